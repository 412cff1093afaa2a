"""Initial weights from another run, actions for a batch of observations, and a budget's fields as arguments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import SettingError

SMALL = rl.PPO(num_envs=2, num_steps=16, batch_size=32, num_epochs=1, hidden_sizes=(8,))


def train(settings: Any = SMALL, steps: int = 64, **others: Any) -> rl.Run:
    return rl.train(settings, "CartPole-v1", steps=steps, final_episodes=2, eval_episodes=2, threads=1, **others)


def start_of(run: rl.Run, settings: Any, **others: Any) -> rl.Run:
    """A run before its first step: learning rates of next to nothing leave the weights where they began."""
    from rlmeta.runs.train import prepare

    return prepare(settings, "CartPole-v1", rl.Budget(steps=32), init=run, **others)


def test_learners_begin_with_their_counterparts_weights(tmp_path):
    source = train(seeds=2, out=tmp_path / "source")
    begun = start_of(source, SMALL, seeds=2)
    for name, value in begun.state["params"]["weights"].items():
        assert torch.equal(value, source.state["params"]["weights"][name])
    assert all(not bool(value.any()) for value in begun.state["count"].values())
    by_folder = rl.train(SMALL, "CartPole-v1", steps=32, seeds=2, init=tmp_path / "source", threads=1)
    in_memory = rl.train(SMALL, "CartPole-v1", steps=32, seeds=2, init=source, threads=1)
    for name, value in by_folder.state["params"]["weights"].items():
        assert torch.equal(value, in_memory.state["params"]["weights"][name])


def test_another_number_of_learners_begins_with_the_best():
    source = train(seeds=3)
    begun = start_of(source, SMALL, seeds=2)
    for name, value in begun.state["params"]["weights"].items():
        assert torch.equal(value[0], source.state["params"]["weights"][name][source.best_learner])
        assert torch.equal(value[1], value[0])


def test_running_statistics_come_along_or_are_asked_for():
    import dataclasses

    white = dataclasses.replace(SMALL, normalise_observation=True)
    source = train(white)
    begun = start_of(source, white)
    for name, value in begun.state["params"]["normalisers"]["observation"].items():
        assert torch.equal(value, source.state["params"]["normalisers"]["observation"][name])
    with pytest.raises(SettingError, match="with normalise_observation: set normalise_observation to true"):
        start_of(source, SMALL)
    with pytest.raises(SettingError, match="without normalise_observation: set normalise_observation to false"):
        start_of(train(), white)


def test_what_has_no_counterpart_begins_anew_and_is_named():
    a2c = rl.A2C(num_envs=2, num_steps=4, hidden_sizes=(8,))
    source = train(a2c)
    only = {n: v for n, v in source.state["params"]["weights"].items() if n.startswith("policy.")}
    source.state["params"]["weights"] = only
    with pytest.warns(RuntimeWarning, match="value of ppo begin anew"):
        begun = start_of(source, SMALL)
    assert all(torch.equal(begun.state["params"]["weights"][name], value) for name, value in only.items())
    import dataclasses

    with pytest.raises(SettingError, match="no network of ppo has the names and shapes"):
        start_of(source, dataclasses.replace(SMALL, hidden_sizes=(9,)))


@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_a_batch_of_observations_gets_a_batch_of_actions(task):
    run = rl.train(SMALL, task, steps=64, seeds=2, final_episodes=2, threads=1)
    env = gym.make_vec(task, 3, vectorization_mode="sync")
    observation, _ = env.reset(seed=0)
    actions = run.act(observation)
    assert actions.shape == env.action_space.shape and env.action_space.contains(actions)
    for row in range(3):
        np.testing.assert_allclose(run.act(observation[row]), actions[row], rtol=1e-5)
    env.step(actions)


def test_the_budgets_fields_are_arguments():
    run = train(steps=96, log_points=3, eval_every=32)
    assert (run.experiment.budget.log_points, run.experiment.budget.final_episodes) == (3, 2)
    with pytest.raises(SettingError, match="eval_every, budget say the same twice"):
        rl.train(SMALL, "CartPole-v1", eval_every=10, budget=rl.Budget(steps=64))


def test_the_command_begins_with_a_runs_weights(tmp_path, capsys):
    source = train(out=tmp_path / "source")
    small = "--num-envs 2 --num-steps 16 --batch-size 32 --hidden-sizes 8 --final-episodes 2 --preset none"
    slow = "--learning-rate 1e-30 --learning-rate-schedule constant --steps 32 --quiet"
    command = ["train", "ppo", "CartPole-v1", *small.split(), *slow.split(), "--init"]
    assert main([*command, str(tmp_path / "source"), "--out", str(tmp_path / "run")]) == 0
    begun = rl.load(tmp_path / "run")
    for name, value in begun.state["params"]["weights"].items():
        torch.testing.assert_close(value, source.state["params"]["weights"][name])
    assert f'init = "{tmp_path / "source"}"' in (tmp_path / "run" / "config.toml").read_text()
    assert main([*command, str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) != 0
    assert "nowhere is not the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
