"""Policy heads of continuous actions: a diagonal Gaussian, and one squashed into the bounds by a tanh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import distributions
from rlmeta.nn.block import Block, Context, Params, between
from rlmeta.nn.heads.common import Distribution, project
from rlmeta.nn.initialisers import parameter
from rlmeta.nn.linear import Linear
from rlmeta.nn.units import ActionUnits

_NODES = torch.linspace(-4.5, 4.5, 32, dtype=torch.float64, device="cpu")


_WEIGHTS = (-0.5 * _NODES.square()).softmax(0)
"""Quadrature weights: E f(x) = Σ w f(node) for standard normal x by the trapezoidal rule, which for smooth functions on
the whole line is more exact than Gauss-Hermite quadrature with as many nodes."""


def bounded_units(shape: tuple[int, ...], low: Sequence[float] | None, high: Sequence[float] | None) -> ActionUnits:
    """Units of actions that are squashed into bounds, -1 and 1 by default.

    Raises:
        SettingError: a bound is infinite, or not below its upper one.
    """
    count = math.prod(shape)
    lower, upper = [-1.0] * count if low is None else low, [1.0] * count if high is None else high
    units = ActionUnits(shape, lower, upper)
    if not units.bounded:
        raise SettingError(
            f"bounds {list(lower)} and {list(upper)} are infinite or equal, so nothing can be squashed into them: "
            'use GaussianHead (an agent\'s action_bounds="scale")'
        )
    return units


def tanh_entropy(d: Distribution) -> Tensor:
    """Entropy in nats of a squashed Gaussian in units of [-1, 1] by quadrature, `[*L, ...]`."""
    u = d["mean"].unsqueeze(-1) + d["log_std"].exp().unsqueeze(-1) * _NODES.to(d["mean"])
    squeezed = 2.0 * (math.log(2.0) - u + F.logsigmoid(2.0 * u)) * _WEIGHTS.to(u)
    return distributions.normal_entropy(d["log_std"]) + squeezed.sum((-2, -1))


class GaussianHead(Block):
    """Diagonal Gaussian policy head with a state-independent parameter `log_std` `[*L, A]`.

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
            features: D, the number of input features.
            actions: A, the number of components of an action.
            initial_scale: gain of the mean's orthogonal initial weights.
            initial_log_std: initial value of `log_std`.
            low: lower bounds to measure actions by, see `ActionUnits`; None for none.
            high: upper bounds.
            shape: of an action, `(A,)` by default.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.log_std = parameter(actions, value=float(initial_log_std))
        self.units = ActionUnits((actions,) if shape is None else shape, low, high)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std, both of full shape."""
        mean = project(params, x, ctx, prefix)
        log_std = params[prefix + "log_std"]
        return {"mean": mean, "log_std": between(log_std, mean, log_std.dim() - 1).expand_as(mean)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample μ + σ ε, differentiable."""
        return self.units.to_environment(distributions.normal_sample(d["mean"], d["log_std"], key))

    def mode(self, d: Distribution) -> Tensor:
        """Deterministic action, the mean."""
        return self.units.to_environment(distributions.normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-density of an action, `[*L, ...]`."""
        return distributions.normal_log_prob(d["mean"], d["log_std"], self.units.to_policy(action))

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats, in closed form, `[*L, ...]`."""
        return distributions.normal_entropy(d["log_std"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats, `[*L, ...]`."""
        return distributions.normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])


class TanhGaussianHead(Block):
    """SAC's squashed Gaussian policy head: tanh of a Gaussian, within the action space's bounds.

    `{"mean": [*L, ..., A], "log_std": [*L, ..., A]}` before squashing, both functions of the state; an action is
    centre + half width * tanh(u). Densities are those of the action in the environment's units: for the paper's target
    entropy of -A in units of [-1, 1], add `log_half_width`.

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
            features: D, the number of input features.
            actions: A, the number of components of an action.
            initial_scale: gain of the orthogonal initial weights, of the mean and the spread.
            initial_log_std: initial bias of `log_std`.
            low: lower bounds, -1 by default.
            high: upper bounds, 1 by default.
            log_std_range: limits to which `log_std` is clamped.
            shape: of an action, `(A,)` by default.

        Raises:
            SettingError: a bound is infinite, or not below its upper one.
        """
        super().__init__()
        self.units = bounded_units((actions,) if shape is None else shape, low, high)
        self.linear = Linear(features, 2 * actions, initialiser="orthogonal", gain=initial_scale)
        with torch.no_grad():
            self.linear.bias[actions:] = initial_log_std  # type: ignore[index]
        self.log_half_width = float(self.units.unit.double().log().sum())
        self._log_std_range = log_std_range

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> mean and log_std."""
        mean, log_std = project(params, x, ctx, prefix).chunk(2, -1)
        return {"mean": mean, "log_std": log_std.clamp(*self._log_std_range)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action within the bounds, differentiable."""
        return self.units.to_environment(distributions.tanh_normal_sample(d["mean"], d["log_std"], key))

    def sample_log_prob(self, d: Distribution, key: Tensor) -> tuple[Tensor, Tensor]:
        """Sample an action, with its log-density, which is exact even next to the bounds."""
        action, log_prob = distributions.tanh_normal_sample_log_prob(d["mean"], d["log_std"], key)
        return self.units.to_environment(action), log_prob - self.log_half_width

    def mode(self, d: Distribution) -> Tensor:
        """Deterministic action: the median, tanh μ within the bounds."""
        return self.units.to_environment(distributions.tanh_normal_mode(d["mean"]))

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-density of an action, `[*L, ...]`; one on a bound is moved inside by a rounding error."""
        squashed = self.units.to_policy(action)
        return distributions.tanh_normal_log_prob(d["mean"], d["log_std"], squashed) - self.log_half_width

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats by quadrature, or with a key an unbiased estimate from one sample, `[*L, ...]`.

        H = H[N(μ, σ)] + Σ_k E log(1 - tanh² u_k) + log half width; log(1 - tanh² u) = 2 (log 2 - u - softplus(-2u)).
        The quadrature is within 0.01 nats a component for every spread that `log_std_range` allows by default.
        """
        if key is not None:
            return distributions.tanh_normal_entropy(d["mean"], d["log_std"], key) + self.log_half_width
        return tanh_entropy(d) + self.log_half_width

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats, that of the Gaussians before squashing, `[*L, ...]`."""
        return distributions.tanh_normal_kl(d["mean"], d["log_std"], other["mean"], other["log_std"])
