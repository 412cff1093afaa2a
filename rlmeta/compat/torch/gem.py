"""Gradient episodic memory (GEM) and A-GEM, as a projection of `.grad` in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlmeta.compat.torch.checks import (
    Batch,
    check_state,
    evaluation,
    leaves_of,
    precise,
    quiet,
    require_gradients,
    require_module,
    require_number,
    take,
    trainable,
)
from rlmeta.errors import SettingError, require_count
from rlmeta.functional import random
from rlmeta.functional.projection import project, project_average


class _EpisodicMemory:
    """Episodic memory of every task, and gradients of the loss on it."""

    def __init__(self, module: nn.Module, memory: int, seed: int) -> None:
        name = type(self).__name__
        require_module(module, name)
        require_count(f"{name}: memory", memory)
        self.module, self.memory = module, memory
        self._key = random.make_keys([seed])[0]
        self._tasks: list[tuple[Batch, ...]] = []
        self._steps = 0
        self._joined: list[Tensor] = []  # samples of all tasks, joined when they are needed

    def __len__(self) -> int:
        """Number of tasks in memory."""
        return len(self._tasks)

    @quiet()
    def remember(self, *batch: Batch) -> None:
        """Store `memory` random samples of a task, or all if there are fewer.

        Args:
            batch: arguments of the loss, such as inputs and targets: each a `Batch` of the same samples.

        Raises:
            SettingError: there are no samples, or their numbers differ.
        """
        leaves, structure = leaves_of(batch, type(self).__name__)
        self._check(leaves, structure)
        count = len(leaves[0])
        rows = random.permutation(random.fold(self._key, len(self)), "remember", 0, count)[: self.memory].sort()[0]
        self._joined = []
        self._tasks.append(pytree.tree_unflatten([take(leaf, rows) for leaf in leaves], structure))

    def _check(self, leaves: list[Tensor], structure: pytree.TreeSpec) -> None:
        """Check the shapes of a task's samples against those in memory."""

    def state_dict(self) -> dict[str, Any]:
        """State to save: the samples in memory."""
        return {"tasks": list(self._tasks), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of `state_dict`."""
        check_state(state, ("tasks", "steps"), type(self).__name__)
        self._tasks, self._steps, self._joined = list(state["tasks"]), int(state["steps"]), []

    def _gradient(self) -> tuple[dict[str, nn.Parameter], Tensor]:
        """Collect the trainable parameters and their gradient `[P]`, 0 for those without."""
        name = type(self).__name__
        parameters = trainable(self.module, name)
        require_gradients(parameters, f"{name}: project()")
        return parameters, _flat([_zero(p) if p.grad is None else p.grad for p in parameters.values()])

    def _reference(self, loss: Callable[..., Tensor], samples: Batch, parameters: dict[str, nn.Parameter]) -> Tensor:
        """Compute a reference gradient `[P]`: of the loss on samples in memory."""
        name = type(self).__name__
        with evaluation(self.module), torch.inference_mode(False), torch.enable_grad():
            value = loss(*samples)
            if not isinstance(value, Tensor) or value.numel() != 1:
                actual = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise SettingError(f"{name}: the loss of the memories is {actual}, expected one number: take its mean")
            gradients: Sequence[Tensor | None] = [None]  # of a constant loss
            if value.requires_grad:
                gradients = torch.autograd.grad(value.reshape(()), list(parameters.values()), allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise SettingError(
                f"{name}: the loss of the memories does not depend on the module's parameters: compute it from the "
                "module, without detach or no_grad"
            )
        return _flat([_zero(p) if g is None else g for p, g in zip(parameters.values(), gradients)])


class GEM(_EpisodicMemory):
    """Gradient episodic memory (GEM, Lopez-Paz and Ranzato, 2017): no step may increase the loss on earlier tasks.

    Between `loss.backward()` and `optimizer.step()`, `project` replaces the gradient by the nearest one that has no
    negative product with the gradient of an earlier task. Momentum, Adam and weight decay are applied after it, so
    with them the constraint holds only approximately.

    Args:
        module: whose gradient is projected.
        memory: number of samples stored of every task.
        margin: lower bound of the multipliers if a constraint is violated; above 0 it favours earlier tasks. In units
            of the gradient: with mixed precision, call `scaler.unscale_` before.
        seed: of the choice of samples.

    Raises:
        SettingError: a number is out of its range, or `module` is no module.
    """

    def __init__(self, module: nn.Module, memory: int = 256, margin: float = 0.5, *, seed: int = 0) -> None:
        super().__init__(module, memory, seed)
        require_number("GEM: margin", margin, 0.0)
        self.margin = margin

    @quiet()
    def project(self, loss: Callable[..., Tensor]) -> bool:
        """Project `.grad` in place, so that to first order no earlier task's loss increases.

        Args:
            loss: function from the arguments of `remember`, for a task, to its mean loss, `lambda x, y:
                cross_entropy(model(x), y)`. The module is in evaluation mode then, so that running statistics stay
                those of training.

        Returns:
            Whether the gradient was changed; without a violated constraint it stays the same bit for bit.

        Raises:
            SettingError: there is no gradient, or the loss is no scalar that depends on the parameters.
        """
        parameters, gradient = self._gradient()
        if not self._tasks:
            return False
        references = torch.stack([self._reference(loss, samples, parameters) for samples in self._tasks])
        return _write(parameters, gradient, project(gradient, references, self.margin))


class AGEM(_EpisodicMemory):
    """Averaged GEM (A-GEM, Chaudhry et al., 2019): one reference gradient, on a random sample of all tasks in memory.

    Args:
        module: whose gradient is projected.
        memory: number of samples stored of every task.
        batch_size: number of samples drawn in every step, over all earlier tasks.
        seed: of the choice of samples.

    Raises:
        SettingError: a number is out of its range, or `module` is no module.
    """

    def __init__(self, module: nn.Module, memory: int = 256, batch_size: int = 256, *, seed: int = 0) -> None:
        super().__init__(module, memory, seed)
        require_count("AGEM: batch_size", batch_size)
        self.batch_size = batch_size

    @quiet()
    def project(self, loss: Callable[..., Tensor]) -> bool:
        """Project `.grad` in place, so that to first order the average loss of earlier tasks does not increase.

        Args:
            loss: function from samples of all tasks to their mean loss; see `GEM.project`.

        Returns:
            Whether the gradient was changed.

        Raises:
            SettingError: there is no gradient, or the loss is no scalar that depends on the parameters.
        """
        parameters, gradient = self._gradient()
        if not self._tasks:
            return False
        if not self._joined:
            self._joined = [torch.cat(column) for column in zip(*map(pytree.tree_leaves, self._tasks))]
        count = len(self._joined[0])
        rows = random.integers(self._key, "rows", self._steps, (min(self.batch_size, count),), count)
        drawn = [take(leaf, rows) for leaf in self._joined]
        samples = pytree.tree_unflatten(drawn, pytree.tree_structure(self._tasks[0]))
        reference = self._reference(loss, samples, parameters)
        self._steps += 1  # a step that is refused draws the same samples when it is repeated
        return _write(parameters, gradient, project_average(gradient, reference))

    def _check(self, leaves: list[Tensor], structure: pytree.TreeSpec) -> None:
        for samples in self._tasks[:1]:
            stored, stored_structure = pytree.tree_flatten(samples)
            if stored_structure != structure or any(a.shape[1:] != b.shape[1:] for a, b in zip(stored, leaves)):
                raise SettingError(
                    f"AGEM remembers samples of shapes {[list(x.shape[1:]) for x in stored]}, and was given "
                    f"{[list(x.shape[1:]) for x in leaves]}: it draws from all tasks at once, so they must be alike"
                )


def _zero(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    """Flatten gradients to `[P]`, on the device of the first, in single precision or better."""
    device = gradients[0].device
    return torch.cat([precise(gradient.detach()).flatten().to(device) for gradient in gradients])


def _write(parameters: Mapping[str, nn.Parameter], before: Tensor, after: Tensor) -> bool:
    """Write a projected gradient `[P]` to `.grad`; returns whether it changed.

    One that is not finite is dropped: the gradient stays as it was.
    """
    if torch.equal(before, after) or not bool(torch.isfinite(after).all()):
        return False
    for parameter, part in zip(parameters.values(), torch.split(after, [p.numel() for p in parameters.values()])):
        part = part.view(parameter.shape).to(parameter.device, parameter.dtype)
        if parameter.grad is not None:
            parameter.grad.copy_(part)
        elif bool((part != 0).any()):  # a parameter that only earlier tasks use
            parameter.grad = part.clone()
    return True
