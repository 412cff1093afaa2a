"""More steps for a run that has ended, or was stopped: as if they had been asked for at once."""

from __future__ import annotations

import dataclasses
import json
import signal
import warnings

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional import tree
from rlmeta.runs import checkpoint

SMALL = rl.PPO(num_envs=2, num_steps=16, batch_size=32, num_epochs=1, hidden_sizes=(8,),
               learning_rate_schedule="constant")  # fmt: skip


def train(folder, steps, settings=SMALL, **others):
    budget = rl.Budget(steps=steps, eval_every=64, final_episodes=2, eval_episodes=2)
    return rl.train(settings, "CartPole-v1", seeds=2, budget=budget, out=folder, threads=1, **others)


def test_an_ended_run_goes_on_as_if_asked_at_once(tmp_path):
    at_once = train(tmp_path / "whole", 256)
    train(tmp_path / "run", 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = rl.resume(tmp_path / "run", steps=256)
    for part in ("params", "optimizer", "world", "count", "key", "best", "progress"):
        ours, theirs = tree.flatten({"x": longer.state[part]}), tree.flatten({"x": at_once.state[part]})
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), part
    assert torch.equal(longer.evaluation.returns, at_once.evaluation.returns)
    again = rl.load(tmp_path / "run")
    assert again.experiment.budget.steps == 256 and torch.equal(again.scores, longer.scores)


def test_the_evaluation_that_was_left_out_at_the_old_end_is_made(tmp_path):
    budget = {"eval_every": 64, "eval_episodes": 2, "final_episodes": 2}
    rl.train(SMALL, "CartPole-v1", steps=64 * 4, out=tmp_path / "whole", threads=1, **budget)
    rl.train(SMALL, "CartPole-v1", steps=64 * 2, out=tmp_path / "run", threads=1, **budget)
    rl.resume(tmp_path / "run", steps=64 * 4)

    def evaluations(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {line["iteration"]: line["eval/return"] for line in lines if "eval/return" in line}

    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    best, same = (rl.load(tmp_path / name).state["best"]["score"] for name in ("run", "whole"))
    assert torch.equal(best, same)


def test_interrupted_in_the_evaluation_at_the_old_end_it_is_not_made_twice(tmp_path):
    train(tmp_path / "run", 64)
    stopped = rl.resume(tmp_path / "run", steps=128, callbacks=[lambda run, line: signal.raise_signal(signal.SIGINT)])
    assert stopped.stopped == "interrupted" and stopped.iterations_done == 2
    rl.resume(tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    evaluated = [line["iteration"] for line in lines if "eval/return" in line]
    assert evaluated == [2]


def test_it_is_remembered_when_the_longer_run_is_stopped(tmp_path):
    train(tmp_path / "run", 96)
    stopped = rl.resume(tmp_path / "run", steps=256, callbacks=[lambda run, line: line["iteration"] >= 5])
    assert stopped.env_steps == 160
    ended = rl.resume(tmp_path / "run")
    assert ended.env_steps == 256


def test_what_goes_over_the_budget_is_named(tmp_path):
    train(tmp_path / "run", 64, dataclasses.replace(SMALL, learning_rate_schedule="linear"))
    with pytest.warns(RuntimeWarning, match="scheduled over the budget: learning_rate_schedule; the"):
        rl.resume(tmp_path / "run", steps=128)


def test_fewer_steps_and_streams_are_refused_and_nothing_is_lost(tmp_path):
    run = train(tmp_path / "run", 96)
    with pytest.raises(SettingError, match="steps is 32, fewer than the 96"):
        rl.resume(tmp_path / "run", steps=32)
    assert torch.equal(rl.load(tmp_path / "run").scores, run.scores)
    stream = rl.stream(["CartPole-v1"] * 2)
    rl.train(SMALL, stream, steps=32, final_episodes=2, eval_episodes=2, out=tmp_path / "stream")
    with pytest.raises(SettingError, match="come one after another"):
        rl.resume(tmp_path / "stream", steps=64)


@pytest.mark.parametrize("steps", [True, "128", 128.5, 0, -5, 10**30, float("nan")], ids=repr)
def test_steps_that_are_no_whole_number_are_refused_and_nothing_is_lost(steps, tmp_path):
    run = train(tmp_path / "run", 64)
    with pytest.raises(SettingError, match=r"^steps is .*, expected (a whole number|at least 1)"):
        rl.resume(tmp_path / "run", steps=steps)
    assert torch.equal(rl.load(tmp_path / "run").scores, run.scores)


def test_steps_may_be_numpys_number(tmp_path):
    train(tmp_path / "run", 64)
    rl.resume(tmp_path / "run", steps=np.int64(96))
    assert rl.load(tmp_path / "run").env_steps == 96


def test_a_disk_that_fails_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    run = train(tmp_path / "run", 64)

    def fails(*arguments, **others):
        raise CheckpointError("full")

    monkeypatch.setattr(checkpoint, "save", fails)
    with pytest.raises(CheckpointError, match="full"):
        rl.resume(tmp_path / "run", steps=128)
    again = rl.load(tmp_path / "run")
    assert torch.equal(again.scores, run.scores) and again.experiment.budget.steps == 64


def test_a_stopped_run_that_goes_on_is_no_longer_taken_for_ended(tmp_path):
    def fails_later(run, line):
        return 1 / 0 if line["iteration"] > 4 else None

    budget = {"eval_every": 64, "eval_episodes": 2, "final_episodes": 2, "checkpoint_seconds": 0.0}
    rl.train(SMALL, "CartPole-v1", steps=256, out=tmp_path / "run", callbacks=[lambda run, line: True], **budget)
    assert rl.load(tmp_path / "run").evaluation is not None
    with pytest.raises(ZeroDivisionError):
        rl.resume(tmp_path / "run", callbacks=[fails_later])
    again = rl.load(tmp_path / "run")
    assert again.iterations_done == 4 and again.evaluation is None


def test_the_command_takes_steps(tmp_path, capsys):
    train(tmp_path / "run", 64)
    assert main(["resume", str(tmp_path / "run"), "--steps", "128", "--quiet"]) == 0
    assert rl.load(tmp_path / "run").env_steps == 128
