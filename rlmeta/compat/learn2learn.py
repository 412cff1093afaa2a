"""MAML with learn2learn's interface for any `nn.Module`: `clone()` and `adapt(loss)`; only the import changes.

```python
from rlmeta.compat.learn2learn import MAML

maml = MAML(model, lr=0.01)
for task in tasks:
    learner = maml.clone()
    learner.adapt(loss(learner(task.x_support), task.y_support))
    total = total + loss(learner(task.x_query), task.y_query)
total.backward()  # gradients of `model`, second order
```

Tasks are adapted to one after the other, as in learn2learn. `rlmeta.meta.maml` adapts to all tasks of a meta-batch at
once.

Torch's fused attention has no second derivative: run a model that has attention within
`torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)`, or in first order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError


class MAML(nn.Module):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine, 2017) around a module.

    Unlike in learn2learn, a clone has its own buffers too: batch-norm statistics of a task never reach another task.

    Args:
        model: any module.
        lr: learning rate of the inner loop.
        first_order: treat inner gradients as constants (first-order MAML).
        allow_unused: accept parameters that the loss does not depend on; by default as `allow_nograd`.
        allow_nograd: accept parameters that do not require gradients; they stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__()
        self.module = model
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the module."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """Clone to adapt, through which gradients flow back to this module's parameters."""
        return MAML(
            clone_module(self.module),
            self.lr,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """Inner gradient step on this clone, in place: p ← p − lr ∇loss.

        Args:
            loss: of this clone's output, a scalar.
            first_order: as for the class, as are the other two; None takes this clone's setting.
            allow_unused: see the class.
            allow_nograd: see the class.

        Raises:
            SettingError: the loss is no scalar or requires no gradient; or, unless allowed, a parameter requires no
                gradient or the loss does not depend on it.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise SettingError(f"adapt: the loss is {got}, expected a tensor of one number: take its mean")
        if not loss.requires_grad:
            raise SettingError("adapt: the loss has no gradient: compute it from this clone, without detach or no_grad")
        second_order = not (self.first_order if first_order is None else first_order)
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        parameters = dict(self.module.named_parameters())
        adapted = {name: p for name, p in parameters.items() if p.requires_grad}
        if not allow_nograd and len(adapted) < len(parameters):
            frozen = ", ".join(name for name in parameters if name not in adapted)
            raise SettingError(f"adapt: {frozen} require no gradient; pass allow_nograd=True to leave them as they are")
        gradients = torch.autograd.grad(
            loss, list(adapted.values()), retain_graph=second_order, create_graph=second_order, allow_unused=True
        )
        unused = ", ".join(name for name, gradient in zip(adapted, gradients) if gradient is None)
        if not allow_unused and all(gradient is None for gradient in gradients):
            raise SettingError(
                "adapt: the loss does not depend on this clone's parameters as they are now: compute it from this "
                "clone, again after each adapt"
            )
        if unused and not allow_unused:
            raise SettingError(f"adapt: the loss does not depend on {unused}; pass allow_unused=True to leave them")
        moved: dict[Tensor, Tensor] = {p: p - self.lr * g for p, g in zip(adapted.values(), gradients) if g is not None}
        _replace(self.module, moved)


def clone_module(module: nn.Module) -> nn.Module:
    """Differentiable clone of a module: copies of parameters and buffers, with tied parameters still tied."""
    copies: dict[Tensor, Tensor] = {}
    modules: dict[int, nn.Module] = {}

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor not in copies:
            copies[tensor] = tensor.clone()
        return copies[tensor]

    def copy(original: nn.Module) -> nn.Module:
        if id(original) in modules:
            return modules[id(original)]
        clone = original.__new__(type(original))
        modules[id(original)] = clone
        clone.__dict__ = dict(original.__dict__)
        clone.__dict__["_parameters"] = {name: copied(p) for name, p in original._parameters.items()}
        clone.__dict__["_buffers"] = {name: copied(b) for name, b in original._buffers.items()}
        clone.__dict__["_modules"] = {n: None if m is None else copy(m) for n, m in original._modules.items()}
        return clone

    return copy(module)


def _replace(module: nn.Module, moved: dict[Tensor, Tensor]) -> None:
    """Replace parameters by other tensors, wherever they are used."""
    for part in module.modules():
        part._parameters.update({n: moved[p] for n, p in part._parameters.items() if p is not None and p in moved})  # type: ignore[misc]
