"""The conditional variational autoencoder (Kingma and Welling, 2014; Sohn, Lee and Yan, 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.functional import distributions
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import Distribution
from rlmeta.nn.mlp import MLP


class ConditionalVAE(Block):
    """Latent numbers z from an input x and its condition c, and an input from both: q(z | x, c) and p(x | z, c).

    q is a Gaussian with a deviation for every component, the prior of z a standard one. x is numbers in [0, 1], each
    with a Bernoulli's logit, as of the ink of a pixel.
    """

    def __init__(self, inputs: int, condition: int, latent: int = 16, hidden_sizes: Sequence[int] = (128,)) -> None:
        """Create the networks.

        Args:
            inputs: D.
            condition: C, numbers that the input is conditioned on, such as a one-hot class; 0 for none.
            latent: Z.
            hidden_sizes: of the encoder; the decoder's are the same in reverse.
        """
        super().__init__()
        self.latent = latent
        self.encoder = MLP(inputs + condition, hidden_sizes, 2 * latent, activation="relu", initialiser="torch")
        self.decoder = MLP(latent + condition, hidden_sizes[::-1], inputs, activation="relu", initialiser="torch")

    def run(self, params: Params, x: dict[str, Tensor], ctx: Context, prefix: str = "") -> Distribution:
        """`input` `[*L, B, D]`, `condition` `[*L, B, C]` and `noise` `[*L, B, Z]` to q's `mean` and `log_std`
        `[*L, B, Z]` and the `logits` `[*L, B, D]` of z = mean + exp(log_std) noise."""
        encoded = self.encoder.run(params, torch.cat([x["input"], x["condition"]], -1), ctx, f"{prefix}encoder.")
        mean, log_std = encoded.chunk(2, -1)
        logits = self.decode(params, mean + log_std.exp() * x["noise"], x["condition"], ctx, prefix)
        return {"mean": mean, "log_std": log_std, "logits": logits}

    def decode(self, params: Params, z: Tensor, condition: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """The logits `[*L, B, D]` of inputs, for z `[*L, B, Z]` and conditions `[*L, B, C]`."""
        return self.decoder.run(params, torch.cat([z, condition], -1), ctx, f"{prefix}decoder.")


def negative_elbo(d: Distribution, x: Tensor) -> Tensor:
    """-log p(x | z, c) + KL(q(z | x, c) || N(0, 1)) in nats: a bound on -log p(x | c) in expectation over the noise.

    Args:
        d: what `ConditionalVAE.run` gives.
        x: inputs in [0, 1], `[*L, B, D]`.

    Returns:
        `[*L, B]`
    """
    zero = torch.zeros_like(d["mean"])
    wrong = (F.softplus(d["logits"]) - x * d["logits"]).sum(-1)
    return wrong + distributions.normal_kl(d["mean"], d["log_std"], zero, zero)
