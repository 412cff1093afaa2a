"""Budgets: what leaves nothing to learn is refused, evaluation takes a part of the steps, epochs beside steps."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit

import rlmeta as rl
from rlmeta.agents.a2c import A2CAgent
from rlmeta.data.samples import DataTask, Samples
from rlmeta.errors import SettingError
from rlmeta.learning.evaluate import Evaluation
from rlmeta.runs.experiment import chosen_seeds
from rlmeta.runs.folder import read_config
from rlmeta.runs.train import prepare
from tests.agents.worlds import Target

TINY = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(4,))
QUIET = {"eval_every": 10**6, "final_episodes": 2}

# ---------------------------------------------------------------------- nothing to learn


@pytest.mark.parametrize(
    ("settings", "problem", "steps"),
    [
        (rl.DQN(learning_starts=1000), "CartPole-v1", 600),
        (rl.DQN(learning_starts=0, n_steps=9, num_steps=4), "CartPole-v1", 16),
        (rl.DQN(learning_starts=1000), rl.stream("cartpole-conflicts"), 600),
    ],
)
def test_a_budget_that_ends_before_the_first_gradient_step_is_refused(settings, problem, steps):
    with pytest.raises(SettingError, match=rf"first gradient step after [\d,]+ steps, the budget is {steps}"):
        rl.train(settings, problem, steps=steps)


@pytest.mark.parametrize(("starts", "n_steps"), [(64, 1), (61, 1), (0, 16), (0, 13)])
def test_the_least_budget_that_is_taken_learns(starts, n_steps):
    settings = rl.DQN(learning_starts=starts, n_steps=n_steps, num_envs=4, num_steps=4, hidden_sizes=(4,), batch_size=4)
    run = rl.train(settings, "CartPole-v1", budget=rl.Budget(steps=64, **QUIET), threads=1)
    assert (run.state["count"]["gradient_steps"] > 0).all()
    with pytest.raises(SettingError, match="first gradient step"):
        rl.train(settings, "CartPole-v1", steps=48)


def test_who_takes_no_gradient_step_at_all_is_told_so_at_the_end(monkeypatch):
    monkeypatch.setattr(A2CAgent, "update", lambda self, state, rollout, rewards: (state, {}))
    with pytest.warns(RuntimeWarning, match="no learner has taken a gradient step"):
        rl.train(TINY, "CartPole-v1", budget=rl.Budget(steps=64, **QUIET))


def test_an_iteration_beyond_the_budget_is_said():
    with pytest.warns(RuntimeWarning, match="steps is 3, but an iteration takes 16: training takes one iteration"):
        run = rl.train(TINY, "CartPole-v1", budget=rl.Budget(steps=3, **QUIET))
    assert run.env_steps == 16 and (run.state["count"]["gradient_steps"] == 1).all()


# ---------------------------------------------------------------------- what evaluation costs


class Standing(gym.Env):
    """Nothing happens, for ever."""

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


def standing(limit: int):
    return rl.task(lambda: TimeLimit(Standing(), limit), name="standing")


@pytest.mark.parametrize(("limit", "steps"), [(1600, 8_000), (100, 8_000), (50, 8_000), (10, 20_000)])
def test_evaluation_takes_a_fifth_of_the_steps_at_most_but_four_episodes_at_least(limit, steps, monkeypatch):
    """However long the declared episodes, and as published where they are short."""
    played = []

    def evaluate(self, p, world, key, episodes, *, deterministic=True):
        played.append(episodes)
        shape = (*key.shape, episodes)
        return Evaluation(torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.int64))

    monkeypatch.setattr(A2CAgent, "evaluate", evaluate)
    run = rl.train(rl.A2C(num_envs=4, num_steps=50, hidden_sizes=(4,)), standing(limit), steps=steps, threads=1)
    *periodic, final = played
    assert sum(periodic) * limit <= steps / 5
    assert final * limit <= steps / 5 or final == 4
    if limit == 10:
        assert periodic == [16] * 9 and final == 64
    budget = run.experiment.budget
    assert (budget.final_episodes, len(periodic) * budget.eval_episodes) == (final, sum(periodic))
    given = rl.Budget(steps=steps, eval_every=steps // 2, eval_episodes=3, final_episodes=5)
    played.clear()
    rl.train(rl.A2C(num_envs=4, num_steps=50, hidden_sizes=(4,)), standing(limit), budget=given, threads=1)
    assert played == [3, 5]


@pytest.mark.parametrize("problem", ["CartPole-v1", rl.task(lambda: Target("discrete"), name="own")])
def test_without_a_limit_or_where_rows_are_cheap_evaluation_is_whole(problem):
    run = prepare(TINY, problem, rl.Budget(steps=400))
    run.close()
    budget = run.experiment.budget
    assert (budget.eval_every, budget.eval_episodes, budget.final_episodes) == (40, 16, 64)


def test_tasks_of_a_stream_share_the_fifth():
    stream = rl.stream([standing(50), standing(100)])
    run = prepare(TINY, stream, rl.Budget(steps=6_000))
    run.close()
    budget = run.experiment.budget  # (2 + 1) evaluations of 2 tasks of 100 steps at most, in 2 * 6000
    assert (budget.eval_episodes, budget.final_episodes) == (4, 12)


def test_what_evaluation_took_is_said_with_the_flags_that_set_it(capsys):
    rl.train(TINY, "CartPole-v1", steps=64, progress=True, threads=1)
    assert "of the time (--eval-every, --final-episodes, --eval-episodes set it)" in capsys.readouterr().err
    rl.train(TINY, "CartPole-v1", steps=64, threads=1)
    assert not capsys.readouterr().err


def test_settled_evaluations_are_written_down_so_that_a_resume_has_the_same(tmp_path):
    stop = lambda run, line: line["iteration"] >= 20  # noqa: E731
    rl.train(TINY, standing(40), steps=1_600, out=tmp_path / "run", callbacks=[stop], threads=1)
    said = read_config(tmp_path / "run")["budget"]
    assert (said["eval_every"], said["eval_episodes"], said["final_episodes"]) == (544, 4, 8)


# ---------------------------------------------------------------------- epochs


def samples(count: int, classes: int = 2) -> Samples:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return Samples(x, (x.sum(-1) > 0).long())


def data(name: str, count: int) -> DataTask:
    return DataTask(name, samples(count), samples(20), (0, 1), 2)


@pytest.mark.parametrize(("epochs", "iterations"), [(1, (5, 2)), (3, (15, 5)), (0.5, (3, 1))])
def test_epochs_are_passes_over_every_tasks_own_samples(epochs, iterations):
    """100 samples are 20 minibatches of 5, 34 are 6 and a remainder that is left out; an iteration takes 4."""
    settings = rl.Classifier(batch_size=5, num_steps=4, hidden_sizes=(4,))
    stream = rl.stream([data("a", 100), data("b", 34)])
    run = rl.train(settings, stream, epochs=epochs, threads=1)
    assert run.iterations == iterations
    assert int(run.state["count"]["iterations"][0]) == sum(iterations)
    assert int(run.state["count"]["gradient_steps"][0]) == 4 * sum(iterations)
    single = rl.train(settings, data("a", 100), budget=rl.Budget(epochs=epochs), threads=1)
    assert single.env_steps == iterations[0] * 20 == single.experiment.budget.steps


def test_a_run_of_epochs_resumes_exactly(tmp_path):
    settings = rl.Classifier(batch_size=5, num_steps=4, hidden_sizes=(4,), learning_rate_schedule="linear")
    stream = rl.stream([data("a", 100), data("b", 34)])
    budget = rl.Budget(epochs=2, checkpoint_seconds=0)
    whole = rl.train(settings, stream, budget=budget, threads=1, out=tmp_path / "whole")
    stop = lambda run, line: line["iteration"] == 11  # noqa: E731
    rl.train(settings, stream, budget=budget, threads=1, out=tmp_path / "run", callbacks=[stop])
    again = rl.resume(tmp_path / "run", env=stream)
    assert again.state["params"]["weights"].flat.equal(whole.state["params"]["weights"].flat)
    assert again.matrix.nan_to_num().equal(whole.matrix.nan_to_num())


def test_what_has_no_samples_has_no_epochs():
    for settings, problem in ((TINY, "CartPole-v1"), (rl.MAML(), "sinusoid"), (TINY, rl.stream("cartpole-conflicts"))):
        with pytest.raises(SettingError, match=r"epochs is 2, but .* has no samples to pass over: give steps instead"):
            rl.train(settings, problem, epochs=2)
    stream = rl.stream([data("a", 100), data("b", 34)], order="all")
    with pytest.raises(SettingError, match="differ in size and learners meet them in several orders"):
        rl.train(rl.Classifier(batch_size=5, num_steps=4), stream, epochs=1)
    alike = rl.stream([data("a", 100), data("b", 101)], order="all")
    assert rl.train(rl.Classifier(batch_size=5, num_steps=4, hidden_sizes=()), alike, epochs=1).iterations == (5, 5)


# ---------------------------------------------------------------------- what is no budget, no seed, no learner


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "x"}, "budget: steps is 'x', expected a whole number"),
        ({"steps": 1.5}, "expected a whole number"),
        ({"steps": True}, "expected a whole number"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": [1]}, "expected one number"),
        ({"epochs": -1}, "epochs is -1, expected a number of at least 0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"eval_episodes": -1}, "eval_episodes is -1, expected 0 or more"),
        ({"target": float("nan")}, "target is nan"),
        ({"checkpoint_seconds": None}, "checkpoint_seconds is None, expected a number"),
    ],
)
def test_a_budget_of_another_type_is_refused(given, message):
    with pytest.raises(SettingError, match=message):
        rl.Budget(**given)


def test_seeds_are_a_count_or_whole_numbers_of_any_kind(tmp_path):
    assert chosen_seeds(3) == chosen_seeds(np.int64(3)) == chosen_seeds(range(3)) == (0, 1, 2)
    assert chosen_seeds(np.arange(100, 103)) == chosen_seeds(torch.arange(100, 103)) == (100, 101, 102)
    assert all(type(seed) is int for seed in chosen_seeds([np.int32(7), 8]))
    run = rl.train(TINY, "CartPole-v1", seeds=np.arange(4), budget=rl.Budget(steps=16, **QUIET), out=tmp_path / "run")
    assert rl.load(tmp_path / "run").experiment.seeds == run.experiment.seeds == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "seeds", [1.5, True, "3", None, [0.5, 0.7], [True, 2], [-1], -1, 0, [], [3, 3], [1 << 63], np.array([0.5]), [[1]]]
)
def test_what_are_no_seeds_is_refused(seeds):
    with pytest.raises(SettingError, match="seeds"):
        rl.train(TINY, "CartPole-v1", seeds=seeds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"problem": None}, "can't be None, expected a name"),
        ({"problem": 3}, "can't be 3, expected a name"),
        ({"problem": Standing()}, "which is made already"),
        ({"problem": gym.make_vec("CartPole-v1", num_envs=2)}, "is a vector environment|made already|VectorEnv"),
        ({"agent": rl.A2C}, r"expected the settings of one, such as A2C\(\)"),
        ({"agent": None}, "agent is None"),
        ({"budget": 1000}, "budget is 1000, expected one such as"),
        ({"steps": 100, "epochs": 1}, "steps, epochs say the same twice"),
        ({"steps": 100, "budget": rl.Budget()}, "steps, budget say the same twice"),
        ({"lifelong": rl.EWC()}, "lifelong is EWC, expected a list of methods"),
        ({"out": 5}, "out is 5, expected the folder"),
        ({"threads": -1}, "threads is -1, expected 0 to"),
        ({"device": 5}, "device is 5, expected text"),
    ],
)
def test_what_is_no_argument_of_train_is_a_sentence(given, message):
    arguments = {"agent": TINY, "problem": "CartPole-v1", **given}
    with pytest.raises(SettingError, match=message):
        rl.train(**arguments)


def test_what_a_configuration_has_no_form_for_is_found_before_anything_is_written(tmp_path):
    problem = rl.task(
        "CartPole-v1", native=False, settings={"render_mode": None, "sutton_barto_reward": np.bool_(True)}
    )
    run = rl.train(TINY, problem, budget=rl.Budget(steps=16, **QUIET), out=tmp_path / "run")
    assert rl.load(tmp_path / "run").experiment.problem.settings["sutton_barto_reward"] is True
    run.close()

    def made(secret=None):
        return Target("discrete")

    with pytest.raises(SettingError, match="TOML has no form for"):
        rl.train(TINY, rl.task(made, settings={"secret": object()}), steps=16, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
