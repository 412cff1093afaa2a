"""Films during training: after evaluations, without a trace in the learners, and again after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import CheckpointError, MissingExtraError, SettingError
from rlmeta.functional import tree
from rlmeta.report.films import FILE, films_again
from rlmeta.runs.run import Run

pytest.importorskip("av")

AGENT = rl.PPO(num_envs=2, num_steps=8, batch_size=8, num_epochs=1, hidden_sizes=(4,))
BUDGET = rl.Budget(steps=96, eval_every=16, eval_episodes=2, final_episodes=2, log_points=6)


def train(folder: Path, problem: Any = "Catch-v0", **more: Any) -> rl.Run:
    return rl.train(AGENT, problem, budget=BUDGET, seeds=2, out=folder, **more)


def names(folder: Path) -> list[int]:
    """Steps of the films in a run's folder."""
    return [int(path.stem.removeprefix("steps-")) for path in sorted((folder / "videos").iterdir())]


def equal(first: rl.Run, second: rl.Run) -> bool:
    a, b = tree.flatten(first.state), tree.flatten(second.state)
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(7), b[name].nan_to_num(7)) for name in a)


class Killed(Exception):
    """What ends a run as a kill does."""


def test_films_change_no_bit_of_the_learners_and_go_on_after_a_resume(tmp_path: Path) -> None:
    plain, filmed = train(tmp_path / "plain"), train(tmp_path / "filmed", video_every=32)
    assert equal(plain, filmed)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "filmed")]
    assert metrics[0] == metrics[1] and not (tmp_path / "plain" / FILE).exists()
    assert names(tmp_path / "filmed") == [32, 64, 96]

    def stop(run: Run, entry: dict[str, Any]) -> None:
        if entry["iteration"] == 3:
            raise Killed

    with pytest.raises(Killed):  # the checkpoint is the first one
        train(tmp_path / "killed", video_every=32, callbacks=[stop])
    assert names(tmp_path / "killed") == [32]
    resumed = rl.resume(tmp_path / "killed")
    assert equal(resumed, plain)
    for path in sorted((tmp_path / "filmed/videos").iterdir()):
        assert (tmp_path / "killed/videos" / path.name).read_bytes() == path.read_bytes()


def test_a_film_is_made_once_where_evaluations_are_rarer(tmp_path: Path) -> None:
    train(tmp_path / "run", video_every=24)
    assert names(tmp_path / "run") == [32, 48, 80, 96]  # after 24, 48, 72, and the last


def test_a_stream_is_filmed_after_its_tasks(tmp_path: Path) -> None:
    stream = rl.stream([rl.task("DeepSea-v0", settings={"size": 3, "move_cost": c}) for c in (0.01, 0.02)])
    rl.train(AGENT, stream, steps=32, out=tmp_path / "run", eval_episodes=1, final_episodes=1, video_every=1)
    assert names(tmp_path / "run") == [32, 64]


def test_the_command_line_films_a_group_and_a_resume_of_it(tmp_path: Path, capsys: Any) -> None:
    run, flags = str(tmp_path / "run"), ["--num-envs", "2", "--num-steps", "8", "--batch-size", "8", "--quiet"]
    flags += ["--eval-every", "16", "--eval-episodes", "1", "--final-episodes", "1", "--hidden-sizes", "4"]
    assert main(["train", "ppo", "Catch-v0", "--steps", "32", "--out", run, "--video-every", "16", *flags]) == 0
    assert main(["resume", run, "--steps", "64", "--quiet"]) == 0
    assert names(tmp_path / "run") == [16, 32, 48, 64]
    assert "error" not in capsys.readouterr().err


def test_a_film_that_fails_is_warned_of_and_ends_no_run(tmp_path: Path) -> None:
    def block(run: Run, entry: dict[str, Any]) -> None:
        if entry["iteration"] == 1:
            (tmp_path / "run/videos").write_text("a file in its place")

    with pytest.warns(RuntimeWarning, match="no more films of this run: SettingError: the film"):
        run = train(tmp_path / "run", video_every=32, callbacks=[block])
    assert run.scores.isfinite().all()


def test_what_cannot_be_filmed_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="a run in memory has none: give out="):
        rl.train(AGENT, "Catch-v0", budget=BUDGET, video_every=16)
    with pytest.raises(SettingError, match=r"video_every is 0\.5, expected a whole number"):
        train(tmp_path / "a", video_every=0.5)
    with pytest.raises(SettingError, match="vector environment"):
        train(tmp_path / "a", lambda num_envs: gym.make_vec("CartPole-v1", num_envs), video_every=16)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"rlmeta\[video\]"):
        train(tmp_path / "a", video_every=16)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"every": 0}', '{"every": "a"}', "[" * 4000])
def test_a_foreign_file_is_refused_by_a_resume(content: str, tmp_path: Path) -> None:
    assert films_again(tmp_path) == []
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match="does not say how often"):
        films_again(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"every": 5}))
    assert len(films_again(tmp_path)) == 1
