"""Heads: from features to the parameters of a distribution over actions, or to values.

A policy head's `run` returns a dictionary `d` of distribution parameters, each `[*L, ..., K]`. Its methods are pure
functions of such a dictionary, so a rollout's or a teacher's can be kept, indexed along its batch axes and compared:

    sample(d, key)          an action, differentiable where the distribution allows; the key is `[*L]`
    mode(d)                 the deterministic action
    log_prob(d, action)     `[*L, ...]`, of the action as sampled, before any clipping
    entropy(d, key)         `[*L, ...]` in nats; where there is no closed form a key asks for an unbiased estimate
    kl(d, other)            KL(d ‖ other), `[*L, ...]` in nats

Discrete actions are counted from 0, as worlds take them. Continuous ones are in the environment's units, while the
parameters of their distribution are in the policy's (`ActionUnits`); so are densities and entropies of unbounded
Gaussians, which differ from those in the environment's units by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import distributions, random
from rlmeta.nn.block import Block, Context, Params, between
from rlmeta.nn.initialisers import Initialiser, parameter
from rlmeta.nn.linear import Linear, linear, tapped
from rlmeta.nn.units import ActionBounds, ActionUnits

Distribution: TypeAlias = dict[str, Tensor]
"""Parameters of one distribution per learner and batch row."""


_NODES = torch.linspace(-4.5, 4.5, 32, dtype=torch.float64, device="cpu")
_WEIGHTS = (-0.5 * _NODES.square()).softmax(0)
"""E f(x) = Σ w f(node) of a standard normal x: the trapezoidal rule, which for smooth functions on the whole line is
more exact than Gauss and Hermite's with as many nodes."""


def _project(params: Params, x: Tensor, ctx: Context, prefix: str) -> Tensor:
    """The head's linear layer, without the detour over its module."""
    return tapped(ctx, f"{prefix}linear.", x, params[prefix + "linear.weight"], params[prefix + "linear.bias"])


def _flat(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[..., *shape]` -> `[..., A]`."""
    return action if len(shape) == 1 else action.reshape(*action.shape[: action.dim() - len(shape)], -1)


def _shaped(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[..., A]` -> `[..., *shape]`."""
    return action if len(shape) == 1 else action.reshape((*action.shape[:-1], *shape))


def allowed(mask: Tensor, sizes: Sequence[int] = ()) -> Tensor:
    """Which actions a mask leaves, as bool: of a row that forbids them all, every one.

    Something must be done there, or a value be given to what comes after it; what to do where nothing is allowed is
    for the environment to say.

    Args:
        mask: `[..., A]`, nonzero where an action is allowed.
        sizes: of the components that the last axis is made of, if there are several.
    """
    open_ = mask.bool()
    if not sizes:
        return open_ | ~open_.any(-1, keepdim=True)
    return torch.cat([part | ~part.any(-1, keepdim=True) for part in torch.split(open_, list(sizes), -1)], -1)


class CategoricalHead(Block):
    """One of A actions: `{"logits": [*L, ..., A]}`; actions `[*L, ...]` int64 in [0, A)."""

    def __init__(self, features: int, actions: int, initial_scale: float = 0.01) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the orthogonal initial weights; small, so that training starts near uniform.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)

    def run(
        self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None
    ) -> Distribution:
        """Features `[*L, ..., D]` -> logits; `mask` `[*L, ..., A]` is nonzero where an action is allowed.

        A row that allows nothing is taken as one that allows everything.
        """
        logits = _project(params, x, ctx, prefix)
        return {"logits": logits if mask is None else distributions.mask_logits(logits, allowed(mask))}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """An action, by the Gumbel-max trick."""
        return distributions.categorical_sample(d["logits"], key)

    def mode(self, d: Distribution) -> Tensor:
        """The most probable action."""
        return distributions.categorical_mode(d["logits"])

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """log π(a)."""
        return distributions.categorical_log_prob(d["logits"], action)

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """In closed form."""
        return distributions.categorical_entropy(d["logits"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL(d ‖ other)."""
        return distributions.categorical_kl(d["logits"], other["logits"])


class MultiDiscreteHead(Block):
    """Independent choices among `sizes`: `{"logits": [*L, ..., sum(sizes)]}`; actions `[*L, ..., *shape]` int64."""

    def __init__(
        self,
        features: int,
        sizes: Sequence[int],
        initial_scale: float = 0.01,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            sizes: how many actions each component has.
            initial_scale: gain of the orthogonal initial weights.
            shape: of an action, `(len(sizes),)` where left out.
        """
        super().__init__()
        self.sizes = tuple(int(size) for size in sizes)
        self.linear = Linear(features, sum(self.sizes), initialiser="orthogonal", gain=initial_scale)
        self.shape = (len(self.sizes),) if shape is None else shape

    def run(
        self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None
    ) -> Distribution:
        """Features `[*L, ..., D]` -> logits; `mask` `[*L, ..., sum(sizes)]` is nonzero where an action is allowed.

        A component that has nothing to choose from may choose anything.
        """
        logits = _project(params, x, ctx, prefix)
        return {"logits": logits if mask is None else distributions.mask_logits(logits, allowed(mask, self.sizes))}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """An action."""
        return _shaped(distributions.multi_discrete_sample(d["logits"], self.sizes, key), self.shape)

    def mode(self, d: Distribution) -> Tensor:
        """Each component's most probable action."""
        return _shaped(distributions.multi_discrete_mode(d["logits"], self.sizes), self.shape)

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Sum of the components' log-probabilities."""
        return distributions.multi_discrete_log_prob(d["logits"], _flat(action, self.shape), self.sizes)

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Sum of the components' entropies."""
        return distributions.multi_discrete_entropy(d["logits"], self.sizes)

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """Sum of the components' divergences."""
        return distributions.multi_discrete_kl(d["logits"], other["logits"], self.sizes)


class BernoulliHead(Block):
    """Independent zeros and ones: `{"logits": [*L, ..., A]}`, log-odds of 1; actions `[*L, ..., *shape]` int64."""

    def __init__(
        self, features: int, actions: int, initial_scale: float = 0.01, shape: tuple[int, ...] | None = None
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the orthogonal initial weights.
            shape: of an action, `(A,)` where left out.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.shape = (actions,) if shape is None else shape

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> log-odds."""
        return {"logits": _project(params, x, ctx, prefix)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """An action."""
        return _shaped(distributions.bernoulli_sample(d["logits"], key), self.shape)

    def mode(self, d: Distribution) -> Tensor:
        """1 where it is the more probable."""
        return _shaped(distributions.bernoulli_mode(d["logits"]), self.shape)

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Sum of the components' log-probabilities."""
        return distributions.bernoulli_log_prob(d["logits"], _flat(action, self.shape))

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Sum of the components' entropies."""
        return distributions.bernoulli_entropy(d["logits"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """Sum of the components' divergences."""
        return distributions.bernoulli_kl(d["logits"], other["logits"])


class GaussianHead(Block):
    """A diagonal Gaussian whose spread is a parameter `log_std` `[*L, A]`, the same in every state.

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A]}` in the policy's units; actions `[*L, ..., *shape]` in the
    environment's, not kept within any bounds. Density and entropy are those in the policy's units.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 0.01,
        initial_log_std: float = 0.0,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: where `log_std` starts.
            low: lower bounds to measure actions by, see `ActionUnits`; none where left out.
            high: upper bounds.
            shape: of an action, `(A,)` where left out.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(actions, value=float(initial_log_std))
        self.units = ActionUnits((actions,) if shape is None else shape, low, high)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std, both of full shape."""
        mean = _project(params, x, ctx, prefix)
        log_std = params[prefix + "log_std"]
        return {"mean": mean, "log_std": between(log_std, mean, log_std.dim() - 1).expand_as(mean)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """μ + σ ε, differentiable."""
        return self.units.to_environment(distributions.normal_sample(d["mean"], d["log_std"], key))

    def mode(self, d: Distribution) -> Tensor:
        """The mean."""
        return self.units.to_environment(distributions.normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density."""
        return distributions.normal_log_prob(d["mean"], d["log_std"], self.units.to_policy(action))

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """In closed form."""
        return distributions.normal_entropy(d["log_std"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL(d ‖ other)."""
        return distributions.normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])


class TanhGaussianHead(Block):
    """A Gaussian squashed into the bounds of the action space, mean and spread functions of the state, as in SAC.

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A]}` before squashing; an action is centre + half width * tanh(u). The
    densities are those of the action in its own units: for a target entropy of -A in units of [-1, 1], as the paper has
    it, add `log_half_width`.

    Source: Haarnoja et al., "Soft Actor-Critic", 2018.
    """

    log_half_width: float
    """Σ log((high - low) / 2) over the action's components."""

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 0.01,
        initial_log_std: float = 0.0,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the orthogonal initial weights, of the mean and the spread.
            initial_log_std: bias with which `log_std` starts.
            low: lower bounds, -1 where left out.
            high: upper bounds, 1 where left out.
            log_std_range: where `log_std` is clamped.
            shape: of an action, `(A,)` where left out.

        Raises:
            SettingError: a bound is infinite, or not below its upper one.
        """
        super().__init__()
        lower, upper = [-1.0] * actions if low is None else low, [1.0] * actions if high is None else high
        self.units = ActionUnits((actions,) if shape is None else shape, lower, upper)
        if not self.units.bounded:
            raise SettingError(
                f"bounds {list(lower)} and {list(upper)} are infinite or equal, so nothing can be squashed into them: "
                'use GaussianHead (an agent\'s action_bounds="scale")'
            )
        self.linear = Linear(features, 2 * actions, initialiser="orthogonal", gain=initial_scale)
        with torch.no_grad():
            self.linear.bias[actions:] = initial_log_std  # type: ignore[index]
        self.log_half_width = float(self.units.unit.double().log().sum())
        self._log_std_range = log_std_range

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std."""
        mean, log_std = _project(params, x, ctx, prefix).chunk(2, -1)
        return {"mean": mean, "log_std": log_std.clamp(*self._log_std_range)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """An action within the bounds, differentiable."""
        return self.units.to_environment(distributions.tanh_normal_sample(d["mean"], d["log_std"], key))

    def sample_log_prob(self, d: Distribution, key: Tensor) -> tuple[Tensor, Tensor]:
        """The action of `sample` and its log density, exact however near the bounds it is."""
        action, log_prob = distributions.tanh_normal_sample_log_prob(d["mean"], d["log_std"], key)
        return self.units.to_environment(action), log_prob - self.log_half_width

    def mode(self, d: Distribution) -> Tensor:
        """The median, tanh μ within the bounds."""
        return self.units.to_environment(distributions.tanh_normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density; an action on a bound is taken a rounding error inside it."""
        squashed = self.units.to_policy(action)
        return distributions.tanh_normal_log_prob(d["mean"], d["log_std"], squashed) - self.log_half_width

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """There is no closed form: by quadrature, or with a key an unbiased estimate from one sample.

        H = H[N(μ, σ)] + Σ_k E log(1 - tanh² u_k) + log half width; log(1 - tanh² u) = 2 (log 2 - u - softplus(-2u)).
        The quadrature is within 0.01 nats a component for every spread that `log_std_range` allows by default.
        """
        if key is not None:
            return distributions.tanh_normal_entropy(d["mean"], d["log_std"], key) + self.log_half_width
        u = d["mean"].unsqueeze(-1) + d["log_std"].exp().unsqueeze(-1) * _NODES.to(d["mean"])
        squeezed = 2.0 * (math.log(2.0) - u + F.logsigmoid(2.0 * u)) * _WEIGHTS.to(u)
        return distributions.normal_entropy(d["log_std"]) + squeezed.sum((-2, -1)) + self.log_half_width

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL(d ‖ other), that of the Gaussians before squashing."""
        return distributions.tanh_normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])


class StateDependentNoiseHead(Block):
    """Generalised state-dependent exploration (gSDE): the noise is a random linear function of the features.

    a = μ(s) + Wᵀ f with W `[D, A]`, W_ij ~ N(0, exp(log_std_ij)²) drawn once and held for several steps, so that
    exploration is smooth within them. Over W an action is Gaussian with σ_j² = Σ_i f_i² exp(log_std_ij)², which is what
    log-probability, entropy and divergence are of. Gradients do not reach the features through the noise.

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A] (of the action), "features": [*L, ..., D], "noise_log_std":
    [*L, D, A] (of W)}`; the last two only serve to sample, and the last has no batch axes. All of it, density and
    entropy too, is in the policy's units; actions are in the environment's.

    Source: Raffin, Kober and Stulp, "Smooth Exploration for Robotic Reinforcement Learning", 2021.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 0.01,
        initial_log_std: float = 0.0,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: where `log_std` `[D, A]` starts.
            low: lower bounds to measure actions by, see `ActionUnits`; none where left out.
            high: upper bounds.
            shape: of an action, `(A,)` where left out.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(features, actions, value=float(initial_log_std))
        self.units = ActionUnits((actions,) if shape is None else shape, low, high)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean, spread, and what sampling needs."""
        mean = _project(params, x, ctx, prefix)
        noise_log_std, features = params[prefix + "log_std"], x.detach()
        variance = linear(features.square(), (2.0 * noise_log_std).exp().mT, None)
        # 1e-6 keeps the density finite where every feature is zero, as in Stable-Baselines3.
        return {
            "mean": mean,
            "log_std": 0.5 * (variance + 1e-6).log(),
            "features": features,
            "noise_log_std": noise_log_std,
        }

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """An action, one noise matrix per learner and batch row; the same key gives the same matrices.

        Pass one key for as many steps as the noise is held, with rows in the same order.
        """
        features, noise_log_std = d["features"], d["noise_log_std"]
        rows = features.shape[key.dim() : -1]
        standard = random.normal(key, "action", 0, (*rows, *noise_log_std.shape[-2:]), noise_log_std.dtype)
        matrices = standard * between(noise_log_std, standard, key.dim()).exp()
        noise = (features.unsqueeze(-2) @ matrices).squeeze(-2)
        return self.units.to_environment(d["mean"] + noise)

    def mode(self, d: Distribution) -> Tensor:
        """The mean."""
        return self.units.to_environment(distributions.normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density over the noise matrices."""
        return distributions.normal_log_prob(d["mean"], d["log_std"], self.units.to_policy(action))

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """In closed form, over the noise matrices."""
        return distributions.normal_entropy(d["log_std"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL(d ‖ other), over the noise matrices."""
        return distributions.normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])


class ValueHead(Block):
    """One value per state: `[*L, ..., D]` -> `[*L, ...]`."""

    def __init__(self, features: int, initial_scale: float = 1.0, initialiser: Initialiser = "orthogonal") -> None:
        """Create the head.

        Args:
            features: D.
            initial_scale: gain of the initial weights.
            initialiser: see `initialise`.
        """
        super().__init__()
        self.linear = Linear(features, 1, initialiser=initialiser, gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """`[*L, ..., D]` -> `[*L, ...]`."""
        return _project(params, x, ctx, prefix).squeeze(-1)


class QHead(Block):
    """One value per action: `[*L, ..., D]` -> `[*L, ..., A]`."""

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 1.0,
        initialiser: Initialiser = "torch",
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the initial weights.
            initialiser: see `initialise`.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser=initialiser, gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """`[*L, ..., D]` -> `[*L, ..., A]`."""
        return _project(params, x, ctx, prefix)

    def mode(self, values: Tensor) -> Tensor:
        """The best action, `[..., A]` -> `[...]`."""
        return values.argmax(-1)

    def take(self, values: Tensor, action: Tensor) -> Tensor:
        """The values of the given actions, `[..., A]` and `[...]` -> `[...]`."""
        return values.gather(-1, action.unsqueeze(-1)).squeeze(-1)


PolicyHead: TypeAlias = (
    CategoricalHead | MultiDiscreteHead | BernoulliHead | GaussianHead | TanhGaussianHead | StateDependentNoiseHead
)
"""What `head_for` returns; anything with the methods described above can stand in its place."""


def head_for(
    action_space: gym.Space,
    features: int,
    initial_scale: float = 0.01,
    initial_log_std: float = 0.0,
    action_bounds: ActionBounds = "scale",
    state_dependent_noise: bool = False,
) -> PolicyHead:
    """The policy head of an action space.

    Args:
        action_space: of a single environment.
        features: D.
        initial_scale: gain of the orthogonal initial weights.
        initial_log_std: initial log standard deviation of a Box's head, in the policy's units.
        action_bounds: for a Box: they are the policy's unit (`ActionUnits`), a tanh keeps actions within them
            (`TanhGaussianHead`), or the policy knows nothing of them.
        state_dependent_noise: for a Box: `StateDependentNoiseHead`.

    Returns:
        `CategoricalHead`, `MultiDiscreteHead`, `BernoulliHead`, or for a Box `GaussianHead` or the one asked for.

    Raises:
        SpaceError: the space has no head.
        SettingError: an option for a Box with another space, both at once, or squashing into infinite bounds.
    """
    spaces, squash = gym.spaces, action_bounds == "squash"
    if action_bounds not in get_args(ActionBounds):
        raise SettingError(f"action_bounds is {action_bounds!r}, expected one of {', '.join(get_args(ActionBounds))}")
    if (squash or state_dependent_noise) and not isinstance(action_space, spaces.Box):
        raise SettingError(
            f'action_bounds="squash" and state-dependent noise are options for a Box, the action space is '
            f"{action_space}: leave them out"
        )
    if squash and state_dependent_noise:
        raise SettingError('action_bounds="squash" and state-dependent noise exclude each other: choose one')
    if isinstance(action_space, spaces.Discrete):
        return CategoricalHead(features, int(action_space.n), initial_scale)
    if isinstance(action_space, spaces.MultiDiscrete):
        return MultiDiscreteHead(
            features, action_space.nvec.reshape(-1).tolist(), initial_scale, action_space.nvec.shape
        )
    shape = action_space.shape or ()
    count = int(np.prod(shape))
    if isinstance(action_space, spaces.MultiBinary):
        return BernoulliHead(features, count, initial_scale, shape)
    if isinstance(action_space, spaces.Box) and count > 0 and np.issubdtype(action_space.dtype, np.floating):
        kinds = {"squash": TanhGaussianHead, "noise": StateDependentNoiseHead, "plain": GaussianHead}
        kind = "squash" if squash else "noise" if state_dependent_noise else "plain"
        known = action_bounds != "clip"
        low, high = ((bound.reshape(-1).tolist() if known else None) for bound in (action_space.low, action_space.high))
        return kinds[kind](features, count, initial_scale, initial_log_std, low, high, shape=shape)
    raise SpaceError(
        f"action space {action_space} has no policy head: expected Discrete, MultiDiscrete, MultiBinary or a Box of "
        "floats; wrap the environment in gymnasium.wrappers.TransformAction to make it one"
    )
