"""Arguments and surroundings that were answered by a raw error, by none, or never."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.runs.allocator import explain_out_of_memory

PPO = {"num_envs": 2, "num_steps": 8, "batch_size": 16, "num_epochs": 1, "hidden_sizes": (4,)}


def train(settings: Any = None, **about: Any) -> rl.Run:
    budget = rl.Budget(steps=32, final_episodes=1, eval_episodes=1)
    return rl.train(settings or rl.PPO(**PPO), "CartPole-v1", budget=budget, **{"threads": 1, **about})


class OfBytes:
    """A path of bytes."""

    def __fspath__(self) -> bytes:
        return b"run"


@pytest.mark.parametrize(
    "out",
    ["a\0b", Path("a\0b"), OfBytes(), b"run", 5],
    ids=["NUL", "NUL in a Path", "bytes of a Path", "bytes", "number"],
)
def test_what_names_no_folder_is_refused(out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"^out is .*, expected the folder of the run"):
        train(out=out)
    assert os.listdir() == []


@pytest.mark.parametrize("seeds", [10**12, range(10**12), itertools.count()], ids=["count", "range", "endless"])
def test_seeds_that_nobody_has_memory_for_are_not_counted(seeds: Any) -> None:
    with pytest.raises(SettingError, match=r"seeds .* 1,000,000"):
        train(seeds=seeds)


@pytest.mark.parametrize("given", [[5], 5, lambda run, line: None, {len}], ids=["number", "none", "function", "set"])
@pytest.mark.parametrize("name", ["callbacks", "trackers"])
def test_callbacks_and_trackers_are_lists_of_functions(name: str, given: Any, tmp_path: Path) -> None:
    for verb in (lambda **about: train(out=tmp_path / "run", **about), lambda **about: rl.resume(tmp_path, **about)):
        with pytest.raises(SettingError, match=f"^{name} is .*, expected a list of functions"):
            verb(**{name: given})
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(SettingError, match="device is 'meta'"):
        train(device="meta")


@pytest.mark.parametrize("change", [{"num_envs": 10**13}, {"num_steps": 10**13}, {"hidden_sizes": (10**13,)}], ids=str)
def test_what_does_not_fit_into_memory_says_what_asks_for_less(change: dict[str, Any]) -> None:
    settings = rl.PPO(**{**PPO, "batch_size": 16, **change})
    with pytest.raises(SettingError, match=r"does not fit into memory: take fewer learners .*num_envs.*num_steps"):
        rl.train(settings, "CartPole-v1", steps=10**15, threads=1)


def test_other_errors_are_not_of_memory() -> None:
    with pytest.raises(RuntimeError, match=r"^else$"), explain_out_of_memory():
        raise RuntimeError("else")
    with pytest.raises(SettingError, match="memory"), explain_out_of_memory():
        raise MemoryError


def test_a_run_is_the_same_under_autocast() -> None:
    alone = tree.flatten(train(seeds=2).state)
    with torch.autocast("cpu", torch.bfloat16):
        within = tree.flatten(train(seeds=2).state)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(value, within[name]) for name, value in alone.items())
