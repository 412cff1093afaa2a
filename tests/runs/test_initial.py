"""Initial weights from another run, actions for a batch of observations, and a budget's fields as arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import SettingError, SpaceError
from rlmeta.runs.train import prepare

SMALL = rl.PPO(num_envs=2, num_steps=16, batch_size=32, num_epochs=1, hidden_sizes=(8,))


def train(settings: Any = SMALL, steps: int = 64, **others: Any) -> rl.Run:
    return rl.train(settings, "CartPole-v1", steps=steps, final_episodes=2, eval_episodes=2, threads=1, **others)


def start_of(run: rl.Run, settings: Any, **others: Any) -> rl.Run:
    """A run before its first step: learning rates of next to nothing leave the weights where they began."""
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
    with pytest.warns(RuntimeWarning, match="value of ppo keep their initial weights"):
        begun = start_of(source, SMALL)
    assert all(torch.equal(begun.state["params"]["weights"][name], value) for name, value in only.items())
    with pytest.raises(SettingError, match="has no network 'policy' of the names and shapes that ppo's has"):
        start_of(source, dataclasses.replace(SMALL, hidden_sizes=(9,)))


def test_a_target_network_that_the_source_lacks_is_a_copy_of_its_network():
    small = rl.DQN(num_envs=2, num_steps=4, gradient_steps=1, batch_size=8, capacity=80, learning_starts=8,
                   hidden_sizes=(8,))  # fmt: skip
    source = train(small)
    begun = start_of(source, dataclasses.replace(small, average_rate=0.1))
    p = begun.state["params"]
    for name, value in p["weights"].items():
        assert torch.equal(value, source.state["params"]["weights"][name])
        assert torch.equal(p["buffers"][name.replace("q.", "average.")], value)
    assert not torch.equal(p["buffers"]["target.head.streams.linear.bias"], p["weights"]["q.head.streams.linear.bias"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "relu"}, "was trained with activation = 'tanh': it is 'relu' here"),
        ({"action_bounds": "clip"}, "was trained with action_bounds = 'scale': it is 'clip' here"),
    ],
)
@pytest.mark.filterwarnings("ignore:action_bounds")
def test_weights_that_would_mean_something_else_are_refused(change, words):
    source = rl.train(SMALL, "Pendulum-v1", steps=32, final_episodes=2, threads=1)
    with pytest.raises(SettingError, match=words):
        prepare(dataclasses.replace(SMALL, **change), "Pendulum-v1", rl.Budget(steps=32), init=source)


def test_what_the_weights_saw_is_seen_again():
    memory = dataclasses.replace(SMALL, memory="gru", memory_size=8, sees=("reward",))
    source = rl.train(memory, "CartPole-positions", steps=32, final_episodes=2, threads=1)
    with pytest.raises(SettingError, match=r"was trained with sees = \('reward',\): it is \('start',\) here, set the"):
        prepare(dataclasses.replace(memory, sees=("start",)), "CartPole-positions", rl.Budget(steps=32), init=source)
    prepare(memory, "CartPole-positions", rl.Budget(steps=32), init=source).close()


def tanh(space: Any) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())


def relu(space: Any) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())


def test_another_network_of_the_same_shapes_is_refused():
    source = train(dataclasses.replace(SMALL, network=tanh))
    with pytest.raises(SettingError, match=r"was trained with network = '.*:tanh': it is '.*:relu' here"):
        start_of(source, dataclasses.replace(SMALL, network=relu))


@pytest.mark.parametrize("init", [3, rl.PPO, SMALL], ids=["number", "class", "settings"])
def test_what_is_no_run_is_refused(init):
    with pytest.raises(SettingError, match=r"^init is .*, expected a trained run, or the folder of one"):
        start_of(init, SMALL)


def test_another_head_and_other_spaces_are_refused():
    source = rl.train(dataclasses.replace(SMALL, activation="relu"), "Pendulum-v1", steps=32, final_episodes=2)
    with pytest.raises(SettingError, match="ends in GaussianHead, that of td3 in DeterministicHead"):
        prepare(rl.TD3(hidden_sizes=(8,)), "Pendulum-v1", rl.Budget(steps=2000), init=source)
    with pytest.raises(SettingError, match="has no network 'policy'"):
        prepare(SMALL, "Acrobot-v1", rl.Budget(steps=32), init=train())


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


def test_rows_of_a_tuple_are_not_taken_for_its_parts():
    space = gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.Discrete(4)])

    class Pairs(gym.Env):
        observation_space, action_space = space, gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return (1, 2), {}

        def step(self, action):
            return (0, 3), 1.0, True, False, {}

    run = rl.train(SMALL, Pairs, steps=32, final_episodes=2, threads=1)
    assert run.act((1, 2)) in (0, 1) and run.act((np.array([1, 2, 0]), np.array([2, 3, 3]))).shape == (3,)
    for wrong in ([(1, 2), (0, 3)], np.array([[1, 2], [2, 3], [0, 3]])):
        with pytest.raises(SpaceError, match="expected a tuple of its 2 parts"):
            run.act(wrong)


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
