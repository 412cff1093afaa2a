"""Random network distillation and streams that stay apart: closed forms, isolation, resume."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.agents.streams import stream_advantage
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.returns import generalized_advantage
from tests.agents.worlds import start
from tests.runs.test_resume import assert_same_run

SMALL = {"num_envs": 2, "num_steps": 16, "hidden_sizes": (8,)}
PPO = {**SMALL, "num_epochs": 2, "batch_size": 16}
RND = {"batch_size": 16, "hidden_sizes": (8,), "outputs": 4}
AGENTS = {"ppo": (rl.PPO, PPO), "a2c": (rl.A2C, SMALL)}


def budget(steps: int = 512) -> rl.Budget:
    return rl.Budget(steps=steps, eval_episodes=2, final_episodes=2, log_points=8, checkpoint_seconds=0.0)


@pytest.mark.parametrize("name", AGENTS)
def test_a_stream_of_coefficient_0_changes_no_bit(name):
    cls, settings = AGENTS[name]
    runs = [
        rl.train(cls(**settings, rewards=rewards), "CartPole-v1", seeds=3, budget=budget(), threads=1)
        for rewards in ((), (rl.RND(coefficient=0.0, **RND),))
    ]
    for part in ("params", "optimizer", "key", "count", "active", "world"):
        plain, curious = (tree.flatten(run.state[part]) for run in runs)
        assert all(torch.equal(plain[leaf], curious[leaf]) for leaf in plain), part
    assert torch.equal(runs[0].scores, runs[1].scores)


@pytest.mark.parametrize("name", AGENTS)
def test_a_stream_changes_what_is_learned_and_learners_have_their_own_coefficient(name):
    cls, settings = AGENTS[name]
    agent, state, world = start(cls(**settings, rewards=(rl.RND(coefficient=[0.0, 1.0], **RND),)), "CartPole-v1", 1)
    plain, other, same_world = start(cls(**settings), "CartPole-v1", [0, 0])
    for _ in range(3):
        state, metrics = agent.iterate(state, world)
        other, expected = plain.iterate(other, same_world)
    weights, others = state["params"]["weights"], other["params"]["weights"]
    assert all(torch.equal(weights[n][0], others[n][0]) for n in weights)
    assert any(not torch.equal(weights[n][1], others[n][1]) for n in weights)
    assert all(torch.equal(value[0], metrics[name][0]) for name, value in expected.items())
    assert (metrics["rewards/rnd"] > 0).all() and (metrics["rnd/loss"] > 0).all()


def test_the_target_stays_and_the_predictor_and_value_head_learn():
    agent, state, world = start(rl.PPO(**PPO, rewards=(rl.RND(**RND),)), "CartPole-v1")
    before = tree.map(
        torch.clone, {"rnd": state["rewards"]["rnd"]["params"], "value": state["values"]["rnd"]["params"]}
    )
    state, _ = agent.iterate(state, world)
    after = {"rnd": state["rewards"]["rnd"]["params"], "value": state["values"]["rnd"]["params"]}
    old, new = tree.flatten(before), tree.flatten(after)
    moved = {name: not torch.equal(old[name], new[name]) for name in old}
    assert moved == {name: "buffers" not in name for name in old}


def test_a_learner_that_is_stopped_keeps_its_owners_bits():
    agent, state, world = start(rl.PPO(**PPO, rewards=(rl.RND(**RND),)), "CartPole-v1")
    state["active"] = torch.tensor([False, True])
    owned = {"rnd": state["rewards"]["rnd"], "value": state["values"]["rnd"]}
    parts = {name: {k: memory[k] for k in ("params", "optimizer")} for name, memory in owned.items()}
    before = tree.map(torch.clone, parts)
    state, _ = agent.iterate(state, world)
    after = {"rnd": state["rewards"]["rnd"], "value": state["values"]["rnd"]}
    for name, leaf in tree.flatten(before).items():
        now = tree.flatten(after)[name]
        assert torch.equal(leaf[0], now[0]), name
        if "weights" in name:
            assert not torch.equal(leaf[1], now[1]), name


@pytest.mark.filterwarnings("ignore:the reward 'rnd' gave")
@pytest.mark.parametrize("part", ["rewards", "values"])
def test_an_owner_that_is_lost_stops_its_learner_alone(part):
    agent, state, world = start(rl.PPO(**PPO, rewards=(rl.RND(**RND),)), "CartPole-v1")
    next(iter(state[part]["rnd"]["params"]["weights"].values()))[0] = torch.nan
    state, _ = agent.iterate(state, world)
    assert state["active"].tolist() == [False, True]


def test_credit_goes_on_over_the_end_of_an_episode():
    """Against a return summed by hand, lambda 1, S = T = N = 3."""
    shape = (3, 3, 3)
    reward, value, next_value = (random.normal(random.make_keys([7]), n, 0, shape, torch.float64)[0] for n in "rvn")
    no = torch.zeros(shape, dtype=torch.bool)
    ended = no.clone()
    ended[:, 0] = True
    rollout = {"terminated": ended, "truncated": no, "valid": ~no}
    gamma, one = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    advantage = stream_advantage(reward, value, next_value, rollout, gamma, one, episodic=False)
    for learner in range(3):
        g = gamma[learner]
        total = reward[learner, 0] + g * reward[learner, 1] + g**2 * (reward[learner, 2] + g * next_value[learner, 2])
        # within an episode the successor's value is next_value, at its end that of the next episode's first step
        correction = g**2 * (next_value[learner, 1] - value[learner, 2])
        torch.testing.assert_close(advantage[learner, 0], total + correction - value[learner, 0])
    usual = generalized_advantage(reward, gamma[:, None, None] * ~ended, value, next_value, ended, one)
    torch.testing.assert_close(stream_advantage(reward, value, next_value, rollout, gamma, one, episodic=True), usual)


def test_batched_equals_one_learner_at_a_time():
    settings = rl.PPO(**PPO, rewards=(rl.RND(**RND),))
    agent, state, world = start(settings, "CartPole-v1", [0, 1])
    for _ in range(2):
        state, metrics = agent.iterate(state, world)
    for seed in range(2):
        one, alone, small = start(settings, "CartPole-v1", [seed])
        for _ in range(2):
            alone, found = one.iterate(alone, small)
        torch.testing.assert_close(found["rewards/rnd"][0], metrics["rewards/rnd"][seed], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("task", "axes", "steps"), [("CartPole-v1", 3, 512), ("Catch-v0", 5, 128)])
def test_resumed_equals_never_stopped(task, axes, steps, tmp_path):
    """Of pictures the weights of convolutions have 5 axes."""
    rewards = (rl.RND(coefficient=[0.5, 1.0], **RND),)
    settings, runs = rl.PPO(**PPO, rewards=rewards), []
    for name in ("whole", "half"):
        stop = [lambda run, line: line["iteration"] >= steps // 64] if name == "half" else []
        runs.append(rl.train(settings, task, seeds=1, out=tmp_path / name, budget=budget(), callbacks=stop, threads=1))
    assert max(weight.dim() for weight in runs[0].state["rewards"]["rnd"]["params"]["weights"].values()) == axes
    assert_same_run(runs[0], rl.resume(tmp_path / "half", own={"rewards": rewards}))


def test_odd_settings_are_refused():
    for wrong in ({"coefficient": -1.0}, {"gamma": 1.5}, {"learning_rate": 0.0}, {"batch_size": 0}, {"name": "task"}):
        with pytest.raises(SettingError):
            rl.RND(**wrong)
    with pytest.raises(SettingError, match="needs a value of its own: use PPO or A2C"):
        start(rl.DQN(rewards=(rl.RND(),)), "CartPole-v1")
    with pytest.raises(SettingError, match="does not divide the 32 steps"):
        start(rl.PPO(**PPO, rewards=(rl.RND(batch_size=24),)), "CartPole-v1")
