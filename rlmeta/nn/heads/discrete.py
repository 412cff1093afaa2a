"""Policy heads of discrete actions: categorical, multi-discrete and Bernoulli, with action masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlmeta.functional import distributions
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import Distribution, flat, project, shaped
from rlmeta.nn.linear import Linear


def allowed(mask: Tensor, sizes: Sequence[int] = ()) -> Tensor:
    """Convert an action mask to bool; a row that allows no action is taken to allow all.

    An agent has to act there, or value the state, all the same; the environment decides what such an action does.

    Args:
        mask: `[..., A]`, nonzero where an action is allowed.
        sizes: numbers of actions of the components, where the last axis concatenates several.

    Returns:
        `[..., A]` bool
    """
    open_ = mask.bool()
    if not sizes:
        return open_ | ~open_.any(-1, keepdim=True)
    return torch.cat([part | ~part.any(-1, keepdim=True) for part in torch.split(open_, list(sizes), -1)], -1)


class CategoricalHead(Block):
    """Categorical policy head, one of A actions: `{"logits": [*L, ..., A]}`; actions `[*L, ...]` int64 in [0, A)."""

    def __init__(self, features: int, actions: int, initial_scale: float = 0.01) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of actions.
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
        logits = project(params, x, ctx, prefix)
        return {"logits": logits if mask is None else distributions.mask_logits(logits, allowed(mask))}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action."""
        return distributions.categorical_sample(d["logits"], key)

    def mode(self, d: Distribution) -> Tensor:
        """Most probable action."""
        return distributions.categorical_mode(d["logits"])

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-probability of an action, `[*L, ...]`."""
        return distributions.categorical_log_prob(d["logits"], action)

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats, in closed form, `[*L, ...]`."""
        return distributions.categorical_entropy(d["logits"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats, `[*L, ...]`."""
        return distributions.categorical_kl(d["logits"], other["logits"])


class MultiDiscreteHead(Block):
    """Policy head of independent categorical components.

    `{"logits": [*L, ..., sum(sizes)]}`; actions `[*L, ..., *shape]` int64.
    """

    def __init__(
        self,
        features: int,
        sizes: Sequence[int],
        initial_scale: float = 0.01,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            sizes: number of actions of each component.
            initial_scale: gain of the orthogonal initial weights.
            shape: of an action, `(len(sizes),)` by default.
        """
        super().__init__()
        self.sizes = tuple(int(size) for size in sizes)
        self.linear = Linear(features, sum(self.sizes), initialiser="orthogonal", gain=initial_scale)
        self.shape = (len(self.sizes),) if shape is None else shape

    def run(
        self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None
    ) -> Distribution:
        """Features `[*L, ..., D]` -> logits; `mask` `[*L, ..., sum(sizes)]` is nonzero where an action is allowed.

        A component that allows nothing is taken as one that allows everything.
        """
        logits = project(params, x, ctx, prefix)
        return {"logits": logits if mask is None else distributions.mask_logits(logits, allowed(mask, self.sizes))}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action."""
        return shaped(distributions.multi_discrete_sample(d["logits"], self.sizes, key), self.shape)

    def mode(self, d: Distribution) -> Tensor:
        """Most probable action of each component."""
        return shaped(distributions.multi_discrete_mode(d["logits"], self.sizes), self.shape)

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-probability of an action, the sum over its components, `[*L, ...]`."""
        return distributions.multi_discrete_log_prob(d["logits"], flat(action, self.shape), self.sizes)

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats, the sum over the components, `[*L, ...]`."""
        return distributions.multi_discrete_entropy(d["logits"], self.sizes)

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats, the sum over the components, `[*L, ...]`."""
        return distributions.multi_discrete_kl(d["logits"], other["logits"], self.sizes)


class BernoulliHead(Block):
    """Policy head of independent binary actions (Bernoulli).

    `{"logits": [*L, ..., A]}`, log-odds of 1; actions `[*L, ..., *shape]` int64.
    """

    def __init__(
        self, features: int, actions: int, initial_scale: float = 0.01, shape: tuple[int, ...] | None = None
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of actions.
            initial_scale: gain of the orthogonal initial weights.
            shape: of an action, `(A,)` by default.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)
        self.shape = (actions,) if shape is None else shape

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> log-odds."""
        return {"logits": project(params, x, ctx, prefix)}

    def sample(self, d: Distribution, key: Tensor) -> Tensor:
        """Sample an action."""
        return shaped(distributions.bernoulli_sample(d["logits"], key), self.shape)

    def mode(self, d: Distribution) -> Tensor:
        """Most probable action: 1 where it is more probable than 0."""
        return shaped(distributions.bernoulli_mode(d["logits"]), self.shape)

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-probability of an action, the sum over its components, `[*L, ...]`."""
        return distributions.bernoulli_log_prob(d["logits"], flat(action, self.shape))

    def entropy(self, d: Distribution, key: Tensor | None = None) -> Tensor:
        """Entropy in nats, the sum over the components, `[*L, ...]`."""
        return distributions.bernoulli_entropy(d["logits"])

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence KL(d ‖ other) in nats, the sum over the components, `[*L, ...]`."""
        return distributions.bernoulli_kl(d["logits"], other["logits"])
