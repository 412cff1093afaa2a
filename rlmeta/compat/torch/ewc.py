"""EWC as a penalty beside the loss."""

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
from rlmeta.compat.torch.information import Distribution, fisher_information
from rlmeta.errors import SettingError
from rlmeta.functional.quadratics import add_quadratic, no_quadratic, quadratic_value, replace_quadratic


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al., 2017): a penalty ½ λ Σₖ Fₖ (θ - θₖ)² to add to the loss.

    After each task `consolidate` measures how much its weights θₖ matter, by the Fisher information Fₖ. The sum over
    tasks is kept as one quadratic, so memory and time do not grow with their number.

    Args:
        module: whose parameters are held. It may grow: what is new is free until it is consolidated itself.
        strength: λ.
        online: one anchor at the latest weights and F <- decay F + new F (Schwarz et al., 2018), instead of the sum.
        decay: γ of online EWC.

    Raises:
        SettingError: a number is out of its range, or the module is none.
    """

    def __init__(self, module: nn.Module, strength: float = 1e3, *, online: bool = False, decay: float = 1.0) -> None:
        require_module(module, "EWC")
        require_number("EWC: strength", strength, 0.0)
        require_number("EWC: decay", decay, 0.0, 1.0)
        self.module, self.strength, self.online, self.decay = module, strength, online, decay
        self._quadratics: dict[str, Named] = {}

    @quiet()
    def consolidate(self, batch: Batch, **distribution: Unpack[Distribution]) -> None:
        """Hold the present weights as strongly as the samples of the task that has just been learned need them.

        Args:
            batch: samples of the task; some hundreds will do.
            distribution: as for `fisher_information`: what the module's outputs are, if not logits.

        Raises:
            SettingError: as `fisher_information`.
        """
        parameters = trainable(self.module, "EWC")
        self._check(dict(self.module.named_parameters()))
        for name, fisher in fisher_information(self.module, batch, **distribution).items():
            theta = precise(parameters[name].detach()).flatten()
            before = self._quadratic(name, theta) if name in self._quadratics else no_quadratic(theta)
            new = fisher.flatten().to(theta.dtype)
            if self.online:
                decay = torch.as_tensor(self.decay, dtype=theta.dtype, device=theta.device)
                after = replace_quadratic(before, new, theta, decay)
            else:
                after = add_quadratic(before, new, theta)
            self._quadratics[name] = after

    def penalty(self) -> Tensor:
        """½ λ Σₖ Fₖ (θ - θₖ)², one number, differentiable in the module's parameters; 0 before the first task ends.

        Raises:
            SettingError: a parameter that is held is no longer there, or has another shape.
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
        """What is held, by parameter."""
        return {"quadratics": {name: dict(quadratic) for name, quadratic in self._quadratics.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what `state_dict` gave.

        Raises:
            SettingError: it is of another module.
        """
        check_state(state, ("quadratics",), "EWC")
        before, self._quadratics = self._quadratics, {n: dict(q) for n, q in state["quadratics"].items()}
        try:
            self._check(dict(self.module.named_parameters()))
        except SettingError:
            self._quadratics = before
            raise

    def _quadratic(self, name: str, like: Tensor) -> Named:
        """What holds a parameter, where that is now."""
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
