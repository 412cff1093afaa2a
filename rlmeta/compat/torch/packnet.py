"""PackNet around optimizer steps in a plain PyTorch loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlmeta.compat.torch.checks import Named, check_state, quiet, require_gradients, require_number, trainable
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.pruning import largest_free

_FREE = 0
"""Owner of free weights; task k (from 0) is owner k + 1."""


class PackNet:
    """PackNet (Mallya and Lazebnik, 2018): every task owns some weights, which no later task can change.

    ```python
    packnet = PackNet(model, share=0.5)
    for loader in tasks:
        packnet.begin()
        train(model, loader)  # loss.backward(); packnet.step(optimizer)
        packnet.prune()
        train(model, loader)  # without the pruned weights
    with packnet.use(0):
        test(model)
    ```

    A task trains the free weights, beside the frozen weights of earlier tasks, which it uses. `prune` frees the
    smallest of its weights in every layer. Weights of earlier tasks stay the same bit for bit, despite momentum, Adam
    and weight decay: `step` masks their gradients, and restores them after the optimizer. Biases, parameters of
    normalisation and buffers are few, and every task has its own copy. As in `rlmeta.lifelong.PackNet`, which gives the
    reasons, a task keeps only weights that have had a gradient, and weights that are free when a later task begins are
    redrawn from the layer's initial values.

    Args:
        module: whose parameters are packed. It may grow: new layers are free.
        share: fraction of the free weights of every layer that a task keeps.
        give_back: whether a task also frees, when the next one begins, weights without a gradient since its pruning:
            those of units that its training has made inactive. Its outputs on the samples of the second training do
            not depend on them, but other outputs may change, as may those in evaluation with running statistics of
            batch normalisation.
        seed: of redrawn weights.

    Raises:
        SettingError: the share is not in (0, 1], or the module has no matrix to pack.
    """

    @quiet()
    def __init__(self, module: nn.Module, share: float = 0.5, *, give_back: bool = False, seed: int = 0) -> None:
        if all(p.dim() <= 1 for p in trainable(module, "PackNet").values()):
            raise SettingError("PackNet packs matrices and kernels, and no parameter of this module has two axes")
        self.module, self.share, self.give_back = module, _share(share), give_back
        self._key = random.make_keys([seed])[0]
        self._task, self._pruned, self._trained = -1, False, False
        self._owner: Named = {}
        self._useful: Named = {}
        self._begun: Named = {}
        self._kept: Named = {}
        self._copies: list[Named] = []
        self._shown: int | None = None
        self._working: Named = {}
        self._packed()

    # ------------------------------------------------------------------ tasks

    @quiet()
    def begin(self) -> int:
        """Begin the next task; free weights are redrawn.

        Returns:
            Index of the task, from 0, the argument of `use`.

        Raises:
            SettingError: earlier tasks own every weight, and the last one goes on; or `use` shows an old task.
        """
        self._require_working("begin()")
        if self._task >= 0:
            if not self._pruned:
                self.prune()
            self._require_free()
            self._end()
        self._task, self._pruned, self._trained = self._task + 1, False, False
        for name, parameter in self._packed().items():
            if self._task > 0:
                free = self._owner[name] == _FREE
                parameter.copy_(torch.where(free, self._drawn(name), parameter))
            self._kept[name] = parameter.clone()
        return self._task

    def _require_free(self) -> None:
        """Refuse a further task before anything is changed, if the end of this one leaves no weight free."""
        free = [owner == _FREE for owner in (self._owner[name] for name in self._packed())]
        if not any(bool(part.any()) for part in (*free, *self._useless().values())):
            raise SettingError(
                f"PackNet: {self._task + 1} tasks own every weight, so a further one has none: choose a smaller share"
            )

    def _useless(self) -> Named:
        """Masks of the weights that the task gives back at its end: those without a gradient since the pruning."""
        if not (self._trained and self.give_back):
            return {}
        return {n: (self._owner[n] == self._task + 1) & ~self._useful[n] for n in self._packed()}

    @quiet()
    def prune(self, share: float | None = None) -> None:
        """Magnitude pruning: the task keeps the largest weights of every layer; the others become 0 and free.

        Train again afterwards: only the kept weights change then.

        Args:
            share: fraction of a layer's free weights that it keeps; None for that of the class.

        Raises:
            SettingError: there is no task to prune, it is pruned already, or the share is not in (0, 1].
        """
        self._require_task("prune()")
        if self._pruned:
            raise SettingError(f"PackNet: task {self._task} is pruned already: begin() starts the next one")
        part = self.share if share is None else _share(share)
        self.restore()
        for name, parameter in self._packed().items():
            owner, size = self._owner[name].flatten(), parameter.abs().flatten()
            free = owner == _FREE
            used = free & self._useful[name].flatten() if self._trained else free
            count = (free.sum(-1, keepdim=True).double() * part).ceil().long()
            chosen = largest_free(size, used, torch.minimum(count, used.sum(-1, keepdim=True)))
            kept = torch.where(chosen, self._task + 1, owner).view(parameter.shape)
            parameter.masked_fill_(kept == _FREE, 0.0)
            self._owner[name], self._kept[name] = kept.to(torch.int16), parameter.clone()
            self._useful[name].zero_()
        self._pruned, self._trained = True, False

    def _end(self) -> None:
        """End a task: free weights without a gradient since the pruning, if `give_back`, and store its copies."""
        self.restore()
        packed = self._packed()
        for name, useless in self._useless().items():
            self._owner[name].masked_fill_(useless, _FREE)
            packed[name].masked_fill_(useless, 0.0)
        self._copies.append({name: value.clone() for name, value in self._copied().items()})

    def _drawn(self, name: str) -> Tensor:
        """Redraw weights at random from a layer's initial values."""
        begun = self._begun[name].flatten()
        key = random.fold(random.fold(self._key, name), self._task)
        index = random.integers(key, "packnet", 0, (begun.numel(),), begun.numel())
        return begun[index.to(begun.device)].view(self._begun[name].shape)

    # ------------------------------------------------------------------ every step

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Optimizer step between `mask_gradients` and `restore`, in place of `optimizer.step(closure)`.

        Args:
            optimizer: of the module's parameters.
            closure: clears the gradients, computes the loss and its gradients, as LBFGS needs it: gradients are masked
                after every call.

        Returns:
            What the optimizer returns.

        Raises:
            SettingError: as `mask_gradients`; the optimizer needs a closure.
        """
        if closure is None:
            parameters = inspect.signature(optimizer.step).parameters.values()
            if any(p.name == "closure" and p.default is p.empty for p in parameters):
                raise SettingError(
                    f"PackNet: {type(optimizer).__name__} computes the loss several times in a step and was given no "
                    "closure: call step(optimizer, closure) with a function that clears the gradients, calls "
                    "backward() and returns the loss"
                )
            self.mask_gradients()
            optimizer.step()
            self.restore()
            return None

        def masked() -> Tensor:
            loss = closure()
            self.mask_gradients()
            return loss

        self._require_task("step()")
        loss = optimizer.step(masked)  # type: ignore[arg-type]
        self.restore()
        return loss  # type: ignore[return-value]

    @quiet()
    def mask_gradients(self) -> None:
        """Set the gradient of frozen weights to 0, and record which weights have a gradient.

        Raises:
            SettingError: no task has begun, there is no gradient, or `use` shows an old task.
        """
        self._require_task("mask_gradients()")
        packed = self._packed()
        require_gradients(dict(self.module.named_parameters()), "PackNet: mask_gradients()")
        self._trained = True
        for name, parameter in packed.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._frozen(name), 0.0)
                self._useful[name] |= parameter.grad != 0

    @quiet()
    def restore(self) -> None:
        """Restore frozen weights bit for bit, after an optimizer step."""
        self._require_working("restore()")
        if self._task < 0:
            return
        for name, parameter in self._packed().items():
            parameter.copy_(torch.where(self._frozen(name), self._kept[name], parameter))

    def _frozen(self, name: str) -> Tensor:
        """Compute the mask of frozen weights: those of earlier tasks, and after the pruning all but the task's own."""
        owner = self._owner[name]
        return owner != self._task + 1 if self._pruned else owner != _FREE

    # ------------------------------------------------------------------ an old task's network

    @quiet()
    def use(self, task: int | None) -> _Using:
        """Set the module to the network of a task as it was at the task's end, bit for bit.

        In `with packnet.use(task):` for the block that follows, otherwise until `use(None)`, which restores the network
        in training.

        Args:
            task: its index; None or the current one for the network in training.

        Raises:
            SettingError: no such task has begun.
        """
        if task is not None and not 0 <= task <= self._task:
            raise SettingError(f"PackNet: use({task!r}), expected None or one of the {self._task + 1} tasks begun")
        before = self._shown
        if before is not None:
            _copy(self._tensors(), self._working)
            self._shown, self._working = None, {}
        if task is not None and task < self._task:
            self.restore()
            self._working = {name: value.clone() for name, value in self._tensors().items()}
            for name, parameter in self._packed().items():
                owner = self._owner[name]
                parameter.masked_fill_((owner == _FREE) | (owner > task + 1), 0.0)
            _copy(self._tensors(), self._copies[task])
            self._shown = task
        return _Using(self, before)

    # ------------------------------------------------------------------ what is kept, by name

    @quiet()
    def state_dict(self) -> dict[str, Any]:
        """State to save: owners of the weights, and the tasks' copies; the weights are in the module's state.

        Raises:
            SettingError: `use` shows an old task.
        """
        self._require_working("state_dict()")
        flags = {"task": self._task, "pruned": self._pruned, "trained": self._trained}
        named = {"owner": self._owner, "useful": self._useful, "begun": self._begun}
        copies = [dict(copies) for copies in self._copies]
        return {**flags, **{part: {n: v.clone() for n, v in named[part].items()} for part in named}, "copies": copies}

    @quiet()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of `state_dict`, after the module's own state.

        Raises:
            SettingError: the state is of another module.
        """
        check_state(state, ("task", "pruned", "trained", "owner", "useful", "begun", "copies"), "PackNet")
        parameters = dict(self.module.named_parameters())
        for name, owner in state["owner"].items():
            if name not in parameters or parameters[name].shape != owner.shape:
                raise SettingError(f"PackNet: the state is of another module, whose {name} is {list(owner.shape)}")
        self._task, self._pruned, self._trained = state["task"], state["pruned"], state["trained"]
        self._owner, self._useful, self._begun = (
            {n: v.clone() for n, v in state[part].items()} for part in ("owner", "useful", "begun")
        )
        self._copies = [dict(copies) for copies in state["copies"]]
        self._shown, self._working = None, {}
        self._kept = {name: parameters[name].detach().clone() for name in self._owner}
        self._packed()

    def _packed(self) -> dict[str, nn.Parameter]:
        """Collect the packed parameters, those with two axes or more; create or move their bookkeeping."""
        parameters = trainable(self.module, "PackNet")
        for name in self._owner:
            if name not in parameters or parameters[name].shape != self._owner[name].shape:
                now = f"{list(parameters[name].shape)} now" if name in parameters else "gone, or frozen"
                raise SettingError(
                    f"PackNet: the parameter {name} was {list(self._owner[name].shape)} and is {now}, so its owners "
                    "are unknown: what is packed stays as it is"
                )
        packed = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        for name, parameter in packed.items():
            if name not in self._owner:
                value = parameter.detach()
                self._owner[name] = torch.full_like(value, _FREE, dtype=torch.int16)
                self._useful[name] = torch.zeros_like(value, dtype=torch.bool)
                self._begun[name], self._kept[name] = value.clone(), value.clone()
            elif self._owner[name].device != parameter.device:
                for kept in (self._owner, self._useful, self._begun, self._kept):
                    kept[name] = kept[name].to(parameter.device)
        return packed

    def _copied(self) -> Named:
        """Collect the tensors of which every task has a copy: biases, normalisation and buffers."""
        few = {n: p.detach() for n, p in self.module.named_parameters() if p.dim() <= 1}
        return {**few, **dict(self.module.named_buffers())}

    def _tensors(self) -> Named:
        return {**{name: parameter.detach() for name, parameter in self._packed().items()}, **self._copied()}

    def _require_task(self, what: str) -> None:
        self._require_working(what)
        if self._task < 0:
            raise SettingError(f"PackNet: {what} before the first task: call begin() where a task begins")

    def _require_working(self, what: str) -> None:
        if self._shown is not None:
            raise SettingError(
                f"PackNet: {what} while the module is the network of task {self._shown}: call use(None) first"
            )


class _Using:
    """Context manager of `PackNet.use`."""

    def __init__(self, packnet: PackNet, before: int | None) -> None:
        self._packnet, self._before = packnet, before

    def __enter__(self) -> nn.Module:
        return self._packnet.module

    def __exit__(self, *error: object) -> None:
        self._packnet.use(self._before)


def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if name in into:
            into[name].copy_(value)


def _share(share: float) -> float:
    require_number("PackNet: share", share, 0.0, 1.0)
    if share == 0:
        raise SettingError("PackNet: share is 0, expected more: a task that keeps nothing is not learned")
    return share
