"""Conditional variational autoencoder (Kingma and Welling, 2014; Sohn, Lee and Yan, 2015)."""

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
    """Conditional variational autoencoder: an encoder q(z | x, c) and a decoder p(x | z, c), both MLPs.

    q is a diagonal Gaussian, the prior of the latent variables z a standard one. The inputs x are numbers in [0, 1],
    such as pixels, and the decoder returns Bernoulli logits for them.
    """

    def __init__(self, inputs: int, condition: int, latent: int = 16, hidden_sizes: Sequence[int] = (128,)) -> None:
        """Create the networks.

        Args:
            inputs: D, size of an input.
            condition: C, size of the condition c, such as a one-hot class; 0 for none.
            latent: Z, number of latent variables.
            hidden_sizes: of the encoder; the decoder's are the same in reverse.
        """
        super().__init__()
        self.latent = latent
        self.encoder = MLP(inputs + condition, hidden_sizes, 2 * latent, activation="relu", initialiser="torch")
        self.decoder = MLP(latent + condition, hidden_sizes[::-1], inputs, activation="relu", initialiser="torch")

    def run(self, params: Params, x: dict[str, Tensor], ctx: Context, prefix: str = "") -> Distribution:
        """Encode and decode inputs, with the reparameterisation z = mean + exp(log_std) noise.

        Args:
            params: as in `Block.run`.
            x: `input` `[*L, B, D]`, `condition` `[*L, B, C]` and standard normal `noise` `[*L, B, Z]`.
            ctx: as in `Block.run`.
            prefix: as in `Block.run`.

        Returns:
            `mean` and `log_std` of q, `[*L, B, Z]`, and `logits` of the decoder, `[*L, B, D]`.
        """
        encoded = self.encoder.run(params, torch.cat([x["input"], x["condition"]], -1), ctx, f"{prefix}encoder.")
        mean, log_std = encoded.chunk(2, -1)
        logits = self.decode(params, mean + log_std.exp() * x["noise"], x["condition"], ctx, prefix)
        return {"mean": mean, "log_std": log_std, "logits": logits}

    def decode(self, params: Params, z: Tensor, condition: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Decoder logits `[*L, B, D]` for latent variables `[*L, B, Z]` and conditions `[*L, B, C]`."""
        return self.decoder.run(params, torch.cat([z, condition], -1), ctx, f"{prefix}decoder.")


def negative_elbo(d: Distribution, x: Tensor) -> Tensor:
    """Negative evidence lower bound (ELBO) in nats, -log p(x | z, c) + KL(q(z | x, c) || N(0, 1)).

    Args:
        d: as returned by `ConditionalVAE.run`.
        x: inputs in [0, 1], `[*L, B, D]`.

    Returns:
        `[*L, B]`
    """
    zero = torch.zeros_like(d["mean"])
    reconstruction = (F.softplus(d["logits"]) - x * d["logits"]).sum(-1)
    return reconstruction + distributions.normal_kl(d["mean"], d["log_std"], zero, zero)
