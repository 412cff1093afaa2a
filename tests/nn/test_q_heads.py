"""Q-heads: dueling and noisy layers, distributions of returns; learner by learner, and with action masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.functional import random
from tests.nn.learners import LEARNER_SHAPES, assert_close, assert_equals_loop, data, keys, scattered, take

FEATURES, ACTIONS, ATOMS = 3, 3, 3
OPTIONS = {
    "plain": nn.StreamOptions(),
    "hidden": nn.StreamOptions(hidden_sizes=(3, 2)),
    "dueling": nn.StreamOptions(dueling=True),
    "noisy": nn.StreamOptions(noisy=True),
    "all": nn.StreamOptions(dueling=True, noisy=True, hidden_sizes=(3,)),
}
HEADS = {
    "values": lambda options: nn.QHead(FEATURES, ACTIONS, options=options),
    "categorical": lambda options: nn.CategoricalQHead(FEATURES, ACTIONS, ATOMS, -1.0, 3.0, options),
    "quantile": lambda options: nn.QuantileQHead(FEATURES, ACTIONS, ATOMS, options),
}
EVERY = [pytest.param(head, options, id=f"{head}-{options}") for head in HEADS for options in OPTIONS]


def ready(head: str, options: str, *shape: int) -> tuple[Any, nn.Params]:
    block = HEADS[head](OPTIONS[options])
    return block, scattered(nn.stack(lambda: block, keys(*shape)), seed=3)


def some_mask(*shape: int) -> Tensor:
    mask = data(*shape, ACTIONS, seed=5) > 0
    mask[..., 0, :] = False  # a row that allows nothing is taken to allow everything
    return mask


@pytest.mark.parametrize(("head", "options"), EVERY)
@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("noise", ["none", "of a minibatch", "of rows"])
def test_equals_a_loop_over_learners(head: str, options: str, learner_shape: tuple[int, ...], noise: str) -> None:
    block, params = ready(head, options, *learner_shape)
    x, mask = data(*learner_shape, 3, FEATURES), some_mask(*learner_shape, 3)
    key = {"none": None, "of a minibatch": keys(*learner_shape), "of rows": keys(*learner_shape, 3)}[noise]

    def run(params: nn.Params, x: Tensor, index: tuple[int, ...] = ()) -> Any:
        ctx = nn.Context(training=key is not None, key=None if key is None else key[index])
        d = block.run(params, x, ctx, "", mask[index])
        values = block.values(d)
        action = block.mode(d)
        assert torch.equal(action, values.argmax(-1)) and bool(values.isfinite().any(-1).all())
        # minus infinity has no gradient to compare, and the distribution goes with it
        rest = {name: part for name, part in d.items() if name != "values"} if isinstance(d, dict) else {}
        return {**rest, "finite": values.masked_fill(~values.isfinite(), 0.0), "taken": block.take(d, action)}

    assert_equals_loop(run, run, params, x, learner_shape)


@pytest.mark.parametrize("head", HEADS)
def test_dueling_centres_the_advantages_of_allowed_actions(head: str) -> None:
    block, params = ready(head, "dueling", 3)
    x, mask = data(3, 3, FEATURES), some_mask(3, 3)
    open_ = nn.allowed(mask)
    outputs = 1 if head == "values" else ATOMS
    advantage = torch.stack([
        torch.nn.functional.linear(x[i], params["streams.advantage.weight"][i], params["streams.advantage.bias"][i])
        for i in range(3)
    ]).reshape(3, 3, ACTIONS, outputs)  # fmt: skip
    value = torch.stack([
        torch.nn.functional.linear(x[i], params["streams.value.weight"][i], params["streams.value.bias"][i])
        for i in range(3)
    ])  # fmt: skip
    expected = torch.zeros_like(advantage)
    for i in range(3):
        for row in range(3):
            centre = advantage[i, row][open_[i, row]].mean(0)
            expected[i, row] = value[i, row] + advantage[i, row] - centre
    d = block.run(params, x, nn.Context(), "", mask)
    found = d.unsqueeze(-1) if head == "values" else d["logits" if head == "categorical" else "quantiles"]
    kept = open_ if head == "values" else torch.ones_like(open_)
    assert_close(found[kept], expected[kept])
    assert bool((block.values(d)[~open_] == -torch.inf).all())
    unmasked = block.run(params, x, nn.Context())
    everything = block.run(params, x, nn.Context(), "", torch.ones_like(mask))
    assert_close(block.values(unmasked), block.values(everything))


def test_the_values_of_distributions_are_their_means() -> None:
    block, params = ready("categorical", "plain", 3)
    d = nn.apply(block, params, data(3, 3, FEATURES))
    assert_close(d["values"], (d["logits"].softmax(-1) * torch.tensor([-1.0, 1.0, 3.0]).double()).sum(-1))
    block, params = ready("quantile", "plain", 3)
    d = nn.apply(block, params, data(3, 3, FEATURES))
    assert_close(d["values"], d["quantiles"].sum(-1) / ATOMS)
    assert torch.equal(block.take(d, torch.full((3, 3), 2)), d["quantiles"][:, :, 2])


@pytest.mark.parametrize("rows", [False, True])
def test_noise_is_that_of_the_paper(rows: bool) -> None:
    layer = nn.NoisyLinear(4, 3)
    params = scattered(nn.stack(lambda: layer, keys(2)), seed=3)
    x, key = data(2, 5, 4), keys(2, 5) if rows else keys(2)
    named = {f"name.{name}": value for name, value in params.items()}
    y = layer.run(named, x, nn.Context(key=key), "name.")
    for i in range(2):
        for row in range(5):
            own = key[i, row] if rows else key[i]
            normal = random.normal(own, "noisy/name.", 0, (7,), torch.float64)
            noise = normal.sign() * normal.abs().sqrt()
            after, before = noise[:3], noise[3:]
            weight = params["weight"][i] + params["weight_sigma"][i] * torch.outer(after, before)
            assert_close(y[i, row], weight @ x[i, row] + params["bias"][i] + params["bias_sigma"][i] * after)
    quiet = layer.run(named, x, nn.Context(), "name.")
    assert_close(quiet[1], torch.nn.functional.linear(x[1], params["weight"][1], params["bias"][1]))
    other = layer.run(named, x, nn.Context(key=random.fold(key, 1)), "name.")
    assert not torch.allclose(y, other)


def test_initial_noise_and_modes() -> None:
    layer = nn.NoisyLinear(16, 3)
    for name in ("weight_sigma", "bias_sigma"):
        assert bool((getattr(layer, name) == 0.5 / math.sqrt(16)).all())
    assert float(layer.weight.detach().abs().max()) <= 0.25 and layer.weight.detach().std() > 0.1
    x = torch.randn(4, 16)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    with pytest.raises(nn.NeedsKey, match="noisy layer in training"):
        layer.run(dict(layer.named_parameters()), x, nn.Context(training=True))
    with pytest.raises(SettingError, match="initial_sigma is -1"):
        nn.NoisyLinear(2, 2, initial_sigma=-1.0)


def test_the_spread_is_learned() -> None:
    layer = nn.NoisyLinear(4, 3)
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    layer.run(params, torch.randn(5, 4), nn.Context(training=True, key=keys())).square().sum().backward()
    assert all(float(p.grad.abs().min()) > 0 for p in params.values())  # type: ignore[union-attr]


def test_distributions_refuse_what_is_none() -> None:
    with pytest.raises(SettingError, match="1 atoms from -1 to 1"):
        nn.CategoricalQHead(3, 2, 1, -1, 1)
    with pytest.raises(SettingError, match="from a smaller to a larger"):
        nn.CategoricalQHead(3, 2, 5, 1, 1)
    with pytest.raises(SettingError, match="0 quantiles"):
        nn.QuantileQHead(3, 2, 0)


def test_a_learner_alone_gets_the_same_noise() -> None:
    block, params = ready("categorical", "all", 3)
    x, key = data(3, 3, FEATURES), keys(3)
    together = block.run(params, x, nn.Context(key=key))
    alone = block.run(take(params, (slice(1, 2),)), x[1:2], nn.Context(key=key[1:2]))
    assert_close(together["logits"][1:2], alone["logits"])
