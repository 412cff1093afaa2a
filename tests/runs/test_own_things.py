"""What is the user's own (samples, methods, families, networks) trains, and is asked for again where it is read."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import pytest
import torch
from torch import nn

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.tree import flatten
from rlmeta.lifelong import Method
from tests.lifelong.toy import learner, points


class Mine(Method):
    name = "mine"


def test_a_run_on_own_samples_with_an_own_method_is_read_back(tmp_path):
    methods = [Mine(), rl.Replay(size=6)]
    run = rl.train(learner(), points(2), steps=80, lifelong=methods, out=tmp_path / "run")
    again = rl.load(tmp_path / "run", env=points(2), lifelong=methods)
    for name, value in flatten(run.state).items():
        assert torch.equal(value, flatten(again.state)[name]), name
    for given, message in (((), "pass them again as lifelong="), ([rl.Replay(size=6)], "mine, replay, got replay")):
        with pytest.raises(SettingError, match=message):
            rl.load(tmp_path / "run", env=points(2), lifelong=given)


@dataclass(frozen=True)
class Lines:
    """Straight lines through 0, of a slope of their own."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def tasks(self, key, counter, count, split):
        keys = random.fold(random.fold(random.fold(key, split), counter).unsqueeze(-1), torch.arange(count))
        slope = random.normal(keys, "slope", 0, (1, 1))
        x = random.normal(keys, "x", 0, (8, 1))
        cuts = {"support": slice(0, 4), "query": slice(4, 8)}
        return {name: {"observation": x[..., c, :], "target": (slope * x)[..., c, :]} for name, c in cuts.items()}


def test_a_family_of_ones_own_needs_no_name(tmp_path):
    run = rl.train(rl.MAML(num_envs=4), Lines(), steps=8, seeds=2, out=tmp_path / "run")
    assert run.experiment.problem.name == "Lines" and run.scores.isfinite().all()
    with pytest.raises(SettingError, match=r"learned from your own family 'Lines': pass it again as env="):
        rl.load(tmp_path / "run")
    assert torch.equal(rl.load(tmp_path / "run", env=Lines()).evaluate(64).returns, run.evaluation.returns)
    with pytest.raises(SettingError, match="'Lines' is a family of tasks for meta-learners, Regressor learns one task"):
        rl.train(rl.Regressor(), Lines(), steps=8)


def features(space):
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh())


def test_a_network_inside_anothers_settings_is_never_loaded_from_a_folder(tmp_path):
    settings = rl.MAML(rl.Regressor(network=features), num_envs=4)
    run = rl.train(settings, Lines(), steps=8, seeds=2, out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"had the network .*:features: pass it again as network="):
        rl.load(tmp_path / "run", env=Lines())
    again = rl.load(tmp_path / "run", env=Lines(), network=features)
    assert again.experiment.variants == (settings,)
    assert torch.equal(again.evaluate(64).returns, run.evaluation.returns)


def test_a_network_of_rlmeta_is_loaded(tmp_path):
    settings = rl.MAML(rl.Classifier(network=rl.nn.strided_convolutions), num_envs=2)
    run = rl.train(settings, "few-shot-digits", steps=4, out=tmp_path / "run")
    again = rl.load(tmp_path / "run")
    assert again.experiment.variants == (settings,)
    assert torch.equal(again.evaluate(8).returns, run.evaluate(8).returns)


def test_a_method_of_ones_own_is_never_taken_for_another_of_its_name(tmp_path):
    @dataclass(frozen=True)
    class EWC(rl.EWC):
        """Its name is that of rlmeta's."""

    rl.train(learner(), points(2), steps=80, lifelong=[EWC()], out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"pass them again as lifelong= \(on the command line --lifelong .*EWC"):
        rl.load(tmp_path / "run", env=points(2))


def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    def network(space):
        return nn.Linear(space.shape[0], 8)

    with pytest.raises(SettingError, match=r"torch\.uint8 .* begin with x.float"):
        rl.train(rl.Classifier(network=network), "split-digits", steps=64, out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"network= fails for two observations, torch\.float32"):
        rl.train(rl.PPO(network=lambda space: nn.Linear(7, 8)), "CartPole-v1", steps=64, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
