"""Minari's data sets: written and read with the same digest, and sentences for what can't be."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.errors import DemonstrationError, MissingExtraError
from tests.offline.data import recorded


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


def of_all_spaces() -> Demonstrations:
    """Two episodes with pictures, counted and nested observations, and actions counted from 3."""
    spaces = gym.spaces
    generator = torch.Generator().manual_seed(0)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    return Demonstrations(
        observation={
            "place": {"0": whole(4, 7), "1": torch.randn(7, 2, generator=generator) * 9},
            "picture": whole(256, 7, 32, 32, 3).to(torch.uint8),
            "switches": whole(2, 7, 3),
        },
        action=whole(2, 5, 2),
        reward=torch.randn(5, generator=generator),
        lengths=torch.tensor([2, 3]),
        terminated=torch.tensor([True, True]),
        truncated=torch.tensor([False, True]),
        observation_space=spaces.Dict(
            place=spaces.Tuple((spaces.Discrete(4, start=-1), spaces.Box(-1, 1, (2,), np.float32))),
            picture=spaces.Box(0, 255, (32, 32, 3), np.uint8),
            switches=spaces.MultiBinary(3),
        ),
        action_space=spaces.MultiDiscrete([2, 5], start=[3, 0]),
        about={"agent": "ppo"},
    )


@pytest.mark.parametrize("make", [recorded, of_all_spaces])
def test_a_round_trip_changes_no_bit(make, minari):
    given = make()
    written = given.to_minari("rlmeta/test-v0")
    assert (written.total_episodes, written.total_steps) == (len(given), given.steps)
    for source in ("rlmeta/test-v0", written):
        read = rl.Demonstrations.from_minari(source)
        assert read.digest == given.digest and read.about == {"minari": "rlmeta/test-v0"}
        read.check(given.observation_space, given.action_space)


def test_minari_itself_sees_the_environments_own_values(minari):
    given = of_all_spaces()
    episode = given.to_minari("rlmeta/values-v0")[1]
    assert episode.actions.tolist() == (given.action[2:] + torch.tensor([3, 0])).tolist()
    assert episode.observations["place"][0].tolist() == (given.observation["place"]["0"][3:] - 1).tolist()
    assert episode.terminations.tolist() == episode.truncations.tolist() == [False, False, True]
    pendulum = recorded().to_minari("rlmeta/pendulum-v0", env="Pendulum-v1")
    assert pendulum.recover_environment().spec.id == "Pendulum-v1"


def test_what_cannot_be_read_or_written_is_said(minari):
    with pytest.raises(DemonstrationError, match=r"no Minari data set 'nobodys-v0' .* `minari download nobodys-v0`"):
        rl.Demonstrations.from_minari("nobodys-v0")
    with pytest.raises(DemonstrationError, match="given as 3, expected its id"):
        rl.Demonstrations.from_minari(3)
    recorded().to_minari("twice-v0")
    with pytest.raises(DemonstrationError, match="can't write the data set 'twice-v0'"):
        recorded().to_minari("twice-v0")
    from minari.data_collector import EpisodeBuffer

    cut = EpisodeBuffer(observations=np.zeros((3, 3), np.float32), actions=np.zeros((2, 1), np.float32),
                        rewards=[0.0, 1.0], terminations=[False, False], truncations=[False, False])  # fmt: skip
    spaces = {"observation_space": recorded().observation_space, "action_space": recorded().action_space}
    with pytest.raises(DemonstrationError, match="are cut"):
        rl.Demonstrations.from_minari(minari.create_dataset_from_buffers("cut-v0", [cut], **spaces))


def test_without_minari_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    for call in (lambda: rl.Demonstrations.from_minari("x-v0"), lambda: recorded().to_minari("x-v0")):
        with pytest.raises(MissingExtraError, match=r"needs minari, .* pip install 'rlmeta\[minari\]'"):
            call()
