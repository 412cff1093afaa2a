"""What is given again to load or resume a run: settings that differ from the run's are refused, others come back."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.envs import native
from rlmeta.errors import SettingError
from rlmeta.learning.settings import PerLearner
from rlmeta.lifelong import Method
from tests.lifelong.toy import learner, points
from tests.runs.test_own_things import Lines

CODE = [__name__]
SMALL = {"num_envs": 2, "num_steps": 8, "hidden_sizes": (4,)}
BUDGET = {"steps": 32, "eval_every": 10**6, "final_episodes": 2, "threads": 1}


@dataclass(frozen=True)
class Centre:
    """Pays for keeping the cart near 0."""

    coefficient: PerLearner = 0.5
    power: int = 1
    name: str = "centre"

    def init(self, agent: Any, state: Any, world: Any) -> dict[str, Any]:
        return {}

    def relabel(self, agent: Any, state: Any, memory: Any, rollout: Any, rewards: Any) -> tuple[Any, Any, Any]:
        bonus = -(rollout["next_observation"][..., 0].abs() ** self.power) * rollout["valid"]
        return memory, {**rewards, self.name: bonus}, {}


@dataclass(frozen=True)
class Anchor(Method):
    """A method of one's own with a setting."""

    strength: PerLearner = 1.0
    name = "anchor"


def train(folder: Path, *rewards: Any, **others: Any) -> rl.Run:
    return rl.train(rl.A2C(**SMALL, rewards=rewards, **others), "CartPole-v1", out=folder, **BUDGET)


def test_rewards_with_other_settings_are_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", Centre(0.1))
    for again in (rl.resume, rl.load):
        with pytest.raises(
            SettingError, match=r"had the reward Centre with coefficient = 0\.1, this one has 0\.7: give"
        ):
            again(tmp_path / "run", own={"rewards": (Centre(0.7),)})
        with pytest.raises(SettingError, match=r"had the rewards Centre, got also RND: give the same"):
            again(tmp_path / "run", own={"rewards": (Centre(0.1), rl.RND())})
    assert rl.resume(tmp_path / "run", own={"rewards": (Centre(0.1),)}).scores.equal(run.scores)


def test_whole_numbers_may_be_given_again_as_decimals(tmp_path: Path) -> None:
    train(tmp_path / "run", Centre(2, 1))
    assert rl.load(tmp_path / "run", own={"rewards": (Centre(2.0, 1),)}).scores.isfinite().all()


def test_rewards_come_back_from_a_module_that_is_allowed(tmp_path: Path) -> None:
    train(tmp_path / "run", Centre(0.1, 2), rl.RND(hidden_sizes=(4,), batch_size=8))
    with pytest.raises(SettingError, match=rf"pass it again as own=.*, or allow the module as code=\['{__name__}'\]"):
        rl.resume(tmp_path / "run", steps=64)
    rewards = rl.resume(tmp_path / "run", steps=64, code=CODE).experiment.variants[0].rewards
    assert rewards == (Centre(0.1, 2), rl.RND(hidden_sizes=(4,), batch_size=8))
    again = rl.resume(tmp_path / "run", steps=96, own={"rewards": (Centre(0.1, 2),)})
    assert again.experiment.variants[0].rewards == rewards, "rlmeta's own need not be named again"
    assert main(["resume", str(tmp_path / "run"), "--code", __name__, "--quiet"]) == 0


def test_rewards_of_rlmeta_need_not_be_named_again_whatever_they_compare(tmp_path: Path) -> None:
    settings = rl.A2C(**SMALL, rewards=(rl.RND(coefficient=[0.0, 0.5], batch_size=8), rl.rewards.EpisodicCounts()))
    run = rl.train(settings, "CartPole-v1", out=tmp_path / "run", **BUDGET)
    again = rl.resume(tmp_path / "run")
    assert again.experiment.variants == run.experiment.variants and again.scores.equal(run.scores)
    assert rl.resume(tmp_path / "run", own={"rewards": settings.rewards}).scores.equal(run.scores)


def test_a_reward_that_holds_code_is_asked_for(tmp_path: Path) -> None:
    train(tmp_path / "run", rl.rewards.EpisodicCounts(cell=cells))
    with pytest.raises(SettingError, match=r"had the rewards <.*cell=<.*:cells>.*pass it again as own="):
        rl.resume(tmp_path / "run", code=CODE)
    with pytest.raises(SettingError, match=r"cell = '<cells>', this one has '<other_cells>'"):
        rl.resume(tmp_path / "run", own={"rewards": (rl.rewards.EpisodicCounts(cell=other_cells),)})


def test_the_module_of_what_is_given_again_may_be_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (Centre, cells):
        monkeypatch.setattr(name, "__module__", "__main__")
    run = train(tmp_path / "run", Centre(0.1), rl.rewards.EpisodicCounts(cell=cells))
    for name in (Centre, cells):
        monkeypatch.setattr(name, "__module__", __name__)
    assert rl.resume(tmp_path / "run", own={"rewards": run.experiment.variants[0].rewards}).scores.equal(run.scores)


def cells(observation: torch.Tensor) -> torch.Tensor:
    return (observation[..., 0] > 0).long()


def other_cells(observation: torch.Tensor) -> torch.Tensor:
    return (observation[..., 1] > 0).long()


@pytest.mark.parametrize(
    ("begun", "given", "message"),
    [
        (Anchor(0.1), Anchor(50.0), r"had the lifelong method anchor with strength = 0\.1, this one has 50\.0: give"),
        (rl.EWC(strength=1000.0), rl.EWC(strength=1.0), r"method ewc with strength = 1000\.0, this one has 1\.0: give"),
        (rl.EWC(strength=[1.0, 10.0]), rl.EWC(strength=[1.0, 5.0]), r"strength = \[1\.0, 10\.0\], this one has"),
        (rl.EWC(samples=8), rl.EWC(), r"method ewc with samples = 8, this one has 500: give"),
    ],
    ids=["own", "rlmeta's", "compared", "static"],
)
def test_methods_with_other_settings_are_refused(begun: Any, given: Any, message: str, tmp_path: Path) -> None:
    run = rl.train(learner(), points(2), steps=16, lifelong=[begun], out=tmp_path / "run")
    for again in (rl.resume, rl.load):
        with pytest.raises(SettingError, match=message):
            again(tmp_path / "run", env=points(2), lifelong=[given])
    loaded = rl.load(tmp_path / "run", env=points(2), lifelong=[begun])
    assert loaded.experiment.methods == run.experiment.methods


def test_settings_that_the_folder_holds_are_not_given_differently(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(SettingError, match=r"had hidden_sizes = \[4\], this one has \[8\]: give the same"):
        rl.load(tmp_path / "run", own={"hidden_sizes": (8,)})
    with pytest.raises(SettingError, match="own: unknown setting of A2C 'reward': did you mean rewards"):
        rl.load(tmp_path / "run", own={"reward": ()})
    with pytest.raises(SettingError, match=r"had the rewards \(none\), got also Centre"):
        rl.resume(tmp_path / "run", own={"rewards": (Centre(),)})


def network(space: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def other_network(space: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def test_another_network_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", network=network)
    with pytest.raises(SettingError, match=r"had the network .*:network, got .*:other_network: give the same"):
        rl.load(tmp_path / "run", network=other_network)
    assert rl.load(tmp_path / "run", network=network).scores.isfinite().all()


def test_an_environment_with_other_constants_is_refused(tmp_path: Path) -> None:
    env = native.NATIVE["CartPole-v1"]
    rl.train(rl.A2C(**SMALL), dataclasses.replace(env, length=0.7), out=tmp_path / "run", **BUDGET)
    with pytest.raises(
        SettingError,
        match=r"learned in environments with length = 0\.7, this one has nothing, or the default: give those",
    ):
        rl.load(tmp_path / "run", env=env)
    assert rl.load(tmp_path / "run", env=dataclasses.replace(env, length=0.7)).scores.isfinite().all()


@dataclass(frozen=True)
class Noisy(Lines):
    """A family with a setting."""

    noise: float = 0.0


def test_a_family_with_other_settings_is_refused(tmp_path: Path) -> None:
    rl.train(rl.MAML(num_envs=4), Noisy(0.1), steps=8, out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"learned in environments with noise = 0\.1, this one has 0\.3: give those"):
        rl.load(tmp_path / "run", env=Noisy(0.3))
    assert rl.load(tmp_path / "run", env=Noisy(0.1)).scores.isfinite().all()


def test_a_folder_holds_the_class_and_the_settings_of_a_reward(tmp_path: Path) -> None:
    train(tmp_path / "run", Centre(0.1))
    saved = tomllib.loads((tmp_path / "run/config.toml").read_text())["variants"][0]["rewards"]
    settings = {"coefficient": 0.1, "power": 1, "name": "centre"}
    assert saved == [{"class": f"{__name__}:Centre", "settings": settings}]
