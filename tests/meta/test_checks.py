"""A family of one's own that draws something else than it says is refused before anything is trained."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.envs.few_shot import FewShot
from rlmeta.envs.minimisation import Quadratics
from rlmeta.envs.task_families import task_keys
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
        (Own, leaf("query", "observation", lambda x: x[..., :1]), r"query: got \[3, 2, 6, 1\] .* \[3, 2, samples, 2\]"),
        (Own, leaf("support", "target", lambda x: x.squeeze(-1)), r"got \[3, 2, 4\] .* expected \[3, 2, samples, 1\]"),
        (Own, leaf("query", "target", lambda x: x[:, :, :3]), "query has 6 observations and 3 targets"),
        (Own, leaf("query", "target", lambda x: x[:, :, :0]), r"got \[3, 2, 0, 1\]"),
        (Own, lambda t, _: tree.map(lambda x: x[0], t), r"got \[2, 4, 2\] for 2 tasks of each of 3 learners"),
        (Own, leaf("support", "target", nan_in_task_1), "support: task 1 has numbers that are not finite"),
        (Own, leaf("query", "observation", nan_in_task_1, only="test"), "Own: split 'test': query: task 1 has"),
        (OwnClasses, leaf("query", "target", lambda x: x + 1), "targets are 1 to 3, expected 0 to 2"),
        (OwnClasses, leaf("query", "target", lambda x: x - 1), "targets are -1 to 1, expected 0 to 2"),
        (OwnClasses, leaf("query", "target", lambda x: x.float()), "targets are torch.float32, expected whole numbers"),
        (OwnClasses, leaf("query", "target", lambda x: x.int()), r"torch.int32, expected whole numbers \(int64\)"),
        (Own, leaf("query", "target", lambda x: x.tolist()), "query: got list, expected a tensor or an array"),
        (Own, lambda t, _: tree.map(lambda x: x[:1], t), r"got \[1, 2, 4, 2\] .* expected \[3, 2, samples, 2\]"),
        (Own, leaf("query", "target", lambda x: x + torch.rand(1)), "split 'train': the same key draws other tasks"),
        (Own, lambda t, split: Own().tasks(random.make_keys(range(3)), 0, 2, "train"), "draw the very same tasks"),
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


def test_a_loss_is_asked_at_one_step_for_all_too(tmp_path):
    """As evaluations do, which would find it after training."""

    class OfItsStep(Quadratics):
        def loss(self, weights, problem, step):
            return super().loss(weights, problem, step) * (1 + step[0])

    with pytest.raises(IndexError):
        rl.train(rl.LearnedOptimizer(num_envs=2), OfItsStep(2), steps=40, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
        ({"loss": torch.Tensor.detach}, r"split 'train': the loss at step \[3, 2\] does not depend on the weights"),
        ({"loss": torch.sum}, r"the loss at step \[3, 2\] is \[\], expected \[3, 2\], one for each problem"),
        ({"loss": lambda x: x / 0.0}, r"is \[inf, inf, .*\] at the start"),
        (
            {"start": lambda w: w[0]},
            r"weight x is \[2, 2\], expected \[3, 2, \.\.\.\] for 2 tasks of each of 3 learners",
        ),
    ],
)
def test_problems_without_a_loss_of_their_weights_are_refused(changes, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        rl.train(rl.LearnedOptimizer(num_envs=2), OwnProblems(**changes), steps=40, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"observation_space": None}, "observation_space is None, expected the gymnasium space of one input"),
        ({"action_space": (1,)}, r"action_space is \(1,\), expected the gymnasium space of one target"),
        ({"tasks": lambda self, n: None}, r"tasks\(n\) can't be called as tasks\(key, counter, count, split\)"),
        ({"tasks": 3}, r"has no tasks\(key, counter, count, split\)"),
    ],
)
def test_what_is_no_family_is_refused(attributes, message, tmp_path):
    spoilt = type("Spoilt", (Own,), attributes)
    with pytest.raises(SettingError, match=f"Spoilt.*{message}"):
        rl.train(rl.MAML(num_envs=2), spoilt(), steps=4, out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"Own is the class of a family: give one of it, such as Own\(\)"):
        rl.train(rl.MAML(num_envs=2), Own, steps=4, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_family_calls_its_own_means_nothing(tmp_path):
    """Attributes of the names that rlmeta's families of environments and of functions have."""

    class Named(Own):
        base, world, start, ranges = "mine", 3, 0.5, ()

    run = rl.train(rl.MAML(num_envs=2), Named(), steps=4, out=tmp_path / "run")
    again = rl.load(tmp_path / "run", env=Named())
    assert torch.equal(run.evaluation.returns, again.evaluation.returns)


@pytest.mark.parametrize("kind", [Own, OwnClasses])
def test_a_family_of_arrays_is_that_of_tensors(kind):
    """numpy's doubles are floats."""

    def arrays(tasks, split):
        return tree.map(lambda x: x.double().numpy() if x.is_floating_point() else x.numpy(), tasks)

    runs = [rl.train(rl.MAML(num_envs=3), kind(*change), steps=30, seeds=2) for change in ((), (arrays,))]
    assert torch.equal(runs[0].scores, runs[1].scores)
    for name, value in runs[0].state["params"]["weights"].items():
        assert torch.equal(value, runs[1].state["params"]["weights"][name])


def test_a_family_may_have_one_task_alone():
    def one(tasks, split):
        return tree.map(lambda x: x[:1, :1].expand_as(x) * 0 + 1, tasks)

    assert rl.train(rl.MAML(num_envs=2), Own(one), steps=4).scores.isfinite().all()


@pytest.mark.parametrize(
    "learner", [rl.DQN(), rl.BehaviourCloning(), rl.GAIL(), rl.IRL(), rl.MAML(), rl.LearnedOptimizer()]
)
def test_learners_that_maml_can_not_adapt_are_refused_at_once(learner):
    with pytest.raises(SettingError, match=f"MAML can't adapt {type(learner).__name__}: give it a Regressor"):
        rl.MAML(learner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner": rl.Regressor}, "expected the settings of one"),
        ({"learner": "regressor"}, "learner is 'regressor', expected the settings of one"),
        ({"inner_steps": -1}, "inner_steps is -1, expected at least 0"),
        ({"inner_steps": True}, "inner_steps is True, expected a whole number"),
        ({"inner_steps": [1, 2]}, r"inner_steps is \[1, 2\], expected one number"),
        ({"inner_rate": float("inf")}, "inner_rate is inf, expected a finite number"),
        ({"inner_rate": [0.1, float("inf")]}, "inner_rate is inf, expected a finite number"),
        ({"inner_rate": float("nan")}, "inner_rate is nan, expected a number"),
        ({"inner_rate": torch.tensor(0.1)}, "inner_rate is tensor"),
        ({"inner_rate": np.array([0.1, 0.2])}, r"inner_rate is array\(\[0.1, 0.2\]\), expected a number"),
        ({"meta_rate": -1}, "meta_rate is -1, expected at least 0"),
    ],
)
def test_settings_of_maml_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        rl.MAML(**settings)


@pytest.mark.parametrize("problem", ["sinusoid", "few-shot-digits", "quadratics", "digit-mlps"])
def test_nothing_is_made_on_a_default_device(problem):
    """Where the default device is one without numbers, a run has the very numbers of one without."""
    minimised = problem in ("quadratics", "digit-mlps")
    settings = rl.LearnedOptimizer(num_envs=4, horizon=4, unroll=2) if minimised else rl.MAML(num_envs=4)
    budget = rl.Budget(steps=16, eval_episodes=2, final_episodes=2)
    expected = rl.train(settings, problem, budget=budget).scores
    with torch.device("meta"):
        found = rl.train(settings, rl.family(problem), budget=budget).scores
    assert found.device.type == "cpu" and torch.equal(found, expected)
