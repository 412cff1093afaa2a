"""Dropout with masks drawn from a random key."""

from __future__ import annotations

from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.nn.block import Block, Context, NeedsKey, Params


class Dropout(Block):
    """Dropout: in training, zeros with probability `p` and the rest divided by 1 - p; the shape stays the same.

    In evaluation, and where the block was put in `eval()`, the input is returned unchanged. The mask is drawn from the
    context's key and the block's name, so a learner's mask does not depend on the other learners.

    Source: Srivastava et al., "Dropout", 2014.
    """

    def __init__(self, p: float = 0.5) -> None:
        """Create the block; `p` is the probability of a zero.

        Raises:
            SettingError: `p` is not in [0, 1].
        """
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise SettingError(f"dropout probability is {p}, expected a number in [0, 1]")
        self._p = p
        self._key: Tensor | None = None  # set during a call of a lifted module
        self._name = ""
        self._calls = 0

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Drop entries of `x` in training.

        Raises:
            NeedsKey: training without a key.
        """
        if not self.trains(ctx) or self._p == 0.0:
            return x
        if ctx.key is None:
            raise NeedsKey(
                "dropout in training draws random numbers, for which agents and MAML have no key: leave it out of "
                "their networks; in a loop of your own pass a key, Context(training=True, key=key)"
            )
        return self._drop(x, ctx.key, prefix, 0)

    def may_draw(self) -> bool:
        """Whether it is in training mode with a positive probability."""
        return self.training and self._p > 0.0

    def trains_otherwise(self) -> bool:
        """As `may_draw`."""
        return self.may_draw()

    def begin(self, key: Tensor | None, name: str) -> None:
        """Set the key of the next calls inside a lifted module, each with a mask of its own; None unsets it."""
        self._key, self._name, self._calls = key, name, 0

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass as in any module: masks from the lifted module's key if set, else from torch's generator."""
        if self._key is None or not self.may_draw():
            return super().forward(x)
        self._calls += 1
        return self._drop(x, self._key, self._name, self._calls - 1)

    def _drop(self, x: Tensor, key: Tensor, name: str, counter: int) -> Tensor:
        if x.shape[: key.dim()] != key.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected the key's learner axes {tuple(key.shape)} in front"
            )
        keep = random.uniform(key, f"dropout/{name}", counter, x.shape[key.dim() :]) >= self._p
        scale = 0.0 if self._p == 1.0 else 1.0 / (1.0 - self._p)
        return x * keep * scale
