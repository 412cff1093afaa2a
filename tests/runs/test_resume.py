"""A run that was killed at any moment and resumed ends as the one that was not: equal state, equal metrics."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.agents.agent import Agent
from rlmeta.errors import CheckpointError, InexactResumeError, RunExistsError, SettingError
from rlmeta.functional import tree
from rlmeta.learning.evaluate import evaluate
from rlmeta.runs import checkpoint
from rlmeta.runs import folder as run_folder
from rlmeta.runs.experiment import Experiment
from rlmeta.runs.run import Run
from rlmeta.runs.train import restore_world
from tests.agents.worlds import Target
from tests.runs import killed
from tests.runs.forging import accept_config, reseal


def assert_same_run(one: rl.Run, two: rl.Run) -> None:
    first, second = tree.flatten(one.state), tree.flatten(two.state)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        assert torch.equal(torch.nan_to_num(leaf), torch.nan_to_num(second[name])), name
    assert (one.folder / "metrics.jsonl").read_bytes() == (two.folder / "metrics.jsonl").read_bytes()
    assert torch.equal(one.evaluation.returns, two.evaluation.returns)


QUICK = [("dqn", "CartPole-v1"), ("reinforce", "CartPole-v1"), ("ppo", "LunarLander-v3"), ("a2c", "own")]
"""Every agent and every kind of task once; all of their pairs are slow."""


@pytest.mark.parametrize(
    ("agent", "task"),
    [
        pytest.param(agent, task, marks=[] if (agent, task) in QUICK else pytest.mark.slow)
        for task in ("CartPole-v1", "LunarLander-v3", "own")
        for agent in ("ppo", "a2c", "dqn", "reinforce")
    ],
)
def test_killed_and_resumed_equals_never_stopped(agent, task, tmp_path, killer):
    whole = killed.train(str(tmp_path / "whole"), agent, task)
    half = int(whole.state["count"]["iterations"].max()) // 2
    killer.kill("tests.runs.killed:train", str(tmp_path / "killed"), agent, task, half)
    env = partial(Target, "discrete") if task == "own" else None
    resumed = rl.resume(tmp_path / "killed", env=env)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize(
    ("agent", "stream", "tenth"),
    [
        ("classifier", "split-digits+ewc+replay", 5),
        ("classifier", "split-digits+gem", 5),
        pytest.param("classifier", "split-digits+agem", 7, marks=pytest.mark.slow),
        pytest.param("classifier", "split-digits+packnet", 3, marks=pytest.mark.slow),
        ("classifier", "split-digits+packnet", 4),
        pytest.param("classifier", "split-digits+hat", 5, marks=pytest.mark.slow),
        ("classifier", "split-digits+generative_replay", 3),
        pytest.param("classifier", "split-digits+generative_replay", 6, marks=pytest.mark.slow),
        ("ppo", "cartpole-conflicts+ewc+replay", 5),
        pytest.param("ppo", "cartpole-conflicts+packnet", 6, marks=pytest.mark.slow),
    ],
)
def test_killed_along_a_stream_and_resumed_equals_never_stopped(agent, stream, tenth, tmp_path, killer):
    """The methods' memories, PackNet's phases and the matrix of scores included; the run says itself what it needs."""
    whole = killed.train(str(tmp_path / "whole"), agent, stream)
    at = int(whole.state["count"]["iterations"].max()) * tenth // 10
    killer.kill("tests.runs.killed:train", str(tmp_path / "killed"), agent, stream, at)
    assert_same_run(whole, rl.resume(tmp_path / "killed"))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = killed.train(str(tmp_path / "run"), "a2c", "CartPole-v1")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = rl.resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert torch.equal(whole.evaluation.returns, again.evaluation.returns)


@pytest.mark.parametrize(
    "problem", [rl.task("CartPole-v1"), rl.task(partial(Target, "discrete"), name="own")], ids=["native", "own"]
)
def test_a_frozen_learner_is_named_and_the_others_go_on_as_without_it(problem, tmp_path):
    """One learner's rate makes it blow up: it is frozen and named, and a run without it has the same others."""
    budget = rl.Budget(steps=512, eval_every=4096, final_episodes=2, log_points=8)
    settings = rl.A2C(num_envs=2, num_steps=8, learning_rate=[1e-3, 1e30], hidden_sizes=(8,))
    with pytest.warns(RuntimeWarning, match=r"seed 0 \(learning_rate=1e\+30\) is no longer finite"):
        run = rl.train(settings, problem, seeds=1, budget=budget, out=tmp_path / "run", threads=1)
    assert run.state["active"].tolist() == [True, False]
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(run.state["params"]["weights"]))
    tame = rl.A2C(num_envs=2, num_steps=8, learning_rate=[1e-3, 1e-4], hidden_sizes=(8,))
    other = rl.train(tame, problem, seeds=1, budget=budget, threads=1)
    for a, b in zip(tree.leaves(run.state["params"]["weights"]), tree.leaves(other.state["params"]["weights"])):
        assert torch.equal(a[0], b[0])


def test_early_stop_freezes_the_learners_that_reached_the_target_and_keeps_the_best(tmp_path):
    budget = rl.Budget(steps=20_000, eval_every=1024, eval_episodes=8, final_episodes=8, target=100.0)
    run = rl.train(rl.preset("ppo", "CartPole-v1"), "CartPole-v1", seeds=2, budget=budget, threads=1)
    assert run.stopped == "every learner has stopped"
    assert run.env_steps < 20_000
    assert (run.state["best"]["score"] >= 100).all()
    best = run.evaluate(32, best=True).returns.mean(-1)
    assert (best > 60).all()


class Random(gym.Env):
    """Not reproducible from its seed."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.random.default_rng().uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        return np.random.default_rng().uniform(-1, 1, 2).astype(np.float32), 1.0, False, self.t == 50, {}


def test_an_environment_that_cannot_be_brought_back_says_so_and_goes_on_if_asked(tmp_path):
    budget = rl.Budget(steps=256, final_episodes=2, checkpoint_seconds=0.0, log_points=64, eval_every=1000)
    settings = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(8,))
    stop = lambda run, line: line["iteration"] >= 8  # noqa: E731
    problem = rl.task(Random, name="random")
    rl.train(settings, problem, out=tmp_path / "run", budget=budget, callbacks=[stop])
    with pytest.raises(InexactResumeError, match="--inexact"):
        rl.resume(tmp_path / "run", env=Random)
    assert rl.resume(tmp_path / "run", env=Random, inexact=True).env_steps == 256


class Half(Random):
    """Not reproducible where its seed is odd."""

    def reset(self, *, seed=None, options=None):
        first, info = super().reset()
        return first if seed % 2 else np.zeros(2, np.float32), info

    def step(self, action):
        seen, *rest = super().step(action)
        return np.zeros_like(seen), *rest


def test_rows_that_begin_a_new_episode_forget_the_old_one_and_no_others_do(tmp_path, monkeypatch):
    initial = lambda agent, p, rows: {"hidden": torch.full((*rows, 3), 7.0)}  # noqa: E731
    monkeypatch.setattr(Agent, "initial_memory", initial)
    problem = rl.task(Half, name="half")
    run = Run(Experiment((rl.A2C(num_envs=8),), (0, 1), problem), None)
    run.start()
    odd = run.state["world"]["seed"] % 2 == 1
    assert odd.any() and not odd.all()
    run.state["memory"]["hidden"].fill_(3.0)
    run.state["episode"] = tree.map(lambda leaf: leaf + 5.0, run.state["episode"])
    with pytest.raises(InexactResumeError):
        restore_world(run, inexact=False)
    restore_world(run, inexact=True)
    run.close()
    assert run.state["world"]["episode"].equal(odd.long())
    assert run.state["memory"]["hidden"].equal(torch.where(odd, 7.0, 3.0).unsqueeze(-1).expand(2, 8, 3))
    for total in run.state["episode"].values():
        assert total.equal(torch.where(odd, 0.0, 5.0).double())


def test_wrong_folders_and_wrong_checkpoints_are_refused_and_nothing_is_overwritten(tmp_path):
    run = killed.train(str(tmp_path / "a"), "a2c", "CartPole-v1")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(RunExistsError):
        killed.train(str(tmp_path / "a"), "a2c", "CartPole-v1")
    with pytest.raises(CheckpointError, match=r"config\.toml"):
        rl.load(tmp_path / "nothing")
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    config = (tmp_path / "a" / "config.toml").read_text()
    wider = config.replace("hidden_sizes = [\n    8,\n]", "hidden_sizes = [\n    9,\n]")
    (tmp_path / "a" / "config.toml").write_text(wider)
    accept_config(tmp_path / "a")
    with pytest.raises(CheckpointError, match="another agent"):
        rl.load(tmp_path / "a")
    (tmp_path / "a" / "config.toml").write_text(config)
    accept_config(tmp_path / "a")
    for path in (tmp_path / "a" / "state").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        rl.load(tmp_path / "a")
    assert run.folder == tmp_path / "a"


def test_a_run_with_ones_own_network_asks_for_it_again(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self, space):
            super().__init__()
            self.layer = torch.nn.Linear(4, 8)

        def forward(self, x):
            return self.layer(x).tanh()

    budget = rl.Budget(steps=64, final_episodes=2)
    rl.train(rl.A2C(network=Net), "CartPole-v1", out=tmp_path / "run", budget=budget)
    with pytest.raises(SettingError, match=r"pass it again as network= \(on the command line --network\)"):
        rl.load(tmp_path / "run")
    run = rl.load(tmp_path / "run", network=Net)
    assert run.act(np.zeros(4, np.float32)) in (0, 1)


class Dies(Exception):
    """Ends a run as a crash would."""


def crash(at: int):
    """A callback that raises at an iteration."""

    def callback(run, line):
        if line["iteration"] >= at:
            raise Dies

    return callback


BUDGET = rl.Budget(steps=256, eval_every=64, eval_episodes=2, final_episodes=2, checkpoint_seconds=0.0, log_points=16)
SETTINGS = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(8,))


def test_a_resume_from_the_checkpoint_before_a_damaged_one_repeats_no_line(tmp_path):
    whole = rl.train(SETTINGS, "CartPole-v1", out=tmp_path / "whole", budget=BUDGET)
    with pytest.raises(Dies):
        rl.train(SETTINGS, "CartPole-v1", out=tmp_path / "run", budget=BUDGET, callbacks=[crash(8)])
    folder = tmp_path / "run" / "state"
    newest, previous = (
        json.loads((folder / f"manifest{kind}.json").read_text())["files"] for kind in ("", ".previous")
    )
    for name in newest.keys() - previous.keys():
        (folder / name).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="using the checkpoint before it"):
        resumed = rl.resume(tmp_path / "run")
    assert_same_run(whole, resumed)


def test_a_folder_that_another_process_has_used_meanwhile_is_left_alone(tmp_path, monkeypatch):
    folder, lock = tmp_path / "run", run_folder.lock

    def late(path):
        (folder / "config.toml").write_text("theirs")
        return lock(path)

    monkeypatch.setattr(run_folder, "lock", late)
    with pytest.raises(RunExistsError):
        rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET)
    assert (folder / "config.toml").read_text() == "theirs"


# --------------------------------------------------------------------------------------- what a resume depends on


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """A run that died in the middle."""
    folder = tmp_path_factory.mktemp("runs") / "crashed"
    with pytest.raises(Dies):
        rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, callbacks=[crash(8)], threads=1)
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The same run, never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    return rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, threads=1)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_resume_needs_its_records(name, crashed, tmp_path):
    shutil.copytree(crashed, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{name}: No such file or directory; restore it"):
        rl.resume(tmp_path / "run")
    assert not (tmp_path / "run" / name).exists()
    assert rl.load(tmp_path / "run").env_steps > 0, "which nobody needs to look at it"


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "timing.jsonl"])
def test_a_resume_goes_on_from_no_file_that_was_changed(name, crashed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    path = folder / name
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))
    before = content_of(folder)
    with pytest.raises(
        CheckpointError, match=rf"{name} .*not .*(had at|began with).*: restore it from a copy"
    ) as caught:
        rl.resume(folder)
    assert "\n" not in str(caught.value)
    assert content_of(folder) == before
    path.write_text(text)
    assert rl.resume(folder).env_steps == 256


def test_files_of_two_runs_are_not_taken_for_one(crashed, ended, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ended.folder, folder)
    summary = (folder / "summary.json").read_bytes()
    reseal(folder / "summary.json", lambda content: content.update(run="0" * 16))
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged \(it is of run 0000"):
        rl.load(folder)
    (folder / "summary.json").write_bytes(summary.replace(b"[[", b"[[1", 1))
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged .*: remove it, `rlmeta resume"):
        rl.load(folder)
    (folder / "summary.json").unlink()
    shutil.copy(crashed / "config.toml", folder)
    with pytest.raises(CheckpointError, match=r"config\.toml is not the one the run began with"):
        rl.load(folder)
    accept_config(folder)
    with pytest.raises(CheckpointError, match=r"is of another run than .*config\.toml: restore both"):
        rl.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": "3"},
        {"seconds": None},
        {"seconds": float("nan")},
        {"stopped": 3},
        {"offsets": []},
        {"offsets": ["metrics", "timing"]},
        {"offsets": {"metrics": [0, ""]}},
        {"offsets": {"metrics": 0, "timing": 0}},
        {"offsets": {"metrics": [0, ""], "timing": [0, ""], "../outside": [0, ""]}},
        {"run": 3},
        {"config": None},
    ],
    ids=str,
)
def test_a_checkpoint_that_says_something_else_of_itself_is_refused(changes, crashed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    reseal(folder / "state" / "manifest.json", lambda content: content["about"].update(changes))
    before = content_of(folder)
    with pytest.raises(CheckpointError) as caught:
        rl.resume(folder)
    assert "\n" not in str(caught.value) and "copy" in str(caught.value)
    assert content_of(folder) == before
    reseal(folder / "state" / "manifest.json", lambda content: content["about"].pop(next(iter(changes))))
    with pytest.raises(CheckpointError, match=r"metadata of the checkpoint in .* is not of a run"):
        rl.resume(folder)


FILES = ["config.toml", "run.lock", "metrics.jsonl", "timing.jsonl", "summary.json", "learning_curve.png", "x.tmp"]
INSIDE = ["state", "tensorboard", "wandb", "state/manifest.json", "state/manifest.json.tmp", "tensorboard/seed=0"]


@pytest.mark.parametrize("name", FILES + INSIDE)
def test_a_resume_writes_nothing_outside_of_the_folder(name, crashed, tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(crashed, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    if (folder / name).exists():
        (folder / name).rename(outside)
    elif name in FILES or name.endswith(".tmp"):
        outside.write_text("mine")
    else:
        outside.mkdir()
    (folder / name).symlink_to(outside)
    before = content_of(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{Path(name).name} is a link"):
        rl.resume(folder)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("at", [3, 16], ids=["at the next record", "at the last checkpoint"])
def test_a_run_whose_folder_was_made_anew_leaves_the_new_one_alone(at, tmp_path, killer):
    folder, found = tmp_path / "run", {}

    def make_anew(run, line):
        if line["iteration"] == at:
            shutil.rmtree(folder)
            killer.kill("tests.runs.killed:train", str(folder), "a2c", "CartPole-v1", 4)
            found.update(content_of(folder))

    with pytest.raises(CheckpointError, match="moved, deleted or created again: the run ends here and leaves"):
        rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, callbacks=[make_anew], threads=1)
    assert content_of(folder) == found and len(found) >= 5
    assert rl.resume(folder).env_steps == killed.STEPS["a2c"]


# ------------------------------------------------------------------------------------------------- starts that fail


def test_a_tracker_that_cannot_be_opened_leaves_a_run_to_resume_and_says_so(ended, tmp_path):
    def refuses(run):
        raise SettingError("no key")

    def breaks(run):
        raise PermissionError(errno.EACCES, "Permission denied", "there")

    for tracker, folder in ((refuses, tmp_path / "a"), (breaks, tmp_path / "b")):
        with pytest.raises(SettingError, match=rf"the run is saved, resume it with `rlmeta resume {folder}`"):
            rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, trackers=[tracker], threads=1)
        assert_same_run(ended, rl.resume(folder))
    with pytest.raises(SettingError, match=r"^no key$"):
        rl.train(SETTINGS, "CartPole-v1", budget=BUDGET, trackers=[refuses], threads=1)


def test_a_disk_that_is_full_before_the_first_checkpoint_leaves_the_folder_to_use_again(ended, tmp_path, monkeypatch):
    folder, write = tmp_path / "run", os.write

    def full(file, data):
        if b"manifest" in os.readlink(f"/proc/self/fd/{file}").encode():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match="No space left"):
            rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, threads=1)
    assert {"config.toml", "state", "metrics.jsonl"} <= set(os.listdir(folder))
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*train it again with the same --out"):
        rl.resume(folder)
    assert_same_run(ended, rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, threads=1))


def test_a_start_that_dies_at_any_moment_leaves_a_folder_to_use_again_or_to_resume(ended, tmp_path, monkeypatch):
    folder, shots, ours = tmp_path / "run", tmp_path / "shots", os.getpid()
    shots.mkdir()

    def shooting(name, real):
        def call(*arguments, **named):
            with monkeypatch.context() as patched:
                for one, original in reals.items():
                    patched.setattr(os, one, original)
                if folder.is_dir():
                    shutil.copytree(folder, shots / f"{len(os.listdir(shots))} {name}")
            return real(*arguments, **named)

        return call

    reals = {name: getattr(os, name) for name in ("open", "write", "pwrite", "replace", "fsync", "ftruncate")}
    with monkeypatch.context() as patched:
        for name, real in reals.items():
            patched.setattr(os, name, shooting(name, real))
        with pytest.raises(Dies):
            rl.train(SETTINGS, "CartPole-v1", out=folder, budget=BUDGET, callbacks=[crash(1)], threads=1)
    assert ours == os.getpid()
    saved = {shot: checkpoint.is_saved(shot / "state") for shot in shots.iterdir()}
    assert set(saved.values()) == {True, False} and len(saved) > 20
    for shot, resumes in saved.items():
        if resumes:
            assert rl.load(shot).env_steps == 0
        else:
            run_folder.check_free(shot)
    last = max((shot for shot in saved if not saved[shot]), key=lambda shot: int(shot.name.split()[0]))
    assert_same_run(ended, rl.train(SETTINGS, "CartPole-v1", out=last, budget=BUDGET, threads=1))


@pytest.mark.parametrize("native", [True, False])
def test_at_least_one_episode_is_evaluated(native):
    run = rl.train(SETTINGS, rl.task("CartPole-v1", native=native), budget=BUDGET)
    for episodes in (0, -1):
        with pytest.raises(SettingError, match=f"episodes is {episodes}, expected at least 1"):
            run.evaluate(episodes)
    agent, p = run.agent, run.agent.effective_params(run.state)
    with pytest.raises(SettingError, match="at least 1"):
        evaluate(agent, p, run.experiment.world(), run.state["key"], 0)


def press(*_):
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_during_the_final_evaluation_leaves_it_to_a_resume(tmp_path, monkeypatch):
    whole = rl.train(SETTINGS, "CartPole-v1", out=tmp_path / "whole", budget=BUDGET)
    evaluations, play, handler = [], rl.Run.evaluate, signal.getsignal(signal.SIGINT)

    def interrupted(run, episodes):
        press()
        evaluations.append(play(run, episodes))

    with monkeypatch.context() as patched:
        patched.setattr(rl.Run, "evaluate", interrupted)
        run = rl.train(SETTINGS, "CartPole-v1", out=tmp_path / "run", budget=BUDGET)
    assert (run.stopped, run.evaluation, evaluations) == ("interrupted", None, [])
    assert not (tmp_path / "run" / "summary.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    lines = []
    resumed = rl.resume(tmp_path / "run", callbacks=[lambda run, line: lines.append(line)])
    assert (resumed.stopped, lines) == ("", [])
    assert_same_run(whole, resumed)


def test_a_second_ctrl_c_does_not_wait_for_the_iteration(tmp_path):
    def impatient(run, line):
        press()
        lines.append(line)
        press()
        time.sleep(60)

    lines, handler = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        rl.train(SETTINGS, "CartPole-v1", out=tmp_path / "run", budget=BUDGET, callbacks=[impatient])
    assert len(lines) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert rl.resume(tmp_path / "run").env_steps == 256


def test_the_summary_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    run = rl.train(SETTINGS, "CartPole-v1", out=tmp_path / "run", budget=BUDGET)
    summary = tmp_path / "run" / "summary.json"
    before = summary.read_bytes()

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    run.evaluation = run.evaluate(4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*summary.json: No space left on device"):
            run.write_summary()
    assert summary.read_bytes() == before and not list(summary.parent.glob("*.tmp"))
    for damaged in (before[:-20], b"[]", b'{"returns": [[1.0]]}'):
        summary.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"summary.json is damaged .*: remove it, `rlmeta resume "):
            rl.load(tmp_path / "run")
    summary.unlink()
    assert torch.equal(rl.resume(tmp_path / "run").scores, rl.load(tmp_path / "run").scores)


@pytest.mark.parametrize("agent", [rl.PPO(num_steps=16, batch_size=32), rl.REINFORCE()], ids=["ppo", "reinforce"])
def test_loaded_weights_lie_in_memory_as_in_the_run_that_goes_on(agent, tmp_path):
    """The bits of a matrix product depend on where its factors begin, which for the second learner is at an odd place
    where the weights of one are odd in number."""
    run = rl.train(agent, "CartPole-v1", steps=256, seeds=2, out=tmp_path / "run", progress=False)
    fresh, loaded = Run(run.experiment, None), rl.load(tmp_path / "run")
    fresh.start()
    weights = run.state["params"]["weights"]
    assert sum(w[0].numel() for w in weights.values()) % 2 == 1
    for name, weight in weights.items():
        for other in (fresh.state["params"]["weights"][name], loaded.state["params"]["weights"][name]):
            assert other.stride() == weight.stride(), name
            assert other.data_ptr() % 64 == weight.data_ptr() % 64, name
