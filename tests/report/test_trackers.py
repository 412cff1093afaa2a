"""Trackers: what TensorBoard and W&B hold afterwards, read back from their own files, across kills and resumes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlmeta.agents.ppo import PPO
from rlmeta.envs.task import task
from rlmeta.errors import CheckpointError, MissingExtraError, SettingError
from rlmeta.learning.settings import variants
from rlmeta.report.trackers import (
    TensorBoardTracker,
    Tracker,
    WandbTracker,
    learner_names,
    logged_to_wandb,
    to_tensorboard,
    to_wandb,
    trackers_of,
)
from rlmeta.runs.experiment import Budget, Experiment

NAN = math.nan


def experiment(seeds: tuple[int, ...] = (0, 7), **settings: Any) -> Experiment:
    return Experiment(tuple(variants(PPO(**settings))), seeds, task("CartPole-v1"), Budget(steps=10_000))


def forked(function: Callable[[], None], exit_code: int = 0) -> None:
    """Run in a forked process: it may be killed, and wandb's service ends with it."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(180)
    assert process.exitcode == exit_code


def written(folder: Path, index: int) -> WandbRun:
    """A W&B run once its service, which outlives the process a little, has written how it ended."""
    run_id, deadline = json.loads((folder / "wandb.json").read_text())["ids"][index], time.monotonic() + 120

    def ended() -> bool:
        files = (folder / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")
        return any(record.HasField("exit") for path in files for record in wandb_records(path))

    while not ended():
        assert time.monotonic() < deadline, "W&B's service has written no end of the run"
        time.sleep(0.1)
    return WandbRun(folder, index)


def kill_myself(*arguments: Any, **settings: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(tracker: Tracker, first: int, last: int) -> None:
    """Log the lines of steps first, first + 100, ..., last: a function of the step, as a resumed run's are."""
    for step in range(first, last + 1, 100):
        tracker.log(step, {"charts/episodic_return": [step / 2, step / 4]})


# ---------------------------------------------------------------------- names


def test_learners_are_named_by_setting_and_seed() -> None:
    assert learner_names(experiment((0, 7))) == ["seed=0", "seed=7"]
    assert learner_names(experiment((3,), learning_rate=[1e-3, 1e-4], clip_range=[0.1])) == [
        "learning_rate=0.001__seed=3",
        "learning_rate=0.0001__seed=3",
    ]
    assert learner_names(experiment((3,), learning_rate=[1e-3, 2e-3], gamma=[0.9, 0.99]))[3] == (
        "learning_rate=0.002,gamma=0.99__seed=3"
    )


def test_equal_and_long_names_stay_apart_and_fit_a_folder() -> None:
    assert learner_names(experiment((3,), learning_rate=[1e-3, 1e-3])) == ["learner=0__seed=3", "learner=1__seed=3"]
    per_learner = {name: [0.123456789012345, 0.2] for name in ("learning_rate", "gamma", "gae_lambda", "clip_range")}
    long = learner_names(experiment((10**18,), **per_learner))
    assert len(set(long)) == 16 and max(map(len, long)) == 100
    assert long[2].startswith("learner=2__learning_rate=") and long[2].endswith("..=1000000000000000000")


# ---------------------------------------------------------------------- TensorBoard


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of one learner."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in events.Tags()["scalars"]
    }  # sorted, as files of the same second are read in any order


def test_tensorboard_has_a_run_for_every_learner_with_its_numbers_alone(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, experiment((0, 7), learning_rate=[1e-3, 1e-4]))
    tracker.log(256, {"charts/episodic_return": [1, 2, NAN, 4], "losses/policy_loss": [NAN, NAN, NAN, math.inf]})
    tracker.log(512, {"charts/episodic_return": [5, 6, 7, 8]})
    returns = {folder.name: tensorboard(folder) for folder in (tmp_path / "tensorboard").iterdir()}  # not yet closed
    tracker.close()
    name = "charts/episodic_return"
    assert returns == {
        "learning_rate=0.001__seed=0": {name: [(256, 1), (512, 5)]},
        "learning_rate=0.001__seed=7": {name: [(256, 2), (512, 6)]},
        "learning_rate=0.0001__seed=0": {name: [(512, 7)]},
        "learning_rate=0.0001__seed=7": {name: [(256, 4), (512, 8)]},
    }


def test_tensorboard_shows_the_hyperparameters_of_each_learner_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        TensorBoardTracker(tmp_path, experiment((0, 7), learning_rate=[1e-3, 1e-4])).close()
        time.sleep(0.01)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "learning_rate=0.0001__seed=7"))
    events.Reload()
    (text,) = events.Tensors("hyperparameters/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()
    assert rows[:2] == ["|setting|value|", "|-|-|"]
    for row in ("|env_id|CartPole-v1|", "|exp_name|ppo|", "|seed|7|", "|learning_rate|0.0001|", "|stop_kl|inf|"):
        assert row in rows


def test_speed_is_of_all_learners_as_in_timing_jsonl(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path, experiment=experiment((0, 7)), seconds=0.0)
    tracker = to_tensorboard()(run)
    for step, seconds in ((100, 0.0), (256, 2.0), (512, 8.0)):
        run.seconds = seconds
        tracker.log(step, {})
    tracker.close()
    for seed in (0, 7):
        assert tensorboard(tmp_path / "tensorboard" / f"seed={seed}") == {"charts/SPS": [(256, 256.0), (512, 128.0)]}


@pytest.mark.parametrize("where", ["claiming", "between", "writing"])
def test_tensorboard_never_holds_a_step_twice_after_a_kill(tmp_path: Path, where: str) -> None:
    def die_at_step_900() -> None:
        tracker = TensorBoardTracker(tmp_path, experiment())
        train(tracker, 100, 800)
        if where == "claiming":
            os.replace = kill_myself
        elif where == "between":
            tracker._writers[0].add_scalar = kill_myself  # type: ignore[method-assign]
        else:
            tracker._writers[1].flush = kill_myself  # type: ignore[method-assign]
        train(tracker, 900, 900)

    forked(die_at_step_900, exit_code=-signal.SIGKILL)
    resumed = TensorBoardTracker(tmp_path, experiment())
    train(resumed, 500, 1500)  # the checkpoint was of step 400
    resumed.close()
    for index, seed in enumerate((0, 7)):
        found = tensorboard(tmp_path / "tensorboard" / f"seed={seed}")["charts/episodic_return"]
        if (where, index) == ("writing", 1) and (900, 225.0) in found:
            found.remove((900, 225.0))  # the process may have died just before or just after writing it
        kept = where == "claiming" or (where, index) == ("writing", 0)
        steps = [step for step in range(100, 1501, 100) if step != 900 or kept]
        assert found == [(step, step / (2, 4)[index]) for step in steps]


# ---------------------------------------------------------------------- W&B


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb  # noqa: F401  # takes a second, which the forked processes then need not spend

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # 15 s: too long to wait for in a test
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)


def wandb_records(path: Path) -> list[Any]:
    """The records of a `.wandb` file: protobuf messages in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    message_class: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

    data, position, message, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last piece
            records.append(message_class.FromString(message))
            message = b""
    return records


class WandbRun:
    """Everything in the folder about one W&B id, the oldest part first."""

    def __init__(self, folder: Path, index: int) -> None:
        self.id = json.loads((folder / "wandb.json").read_text())["ids"][index]
        files = sorted((folder / "wandb").glob(f"offline-run-*-{self.id}/*.wandb"))
        self.parts = [wandb_records(path) for path in files]
        records = [record for part in self.parts for record in part]
        self.about = [record.run for record in records if record.HasField("run")]
        self.config = {item.key: json.loads(item.value_json) for item in self.about[-1].config.update}
        self.metrics = [record.metric for record in records if record.HasField("metric")]
        self.exits = [record.exit.exit_code for record in records if record.HasField("exit")]
        self.lines = [line for part in self.parts for line in self.history(part)]

    @staticmethod
    def history(records: list[Any]) -> list[dict[str, float]]:
        lines = []
        for record in records:
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                line = {name: json.loads(value) for name, value in items.items()}
                lines.append({name: value for name, value in line.items() if name not in ("_timestamp", "_runtime")})
        return lines


@pytest.mark.usefixtures("offline")
def test_wandb_has_a_run_for_every_learner_with_its_own_configuration(tmp_path: Path) -> None:
    def child() -> None:
        tracker = WandbTracker(experiment((0, 7), learning_rate=[1e-3, 1e-4]), "project", "group", folder=tmp_path)
        assert tracker.urls == []
        tracker.log(256, {"charts/episodic_return": [1, 2, NAN, 4], "losses/policy_loss": [0.5, NAN, NAN, NAN]})
        tracker.log(512, {"charts/episodic_return": [5, 6, 7, math.inf]})
        tracker.close()

    forked(child)
    runs = [written(tmp_path, index) for index in range(4)]
    assert len({run.id for run in runs}) == 4 == len(list((tmp_path / "wandb").glob("offline-run-*")))
    names = [f"CartPole-v1__ppo__learning_rate={rate}__seed={seed}" for rate in ("0.001", "0.0001") for seed in (0, 7)]
    for index, run in enumerate(runs):
        (about,) = run.about
        assert (about.run_id, about.project, about.run_group) == (run.id, "project", "group")
        assert (about.display_name, about.resume) == (names[index], True)
        expected = {"env_id": "CartPole-v1", "exp_name": "ppo", "seed": (0, 7)[index % 2], "stop_kl": "inf"}
        assert expected.items() <= run.config.items()
        assert run.config["learning_rate"] == (1e-3, 1e-4)[index // 2]
        assert [(metric.name, metric.glob_name, metric.step_metric) for metric in run.metrics] == [
            ("global_step", "", ""),
            ("", "*", "global_step"),
        ]
        assert run.exits == [0]
    name = "charts/episodic_return"
    assert runs[0].lines == [
        {"_step": 256, "global_step": 256, name: 1, "losses/policy_loss": 0.5},
        {"_step": 512, "global_step": 512, name: 5},
    ]
    assert [[line[name] for line in run.lines] for run in runs] == [[1, 5], [2, 6], [7], [4]]
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(os.environ["WANDB_API_KEY"].encode() in text for text in texts)


@pytest.mark.parametrize(
    ("offline", "said"),
    [
        ([False, False], "W&B: https://wandb/0 and 1 more in group g\n"),
        ([False, True], "W&B: https://wandb/0\n"),
        ([True, True], ""),
    ],
)
def test_wandb_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offline: list[bool], said: str
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    def start(tracker: WandbTracker, index: int, *_: Any) -> Any:
        def log(line: dict[str, float], step: int, commit: bool) -> None:
            logged.append((step, line))

        return SimpleNamespace(url=f"https://wandb/{index}", offline=offline[index], disabled=False, log=log)

    monkeypatch.setattr(WandbTracker, "_start", start)
    run: Any = SimpleNamespace(folder=tmp_path, experiment=experiment((0, 7)), seconds=2.0)
    tracker = to_wandb("project", group="g")(run)
    for step in (256, 512):
        tracker.log(step, {"charts/episodic_return": [1, NAN]})
    assert tuple(capsys.readouterr()) == ("", said)
    assert logged[:2] == [
        (256, {"global_step": 256, "charts/episodic_return": 1, "charts/SPS": 256.0}),
        (256, {"global_step": 256, "charts/SPS": 256.0}),
    ]


@pytest.mark.usefixtures("offline")
def test_wandb_goes_on_with_the_same_runs_after_a_kill_and_never_repeats_a_step(tmp_path: Path) -> None:
    def die_at_step_3000() -> None:
        tracker = WandbTracker(experiment(), "project", folder=tmp_path)
        train(tracker, 100, 2900)
        actual = tracker._runs[0].log

        def log_and_die(*arguments: Any, **settings: Any) -> None:
            actual(*arguments, **settings)
            (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{tracker._runs[0].id}/*.wandb")
            while {line["_step"] for line in WandbRun.history(wandb_records(file))} != {*range(100, 3001, 100)}:
                time.sleep(0.05)
            kill_myself()

        tracker._runs[0].log = log_and_die
        train(tracker, 3000, 3000)

    def resume() -> None:
        tracker = WandbTracker(experiment(), "project", folder=tmp_path)
        train(tracker, 1500, 4000)
        tracker.close()

    forked(die_at_step_3000, exit_code=-signal.SIGKILL)
    ids = json.loads((tmp_path / "wandb.json").read_text())["ids"]
    assert len(set(ids)) == 2
    time.sleep(0.1)  # the service notices that its process has died
    forked(resume)
    for index in range(2):
        run = written(tmp_path, index)
        assert run.id == ids[index] and len(run.parts) == 2
        steps = [line["_step"] for line in run.lines]
        lost = [] if index == 0 else [3000]
        # At most once, in order: W&B's service may lose lines around a kill, and nothing is ever logged again.
        assert steps == sorted(set(steps))
        assert {*range(100, 2901, 100)} <= {*steps} <= {*range(100, 4001, 100)} - {*lost}
        assert all(line["charts/episodic_return"] == line["_step"] / (2, 4)[index] for line in run.lines)
        assert {about.run_group for about in run.about} == {f"CartPole-v1__ppo__{tmp_path.name}"}


@pytest.mark.usefixtures("offline")
def test_training_goes_on_when_the_service_dies(tmp_path: Path) -> None:
    def child() -> None:
        tracker = WandbTracker(experiment((0,)), "project", folder=tmp_path)
        tracker.log(100, {"charts/episodic_return": [1.0]})
        children = subprocess.run(
            ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
        )
        (service,) = [line.split()[0] for line in children.stdout.splitlines() if "wandb" in line]
        os.kill(int(service), signal.SIGKILL)
        time.sleep(0.3)
        with pytest.warns(UserWarning, match=r"W&B failed while \w+ing .*; the run goes on without it") as caught:
            tracker.log(200, {"charts/episodic_return": [2.0]})
            tracker.log(300, {"charts/episodic_return": [3.0]})
            tracker.close()
        assert len(caught) == 1

    forked(child)


@pytest.mark.usefixtures("offline")
def test_a_run_that_ends_by_an_exception_has_failed(tmp_path: Path) -> None:
    def child() -> None:
        try:
            raise ValueError("handled long ago")
        except ValueError:  # a training that starts here and ends well has not failed
            WandbTracker(experiment((0,)), "project", folder=tmp_path / "well").close()
        tracker = WandbTracker(experiment((0,)), "project", folder=tmp_path / "badly")
        with pytest.raises(KeyError):
            try:
                raise KeyError
            finally:
                tracker.close()

    for name in ("well", "badly"):
        (tmp_path / name).mkdir()
    forked(child)
    assert written(tmp_path / "well", 0).exits == [0]
    assert written(tmp_path / "badly", 0).exits == [1]


def test_wandb_without_a_key_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        with pytest.raises(SettingError, match=r"W&B run 1 of 2 can't start \(.*API key.*\): `wandb login` or set"):
            WandbTracker(experiment(), "project", folder=tmp_path)

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    forked(child)


def test_wandb_refuses_to_scatter_a_run_over_projects(tmp_path: Path) -> None:
    saved = {"last_step": 5, "project": "old", "entity": None, "group": "g", "ids": ["a", "b"]}
    (tmp_path / "wandb.json").write_text(json.dumps(saved))
    with pytest.raises(SettingError, match="was logged to W&B project 'old', entity None, group 'g': give the same"):
        WandbTracker(experiment(), "new", folder=tmp_path)
    with pytest.raises(SettingError, match="group 'g'"):
        WandbTracker(experiment(), "old", "other", folder=tmp_path)
    assert json.loads((tmp_path / "wandb.json").read_text()) == saved


# ---------------------------------------------------------------------- both


def test_a_line_of_another_number_of_learners_is_refused(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, experiment())
    with pytest.raises(SettingError, match=r"'eval/return' has 3 values, expected one for each of 2"):
        tracker.log(100, {"eval/return": [1, 2, 3]})
    tracker.close()


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_a_damaged_journal_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tensorboard.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        CheckpointError, match=r"tensorboard\.json can't be read .*: restore it from a copy, or remove it"
    ):
        TensorBoardTracker(tmp_path, experiment())


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"needs wandb, which is not installed: pip install 'rlmeta\[wandb\]'"):
        WandbTracker(experiment(), "project", folder=tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'rlmeta\[tensorboard\]'"):
        TensorBoardTracker(tmp_path, experiment())
    for make in (to_tensorboard, lambda: to_wandb("project")):
        with pytest.raises(MissingExtraError):
            make()
    assert list(tmp_path.iterdir()) == []


def test_neither_package_is_imported_before_it_is_used() -> None:
    code = "import sys, rlmeta.report.trackers; print({'wandb', 'tensorboard', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_factories_open_trackers_in_the_folder_of_the_run(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path, experiment=experiment())
    to_tensorboard()(run).close()
    assert (tmp_path / "tensorboard" / "seed=7").is_dir()
    in_memory: Any = SimpleNamespace(folder=None, experiment=experiment())
    for factory in (to_tensorboard(), to_wandb("project")):
        with pytest.raises(SettingError, match="needs a run folder, the run is kept in memory: give out="):
            factory(in_memory)


def test_a_folder_tells_which_trackers_its_run_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers_of(tmp_path) == []
    run: Any = SimpleNamespace(folder=tmp_path, experiment=experiment())
    to_tensorboard()(run).close()
    (factory,) = trackers_of(tmp_path)
    tracker = factory(run)
    assert isinstance(tracker, TensorBoardTracker)
    tracker.close()
    saved = {"last_step": 5, "project": "old", "entity": "team", "group": "g", "ids": ["a", "b"]}
    (tmp_path / "wandb.json").write_text(json.dumps(saved))
    asked: dict[str, Any] = {}

    def start(self: WandbTracker, *_: Any) -> Any:
        asked.update(self._journal.content)
        return SimpleNamespace(offline=True)

    monkeypatch.setattr(WandbTracker, "_start", start)
    assert len(trackers_of(tmp_path)) == 1 and asked == {}, "a folder alone sends nothing to W&B"
    assert logged_to_wandb(tmp_path) == "team/old"
    assert isinstance(trackers_of(tmp_path, "team/old")[1](run), WandbTracker) and asked == saved
    with pytest.raises(SettingError, match="was logged to W&B project 'old', entity 'team'"):
        trackers_of(tmp_path, "old")[1](run)
    for named in ("team/", "/old", "a/b/c"):
        with pytest.raises(SettingError, match="expected PROJECT, or ENTITY/PROJECT"):
            trackers_of(tmp_path, named)
    (tmp_path / "wandb.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"wandb\.json can't be read"):
        logged_to_wandb(tmp_path)
