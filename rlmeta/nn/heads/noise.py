"""Policy heads of generalised state-dependent exploration (gSDE): Gaussian, and squashed into bounds by a tanh."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlmeta.functional import distributions, random
from rlmeta.nn.block import Block, Context, Params, between
from rlmeta.nn.heads.common import Distribution, project
from rlmeta.nn.heads.gaussian import bounded_units, tanh_entropy
from rlmeta.nn.initialisers import parameter
from rlmeta.nn.linear import Linear, linear
from rlmeta.nn.units import ActionUnits

_LEAST_VARIANCE = 1e-6
"""Keeps the density finite where every feature is zero, as in Stable-Baselines3."""


def _noise(d: Distribution, key: Tensor) -> Tensor:
    """Noise Wᵀ f `[*L, ..., A]`, with a matrix W per learner and batch row; equal keys give equal matrices."""
    features, noise_log_std = d["features"], d["noise_log_std"]
    rows = features.shape[key.dim() : -1]
    standard = random.normal(key, "action", 0, (*rows, *noise_log_std.shape[-2:]), noise_log_std.dtype)
    matrices = standard * between(noise_log_std, standard, key.dim()).exp()
    return (features.unsqueeze(-2) @ matrices).squeeze(-2)


class StateDependentNoiseHead(Block):
    """Generalised state-dependent exploration (gSDE): the noise is a random linear function of the features.

    a = μ(s) + Wᵀ f with W `[D, A]`, W_ij ~ N(0, exp(log_std_ij)²) drawn once and held for several steps, so that
    exploration is smooth within them. Over W an action is Gaussian with σ_j² = Σ_i f_i² exp(log_std_ij)², to which
    log-probability, entropy and divergence refer. Gradients do not reach the features through the noise.

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A] (of the action), "features": [*L, ..., D], "noise_log_std":
    [*L, D, A] (of W)}`; the last two are for sampling alone, and the last has no batch axes. All of these, density
    and entropy too, are in the policy's units; actions are in the environment's.

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
            features: D, the number of input features.
            actions: A, the number of components of an action.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: initial value of `log_std` `[D, A]`.
            low: lower bounds to measure actions by, see `ActionUnits`; None for none.
            high: upper bounds.
            shape: of an action, `(A,)` by default.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(features, actions, value=float(initial_log_std))
        self.units = ActionUnits((actions,) if shape is None else shape, low, high)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std of the action, and the parameters of the noise."""
        mean = project(params, x, ctx, prefix)
        noise_log_std, features = params[prefix + "log_std"], x.detach()
        variance = linear(features.square(), (2.0 * noise_log_std).exp().mT, None)
        return {
            "mean": mean,
            "log_std": 0.5 * (variance + _LEAST_VARIANCE).log(),
            "features": features,
            "noise_log_std": noise_log_std,
        }

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action, with a noise matrix per learner and batch row; equal keys give equal matrices.

        Pass one key for as many steps as the noise is held, with rows in the same order.
        """
        return self.units.to_environment(d["mean"] + _noise(d, key))

    def mode(self, d: Distribution) -> Tensor:
        """Deterministic action, the mean."""
        return self.units.to_environment(distributions.normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-density of an action over the noise matrices, `[*L, ...]`."""
        return distributions.normal_log_prob(d["mean"], d["log_std"], self.units.to_policy(action))

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats over the noise matrices, in closed form, `[*L, ...]`."""
        return distributions.normal_entropy(d["log_std"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats over the noise matrices, `[*L, ...]`."""
        return distributions.normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])


class TanhStateDependentNoiseHead(Block):
    """gSDE within bounds, as SAC uses it: the tanh of a Gaussian whose noise is a linear function of the features.

    a = tanh(μ(s) + Wᵀ f), with W as in `StateDependentNoiseHead` and μ clamped to `mean_range`, beyond which the tanh
    is flat. While acting W is drawn once and held for several steps; in learning every row has noise of its own, with
    the same distribution of each action, to which density and entropy refer. Gradients reach the features through the
    noise, too.

    `{"mean": [*L, ..., A] (before squashing), "log_std": [*L, ..., A] (likewise), "features": [*L, ..., D],
    "noise_log_std": [*L, D, A]}`; the last two are for sampling alone. Densities are those of the action in the
    environment's units, as `TanhGaussianHead`'s.

    Source: Raffin, Kober and Stulp, "Smooth Exploration for Robotic Reinforcement Learning", 2021.
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
        shape: tuple[int, ...] | None = None,
        mean_range: tuple[float, float] = (-2.0, 2.0),
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of components of an action.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: initial value of `log_std` `[D, A]`.
            low: lower bounds, -1 by default.
            high: upper bounds, 1 by default.
            shape: of an action, `(A,)` by default.
            mean_range: limits to which the mean before squashing is clamped.

        Raises:
            SettingError: a bound is infinite, or not below its upper one.
        """
        super().__init__()
        self.units = bounded_units((actions,) if shape is None else shape, low, high)
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(features, actions, value=float(initial_log_std))
        self.log_half_width = float(self.units.unit.double().log().sum())
        self._mean_range = mean_range

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std before squashing, and the parameters of the noise."""
        mean, noise_log_std = project(params, x, ctx, prefix), params[prefix + "log_std"]
        variance = linear(x.square(), (2.0 * noise_log_std).exp().mT, None)
        return {
            "mean": mean.clamp(*self._mean_range),
            "log_std": 0.5 * (variance + _LEAST_VARIANCE).log(),
            "features": x.detach(),
            "noise_log_std": noise_log_std,
        }

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action within the bounds; equal keys give equal noise matrices, as in `StateDependentNoiseHead`."""
        return self.units.to_environment((d["mean"] + _noise(d, key)).tanh())

    def sample_log_prob(self, d: Distribution, key: Tensor) -> tuple[Tensor, Tensor]:
        """Sample an action with noise of its own in every row, with its log-density; differentiable."""
        action, log_prob = distributions.tanh_normal_sample_log_prob(d["mean"], d["log_std"], key)
        return self.units.to_environment(action), log_prob - self.log_half_width

    def mode(self, d: Distribution) -> Tensor:
        """Deterministic action: the median, tanh μ within the bounds."""
        return self.units.to_environment(distributions.tanh_normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-density of an action over the noise matrices, `[*L, ...]`; one on a bound is moved inside."""
        squashed = self.units.to_policy(action)
        return distributions.tanh_normal_log_prob(d["mean"], d["log_std"], squashed) - self.log_half_width

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats by quadrature, or with a key an unbiased estimate from one sample, `[*L, ...]`."""
        if key is not None:
            return distributions.tanh_normal_entropy(d["mean"], d["log_std"], key) + self.log_half_width
        return tanh_entropy(d) + self.log_half_width

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats, that of the Gaussians before squashing, `[*L, ...]`."""
        return distributions.tanh_normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])
