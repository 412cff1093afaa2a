"""Conditional variational autoencoder: its bound by hand and by quadrature, and learners as in a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlmeta.functional import random
from rlmeta.nn import Context, stack
from rlmeta.nn.generative.vae import ConditionalVAE, negative_elbo

S = B = 3


def bound(latent: int = 2) -> tuple[ConditionalVAE, dict[str, Tensor], dict[str, Tensor]]:
    key = random.make_keys(range(S))
    blocks: list[Any] = []

    def build() -> nn.Module:
        blocks.append(ConditionalVAE(4, 3, latent, (5,)))
        module: nn.Module = blocks[-1]
        return module

    p = {name: value.double() for name, value in stack(build, key).items()}
    x = {
        "input": random.uniform(key, "x", 0, (B, 4), torch.float64),
        "condition": torch.eye(3, dtype=torch.float64).expand(S, 3, 3),
        "noise": random.normal(key, "z", 0, (B, latent), torch.float64),
    }
    return blocks[0], p, x


def test_learners_at_once_are_a_loop_and_the_bound_is_its_two_terms() -> None:
    block, p, x = bound()
    outputs = block.run(p, x, Context())
    bounds = negative_elbo(outputs, x["input"])
    assert bounds.shape == (S, B)
    for s in range(S):
        w = {name: value[s] for name, value in p.items()}
        for b in range(B):
            both = torch.cat([x["input"][s, b], x["condition"][s, b]])
            encoded = w["encoder.2.weight"] @ (w["encoder.0.weight"] @ both + w["encoder.0.bias"]).relu()
            mean, log_std = (encoded + w["encoder.2.bias"]).chunk(2)
            z = torch.cat([mean + log_std.exp() * x["noise"][s, b], x["condition"][s, b]])
            ink = (w["decoder.2.weight"] @ (w["decoder.0.weight"] @ z + w["decoder.0.bias"]).relu()) + w[
                "decoder.2.bias"
            ]
            likelihood = torch.distributions.Bernoulli(logits=ink, validate_args=False).log_prob(x["input"][s, b]).sum()
            q, prior = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
            expected = torch.distributions.kl_divergence(q, prior).sum() - likelihood
            torch.testing.assert_close(bounds[s, b], expected)


def test_it_bounds_the_likelihood_from_below() -> None:
    """With one latent variable the likelihood of a binary image is an integral on a grid."""
    block, p, x = bound(latent=1)
    x["input"] = x["input"].round()
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(grid).exp() * (grid[1] - grid[0])
    draws = random.normal(random.make_keys(range(S)), "many", 0, (4000, 1), torch.float64)
    for b in range(B):
        sample = {"input": x["input"][:, b : b + 1], "condition": x["condition"][:, b : b + 1]}
        z = grid.reshape(1, -1, 1).expand(S, -1, 1)
        logits = block.decode(p, z, sample["condition"].expand(-1, 2001, -1), Context())
        log_prob = torch.distributions.Bernoulli(logits=logits).log_prob(sample["input"].expand(-1, 2001, -1)).sum(-1)
        likelihood = (log_prob.exp() * weight).sum(-1).log()
        many = {name: value.expand(-1, 4000, -1) for name, value in sample.items()} | {"noise": draws}
        elbo = -negative_elbo(block.run(p, many, Context()), many["input"]).mean(-1)
        assert bool((elbo < likelihood).all()) and bool((likelihood - elbo < 2).all())
