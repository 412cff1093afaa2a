"""A family of one's own that draws something else than it says is refused before anything is trained."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.envs.families import FewShot, Quadratics, task_keys
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree


def box(*shape):
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)


class Own:
    """Samples of two numbers, and one number or one of three classes for each; `change` spoils them."""

    observation_space, action_space = box(2), box(1)

    def __init__(self, change=lambda tasks, split: tasks):
        self.change = change

    def tasks(self, key, counter, count, split):
        keys = task_keys(key, counter, count, split)
        drawn = {}
        for part, n in (("support", 4), ("query", 6)):
            x = random.normal(keys, part, 0, (n, 2))
            target = random.normal(keys, f"{part} target", 0, (n, 1))
            if isinstance(self.action_space, gym.spaces.Discrete):
                target = random.integers(keys, part, 1, (n,), 3)
            drawn[part] = {"observation": x, "target": target}
        return self.change(drawn, split)


class OwnClasses(Own):
    action_space = gym.spaces.Discrete(3)


def leaf(part, name, change, only=None):
    """A change of one entry of the tasks, of one split."""

    def made(tasks, split):
        if only not in (None, split):
            return tasks
        return {**tasks, part: {**tasks[part], name: change(tasks[part][name])}}

    return made


def nan_in_task_1(x):
    return x.clone().index_fill_(1, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Own, lambda t, _: {"support": t["support"]}, "split 'train': query has no observation: tasks are"),
        (Own, lambda t, _: None, "support has no observation"),
        (Own, lambda t, _: tuple(t.values()), "support has no observation"),
        (Own, lambda t, _: {p: {"observation": v["observation"]} for p, v in t.items()}, "support has no target"),
        (Own, leaf("query", "observation", lambda x: x[..., :1]), r"query: got \[1, 2, 6, 1\] .* \[1, 2, samples, 2\]"),
        (Own, leaf("support", "target", lambda x: x.squeeze(-1)), r"got \[1, 2, 4\] .* expected \[1, 2, samples, 1\]"),
        (Own, leaf("query", "target", lambda x: x[:, :, :3]), "query has 6 observations and 3 targets"),
        (Own, leaf("query", "target", lambda x: x[:, :, :0]), r"got \[1, 2, 0, 1\]"),
        (Own, lambda t, _: tree.map(lambda x: x[0], t), r"got \[2, 4, 2\] for 2 tasks of one learner"),
        (Own, leaf("support", "target", nan_in_task_1), "support: task 1 has numbers that are not finite"),
        (Own, leaf("query", "observation", nan_in_task_1, only="test"), "Own: split 'test': query: task 1 has"),
        (OwnClasses, leaf("query", "target", lambda x: x + 1), "targets are 1 to 3, expected 0 to 2"),
        (OwnClasses, leaf("query", "target", lambda x: x - 1), "targets are -1 to 1, expected 0 to 2"),
        (OwnClasses, leaf("query", "target", lambda x: x.float()), "targets are torch.float32, expected whole numbers"),
    ],
)
def test_a_family_of_other_samples_than_its_spaces_is_refused(kind, change, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        rl.train(rl.MAML(num_envs=2), kind(change), steps=4, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [Own, OwnClasses])
def test_a_family_that_keeps_its_word_is_trained_on(kind):
    assert rl.train(rl.MAML(num_envs=2), kind(), steps=4).scores.isfinite().all()


def test_observations_of_several_parts_are_fine_as_long_as_they_are_finite():
    class Parts(Own):
        observation_space = gym.spaces.Dict({"a": box(2), "b": box(1)})

    def parts(x):
        return {"a": x, "b": x[..., :1]}

    def both(tasks, split):
        return leaf("query", "observation", parts)(leaf("support", "observation", parts)(tasks, split), split)

    assert rl.train(rl.MAML(num_envs=2), Parts(both), steps=4).scores.isfinite().all()
    with pytest.raises(SettingError, match="support: task 1 has"):
        rl.train(rl.MAML(num_envs=2), Parts(leaf("support", "observation", lambda x: parts(nan_in_task_1(x)))), steps=4)


@pytest.mark.parametrize("missing", ["train", "validation", "test"])
def test_a_split_without_classes_is_found_before_training(missing, tmp_path):
    classes = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    del classes[missing]
    data = torch.rand(24, 2), torch.arange(24) // 4
    with pytest.raises(SettingError, match=f"no classes for split '{missing}', only for"):
        rl.train(rl.MAML(num_envs=2), FewShot(*data, classes, 2, 1, 2), steps=4, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_is_asked_at_one_step_for_all_too():
    """As evaluations do, which would find it after training."""

    class OfItsStep(Quadratics):
        def loss(self, weights, problem, step):
            return super().loss(weights, problem, step) * (1 + step[0])

    with pytest.raises(IndexError):
        rl.train(rl.LearnedOptimizer(num_envs=2), OfItsStep(2), steps=40)


class OwnProblems(Quadratics):
    """Quadratics of which something is changed."""

    def __init__(self, start=lambda w: w, loss=lambda x: x):
        super().__init__(2)
        object.__setattr__(self, "changes", (start, loss))

    def start(self, problem):
        return tree.map(self.changes[0], super().start(problem))

    def loss(self, weights, problem, step):
        return self.changes[1](super().loss(weights, problem, step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": torch.Tensor.detach}, r"split 'train': the loss at step \[1, 2\] does not depend on the weights"),
        ({"loss": torch.sum}, r"the loss at step \[1, 2\] is \[\], expected \[\*L, K\], one for each problem"),
        ({"loss": lambda x: x / 0.0}, r"is \[inf, inf\] at the start"),
        ({"start": lambda w: w[0]}, r"weight x is \[2, 2\], expected \[\*L, K, \.\.\.\] with K = 2"),
    ],
)
def test_problems_without_a_loss_of_their_weights_are_refused(changes, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        rl.train(rl.LearnedOptimizer(num_envs=2), OwnProblems(**changes), steps=40, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
