"""Policy head of generalised state-dependent exploration (gSDE)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlmeta.functional import distributions, random
from rlmeta.nn.block import Block, Context, Params, between
from rlmeta.nn.heads.common import Distribution, project
from rlmeta.nn.initialisers import parameter
from rlmeta.nn.linear import Linear, linear
from rlmeta.nn.units import ActionUnits


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
        # 1e-6 keeps the density finite where every feature is zero, as in Stable-Baselines3.
        return {
            "mean": mean,
            "log_std": 0.5 * (variance + 1e-6).log(),
            "features": features,
            "noise_log_std": noise_log_std,
        }

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action, with a noise matrix per learner and batch row; equal keys give equal matrices.

        Pass one key for as many steps as the noise is held, with rows in the same order.
        """
        features, noise_log_std = d["features"], d["noise_log_std"]
        rows = features.shape[key.dim() : -1]
        standard = random.normal(key, "action", 0, (*rows, *noise_log_std.shape[-2:]), noise_log_std.dtype)
        matrices = standard * between(noise_log_std, standard, key.dim()).exp()
        noise = (features.unsqueeze(-2) @ matrices).squeeze(-2)
        return self.units.to_environment(d["mean"] + noise)

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
