"""Heads: from features to the parameters of a distribution over actions, or to values.

A policy head's `run` returns a dictionary `d` of distribution parameters, each `[*L, ..., K]`. Its methods are pure
functions of such a dictionary, so a rollout's or a teacher's can be kept, indexed along its batch axes and compared:

    sample(d, key)          an action, differentiable where the distribution allows; the key is `[*L]`
    mode(d)                 the deterministic action
    log_prob(d, action)     `[*L, ...]`, of the action as sampled, before any clipping
    entropy(d, key)         `[*L, ...]` in nats; the key is needed only where there is no closed form
    kl(d, other)            KL(d ‖ other), `[*L, ...]` in nats

Discrete actions are counted from 0, as worlds take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import distributions, random
from rlmeta.nn.block import Block, Context, Params, between
from rlmeta.nn.initialisers import Initialiser, parameter
from rlmeta.nn.linear import Linear, linear, tapped

Distribution: TypeAlias = dict[str, Tensor]
"""Parameters of one distribution per learner and batch row."""


def _project(params: Params, x: Tensor, ctx: Context, prefix: str) -> Tensor:
    """The head's linear layer, without the detour over its module."""
    return tapped(ctx, f"{prefix}linear.", x, params[prefix + "linear.weight"], params[prefix + "linear.bias"])


def _flat(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[..., *shape]` -> `[..., A]`."""
    return action if len(shape) == 1 else action.reshape(*action.shape[: action.dim() - len(shape)], -1)


def _shaped(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[..., A]` -> `[..., *shape]`."""
    return action if len(shape) == 1 else action.reshape((*action.shape[:-1], *shape))


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
        """Features `[*L, ..., D]` -> logits; `mask` `[*L, ..., A]` is nonzero where an action is allowed."""
        logits = _project(params, x, ctx, prefix)
        return {"logits": logits if mask is None else distributions.mask_logits(logits, mask)}

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
        """Features `[*L, ..., D]` -> logits; `mask` is nonzero where a component's action is allowed."""
        logits = _project(params, x, ctx, prefix)
        return {"logits": logits if mask is None else distributions.mask_logits(logits, mask)}

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

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A]}`; actions `[*L, ..., *shape]`, not bounded.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 0.01,
        initial_log_std: float = 0.0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: where `log_std` starts.
            shape: of an action, `(A,)` where left out.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(actions, value=float(initial_log_std))
        self.shape = (actions,) if shape is None else shape

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std, both of full shape."""
        mean = _project(params, x, ctx, prefix)
        log_std = params[prefix + "log_std"]
        return {"mean": mean, "log_std": between(log_std, mean, log_std.dim() - 1).expand_as(mean)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """μ + σ ε, differentiable."""
        return _shaped(distributions.normal_sample(d["mean"], d["log_std"], key), self.shape)

    def mode(self, d: Distribution) -> Tensor:
        """The mean."""
        return _shaped(distributions.normal_mode(d["mean"]), self.shape)

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density."""
        return distributions.normal_log_prob(d["mean"], d["log_std"], _flat(action, self.shape))

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
        lower, upper = (
            torch.tensor([float(bound) for bound in bounds], dtype=torch.float32, device="cpu")
            for bounds in ([-1.0] * actions if low is None else low, [1.0] * actions if high is None else high)
        )
        if lower.shape != (actions,) or upper.shape != (actions,) or not bool((lower < upper).all()):
            raise SettingError(f"bounds {lower.tolist()} and {upper.tolist()} are no intervals for {actions} actions")
        if not bool((upper - lower).isfinite().all()):
            raise SettingError(f"bounds {lower.tolist()} and {upper.tolist()} are infinite: use GaussianHead")
        self.linear = Linear(features, 2 * actions, initialiser="orthogonal", gain=initial_scale)
        with torch.no_grad():
            self.linear.bias[actions:] = initial_log_std  # type: ignore[index]
        self._centre, self._half_width = (upper + lower) / 2, (upper - lower) / 2
        self.log_half_width = float(self._half_width.double().log().sum())
        self._log_std_range = log_std_range
        self.shape = (actions,) if shape is None else shape

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std."""
        mean, log_std = _project(params, x, ctx, prefix).chunk(2, -1)
        return {"mean": mean, "log_std": log_std.clamp(*self._log_std_range)}

    def _scaled(self, squashed: Tensor) -> Tensor:
        return _shaped(squashed * self._half_width.to(squashed) + self._centre.to(squashed), self.shape)

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """An action within the bounds, differentiable."""
        return self._scaled(distributions.tanh_normal_sample(d["mean"], d["log_std"], key))

    def sample_log_prob(self, d: Distribution, key: Tensor) -> tuple[Tensor, Tensor]:
        """The action of `sample` and its log density, exact however near the bounds it is."""
        action, log_prob = distributions.tanh_normal_sample_log_prob(d["mean"], d["log_std"], key)
        return self._scaled(action), log_prob - self.log_half_width

    def mode(self, d: Distribution) -> Tensor:
        """The median, tanh μ within the bounds."""
        return self._scaled(distributions.tanh_normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density; an action on a bound is taken a rounding error inside it."""
        action = _flat(action, self.shape)
        squashed = (action - self._centre.to(action)) / self._half_width.to(action)
        return distributions.tanh_normal_log_prob(d["mean"], d["log_std"], squashed) - self.log_half_width

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """An unbiased estimate from one sample, since there is no closed form.

        Raises:
            SettingError: there is no key.
        """
        if key is None:
            raise SettingError("the entropy of a squashed Gaussian is estimated from a sample: pass a key")
        return distributions.tanh_normal_entropy(d["mean"], d["log_std"], key) + self.log_half_width

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL(d ‖ other), that of the Gaussians before squashing."""
        return distributions.tanh_normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])


class StateDependentNoiseHead(Block):
    """Generalised state-dependent exploration (gSDE): the noise is a random linear function of the features.

    a = μ(s) + Wᵀ f with W `[D, A]`, W_ij ~ N(0, exp(log_std_ij)²) drawn once and held for several steps, so that
    exploration is smooth within them. Over W an action is Gaussian with σ_j² = Σ_i f_i² exp(log_std_ij)², which is what
    log-probability, entropy and divergence are of. Gradients do not reach the features through the noise.

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A] (of the action), "features": [*L, ..., D], "noise_log_std":
    [*L, D, A] (of W)}`; the last two only serve to sample, and the last has no batch axes.

    Source: Raffin, Kober and Stulp, "Smooth Exploration for Robotic Reinforcement Learning", 2021.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 0.01,
        initial_log_std: float = 0.0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: where `log_std` `[D, A]` starts.
            shape: of an action, `(A,)` where left out.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(features, actions, value=float(initial_log_std))
        self.shape = (actions,) if shape is None else shape

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
        return _shaped(d["mean"] + noise, self.shape)

    def mode(self, d: Distribution) -> Tensor:
        """The mean."""
        return _shaped(distributions.normal_mode(d["mean"]), self.shape)

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density over the noise matrices."""
        return distributions.normal_log_prob(d["mean"], d["log_std"], _flat(action, self.shape))

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
    squash: bool = False,
    state_dependent_noise: bool = False,
) -> PolicyHead:
    """The policy head of an action space.

    Args:
        action_space: of a single environment.
        features: D.
        initial_scale: gain of the orthogonal initial weights.
        initial_log_std: initial log standard deviation of a Box's head.
        squash: for a Box: `TanhGaussianHead` in its bounds.
        state_dependent_noise: for a Box: `StateDependentNoiseHead`.

    Returns:
        `CategoricalHead`, `MultiDiscreteHead`, `BernoulliHead`, or for a Box `GaussianHead` or the one asked for.

    Raises:
        SpaceError: the space has no head.
        SettingError: an option for a Box with another space, both at once, or squashing into infinite bounds.
    """
    spaces = gym.spaces
    if (squash or state_dependent_noise) and not isinstance(action_space, spaces.Box):
        raise SettingError(
            f"squash and state_dependent_noise are options for a Box, the action space is {action_space}"
        )
    if squash and state_dependent_noise:
        raise SettingError("squash and state_dependent_noise exclude each other: choose one")
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
        if squash:
            low, high = action_space.low.reshape(-1).tolist(), action_space.high.reshape(-1).tolist()
            return TanhGaussianHead(features, count, initial_scale, initial_log_std, low, high, shape=shape)
        if state_dependent_noise:
            return StateDependentNoiseHead(features, count, initial_scale, initial_log_std, shape)
        return GaussianHead(features, count, initial_scale, initial_log_std, shape)
    raise SpaceError(
        f"action space {action_space} has no policy head: expected Discrete, MultiDiscrete, MultiBinary or a Box of "
        "floats; wrap the environment in gymnasium.wrappers.TransformAction to make it one"
    )
