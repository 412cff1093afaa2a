"""Replay: the reservoir's law, its equality with a loop, balance, and what is replayed."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

import rlmeta as rl
from rlmeta.functional import random, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.lifelong import EWC, Replay
from rlmeta.lifelong.recall import recall_loss
from rlmeta.lifelong.replay import reservoir
from rlmeta.nn import Context
from tests.lifelong.toy import tasks, trained


def offered(keys, groups_of, room: int, groups: int, batch: int):
    """Offer samples 0, 1, 2, ... of the given groups `[n]` in minibatches; what is kept, `[*L, G * M]`."""
    samples = {"number": torch.full((*keys.shape, groups * room), -1)}
    met = torch.zeros(*keys.shape, groups, dtype=torch.int64)
    for start in range(0, len(groups_of), batch):
        number = torch.arange(start, min(start + batch, len(groups_of)))
        new = {"number": number.expand(*keys.shape, -1)}
        group = groups_of[number].expand(*keys.shape, -1)
        samples, met = reservoir(samples, met, new, group, random.fold(keys, start))
    return samples["number"], met


def test_every_position_of_the_stream_is_kept_with_the_same_chance():
    kept, _ = offered(random.make_keys(range(4000)), torch.zeros(40, dtype=torch.int64), 8, 1, 7)
    counts = torch.bincount(kept.flatten(), minlength=40)
    assert counts.sum() == 4000 * 8
    assert chisquare(counts.numpy()).pvalue > 1e-3
    assert all(len(set(row.tolist())) == 8 for row in kept[:50])


def test_a_minibatch_at_once_equals_sample_after_sample():
    """Vitter's loop with the same draws, with S = G = M = B."""
    keys, size = random.make_keys(range(3)), 3
    samples = {"x": random.normal(keys, "x", 0, (9, 3))}
    met = torch.tensor([[0, 2, 9], [1, 3, 4], [5, 5, 5]])
    new = {"x": random.normal(keys, "new", 0, (size, 3))}
    group = torch.tensor([[0, 0, 0], [1, 1, 0], [2, 0, 2]])
    found, counted = reservoir(samples, met, new, group, keys)
    for s in range(3):
        buffer, seen = samples["x"][s].clone(), met[s].clone()
        for i in range(size):
            g = int(group[s, i])
            seen[g] += 1
            n = int(seen[g])
            drawn = int(random.integers(keys, "place", 0, (size,), torch.full((3, size), n))[s, i])
            place = n - 1 if n <= 3 else drawn
            if place < 3:
                buffer[3 * g + place] = new["x"][s, i]
        assert torch.equal(found["x"][s], buffer) and torch.equal(counted[s], seen)


def test_several_samples_on_one_place_leave_the_last():
    keys = random.make_keys(range(500))
    kept, _ = offered(keys, torch.zeros(30, dtype=torch.int64), 1, 1, 30)
    counts = torch.bincount(kept.flatten(), minlength=30)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_classes_have_equal_parts_however_rare_they_are():
    groups = torch.tensor([1] * 5 + [2] * 2 + [0] * 50)  # the rare ones first: nothing later may take their places
    kept, met = offered(random.make_keys(range(3)), groups, 4, 3, 10)
    assert met.tolist() == [[50, 5, 2]] * 3
    kept = kept.reshape(3, 3, 4)
    assert (groups[kept[:, 0]] == 0).all() and (groups[kept[:, 1]] == 1).all()
    assert sorted(kept[0, 2].tolist()) == [-1, -1, 5, 6]


@pytest.mark.parametrize("balance", ["class", "none"])
def test_the_buffer_holds_samples_that_were_met(balance):
    run = trained(Replay(size=12, balance=balance), seeds=2)
    m = run.state["methods"]["replay"]
    known = {tuple(x): int(y) for t in tasks() for x, y in zip(t.train.observation.tolist(), t.train.target)}
    for x, y in zip(m["samples"]["observation"].flatten(0, 1).tolist(), m["samples"]["target"].flatten()):
        assert known[tuple(x)] == int(y)
    assert (m["met"].sum(-1) == 60 * 8).all()
    if balance == "class":
        assert torch.equal(m["samples"]["target"], torch.tensor([0, 1, 2]).repeat_interleave(4).expand(2, -1))


def test_what_is_replayed_is_drawn_from_what_is_there_with_equal_chances():
    run = trained(Replay(size=12, batch_size=4000))
    m, method, task = run.state["methods"]["replay"], run.agent.methods[0], run.state["task"]
    m = {**m, "met": torch.tensor([[2, 0, 9]] * 3)}  # two of class 0, none of class 1, class 2 is full
    key = random.make_keys(range(3))
    ((batch, weight),) = method.batches(run.agent, run.state["params"], m, {"x": torch.zeros(3, 1)}, task, key)
    assert torch.equal(weight, torch.ones(3))
    there = m["samples"]["observation"][0][[0, 1, 8, 9, 10, 11]]
    which = (batch["observation"][0].unsqueeze(1) == there).all(-1)
    assert (which.sum(-1) == 1).all()
    assert chisquare(which.sum(0).numpy()).pvalue > 1e-3


def test_ewc_and_replay_together_are_a_hand_written_step():
    """One step of SGD: the gradient of loss + weight * replayed loss + the spring, in one go."""
    methods = (EWC(strength=2.0), Replay(size=12, strength=0.5))
    run = trained(*methods, optimizer="sgd")
    agent, state, world = run.agent, tree.map(torch.clone, run.state), run.world
    _, batch = world.next_batch(state["world"])
    replay, quadratic = state["methods"]["replay"], state["methods"]["ewc"]["quadratic"]
    key = random.fold(random.fold(state["key"], "method/replay"), state["count"]["gradient_steps"])
    leaves = {n: w.detach().clone().requires_grad_() for n, w in state["params"]["weights"].items()}
    p = {**state["params"], "weights": leaves}
    ((old, _),) = agent.methods[1].batches(agent, p, replay, batch, state["task"], key)
    theta = torch.cat([w.flatten(1) for w in leaves.values()], -1)
    spring = 0.5 * 2.0 * (quadratic["precision"] * (theta - quadratic["centre"]).square()).sum(-1)
    losses = [agent.losses(p, b, StepContext(report=False))["net"] for b in (batch, old)]
    total = (losses[0] + 0.5 * losses[1] + spring).sum()
    gradient = torch.cat([g.flatten(1) for g in torch.autograd.grad(total, list(leaves.values()))], -1)
    from rlmeta.learning.step import step

    moved, _ = step(agent, state, batch, agent.optimizer(state), methods=agent.methods)
    after = torch.cat([w.flatten(1) for w in moved["params"]["weights"].values()], -1)
    torch.testing.assert_close(after, theta.detach() - 0.01 * gradient, rtol=1e-5, atol=1e-6)


def test_an_agent_replays_its_policys_answers_and_no_transition():
    budget = rl.Budget(steps=64, eval_episodes=1, final_episodes=1)
    settings = rl.PPO(num_envs=4, num_steps=16, batch_size=32, hidden_sizes=(8,))
    twice = rl.stream(["CartPole-v1", rl.task("CartPole-v1", settings={"force_mag": -10.0})], "conflict")
    kept: list = []

    def watch(run, metrics):
        m = run.state["methods"]["replay"]
        assert set(m["samples"]) == {"observation", "taught"}
        if metrics["iteration"] == 1:
            first = tree.map(lambda x: x[:, 0].clone(), m["samples"])
            kept.append(first)
            # at the end of the task the policy still says what is remembered: no loss, and no gradient
            p = run.state["params"]
            assert recall_loss(run.agent, p, first, Context()).abs().max() < 1e-6
            torch.testing.assert_close(run.agent.distribution(p, first, Context())["logits"], first["taught"]["logits"])

    run = rl.train(settings, twice, budget=budget, lifelong=[Replay(size=16)], callbacks=[watch], progress=False)
    first = tree.map(lambda x: x[:, 0], run.state["methods"]["replay"]["samples"])
    assert torch.equal(first["observation"], kept[0]["observation"])  # never written again
    assert recall_loss(run.agent, run.state["params"], first, Context()).mean() > 0
