"""Distributional Q-heads: the distribution of the return of every action, by atoms (C51) or by quantiles (QR-DQN)."""

from __future__ import annotations

from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import distributional
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import Distribution
from rlmeta.nn.heads.streams import PLAIN, ActionStreams, StreamOptions
from rlmeta.nn.heads.values import masked


class CategoricalQHead(Block):
    """Categorical distribution of returns (C51): `{"logits": [*L, ..., A, K], "values": [*L, ..., A]}`.

    The logits are those of K atoms, returns at equal distances from `low` to `high`; the values are the means, minus
    infinity for actions that are not allowed.

    Source: Bellemare, Dabney and Munos, "A Distributional Perspective on Reinforcement Learning", 2017.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        atoms: int = 51,
        low: float = -10.0,
        high: float = 10.0,
        options: StreamOptions = PLAIN,
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of actions.
            atoms: K, 2 or more.
            low: smallest return.
            high: largest return.
            options: of its layers, see `ActionStreams`.

        Raises:
            SettingError: there are fewer than 2 atoms, or `low` is not below `high`.
        """
        super().__init__()
        if atoms < 2 or not low < high:
            raise SettingError(f"{atoms} atoms from {low} to {high}: expected 2 or more, from a smaller to a larger")
        self.atoms, self.low, self.high = atoms, low, high
        self.streams = ActionStreams(features, actions, atoms, options)

    def run(
        self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None
    ) -> Distribution:
        """Features `[*L, ..., D]` -> logits and values; `mask` `[*L, ..., A]` is nonzero where an action is allowed."""
        logits = self.streams.run(params, x, ctx, f"{prefix}streams.", mask)
        means = (logits.softmax(-1) * distributional.support(self.low, self.high, logits)).sum(-1)
        return {"logits": logits, "values": masked(means, mask)}

    def values(self, d: Distribution) -> Tensor:
        """Q-values, the means, `[*L, ..., A]`."""
        return d["values"]

    def mode(self, d: Distribution) -> Tensor:
        """Greedy action, `[*L, ...]`."""
        return d["values"].argmax(-1)

    def take(self, d: Distribution, action: Tensor) -> Tensor:
        """Logits of the actions taken `[*L, ...]`, `[*L, ..., K]`."""
        return _of_actions(d["logits"], action)


class QuantileQHead(Block):
    """Quantiles of the distribution of returns (QR-DQN): `{"quantiles": [*L, ..., A, K], "values": [*L, ..., A]}`.

    Quantile i of K is that at (2 i + 1) / (2 K), i from 0; the values are the means, minus infinity for actions that
    are not allowed.

    Source: Dabney et al., "Distributional Reinforcement Learning with Quantile Regression", 2018.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        atoms: int = 51,
        options: StreamOptions = PLAIN,
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of actions.
            atoms: K, the number of quantiles, 1 or more.
            options: of its layers, see `ActionStreams`.

        Raises:
            SettingError: there is no quantile.
        """
        super().__init__()
        if atoms < 1:
            raise SettingError(f"{atoms} quantiles, expected 1 or more")
        self.atoms = atoms
        self.streams = ActionStreams(features, actions, atoms, options)

    def run(
        self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None
    ) -> Distribution:
        """Features `[*L, ..., D]` -> quantiles and values; `mask` `[*L, ..., A]` is nonzero for allowed actions."""
        quantiles = self.streams.run(params, x, ctx, f"{prefix}streams.", mask)
        return {"quantiles": quantiles, "values": masked(quantiles.mean(-1), mask)}

    def values(self, d: Distribution) -> Tensor:
        """Q-values, the means, `[*L, ..., A]`."""
        return d["values"]

    def mode(self, d: Distribution) -> Tensor:
        """Greedy action, `[*L, ...]`."""
        return d["values"].argmax(-1)

    def take(self, d: Distribution, action: Tensor) -> Tensor:
        """Quantiles of the actions taken `[*L, ...]`, `[*L, ..., K]`."""
        return _of_actions(d["quantiles"], action)


def _of_actions(x: Tensor, action: Tensor) -> Tensor:
    """Entries of the actions taken, `[..., A, K]` and `[...]` -> `[..., K]`."""
    index = action.reshape(*action.shape, 1, 1).expand(*action.shape, 1, x.shape[-1])
    return x.gather(-2, index).squeeze(-2)
