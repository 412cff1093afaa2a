"""Acting needs nothing that only training needs, and a resume refuses other data than the run began with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.data.samples import DataTask, Samples
from rlmeta.envs.few_shot import FewShot
from rlmeta.envs.native import TabularMDP
from rlmeta.errors import DemonstrationError, SettingError
from rlmeta.learning.digests import digest_of
from rlmeta.rewards import PotentialShaping

GAIL = {"num_envs": 2, "num_steps": 8, "batch_size": 16, "num_epochs": 1, "hidden_sizes": (4,)}
GAIL |= {"discriminator_updates": 2, "discriminator_batch_size": 4, "discriminator_hidden_sizes": (4,), "warm_start": 2}
BUDGET = rl.Budget(steps=48, eval_every=10**6, final_episodes=2, checkpoint_seconds=0)


def stop(run, line):
    """Ends a run before its budget."""
    return line["iteration"] >= 2


@pytest.fixture(scope="module")
def shown():
    """Demonstrations of somebody who knows nothing."""
    run = rl.train(rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(4,)), "CartPole-v1", budget=BUDGET)
    return rl.record(run, 4, deterministic=False)


def imitator(name, demonstrations):
    if name == "cloning":
        return rl.BehaviourCloning(demonstrations=demonstrations, num_steps=4, hidden_sizes=(4,))
    if name == "gail":
        return rl.GAIL(demonstrations=demonstrations, **GAIL)
    reward = rl.AdversarialReward(demonstrations, updates=1, batch_size=4, hidden_sizes=(4,))
    return rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(4,), rewards=(reward,))


@pytest.mark.filterwarnings("ignore:episodes terminate")
@pytest.mark.parametrize("name", ["cloning", "gail"])
def test_a_finished_run_acts_without_its_demonstrations_from_any_folder(name, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown.save("D.demo")
    run = rl.train(imitator(name, "D.demo"), "CartPole-v1", seeds=2, budget=BUDGET, out="run", callbacks=[stop])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(rl.resume("../run").scores) == 2, "the file is found from any folder"
    (tmp_path / "D.demo").rename(tmp_path / "E.demo")
    again = rl.load("../run")
    x = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    assert again.act(x, learner=1) == rl.load("../run").act(x, learner=1) in (0, 1)
    assert again.evaluate(4).returns.equal(rl.load("../run").evaluate(4).returns)
    assert len(rl.record(again, 2)) == 2 and again.module(0, "policy")(torch.zeros(1, 4)).shape == (1, 2)
    assert (
        again.agent.effective_params(again.state)["normalisers"].keys()
        == run.agent.effective_params(run.state)["normalisers"].keys()
    )
    assert main(["eval", "../run", "--episodes", "4"]) == 0
    assert main(["record", "../run", "--episodes", "2", "--out", "own.demo"]) == 0
    with pytest.raises(DemonstrationError, match="no demonstrations at"):
        rl.resume("../run")
    assert main(["resume", "../run", "--demonstrations", "../E.demo", "--quiet"]) == 0
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore:episodes terminate")
def test_a_finished_run_acts_without_its_rewards_and_a_resume_asks_for_them(shown, tmp_path):
    rewards = (PotentialShaping(lambda x: -x[..., 2].abs()),)
    settings = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(4,), rewards=rewards)
    for number, one in enumerate((settings, imitator("reward", shown))):
        folder = tmp_path / str(number)
        run = rl.train(one, "CartPole-v1", budget=BUDGET, out=folder)
        again = rl.load(folder)
        assert again.evaluate(4).returns.equal(run.evaluate(4).returns)
        with pytest.raises(SettingError, match=r"had the rewards <.*pass it again as own=\{'rewards'"):
            rl.resume(folder)
        assert rl.resume(folder, own={"rewards": one.rewards}).scores.equal(run.scores)


@pytest.mark.filterwarnings("ignore:episodes terminate")
@pytest.mark.parametrize("name", ["cloning", "gail", "reward"])
def test_a_resume_refuses_other_demonstrations_whatever_the_learner(name, shown, tmp_path):
    held, other = "rewards" if name == "reward" else "demonstrations", shown.shuffled()
    if name == "reward":
        first, second = imitator(name, shown).rewards, imitator(name, other).rewards
        rl.train(imitator(name, shown), "CartPole-v1", budget=BUDGET, out=tmp_path / "run", callbacks=[stop])
    else:
        first, second = shown, other
        path = str(shown.save(tmp_path / "demo"))
        rl.train(imitator(name, path), "CartPole-v1", budget=BUDGET, out=tmp_path / "run", callbacks=[stop])
        other.save(path)
        with pytest.raises(SettingError, match=f"the {held} are not those the run began with"):
            rl.resume(tmp_path / "run")
    for again in (rl.resume, rl.load):
        with pytest.raises(SettingError, match=f"the {held} are not those the run began with"):
            again(tmp_path / "run", own={held: second})
    assert rl.resume(tmp_path / "run", own={held: first}).env_steps >= 48


# ---------------------------------------------------------------------- data of the problem


def samples(shift: float) -> Samples:
    x = torch.linspace(-1, 1, 60).reshape(20, 3) + shift
    return Samples(x, (x.sum(-1) > 0).long())


def task_of(shift: float, name: str = "mine") -> DataTask:
    return DataTask(name, samples(shift), samples(0.0), (0, 1), 2)


@dataclass
class Own:
    """A few-shot family of the user's, that holds an array and a cache."""

    table: torch.Tensor

    def __post_init__(self):
        self.cache = None


def few_shot(ink: float) -> FewShot:
    images = torch.rand(24, 4, 4, generator=torch.Generator().manual_seed(1)) * ink
    classes = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    return FewShot(images, torch.arange(24) // 4, classes, ways=2, shots=1, queries=2)


def mdp(p: float) -> TabularMDP:
    transitions = np.array([[[p, 1 - p], [1 - p, p]], [[0.5, 0.5], [0.5, 0.5]]])
    return TabularMDP(transitions, np.zeros((2, 2, 2)), max_episode_steps=5)


PROBLEMS = {
    "data": (rl.Classifier(batch_size=5, hidden_sizes=(4,), num_steps=2), task_of),
    "stream": (
        rl.Classifier(batch_size=5, hidden_sizes=(4,), num_steps=2),
        lambda shift: rl.stream([task_of(0.0, "a"), task_of(shift, "b")]),
    ),
    "few-shot": (rl.MAML(num_envs=2), lambda shift: few_shot(1.0 + shift)),
    "mdp": (rl.A2C(num_envs=2, num_steps=8), lambda shift: rl.task(mdp(0.4 + shift), name="mdp")),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_resume_and_a_load_refuse_other_data_of_the_problem(name, tmp_path):
    settings, make = PROBLEMS[name]
    rl.train(settings, make(0.0), budget=BUDGET, out=tmp_path / "run", callbacks=[stop])
    for again in (rl.resume, rl.load):
        with pytest.raises(SettingError, match="the data of the problem are not those the run began with"):
            again(tmp_path / "run", env=make(0.25))
    assert rl.resume(tmp_path / "run", env=make(0.0)).env_steps >= 48


def test_a_digest_is_of_arrays_by_place_type_and_shape_alone():
    x = torch.arange(6.0)
    assert digest_of({"a": 1, "b": "text", "c": rl.PPO(), "d": lambda: x}) is None
    same = [{"a": x, "b": x + 1}, {"b": x + 1, "a": x.clone()}]
    assert digest_of(same[0]) == digest_of(same[1])
    others = [{"a": x + 1, "b": x}, {"a": x.double(), "b": x + 1}, {"a": x.reshape(2, 3), "b": x + 1}, {"a": x}]
    assert len({digest_of(one) for one in (*same, *others)}) == 5
    assert digest_of(x.numpy()) != digest_of(x.numpy() + 1) and digest_of(torch.empty(0)) is not None
    family, used = Own(x), Own(x)
    used.cache = x + 5
    assert digest_of(family) == digest_of(used) != digest_of(Own(x + 1))
    circle = [x]
    circle.append(circle)
    assert digest_of(circle) is not None


def test_the_same_named_data_from_another_folder_are_refused(tmp_path, monkeypatch):
    from rlmeta.data import sets

    settings = rl.Classifier(hidden_sizes=(4,))
    rl.train(settings, "split-digits", budget=rl.Budget(steps=320, log_points=1), out=tmp_path / "run")
    found = sets.labelled("digits")
    changed = found._replace(train=Samples(255 - found.train.observation, found.train.target))
    monkeypatch.setattr(sets, "_digits", lambda: changed)
    with pytest.raises(SettingError, match="the data of the problem are not those the run began with"):
        rl.load(tmp_path / "run")
