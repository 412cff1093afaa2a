"""Batch renormalisation: against its equations, batch normalisation, and a loop over learners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.runs.train import prepare
from tests.nn.learners import assert_close, assert_equals_loop, data, indices, keys, scattered, take

SHAPES = [(), (1,), (3,), (3, 2)]


def ioffe(p: nn.Params, x: Tensor, eps: float, limits: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of the paper for `[B, C]`: outputs, mean and standard deviation of the batch."""
    mean = x.mean(0)
    std = (((x - mean) ** 2).mean(0) + eps) ** 0.5
    r = (std / p["running_std"]).clamp(1 / limits[0], limits[0]).detach()
    d = ((mean - p["running_mean"]) / p["running_std"]).clamp(-limits[1], limits[1]).detach()
    return ((x - mean) / std * r + d) * p["weight"] + p["bias"], mean, std


def with_statistics(params: nn.Params, batches: int) -> nn.Params:
    count = torch.full_like(params["num_batches_tracked"], batches)
    return {**params, "running_std": params["running_std"].exp(), "num_batches_tracked": count}


@pytest.mark.parametrize("learner_shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("batches", "limits"), [(0, (1.0, 0.0)), (15, (1.25, 0.2)), (20, (1.5, 0.4)), (99, (2.0, 0.4))]
)
def test_training_is_the_papers_algorithm(
    learner_shape: tuple[int, ...], batches: int, limits: tuple[float, float]
) -> None:
    block = nn.BatchRenorm(3, eps=0.1, momentum=0.2, max_r=2.0, max_d=0.4, start=10, r_full=30, d_full=20)
    params = with_statistics(scattered(nn.stack(lambda: block, keys(*learner_shape))), batches)
    kept = {name: value.clone() for name, value in params.items()}
    x, ctx = 3 * data(*learner_shape, 3, 3), nn.Context(training=True)
    assert_equals_loop(
        lambda p, x: nn.apply(block, p, x, nn.Context(training=True)),
        lambda p, x, index: ioffe(p, x, 0.1, limits)[0],
        params,
        x,
        learner_shape,
    )
    nn.apply(block, params, x, ctx)
    assert_close(params, kept, rtol=0, atol=0)
    for index in indices(learner_shape):
        own = take(params, index)
        _, mean, std = ioffe(own, x[index], 0.1, limits)
        found = take(ctx.new_buffers, index)
        assert_close(found["running_mean"], own["running_mean"] + 0.2 * (mean - own["running_mean"]))
        assert_close(found["running_std"], own["running_std"] + 0.2 * (std - own["running_std"]))
        assert found["num_batches_tracked"] == batches + 1
    assert not any(value.requires_grad for value in ctx.new_buffers.values())


def test_second_derivatives_are_the_equations() -> None:
    block = nn.BatchRenorm(3, start=0, r_full=0, d_full=0, max_r=1.1, max_d=0.1)
    params = with_statistics(scattered(nn.stack(lambda: block, keys(3))), 5)

    def twice(run: Any, p: nn.Params, x: Tensor) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (x, p["weight"], p["bias"])]
        loss = run({**p, "weight": leaves[1], "bias": leaves[2]}, leaves[0]).pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)]

    x = data(3, 3, 3)
    together = twice(lambda p, x: nn.apply(block, p, x, nn.Context(training=True)), params, x)
    for i in range(3):
        alone = twice(lambda p, x: ioffe(p, x, 1e-5, (1.1, 0.1))[0], take(params, (i,)), x[i])
        assert_close([value[i] for value in together], alone, rtol=1e-8)


def test_within_wide_limits_training_gives_what_evaluation_gives() -> None:
    block = nn.BatchRenorm(3, max_r=1e6, max_d=1e6, start=0, r_full=0, d_full=0)
    params = with_statistics(scattered(nn.stack(lambda: block, keys(3))), 0)
    x = data(3, 4, 3)
    assert_close(nn.apply(block, params, x, nn.Context(training=True)), nn.apply(block, params, x))


def test_at_first_it_is_batch_normalisation() -> None:
    block, plain = nn.BatchRenorm(3), nn.BatchNorm1d(3)
    params = scattered(nn.stack(lambda: plain, keys(3)))
    ours = {**params, "running_std": params["running_var"].sqrt(), "num_batches_tracked": torch.full((3,), 5_000)}
    x = data(3, 4, 3)
    assert_close(
        nn.apply(block, ours, x, nn.Context(training=True)), nn.apply(plain, params, x, nn.Context(training=True))
    )
    later = {**ours, "num_batches_tracked": torch.tensor([5_000, 5_001, 50_000])}  # a count of each learner's own
    first, second = (nn.apply(block, p, x, nn.Context(training=True)) for p in (ours, later))
    assert [torch.equal(a, b) for a, b in zip(first, second)] == [True, False, False]


def test_pictures_have_torchs_layout() -> None:
    last = nn.BatchRenorm(3, start=0, r_full=0, d_full=0)
    first = nn.BatchRenorm(3, start=0, r_full=0, d_full=0, channels_last=False)
    params = with_statistics(scattered(nn.stack(lambda: last, keys(3))), 1)
    x = data(3, 3, 3, 3, 3)
    for training in (True, False):
        expected = nn.apply(last, params, x.movedim(2, -1), nn.Context(training=training)).movedim(-1, 2)
        assert_close(nn.apply(first, params, x, nn.Context(training=training)), expected)


def test_what_does_not_fit_is_refused() -> None:
    block = nn.BatchRenorm(3)
    params = nn.stack(lambda: block, keys(3))
    for shape in [(3, 2, 4), (2, 2, 3), (3,)]:
        with pytest.raises(ValueError, match="x has shape"):
            nn.apply(block, params, torch.zeros(shape))
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.apply(block, params, torch.zeros(3, 1, 3), nn.Context(training=True))
    for options in ({"max_r": 0.5}, {"max_d": -1.0}, {"momentum": 0.0}, {"start": 10, "r_full": 5}):
        with pytest.raises(SettingError, match="batch renormalisation"):
            nn.BatchRenorm(3, **options)  # type: ignore[arg-type]


def test_an_agent_learns_with_it_and_resumes_exactly(tmp_path: Any) -> None:
    def network(space: Any) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(4, 8), nn.BatchRenorm(8, start=2, r_full=9, d_full=9), torch.nn.Tanh()
        )

    agent = rl.PPO(network=network, num_envs=2, num_steps=8, batch_size=8, num_epochs=1)
    budget = rl.Budget(steps=128, final_episodes=1, eval_every=10**6)
    whole = rl.train(agent, "CartPole-v1", seeds=2, budget=budget)
    stop = [lambda run, line: line["iteration"] >= 3]
    rl.train(agent, "CartPole-v1", seeds=2, budget=budget, out=tmp_path / "run", callbacks=stop)
    again = rl.resume(tmp_path / "run", network=network)
    assert again.env_steps == whole.env_steps
    buffers = whole.state["params"]["buffers"]
    assert (buffers["policy.body.1.num_batches_tracked"] > 9).all()
    for name, value in buffers.items():
        assert torch.equal(value, again.state["params"]["buffers"][name])


def test_a_learner_that_is_not_active_keeps_its_buffers() -> None:
    def network(space: Any) -> torch.nn.Module:
        layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 8))
        return torch.nn.Sequential(layer, nn.BatchRenorm(8), torch.nn.Tanh())

    agent = rl.PPO(network=network, num_envs=2, num_steps=8, batch_size=16, num_epochs=1)
    run = prepare(agent, "CartPole-v1", rl.Budget(steps=1_000), seeds=3)
    before = {name: value.clone() for name, value in run.state["params"]["buffers"].items()}
    run.state["active"] = torch.tensor([True, False, True])
    run.state, _ = run.agent.iterate(run.state, run.world)
    after = run.state["params"]["buffers"]
    assert {name.rpartition(".")[2] for name in after} >= {"_u", "_v", "running_mean", "running_std"}
    for name, value in before.items():
        assert [torch.equal(a, b) for a, b in zip(value, after[name])] == [False, True, False], name
