"""Elastic weight consolidation (EWC) as a penalty in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rlmeta.compat.torch.checks import (
    Batch,
    Named,
    check_state,
    precise,
    quiet,
    require_module,
    require_number,
    trainable,
)
from rlmeta.compat.torch.information import FisherArguments, fisher_information
from rlmeta.errors import SettingError
from rlmeta.functional.quadratics import add_quadratic, quadratic_value, replace_quadratic, zero_quadratic


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al., 2017): a penalty ½ λ Σₖ Fₖ (θ - θₖ)² to add to the loss.

    After each task, `consolidate` estimates the importance of its weights θₖ, the Fisher information Fₖ. The sum over
    tasks is stored as one quadratic, so memory and time do not grow with the number of tasks.

    Args:
        module: with the parameters to consolidate. It may grow: new parameters are free until the next consolidation.
        strength: λ.
        online: online EWC, with an anchor at the latest weights and F <- decay F + new F (Schwarz et al., 2018).
        decay: γ of online EWC.

    Raises:
        SettingError: a number is out of its range, or `module` is no module.
    """

    def __init__(self, module: nn.Module, strength: float = 1e3, *, online: bool = False, decay: float = 1.0) -> None:
        require_module(module, "EWC")
        require_number("EWC: strength", strength, 0.0)
        require_number("EWC: decay", decay, 0.0, 1.0)
        self.module, self.strength, self.online, self.decay = module, strength, online, decay
        self._quadratics: dict[str, Named] = {}

    @quiet()
    def consolidate(self, batch: Batch, **distribution: Unpack[FisherArguments]) -> None:
        """Consolidate the current weights at the end of a task, with the Fisher information of its samples.

        Args:
            batch: samples of the task; some hundred suffice.
            distribution: as for `fisher_information`, if the module's outputs are no logits.

        Raises:
            SettingError: as `fisher_information`.
        """
        parameters = trainable(self.module, "EWC")
        self._check(dict(self.module.named_parameters()))
        for name, fisher in fisher_information(self.module, batch, **distribution).items():
            theta = precise(parameters[name].detach()).flatten()
            before = self._quadratic(name, theta) if name in self._quadratics else zero_quadratic(theta)
            new = fisher.flatten().to(theta.dtype)
            if self.online:
                decay = torch.as_tensor(self.decay, dtype=theta.dtype, device=theta.device)
                after = replace_quadratic(before, new, theta, decay)
            else:
                after = add_quadratic(before, new, theta)
            self._quadratics[name] = after

    def penalty(self) -> Tensor:
        """Penalty ½ λ Σₖ Fₖ (θ - θₖ)², a scalar, differentiable in the module's parameters; 0 during the first task.

        Raises:
            SettingError: a consolidated parameter is missing, or has another shape.
        """
        parameters = dict(self.module.named_parameters())
        self._check(parameters)
        device = next(iter(parameters.values())).device
        values = [
            quadratic_value(self._quadratic(name, parameters[name]), parameters[name].flatten()).to(device)
            for name in self._quadratics
        ]
        return 0.5 * self.strength * torch.stack(values).sum() if values else torch.zeros((), device=device)

    def state_dict(self) -> dict[str, Any]:
        """State to save: the quadratics, by parameter."""
        return {"quadratics": {name: dict(quadratic) for name, quadratic in self._quadratics.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of `state_dict`.

        Raises:
            SettingError: the state is of another module.
        """
        check_state(state, ("quadratics",), "EWC")
        before, self._quadratics = self._quadratics, {n: dict(q) for n, q in state["quadratics"].items()}
        try:
            self._check(dict(self.module.named_parameters()))
        except SettingError:
            self._quadratics = before
            raise

    def _quadratic(self, name: str, like: Tensor) -> Named:
        """Look up the quadratic of a parameter, moved to the parameter's device."""
        quadratic = self._quadratics[name]
        if quadratic["centre"].device != like.device:
            quadratic = self._quadratics[name] = {part: value.to(like.device) for part, value in quadratic.items()}
        return quadratic

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        for name, quadratic in self._quadratics.items():
            if name not in parameters:
                raise SettingError(f"EWC holds the parameter {name}, which the module no longer has")
            if parameters[name].numel() != quadratic["centre"].numel():
                raise SettingError(
                    f"EWC holds {quadratic['centre'].numel()} numbers of {name}, which now has the shape "
                    f"{list(parameters[name].shape)}: give a growing module new layers, not larger ones"
                )
