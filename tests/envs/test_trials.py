"""Trials of several episodes: constants drawn once, one episode to the agent, every episode scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.native import Bandit, CartPole, NativeWorld, TrialWorld
from rlmeta.envs.task import TaskFamily, draw_constants
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.collect import collect, episode_statistics
from rlmeta.learning.settings import per_learner_names

S = N = 3
K = 2
SETTINGS = rl.PPO(num_envs=N, num_steps=8, batch_size=24, num_epochs=1, memory="gru", memory_size=3, hidden_sizes=(4,),
                  sees=("action", "reward", "start"))  # fmt: skip
POLES = TaskFamily("poles", rl.task(CartPole(max_episode_steps=4), name="poles"), {"length": (0.3, 1.0)})


def both(episodes):
    """World of trials and plain world of the same environment, with fixed constants."""
    physics = {"length": torch.linspace(0.3, 1.0, S * N).reshape(S, N).double()}
    env = CartPole(max_episode_steps=4, initial_range=0.2)
    keys = random.make_keys(range(S))
    trials = TrialWorld(env, (S,), N, physics, episodes=episodes)
    plain = NativeWorld(env, (S,), N, physics)
    return trials, trials.reset(keys), plain, plain.reset(keys)


def test_within_a_trial_episodes_follow_one_another_and_only_its_end_is_told():
    trials, a, plain, b = both(K)
    count = torch.zeros(S, N, dtype=torch.int64)
    for t in range(20):
        action = random.integers(random.make_keys(range(S)), "action", t, (N,), 2)
        (a, transition), (b, expected) = trials.step(a, action), plain.step(b, action)
        ended = expected.terminated | expected.truncated
        count += ended
        over = ended & (count % K == 0)
        assert (
            transition.ended.equal(ended) and transition.memory_reset.equal(over) and transition.terminated.equal(over)
        )
        assert not transition.truncated.any()
        assert transition.observation.equal(expected.observation) and transition.reward.equal(expected.reward)
        inside = (ended & ~over).unsqueeze(-1)
        assert transition.next_observation.equal(torch.where(inside, expected.observation, expected.next_observation))
    assert (count >= 2 * K).all()
    tree.map(torch.testing.assert_close, a, b)


def test_constants_are_drawn_once_a_trial():
    world = rl.trials(POLES, episodes=K).world((S,), N)
    state = world.reset(random.make_keys(range(S)))
    lengths, trial = [], []
    for _ in range(17):
        lengths.append(state["physics"]["length"])
        trial.append(state["episode"] // K)
        state, _ = world.step(state, torch.ones(S, N, dtype=torch.int64))
    for before, after, old, new in zip(lengths, lengths[1:], trial, trial[1:]):
        assert (before == after).equal(old == new)
    assert (trial[-1] >= 1).all()


def test_statistics_and_evaluations_score_every_episode():
    world = rl.trials(POLES, episodes=K).world((S,), N)
    agent = SETTINGS.bind(world.observation_space, world.action_space)
    hyper = {name: torch.full((S,), float(getattr(SETTINGS, name))) for name in per_learner_names(rl.PPO)}
    state = agent.init(random.make_keys(range(S)), hyper, world)
    state, rollout = collect(agent, state, world, 8)
    _, figures = episode_statistics(state, rollout)
    assert figures["episodes"].equal(rollout["ended"].sum((1, 2)).double())
    assert rollout["terminated"].sum() < rollout["ended"].sum()
    evaluation = agent.evaluate(agent.effective_params(state), world, random.make_keys(range(S)), 2 * N)
    assert evaluation.returns.shape == (S, 2 * N * K)
    assert evaluation.returns.max() <= 4 and evaluation.returns.equal(evaluation.lengths.double())
    assert evaluation.of_trials(K)[:, 1, 0].equal(evaluation.returns[:, K])


def test_an_actor_sees_where_an_episode_of_its_trial_starts_and_keeps_its_memory():
    world = rl.trials(POLES, episodes=K).world((S,), N)
    agent = SETTINGS.bind(world.observation_space, world.action_space)
    hyper = {name: torch.full((S,), float(getattr(SETTINGS, name))) for name in per_learner_names(rl.PPO)}
    state = agent.init(random.make_keys(range(S)), hyper, world)
    state, rollout = collect(agent, state, world, 12)
    inputs = agent.inputs(rollout)
    ended, over = rollout["ended"], rollout["memory_reset"]
    assert inputs["last"][:, 1:, :, 3].equal(ended[:, :-1].float())
    assert inputs["begins"][:, 1:].equal(over[:, :-1])
    inside = (ended & ~over)[:, :-1]
    assert inside.any() and inputs["last"][:, 1:, :, 2][inside].eq(1).all(), "the reward before is seen"
    assert state["memory"]["start"].equal(ended[:, -1].float())


def test_ranges_of_a_list_draw_every_entry_and_those_of_numbers_as_before():
    key = random.make_keys(range(S))
    means = draw_constants(key, "physics", Bandit(mean=(0.5,) * 5), {"mean": (0.25, 0.75)})["mean"]
    assert means.shape == (S, 5) and means.min() >= 0.25 and means.max() <= 0.75
    assert (means.unsqueeze(-1) - means.unsqueeze(-2)).abs().flatten(1).sort(-1).values[:, 5:].min() > 0
    numbers = draw_constants(key, "physics", CartPole(), {"length": (0.0, 1.0), "gravity": (2.0, 4.0)})
    draws = random.uniform(key, "physics", 0, (2,), torch.float64)
    assert numbers["length"].equal(draws[:, 0]) and numbers["gravity"].equal(2 + 2 * draws[:, 1])
    family = TaskFamily("b", rl.task(Bandit(mean=(0.5,) * 5), name="b"), {"mean": (0.0, 1.0)})
    world = family.world(family.sample(key), (S,), N)
    assert world.reset(key)["physics"]["mean"].equal(family.sample(key)["mean"].unsqueeze(1).expand(S, N, 5))


MEMORIES = {
    "gru": SETTINGS,
    "lstm": replace(SETTINGS, memory="lstm"),
    "attention": replace(SETTINGS, memory="attention", memory_size=4, attention_heads=2, context=3),
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_run_on_trials_goes_on_as_the_one_that_was_not_stopped(tmp_path, memory):
    problem = rl.trials("bandits", episodes=4)
    settings = replace(MEMORIES[memory], num_steps=4, batch_size=12)
    whole = rl.train(settings, problem, steps=72, seeds=2, final_episodes=3)
    rl.train(
        settings, problem, steps=72, seeds=2, final_episodes=3, out=tmp_path / "run",
        callbacks=[lambda run, metrics: metrics["env_steps"] == 36],
    )  # fmt: skip
    resumed = rl.resume(tmp_path / "run")
    assert resumed.env_steps == 72 and resumed.experiment.problem.episodes == 4
    assert len(resumed.experiment.problem.source.mean) == 5
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), resumed.state, whole.state)
    assert resumed.evaluation.of_trials(4).shape == (2, 3, 4)


def test_a_named_family_says_its_trials():
    assert rl.family("bandits").task().episodes == 30 and rl.task("bandits").world((1,), 2).trial_episodes == 30
    assert rl.trials("bandits", episodes=4).world((1,), 2).trial_episodes == 4
    assert rl.family("navigation").task().episodes == 1


def test_what_can_be_no_trial_is_refused():
    with pytest.raises(SettingError, match="native"):
        rl.trials(rl.task("CartPole-v1", native=False), episodes=2)
    with pytest.raises(SettingError, match="episodes"):
        rl.trials("CartPole-v1", episodes=0)
    with pytest.raises(SettingError, match="expected a family"):
        rl.trials(3, episodes=2)
    with pytest.raises(SettingError, match="no tasks of a stream"):
        rl.train(SETTINGS, rl.stream([rl.trials("CartPole-v1", episodes=2)] * 2), steps=24, seeds=1)
