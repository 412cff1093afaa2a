"""Optimizers (SGD, Adagrad, RMSprop, Adam, AdamW) and gradient clipping as pure functions, in optax's manner.

`init(params, learner_shape)` creates the state; `update(grads, state, params)` returns the updates, which are added to
the parameters, and the next state. Neither modifies its inputs. Parameters are `[*L, ...]`, every leaf of a state
starts with `*L`, and a setting is a number or a tensor `[*L]`: S learners with S learning rates are S separate
`torch.optim` optimizers. No learner's numbers enter another's, so a caller may keep the old parameters and state of
some with `torch.where`.

Trajectories can be differentiated any number of times, with respect to parameters, gradients and settings. A parameter
whose gradient has always been zero would make that NaN, since the derivative of √v at v = 0 is infinite; there √v
counts as the constant 0, which gives the true derivative: the update is −lr · m / (√v + eps) with m = 0, so the factor
of √v's derivative vanishes, and what is left is −lr / eps times the derivative of m.

A setting may change from step to step: making an optimizer costs nothing and the state does not depend on its settings
(only on which of the buffers there are), so `adam(lr_now).update(grads, state, params)` follows a schedule.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlmeta.errors import SettingError
from rlmeta.functional.axes import align

Tensors: TypeAlias = dict[str, Tensor]
State: TypeAlias = dict[str, Any]
Setting: TypeAlias = float | Tensor


class Init(Protocol):
    """Optimizer initialisation: from parameters to state."""

    def __call__(self, params: Tensors, learner_shape: Sequence[int] = ()) -> State:
        """Create the state for parameters `[*L, ...]` with `*L = learner_shape`."""


class Update(Protocol):
    """Optimizer step: from gradients and state to updates and the next state."""

    def __call__(self, grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        """Updates to add to the parameters that `init` was called with, and the next state."""


class Recipe(NamedTuple):
    """An optimizer's constructor and its arguments, from which one with other settings can be constructed."""

    make: Callable[..., Optimizer]
    settings: Mapping[str, Setting]


class Optimizer(NamedTuple):
    """Gradient transformation, a pair of `init` and `update`: `sgd`, `adam`, a learned optimizer, `chain`."""

    init: Init
    update: Update
    recipe: Recipe | None = None
    """`recipe.make(**recipe.settings)` is an equal optimizer; None where it does not follow from settings alone."""


P = ParamSpec("P")


def _with_recipe(make: Callable[P, Optimizer]) -> Callable[P, Optimizer]:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def with_recipe(*args: P.args, **settings: P.kwargs) -> Optimizer:
        optimizer = make(*args, **settings)
        return optimizer._replace(recipe=Recipe(make, signature.bind(*args, **settings).arguments))

    return with_recipe


def apply_updates(params: Tensors, updates: Tensors) -> Tensors:
    """Add updates to parameters; those without an update (buffers, for example) are returned as they are."""
    _check_match(updates, params)
    return {name: value + updates[name] if name in updates else value for name, value in params.items()}


def chain(*optimizers: Optimizer) -> Optimizer:
    """Chain of optimizers: the updates of each are the gradients of the next, as in `chain(clip(0.5), adam(lr))`.

    The state is `{"0": state of the first, "1": state of the second, ...}`.
    """

    def init(params: Tensors, learner_shape: Sequence[int] = ()) -> State:
        return {str(index): optimizer.init(params, learner_shape) for index, optimizer in enumerate(optimizers)}

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        new_state: State = {}
        for index, optimizer in enumerate(optimizers):
            grads, new_state[str(index)] = optimizer.update(grads, state[str(index)], params)
        return grads, new_state

    return Optimizer(init, update)


def clip_by_norm(grads: Tensors, max_norm: Setting, learner_axes: int) -> tuple[Tensors, Tensor]:
    """Gradient clipping by the global norm, per learner, as `torch.nn.utils.clip_grad_norm_` does.

    Each learner's gradients are scaled by min(1, max_norm / (norm + 1e-6)).

    Args:
        grads: tensors `[*L, ...]`.
        max_norm: a number or `[*L]`; infinity clips nothing.
        learner_axes: number of leading axes that are learner axes.

    Returns:
        the scaled gradients, and every learner's Euclidean norm over all of its gradients before scaling, `[*L]`

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013.
    """
    if not isinstance(max_norm, Tensor) and not max_norm > 0:
        raise SettingError(f"max_norm is {max_norm}, expected a positive number (infinity to clip nothing)")
    if not grads:
        raise SettingError("there are no gradients to take the norm of")
    learner_shape = next(iter(grads.values())).shape[:learner_axes]
    for name, g in grads.items():
        if g.dim() < learner_axes or g.shape[:learner_axes] != learner_shape:
            raise SettingError(
                f"{name!r} has shape {tuple(g.shape)}, expected {learner_axes} learner axes as the others"
            )
    squares = [g.square().reshape(*learner_shape, math.prod(g.shape[learner_axes:])).sum(-1) for g in grads.values()]
    norm = _sqrt(functools.reduce(torch.add, squares))
    scale = (_fit(max_norm, norm) / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * _fit(scale, g) for name, g in grads.items()}, norm


def clip(max_norm: Setting) -> Optimizer:
    """Gradient clipping by the global norm as a member of a `chain`; see `clip_by_norm`."""

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        clipped, _ = clip_by_norm(grads, max_norm, state["count"].dim())
        return clipped, {"count": state["count"] + 1}

    return Optimizer(_init_with(), update)


@_with_recipe
def sgd(lr: Setting, *, momentum: Setting = 0.0, nesterov: bool = False, weight_decay: Setting = 0.0) -> Optimizer:
    """Stochastic gradient descent: b ← μ b + g, Δ = −lr b, or −lr (g + μ b) with Nesterov's momentum.

    Args:
        lr: learning rate.
        momentum: μ in [0, 1).
        nesterov: Nesterov's momentum instead of the plain one.
        weight_decay: λ, adds λ p to the gradient.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """
    _check_settings(0.0, math.inf, lr=lr, weight_decay=weight_decay)
    _check_settings(0.0, 1.0, momentum=momentum)
    with_momentum = _is_on(momentum)
    buffers = ("momentum",) if with_momentum else ()
    if nesterov and not with_momentum:
        raise SettingError("nesterov=True needs a positive momentum")

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        grads = _prepare(grads, state, params, weight_decay, buffers)
        new_state: State = {"count": state["count"] + 1}
        if with_momentum:
            buffer = {name: _add_scaled(g, momentum, state["momentum"][name]) for name, g in grads.items()}
            new_state["momentum"] = buffer
            grads = {n: _add_scaled(g, momentum, buffer[n]) for n, g in grads.items()} if nesterov else buffer
        return {name: g * -_fit(lr, g) for name, g in grads.items()}, new_state

    return Optimizer(_init_with(*buffers), update)


@_with_recipe
def adagrad(
    lr: Setting = 0.01,
    *,
    eps: Setting = 1e-10,
    lr_decay: Setting = 0.0,
    weight_decay: Setting = 0.0,
    initial_accumulator: float = 0.0,
) -> Optimizer:
    """Adagrad: s ← s + g², Δ = −lr / (1 + (t − 1) d) · g / (√s + eps).

    Args:
        lr: learning rate.
        eps: added to √s.
        lr_decay: d, the decay of the learning rate per step.
        weight_decay: λ, adds λ p to the gradient.
        initial_accumulator: s at the start.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning", 2011.
    """
    _check_settings(0.0, math.inf, lr=lr, eps=eps, lr_decay=lr_decay, weight_decay=weight_decay)
    _check_settings(0.0, math.inf, initial_accumulator=initial_accumulator)

    def init(params: Tensors, learner_shape: Sequence[int] = ()) -> State:
        state = _init_with("square")(params, learner_shape)
        return {**state, "square": {name: s + initial_accumulator for name, s in state["square"].items()}}

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        grads = _prepare(grads, state, params, weight_decay, ("square",))
        before = state["count"].to(_working_dtype(grads))
        rate = _fit(lr, before) / (1.0 + before * _fit(lr_decay, before))
        square: Tensors = {}
        updates: Tensors = {}
        for name, g in grads.items():
            square[name] = torch.addcmul(state["square"][name], g, g)
            updates[name] = g / (_sqrt(square[name]) + _fit(eps, g)) * -_fit(rate, g)
        return updates, {"count": state["count"] + 1, "square": square}

    return Optimizer(init, update)


@_with_recipe
def rmsprop(
    lr: Setting = 0.01,
    *,
    alpha: Setting = 0.99,
    eps: Setting = 1e-8,
    weight_decay: Setting = 0.0,
    momentum: Setting = 0.0,
    centered: bool = False,
) -> Optimizer:
    """RMSprop: v ← α v + (1 − α) g², Δ = −lr b with b ← μ b + g / (√v + eps).

    Args:
        lr: learning rate.
        alpha: α in [0, 1), the decay of the mean square.
        eps: added to the root.
        weight_decay: λ, adds λ p to the gradient.
        momentum: μ in [0, 1).
        centered: divide by the standard deviation, √(v − m²) with m the running mean of g, instead of √v.

    Source: Tieleman and Hinton, "Lecture 6.5 - RMSProp", Coursera, 2012; centred: Graves, 2013.
    """
    _check_settings(0.0, math.inf, lr=lr, eps=eps, weight_decay=weight_decay)
    _check_settings(0.0, 1.0, alpha=alpha, momentum=momentum)
    with_momentum = _is_on(momentum)
    buffers = ("square", *(("mean",) if centered else ()), *(("momentum",) if with_momentum else ()))

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        grads = _prepare(grads, state, params, weight_decay, buffers)
        new_state: dict[str, Tensors] = {name: {} for name in buffers}
        updates: Tensors = {}
        for name, g in grads.items():
            weight = _fit(1.0 - alpha, g)
            variance = new_state["square"][name] = torch.lerp(state["square"][name], g * g, weight)
            if centered:  # the clamp: rounding can leave a little less than 0
                mean = new_state["mean"][name] = torch.lerp(state["mean"][name], g, weight)
                variance = torch.addcmul(variance, mean, mean, value=-1.0).clamp(min=0.0)
            step = g / (_sqrt(variance) + _fit(eps, g))
            if with_momentum:
                step = new_state["momentum"][name] = _add_scaled(step, momentum, state["momentum"][name])
            updates[name] = step * -_fit(lr, g)
        return updates, {"count": state["count"] + 1, **new_state}

    return Optimizer(_init_with(*buffers), update)


@_with_recipe
def adam(
    lr: Setting = 1e-3,
    b1: Setting = 0.9,
    b2: Setting = 0.999,
    eps: Setting = 1e-8,
    *,
    weight_decay: Setting = 0.0,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam: m ← b1 m + (1 − b1) g, v ← b2 v + (1 − b2) g², Δ = −lr m̂ / (√v̂ + eps), m̂ = m / (1 − b1ᵗ), v̂ likewise.

    Args:
        lr: learning rate.
        b1: decay of the mean gradient, in [0, 1).
        b2: decay of the mean square, in [0, 1).
        eps: added to the root (reinforcement learning usually takes 1e-5).
        weight_decay: λ, adds λ p to the gradient; see `adamw` for decay apart from it.
        amsgrad: divide by the root of the largest v so far.

    Source: Kingma and Ba, "Adam", 2015; amsgrad: Reddi, Kale and Kumar, 2018.
    """
    return _adam(lr, b1, b2, eps, weight_decay, amsgrad, decoupled=False)


@_with_recipe
def adamw(
    lr: Setting = 1e-3,
    b1: Setting = 0.9,
    b2: Setting = 0.999,
    eps: Setting = 1e-8,
    *,
    weight_decay: Setting = 1e-2,
    amsgrad: bool = False,
) -> Optimizer:
    """AdamW: Adam with decoupled weight decay, −lr λ p added to the update; arguments as for `adam`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    return _adam(lr, b1, b2, eps, weight_decay, amsgrad, decoupled=True)


def _adam(
    lr: Setting, b1: Setting, b2: Setting, eps: Setting, weight_decay: Setting, amsgrad: bool, decoupled: bool
) -> Optimizer:
    """Adam and AdamW, with the bias corrections applied to numbers `[*L]` instead of whole tensors.

    −lr m̂ / (√v̂ + eps) = rate · m / (√v + floor), rate = −lr √(1 − b2ᵗ) / (1 − b1ᵗ), floor = eps √(1 − b2ᵗ).
    """
    _check_settings(0.0, math.inf, lr=lr, eps=eps, weight_decay=weight_decay)
    _check_settings(0.0, 1.0, b1=b1, b2=b2)
    buffers = ("mean", "square", *(("max_square",) if amsgrad else ()))

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        grads = _prepare(grads, state, params, 0.0 if decoupled else weight_decay, buffers)
        count = state["count"] + 1
        step = count.to(_working_dtype(grads))
        root = _one_minus_power(b2, step).sqrt()
        rate = root / _one_minus_power(b1, step) * -_fit(lr, step)
        floor = root * _fit(eps, step)
        new_state: dict[str, Tensors] = {name: {} for name in buffers}
        updates: Tensors = {}
        for name, g in grads.items():
            mean = new_state["mean"][name] = torch.lerp(state["mean"][name], g, _fit(1.0 - b1, g))
            square = new_state["square"][name] = torch.lerp(state["square"][name], g * g, _fit(1.0 - b2, g))
            if amsgrad:
                square = new_state["max_square"][name] = torch.maximum(state["max_square"][name], square)
            updates[name] = mean / (_sqrt(square) + _fit(floor, g)) * _fit(rate, g)
        if decoupled and _is_on(weight_decay):
            updates = {n: u - params[n] * (_fit(lr, u) * _fit(weight_decay, u)) for n, u in updates.items()}
        return updates, {"count": count, **new_state}

    return Optimizer(_init_with(*buffers), update)


def _init_with(*buffers: str) -> Init:
    """Build an `init`: its state is a count `[*L]` and, for each name in `buffers`, zeros like the parameters."""

    def init(params: Tensors, learner_shape: Sequence[int] = ()) -> State:
        learner_shape = tuple(learner_shape)
        if not params:
            raise SettingError("an optimizer needs at least one parameter")
        for name, value in params.items():
            if value.shape[: len(learner_shape)] != learner_shape:
                raise SettingError(
                    f"parameter {name!r} has shape {tuple(value.shape)}, expected learner axes {learner_shape} first"
                )
        device = next(iter(params.values())).device
        state: State = {"count": torch.zeros(learner_shape, dtype=torch.int64, device=device)}
        for buffer in buffers:
            state[buffer] = {name: torch.zeros_like(value.detach()) for name, value in params.items()}
        return state

    return init


def _check_settings(low: float, high: float, **settings: Setting) -> None:
    """Refuse numbers outside [low, high); tensors are not checked, since reading them would wait for the device."""
    for name, setting in settings.items():
        if not isinstance(setting, Tensor) and not low <= setting < high:
            raise SettingError(f"{name} is {setting}, expected a number in [{low:g}, {high:g}) or a tensor [*L]")


def _check_match(tensors: Tensors, params: Tensors) -> None:
    """Refuse tensors without a parameter of the same name and shape: broadcasting would hide a mistake."""
    for name, value in tensors.items():
        if name not in params:
            raise SettingError(f"there is no parameter {name!r}; there are {', '.join(params)}")
        if value.shape != params[name].shape:
            raise SettingError(
                f"{name!r} has shape {tuple(value.shape)}, expected its parameter's, {tuple(params[name].shape)}"
            )


def _prepare(grads: Tensors, state: State, params: Tensors, weight_decay: Setting, buffers: Sequence[str]) -> Tensors:
    """Add the L2 weight decay λ p to gradients, after a check that state and parameters fit this optimizer."""
    _check_match(grads, params)
    if state.keys() != {"count", *buffers}:
        raise SettingError(
            f"the state has {sorted(state)}, expected {sorted(('count', *buffers))}: same switches as init?"
        )
    for buffer in buffers:
        if state[buffer].keys() != grads.keys():
            raise SettingError(f"gradients of {sorted(grads)}, expected of {sorted(state[buffer])}, as given to init")
    if not _is_on(weight_decay):
        return grads
    return {name: _add_scaled(g, weight_decay, params[name]) for name, g in grads.items()}


def _is_on(setting: Setting) -> bool:
    return isinstance(setting, Tensor) or setting != 0


@overload
def _fit(setting: float, x: Tensor) -> float: ...
@overload
def _fit(setting: Tensor, x: Tensor) -> Tensor: ...
def _fit(setting: Setting, x: Tensor) -> Setting:
    """Align a setting with `x`, in the dtype of `x` (torch.lerp takes no other)."""
    if not isinstance(setting, Tensor):
        return setting
    return align(setting, x).to(x.dtype)


def _add_scaled(x: Tensor, scale: Setting, y: Tensor) -> Tensor:
    """x + scale · y in one pass."""
    if isinstance(scale, Tensor):
        return torch.addcmul(x, _fit(scale, y), y)
    return torch.add(x, y, alpha=scale)


def _working_dtype(tensors: Tensors) -> torch.dtype:
    """Dtype of per-learner numbers: the most precise of the tensors', at least float32, since counts need digits."""
    return functools.reduce(torch.promote_types, (value.dtype for value in tensors.values()), torch.float32)


def _one_minus_power(base: Setting, exponent: Tensor) -> Tensor:
    """1 − baseᵗ for t ≥ 1; written −expm1(t log base), since 1 − 0.999 has only four correct digits in float32."""
    if not isinstance(base, Tensor):
        return -torch.expm1(exponent * (math.log(base) if base > 0 else -math.inf))
    base = align(base, exponent)  # in its own type: 0.999 is 1 in half precision
    positive = base > 0  # the logarithm has no derivative at 0
    by_logarithm = -torch.expm1(exponent * torch.where(positive, base, 1.0).log())
    return torch.where(positive, by_logarithm, 1.0 - torch.where(positive, 0.0, base) ** exponent)


def _sqrt(x: Tensor) -> Tensor:
    """√x for x ≥ 0 whose derivatives of every order are 0, not infinite, where x is 0."""
    if not x.requires_grad and forward_ad.unpack_dual(x).tangent is None:  # type: ignore[no-untyped-call]
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())
