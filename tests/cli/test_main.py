"""The command line, run for real: in this process with tiny budgets, and a few times as a process of its own."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import rlmeta
import rlmeta.report.tables
import rlmeta.report.trackers
import rlmeta.runs.run
from rlmeta.cli import plan as plans
from rlmeta.cli import plan_folder
from rlmeta.cli.groups import train, training
from rlmeta.cli.main import main
from rlmeta.envs import trusted
from rlmeta.errors import SettingError
from rlmeta.runs.folder import read_config
from rlmeta.runs.metric_log import read_metric_log
from rlmeta.runs.shipped import AGENTS, METHODS

REPOSITORY = Path(rlmeta.__file__).parents[1]
TINY = "--steps 64 --num-envs 2 --num-steps 16 --batch-size 32 --num-epochs 1 --final-episodes 2 --eval-episodes 2"
SLOW = TINY.replace("--steps 64", "--steps 10M --log-points 1M")

OWN_CODE = """
import gymnasium as gym
import torch

class Line(gym.Env):
    made = []

    def __init__(self, size=3, name="a", slow=False):
        Line.made.append((size, name, slow))
        self.size = size
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,))
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.observation_space.low, {}

    def step(self, action):
        self.at += 1
        return self.observation_space.high, 1.0, self.at >= self.size, False, {}

def make():
    return Line(5)

def broken():
    return Line(size=1 / 0)

def network(space):
    return torch.nn.Sequential(torch.nn.Linear(space.shape[0], 6), torch.nn.Tanh())

gym.register("Line-v0", Line)
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project folder to be in; what the command line adds to the module path goes again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("RLMETA_DEBUG", raising=False)
    yield tmp_path
    for name in ("own_code", "own_methods", "my_env", "my_native_env", "my_family", "my_stream"):
        sys.modules.pop(name, None)
    for name in ("Line-v0", "MyEnv-v0"):
        gym.registry.pop(name, None)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """The rows of every table of results that is printed."""
    shown: list[list[dict[str, Any]]] = []
    table = rlmeta.report.tables.result_table
    monkeypatch.setattr("rlmeta.report.tables.result_table", lambda rows: (shown.append(rows), table(rows))[1])
    return shown


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: two seeds at two learning rates."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(f"train ppo CartPole-v1 {TINY} --seeds 2 --learning-rate 1e-3,1e-4 --quiet --out {folder}".split()) == 0
    return folder


def rlmeta_says(capfd: pytest.CaptureFixture[str], arguments: str, status: int = 0) -> tuple[str, str]:
    """Run a command; what it printed and what it complained about."""
    capfd.readouterr()
    assert main(arguments.split()) == status
    said = capfd.readouterr()
    return " ".join(said.out.split()), said.err


# ----------------------------------------------------------------------------------------------------------- train


def test_train_says_what_it_does_and_leaves_a_run(
    tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    said, _ = rlmeta_says(capfd, f"train ppo CartPole-v1 {TINY} --seeds 2 --env.gravity 7 --eval-every 32")
    assert "ppo on CartPole-v1 (gravity=7): 2 seeds, 64 steps each, into runs/ppo-CartPole-v1-1" in said
    assert f"preset {REPOSITORY / 'agents' / 'ppo.toml'} [CartPole-v1]" in said
    assert "settings (PPO's default): num_envs=2 (8), num_steps=16 (128), num_epochs=1 (10)" in said
    assert "gae_lambda=0.8 (0.95)" in said
    assert "saved in runs/ppo-CartPole-v1-1" in said
    assert [(row["steps"], row["seeds"], row["episodes"]) for row in tables[0]] == [(64, 2, 2)]
    config = read_config("runs/ppo-CartPole-v1-1")
    assert (config["exp_name"], config["env_id"], config["seeds"]) == ("ppo", "CartPole-v1", [0, 1])
    assert config["budget"] | {"steps": 64, "eval_every": 32, "final_episodes": 2} == config["budget"]
    assert config["variants"][0] | {"num_steps": 16, "gae_lambda": 0.8} == config["variants"][0]
    assert config["task"]["settings"] == {"gravity": 7}
    assert config["task"]["source"] == "rlmeta.envs.native.cartpole:CartPole"
    assert [
        line["env_steps"] for line in read_metric_log("runs/ppo-CartPole-v1-1/metrics.jsonl") if "eval/return" in line
    ]

    said, _ = rlmeta_says(capfd, f"train ppo CartPole-v1 {TINY} --preset none --seeds 7,5 --threads 1 --quiet")
    assert "preset" not in said
    assert "saved in runs/ppo-CartPole-v1-2" in said
    config = read_config("runs/ppo-CartPole-v1-2")
    assert (config["seeds"], config["threads"]) == ([7, 5], 1)
    assert config["variants"][0]["gae_lambda"] == 0.95


def test_no_native_takes_gymnasiums_environment() -> None:
    assert main(f"train ppo CartPole-v1 {TINY} --no-native --seeds 3, --quiet --out a".split()) == 0
    config = read_config("a")
    assert (config["task"]["source"], config["task"]["mode"], config["seeds"]) == ("CartPole-v1", "sync", [3])


def test_async_reaches_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plans.from_flags("ppo", "CartPole-v1", ["--no-native", "--async", "--device", "cpu"])
    problem = plan.problem()
    assert isinstance(problem, rlmeta.Task)
    assert (problem.mode, problem.native) == ("async", False)


def test_a_comma_in_a_per_learner_setting_is_one_batch(trained: Path) -> None:
    config = read_config(trained)
    assert [variant["learning_rate"] for variant in config["variants"]] == [1e-3, 1e-4]
    summary = json.loads((trained / "summary.json").read_text())
    assert [row["setting"] for row in summary["summary"]] == ["learning_rate=0.001", "learning_rate=0.0001"]
    assert (trained / "curve.png").stat().st_size > 0


def test_a_comma_in_a_static_setting_trains_groups(
    tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    said, _ = rlmeta_says(
        capfd, f"train ppo CartPole-v1 {TINY} --learning-rate 1e-3,1e-4 --hidden-sizes 8,8x4 --out runs/g"
    )
    assert "2 groups, one after another: hidden_sizes=8 | hidden_sizes=8x4" in said
    assert sorted(path.name for path in Path("runs/g").iterdir() if path.is_dir()) == [
        "hidden_sizes=8",
        "hidden_sizes=8x4",
    ]
    for sizes in ([8], [8, 4]):
        config = read_config(f"runs/g/hidden_sizes={'x'.join(map(str, sizes))}")
        assert [variant["hidden_sizes"] for variant in config["variants"]] == [sizes, sizes]
    rlmeta_says(capfd, "eval runs/g --episodes 4")
    settings = [f"hidden_sizes={sizes}, learning_rate={rate}" for sizes in ("8", "8x4") for rate in (0.001, 0.0001)]
    assert [[row["setting"] for row in rows] for rows in tables] == [settings, settings], "one table for all"
    assert [row["episodes"] for row in tables[1]] == [4] * 4
    assert rlmeta_says(capfd, "list runs")[0].count("finished") == 2


def test_groups_are_checked_before_any_is_trained(capfd: pytest.CaptureFixture[str]) -> None:
    Path("own_code.py").write_text(OWN_CODE.replace("6)", "6), torch.nn.Flatten(0)"))
    flags = f"{TINY} --hidden-sizes 8,9 --network own_code:network --out g"
    _, error = rlmeta_says(capfd, f"train ppo CartPole-v1 {flags}", 2)
    assert "must give features" in error
    assert not Path("g").exists()


def test_preset_gives_steps_and_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text('["CartPole-v1"]\nsteps = 32\nnum_envs = 2\nnum_steps = 16\nbatch_size = 16\n')
    said, _ = rlmeta_says(capfd, "train ppo CartPole-v1 --preset mine.toml --batch-size 32 --final-episodes 2 --out a")
    assert "1 seed, 32 steps each" in said
    assert "preset mine.toml [CartPole-v1]" in said
    variant = read_config("a")["variants"][0]
    assert (variant["num_envs"], variant["batch_size"], variant["num_epochs"]) == (2, 32, 10)
    with pytest.raises(SettingError, match=r"preset gone\.toml"):
        plans.from_flags("ppo", "CartPole-v1", ["--preset=gone.toml"])


def test_target_stops_learners_and_they_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    said, _ = rlmeta_says(capfd, f"train ppo CartPole-v1 {TINY} --eval-every 32 --target 1 --seeds 4,9")
    assert "learner 1 (seed 9) reached 1 after 32 steps" in said
    assert "stopped: every learner has stopped" in said
    flags = "--steps 50 --num-envs 5 --eval-every 10 --eval-episodes 2 --final-episodes 2"
    said, _ = rlmeta_says(capfd, f"train maml sinusoid {flags} --target 1000")
    assert "learner 0 (seed 0) reached 1000 after 10 steps" in said, "as low as the target, where low is good"


def test_learners_that_diverge_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    said, warned = rlmeta_says(capfd, f"train ppo CartPole-v1 {TINY} --learning-rate 1e-3,1e38 --seeds 4,9 --quiet")
    assert "learner 0 " not in said
    assert "learner 1 " not in said
    assert "learner 2 (seed 4, learning_rate=1e+38) turned NaN and was frozen after " in said
    assert "learner 3 (seed 9, learning_rate=1e+38) turned NaN and was frozen after " in said
    assert "stopped" not in said
    assert warned.startswith("warning: seed 4 (learning_rate=1e+38) ")
    assert warned.count("\n") == 2


def test_trackers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    logged: dict[str, list[int]] = {}

    class Fake:
        def __init__(self, name: str, run: Any) -> None:
            self.name, logged[name] = name, []
            (run.folder / f"{name}.json").write_text(json.dumps({"last_step": 64, "project": "my own", "entity": "me"}))

        def log(self, step: int, metrics: dict[str, list[float]]) -> None:
            logged[self.name].append(step)

        def close(self) -> None:
            logged[self.name].append(-1)

    asked: list[Any] = []

    def to_tensorboard() -> Any:
        return lambda run: Fake("tensorboard", run)

    def to_wandb(project: str, entity: str | None = None) -> Any:
        asked.append((project, entity))
        return lambda run: Fake("wandb", run)

    for module in (plans, rlmeta.report.trackers):
        monkeypatch.setattr(module, "to_tensorboard", to_tensorboard)
        monkeypatch.setattr(module, "to_wandb", to_wandb)
    assert main(f"train ppo CartPole-v1 {TINY} --quiet --tensorboard --wandb --wandb-project mine --out a".split()) == 0
    assert logged == {"tensorboard": [32, 64, -1], "wandb": [32, 64, -1]}
    assert main(f"train ppo CartPole-v1 {TINY} --quiet --no-tensorboard --out b".split()) == 0
    logged.clear()
    _, error = rlmeta_says(capfd, "resume a --quiet")
    assert set(logged) == {"tensorboard"}, "a folder sends nothing to W&B"
    assert error == "note: a says it is logged to W&B as 'me/my own'; not now: resume with --wandb 'me/my own'\n"
    assert asked == [("mine", None)] * 2
    assert rlmeta_says(capfd, "resume a --quiet --wandb me/other")[1] == ""
    assert set(logged) == {"tensorboard", "wandb"} and asked[2:] == [("other", "me")]
    assert "W&B project 'me/': expected PROJECT" in rlmeta_says(capfd, "resume a --wandb me/", 2)[1]


def test_a_saved_plan_sends_nothing_to_wandb(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Fake:
        def log(self, step: int, metrics: dict[str, list[float]]) -> None:
            asked.append(step)

        def close(self) -> None:
            pass

    def to_wandb(project: str, entity: str | None = None) -> Any:
        asked.append((project, entity))
        return lambda run: Fake()

    for module in (plans, rlmeta.report.trackers):
        monkeypatch.setattr(module, "to_wandb", to_wandb)
    flags = f"{TINY} --hidden-sizes 8,9 --quiet --wandb --wandb-project mine"
    plan_folder.begin(plans.from_flags("ppo", "CartPole-v1", flags.split()), Path("g"))
    asked.clear()
    _, error = rlmeta_says(capfd, "resume g")
    assert asked == []
    note = "note: g/plan.toml says it is logged to W&B as mine; not now: resume with --wandb mine\n"
    assert error == note * 2
    shutil.rmtree("g/hidden_sizes=9")
    assert rlmeta_says(capfd, "resume g --wandb me/mine")[1] == ""
    assert asked[0] == ("mine", "me") and 64 in asked


# ------------------------------------------------------------------------------------------------- the user's own code


def test_own_environment_with_arguments(
    project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "own_code.py").write_text(OWN_CODE)
    arguments = "--env.size 4 --env.name=b --env.slow true"
    said, _ = rlmeta_says(capfd, f"train ppo own_code:Line-v0 {TINY} {arguments}")
    assert "ppo on own_code:Line-v0 (size=4, name=b, slow=true)" in said
    folder = "runs/ppo-own_code-Line-v0-1"
    assert set(sys.modules["own_code"].Line.made) == {(4, "b", True)}
    assert read_config(folder)["task"]["settings"] == {"size": 4, "name": "b", "slow": True}
    rlmeta_says(capfd, f"eval {folder} --episodes 2 --code own_code")
    assert tables[-1][0]["scores"] == [4.0]
    _, error = rlmeta_says(capfd, f"eval {folder} --episodes 2", 2)
    assert f"{folder}/config.toml names code in the module 'own_code'" in error


def test_environment_and_network_by_name_are_given_again(
    project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "envs").mkdir()
    (project / "envs" / "own_code.py").write_text(OWN_CODE)
    said, _ = rlmeta_says(capfd, f"train ppo own_code:make {TINY} --network own_code:network --out a")
    assert "network=own_code:network (none)" in said
    variant = read_config("a")["variants"][0]
    assert variant["network"] == "own_code:network"
    _, error = rlmeta_says(capfd, "eval a --env own_code:make", 2)
    assert "had the network own_code:network: pass it again" in error
    _, error = rlmeta_says(capfd, "eval a --network own_code:network", 2)
    assert "had environments of own_code:make: pass it again" in error
    own = "--network own_code:network --env own_code:make"
    rlmeta_says(capfd, f"eval a --episodes 2 {own}")
    rlmeta_says(capfd, f"resume a {own}")
    rlmeta_says(capfd, "eval a --episodes 2 --code own_code")
    assert [rows[0]["scores"] for rows in tables] == [[5.0]] * 4


@pytest.mark.parametrize("again", ["--env own_code:Line-v0", "--env own_code:Line", "--code own_code"])
def test_every_command_takes_the_name_that_train_took(
    again: str, project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    """An id that a module registers, as it was trained on, or the class behind it; with the settings it had."""
    (project / "own_code.py").write_text(OWN_CODE)
    rlmeta_says(capfd, f"train ppo own_code:Line-v0 --env.size 4 {TINY} --quiet --out a")
    rlmeta_says(capfd, f"eval a --episodes 2 {again}")
    rlmeta_says(capfd, f"resume a --quiet {again}")
    assert [rows[0]["scores"] for rows in tables] == [[4.0]] * 3
    said, _ = rlmeta_says(capfd, f"record a --out demo --episodes 2 {again}")
    assert "returns 4 (4 to 4)" in said
    _, error = rlmeta_says(capfd, f"adapt a {again}", 2)
    assert "a run of ppo does not adapt" in error
    _, error = rlmeta_says(capfd, "eval a --env own_code:Lime", 2)
    assert "own_code has no 'Lime': did you mean Line?" in error
    _, error = rlmeta_says(capfd, "eval a --env own_code:Lime-v0", 2)
    assert "unknown gymnasium environment 'own_code:Lime-v0': did you mean own_code:Line-v0" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_code:broken", "error: ZeroDivisionError: division by zero"),
        ("own_code:missing", "error: NameNotFound: Environment `Nowhere` doesn't exist"),
        ("own_code:Failing-v0", "environment 'own_code:Failing-v0' failed with RuntimeError: no display"),
        ("own_code:zoo", "several agents, such as PettingZoo's, are not supported"),
    ],
)
def test_errors_in_ones_own_code_are_shown_as_they_are(
    name: str, message: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = """
def missing():
    return gym.make("Nowhere-v0")

def failing():
    raise RuntimeError("no display")

class Zoo:
    possible_agents = ["a", "b"]

def zoo():
    return Zoo()

gym.register("Failing-v0", failing)
"""
    (project / "own_code.py").write_text(OWN_CODE + more)
    assert main(["train", "ppo", name, *TINY.split(), "--quiet"]) != 0
    error = capfd.readouterr().err
    assert message in error and "unknown" not in error and ("own_code.py" in error or name == "own_code:zoo")
    gym.registry.pop("Failing-v0")


def test_native_environment_by_name(
    project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(REPOSITORY / "envs", project / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    flags = TINY.replace("--steps 64", "--steps 32")
    assert main(f"train ppo my_native_env:MyNativeEnv --env.drag 0.5 {flags} --quiet --out a".split()) == 0
    _, error = rlmeta_says(capfd, "eval a", 2)
    assert "had environments of my_native_env:MyNativeEnv: pass it again" in error
    assert main(["eval", "a", "--episodes", "2", "--env", "my_native_env:MyNativeEnv"]) == 0
    dragged = sys.modules["my_native_env"].MyNativeEnv(drag=0.5)
    expected = rlmeta.load("a", env=dragged).evaluate(2, seed=1).returns.mean(-1).tolist()
    assert tables[-1][0]["scores"] == expected
    groups = f"train ppo my_native_env:MyNativeEnv --env.drag 0.5 {flags} --hidden-sizes 8,9 --quiet --out g"
    assert main(groups.split()) == 0
    with trusted.allowing(["my_native_env"]):
        again = train(plan_folder.from_folder(Path("g")), "hidden_sizes=9", Path("g"))
    assert again.experiment.problem.source == dragged


OWN_METHODS = """
from dataclasses import dataclass

from rlmeta.learning.method import Method
from tests.lifelong.toy import points

@dataclass(frozen=True)
class Slow(Method):
    part: float = 1.0

    name = "slow"
    needs = frozenset({"boundaries"})

    def grads(self, learner, gradients, p, m, task):
        return self.part * gradients.total

class Nothing(Method):
    name = "nothing"

def stream(count=2):
    return points(count)
"""


def test_own_stream_and_methods_by_name_are_given_again(
    project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "own_methods.py").write_text(OWN_METHODS)
    methods = "--lifelong own_methods:Slow,replay,own_methods:Nothing"
    train = f"train classifier own_methods:stream --steps 64 --batch-size 8 --eval-episodes 4 {methods} --slow.part 0.5"
    rlmeta_says(capfd, f"{train} --order 2 --quiet --out a")
    assert read_config("a")["methods"][0] == {"name": "slow", "class": "own_methods:Slow", "settings": {"part": 0.5}}
    rlmeta_says(capfd, f"{train} --quiet --hidden-sizes 4,5 --out g")
    assert rlmeta_says(capfd, "resume g --code own_methods")[1] == "", "a plan names what it needs"
    assert "names code in the module 'own_methods'" in rlmeta_says(capfd, "resume g", 2)[1]
    for given, message in (
        (
            "--env own_methods:stream",
            "had lifelong methods of your own: pass them again as lifelong= (on the command line --lifelong ",
        ),
        ("--env own_methods:stream --lifelong own_methods:Nothing", "--lifelong own_methods:Slow)"),
        (methods, "learned from your own samples 'points-0': pass it again as env="),
        ("--lifelong own_methods:stream", "expected a class that extends rlmeta's Method"),
        ("--lifelong own_methods:Fast", "own_methods has no 'Fast'"),
    ):
        _, error = rlmeta_says(capfd, f"eval a {given}", 2)
        assert message in error
    again = "--env own_methods:stream --lifelong own_methods:Slow,own_methods:Nothing"
    rlmeta_says(capfd, f"resume a {again}")
    rlmeta_says(capfd, f"eval a --episodes 4 {again}")
    assert tables[-2][0]["scores"] == tables[0][0]["scores"] and len(tables[-1][0]["scores"]) == 2
    for flags, message in (
        ("--slow.pat 1", "--slow: unknown setting of Slow 'pat': did you mean part?"),
        ("--nothing.x 1", "--nothing.x: nothing has no settings"),
        ("--scenario class", "--scenario: the stream 'own_methods:stream' has its own scenario"),
        ("--env.size 1", "own_methods:stream takes other settings: got an unexpected keyword argument 'size'"),
        ("--env.count 3", "--env.count: 'own_methods:stream' already has its settings"),
    ):
        _, error = rlmeta_says(capfd, f"{train} {flags}", 2)
        assert message in error


def test_own_family_by_name_is_given_again(
    project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(REPOSITORY / "envs", project / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    rlmeta_says(capfd, "train maml my_family:MyFamily --env.slope 3 --steps 64 --num-envs 8 --quiet --out a")
    assert read_config("a")["task"]["settings"]["slope"] == 3.0
    _, error = rlmeta_says(capfd, "eval a", 2)
    assert "learned from your own family 'MyFamily': pass it again as env= (on the command line --env" in error
    rlmeta_says(capfd, "eval a --episodes 8 --env my_family:MyFamily")
    family = sys.modules["my_family"].MyFamily(slope=3.0)
    assert tables[-1][0]["scores"] == rlmeta.load("a", env=family).evaluate(8, seed=1).returns.mean(-1).tolist()
    _, error = rlmeta_says(capfd, "train maml my_family:MyFamily --env.slop 3", 2)
    assert "my_family:MyFamily takes other settings: got an unexpected keyword argument 'slop'" in error
    _, error = rlmeta_says(capfd, "train ppo my_family:MyFamily", 2)
    assert "'MyFamily' is a family of tasks for meta-learners, PPO learns one task" in error


def test_template_stream_can_be_learned(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(REPOSITORY / "envs", project / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    flags = TINY.replace("--steps 64", "--steps 32")
    assert main(f"train ppo my_stream:my_stream {flags} --lifelong ewc --order 2 --quiet --out a".split()) == 0
    assert rlmeta.load("a").matrix.shape == (2, 4, 3)


def test_an_error_in_own_code_is_one_line_with_its_place(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "own_code.py").write_text(OWN_CODE)
    _, error = rlmeta_says(capfd, f"train ppo own_code:broken {TINY} --quiet", 1)
    assert error.startswith("error: ZeroDivisionError: division by zero (")
    assert "own_code.py:27, in broken); RLMETA_DEBUG=1 shows the traceback" in error
    assert error.count("\n") == 1


# ----------------------------------------------------------------------------------------------- interrupt and resume


SAVING = "finishing this iteration and saving; Ctrl-C again stops at once\n"


def interrupt_at_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run is interrupted, as by Ctrl-C, at its first line of metrics."""
    go, times = training.go, [1]

    def interrupted(*args: Any, **settings: Any) -> Any:
        def press(run: Any, line: dict[str, Any]) -> None:
            if times and line["env_steps"] >= 32:
                times.pop()
                os.kill(os.getpid(), signal.SIGINT)

        return go(*args, callbacks=[press], **settings)

    monkeypatch.setattr(training, "go", interrupted)


def test_interrupted_run_is_resumed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    flags = TINY.replace("--steps 64", "--steps 128")
    assert main(f"train ppo CartPole-v1 {flags} --seeds 2 --quiet --out whole".split()) == 0
    interrupt_at_first_line(monkeypatch)
    said, error = rlmeta_says(capfd, f"train ppo CartPole-v1 {flags} --seeds 2 --quiet --out a", 130)
    assert error == SAVING + "interrupted; resume with: rlmeta resume a\n"
    assert said == ""
    assert not Path("a/summary.json").exists()
    assert main(["resume", "a", "--quiet"]) == 0
    assert Path("a/metrics.jsonl").read_bytes() == Path("whole/metrics.jsonl").read_bytes()
    whole, resumed = (json.loads(Path(name, "summary.json").read_text())["returns"] for name in ("whole", "a"))
    assert resumed == whole


def test_interrupted_groups_are_resumed(
    monkeypatch: pytest.MonkeyPatch, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = f"{TINY} --env.gravity 7.5 --hidden-sizes 8,9 --quiet"
    assert main(f"train ppo CartPole-v1 {flags} --out whole".split()) == 0
    with monkeypatch.context() as patched:
        interrupt_at_first_line(patched)
        _, error = rlmeta_says(capfd, f"train ppo CartPole-v1 {flags} --out g", 130)
    assert error == SAVING + "interrupted; resume with: rlmeta resume g\n"
    assert not Path("g/hidden_sizes=9").exists()
    rlmeta_says(capfd, "resume g")
    assert [row["setting"] for row in tables[-1]] == ["hidden_sizes=8", "hidden_sizes=9"]
    for label in ("hidden_sizes=8", "hidden_sizes=9"):
        assert read_config(Path("g", label))["task"]["settings"] == {"gravity": 7.5}
        assert Path("g", label, "metrics.jsonl").read_bytes() == Path("whole", label, "metrics.jsonl").read_bytes()
    before = Path("g/hidden_sizes=8/summary.json").stat().st_mtime_ns
    assert main(["resume", "g"]) == 0
    assert Path("g/hidden_sizes=8/summary.json").stat().st_mtime_ns == before, "what has ended is only read"


def test_ctrl_c_while_a_group_ends_leaves_the_next_to_a_resume(
    monkeypatch: pytest.MonkeyPatch, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    write_summary = rlmeta.runs.run.Run.write_summary

    def pressed(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write_summary(run)

    with monkeypatch.context() as patched:
        patched.setattr(rlmeta.runs.run.Run, "write_summary", pressed)
        _, error = rlmeta_says(capfd, f"train ppo CartPole-v1 {TINY} --hidden-sizes 8,9 --quiet --out g", 130)
    assert error == SAVING + "interrupted; resume with: rlmeta resume g\n"
    assert Path("g/hidden_sizes=8/summary.json").exists()
    assert not Path("g/hidden_sizes=9").exists()
    rlmeta_says(capfd, "resume g")
    assert [row["setting"] for row in tables[-1]] == ["hidden_sizes=8", "hidden_sizes=9"]


def test_ctrl_c_and_kill_of_a_process(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "rlmeta", *f"train ppo CartPole-v1 {SLOW} --quiet --out a".split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(project / "a" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (130, SAVING + "interrupted; resume with: rlmeta resume a\n")

    _, error = rlmeta_says(capfd, "train ppo CartPole-v1 --out a", 2)
    assert "a exists and holds" in error
    manifest = (project / "a" / "state" / "manifest.json").read_bytes()
    (project / "a" / "state" / "manifest.json").write_bytes(manifest[: len(manifest) // 2])
    (project / "a" / "state" / "manifest.previous.json").unlink(missing_ok=True)
    _, error = rlmeta_says(capfd, "resume a", 2)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "manifest.json" in error


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not (path.is_file() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian ppo CartPole-v1", "unknown command 'trian': did you mean train?"),
        ("train", "rlmeta train takes an agent and a task first, got none"),
        ("train ppo", "rlmeta train takes an agent and a task first, got ppo"),
        ("train ppo CartPole-v1 again", "got ppo CartPole-v1 again"),
        ("train pop CartPole-v1", "unknown agent 'pop': did you mean ppo?"),
        ("train xyz CartPole-v1", "unknown agent 'xyz': expected one of a2c, "),
        ("train ppo xyz", "unknown task 'xyz': `rlmeta list` shows what can be named"),
        ("train ppo CartPole-v2", "unknown task 'CartPole-v2': did you mean CartPole-v1"),
        ("train ppo CartPole-v1 --learning-rte 1e-3", "unknown flag --learning-rte: did you mean --learning-rate"),
        ("train ppo CartPole-v1 --learning-rate", "--learning-rate needs a value"),
        ("train ppo CartPole-v1 --learning-rate fast", "--learning-rate is 'fast', expected a number"),
        ("train ppo CartPole-v1 --learning-rate -1", "learning_rate is -1, expected above 0"),
        ("train ppo CartPole-v1 --num-steps 32,33", "batch_size 256 does not divide num_envs * num_steps = 264"),
        ("train ppo CartPole-v1 --steps 0", "steps is 0, expected at least 1"),
        ("train ppo CartPole-v1 --steps 1k,2k", "--steps is '1k,2k', expected one value"),
        ("train ppo CartPole-v1 --seeds 0", "--seeds is '0', expected at least one"),
        ("train ppo CartPole-v1 --seeds -3", "--seeds is '-3', expected at least one"),
        ("train ppo CartPole-v1 --seeds ,", "--seeds ,: no seeds given, expected at least one"),
        ("train ppo CartPole-v1 --seeds x", "--seeds is 'x', expected a count (16), or seeds (3,5,7 or 100-115)"),
        ("train ppo CartPole-v1 --seeds 3,3", "seeds repeat: [3, 3]"),
        ("train ppo CartPole-v1 --seeds 3,3 --hidden-sizes 8,9", "seeds repeat: [3, 3]"),
        ("train ppo CartPole-v1 --env.gravitty 7", "unknown constant of CartPole 'gravitty': did you mean gravity?"),
        ("train ppo CartPole-v1 --env.gravity hello", "constant gravity of CartPole is 'hello', expected a number"),
        ("train ppo CartPole-v1 --env.gravity", "--env.gravity needs a value"),
        ("train ppo CartPole-v1 --env.gravity 7 --env.gravity 8", "--env.gravity is given twice"),
        ("train ppo CartPole-v1 --env. 7", "--env. names no argument"),
        ("train ppo CartPole-v1 --async", "--async is for gymnasium's environments, 'CartPole-v1' is rlmeta's own"),
        ("train ppo CartPole-v1 --device gpu", "--device is 'gpu': "),
        ("train ppo CartPole-v1 --preset fsat", "unknown preset 'fsat'"),
        ("train ppo CartPole-v1 --wandb-project mine", "--wandb-project is given without --wandb"),
        ("train ppo CartPole-v1 --network nopkg:Net", "--network: no module 'nopkg' can be imported"),
        ("train ppo CartPole-v1 --network json:Net", "--network: json has no 'Net'"),
        ("train ppo split-digits", "PPO acts in environments, this problem is of labelled samples: use Classifier"),
        ("train classifier CartPole-v1", "Classifier learns from labelled samples, this problem is to act in: use PPO"),
        ("train ppo CartPole-v1 --lifelong ewc", "are for streams of tasks, 'CartPole-v1' is none"),
        ("train ppo CartPole-v1 --no-restart-optimizer", "are for streams of tasks, 'CartPole-v1' is none"),
        ("train ppo cartpole-conflicts --order sideways", "--order is 'sideways', expected given, all"),
        ("train ppo cartpole-conflicts --scenario class", "scenario is for streams of samples"),
        ("train classifier split-digits --scenario clas", "scenario is 'clas', expected one of task, domain, class"),
        ("train classifier split-digits --lifelong nothing", "unknown lifelong method 'nothing'"),
        (
            "train classifier split-digits --lifelong ewc --ewc.strength abc",
            "--ewc.strength is 'abc', expected a number",
        ),
        (
            "train classifier split-digits --lifelong ewc --ewc.samples 20,40",
            "--ewc.samples is '20,40', expected one value",
        ),
        ("train classifier permuted-digits --order all", "10 tasks have 3,628,800 orders, more than 720"),
        ("train gail CartPole-v1", "nothing to imitate: give demonstrations="),
        ("train irl CartPole-v1 --demonstrations nothing", "IRL plans over states that can be counted"),
        ("train gail CartPole-v1 --demonstrations nothing", "nothing"),
        ("train ppo CartPole-v1 --rewards json:dumps", "expected rewards such as PotentialShaping"),
        ("train maml quadratics", "Quadratics is a family of functions to minimise: use LearnedOptimizer"),
        ("train maml sinusoid --learner reinforce", "REINFORCE can't learn a family of samples"),
        ("train learned_optimizer sinusoid --num-envs 4,8", "LearnedOptimizer minimises functions"),
        ("train classifier split-digits --lifelong packnet --packnet.keep 1", "PackNet: "),
        ("train classifier split-digits --lifelong packnet --scenario class", "packnet needs to know which task it is"),
        ("train classifier split-digits --lifelong gem --gem.memory 5k", "a memory of 5000 samples a task is more"),
        ("train dqn cartpole-conflicts --lifelong ewc", "DQN gives no distribution"),
        ("train classifier split-digits --target 0.9", "target is 0.9, but every task of the stream"),
        ("train ppo nopkg:MyEnv-v0", "no module 'nopkg' can be imported"),
        ("train ppo json:MyEnv-v0", "unknown gymnasium environment 'json:MyEnv-v0'"),
        ("eval", "rlmeta eval takes one run folder, got none"),
        ("eval a b", "rlmeta eval takes one run folder, got a b"),
        ("eval nothing", "nothing is not the folder of a run: it has no config.toml"),
        ("eval nothing --episodes 0", "--episodes is 0, expected at least 1"),
        ("eval nothing --bset", "unknown flag --bset: did you mean --best"),
        ("resume nothing", "nothing is not the folder of a run: it has no config.toml"),
        ("record nothing", "rlmeta record needs a file to write: --out FILE"),
        ("record nothing --out .", ". exists: record into another file, or delete it first"),
        ("record nothing --out demo --learner -2", "--learner is -2, expected 0 or more, or -1 for the best"),
        ("list tsaks", "unknown kind of name 'tsaks': did you mean tasks?"),
    ],
)
def test_bad_input(
    arguments: str, message: str, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.Loop, "go", lambda loop: pytest.fail("it trains"))
    said, error = rlmeta_says(capfd, arguments, 2)
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(project.iterdir()) == [], "nothing is written"
    assert said == "", "an error comes before the header"


def test_a_folder_that_exists_stays_as_it_is(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "mine").mkdir()
    (project / "mine" / "notes.txt").write_text("mine")
    for flags in (TINY, f"{TINY} --hidden-sizes 8,9"):
        _, error = rlmeta_says(capfd, f"train ppo CartPole-v1 {flags} --out mine --quiet", 2)
        assert error.startswith("error: mine exists and holds 'notes.txt'")
        assert [path.name for path in (project / "mine").iterdir()] == ["notes.txt"]


def test_presets_that_are_wrong(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "agents").mkdir()
    (project / "agents" / "ppo.toml").write_text('["CartPole-v1"]\nlearning_rte = 1e-3\n')
    _, error = rlmeta_says(capfd, "train ppo CartPole-v1", 2)
    assert "unknown setting of PPO 'learning_rte': did you mean learning_rate" in error
    assert rlmeta_says(capfd, f"train ppo CartPole-v1 {TINY} --preset none --quiet")[1] == ""


def test_debug_shows_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLMETA_DEBUG", "1")
    with pytest.raises(SettingError):
        main(["eval"])
    monkeypatch.setattr(plans, "from_flags", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "ppo", "CartPole-v1"])


# ------------------------------------------------------------------------------------------------------ other commands


def test_eval(trained: Path, tables: list[list[dict[str, Any]]]) -> None:
    run = rlmeta.load(trained)
    assert main(f"eval {trained} --episodes 3".split()) == 0
    assert main(f"eval {trained} --episodes 4 --seed 2".split()) == 0
    assert main(f"eval {trained} --episodes 3 --best".split()) == 0
    assert main(f"eval {trained} --episodes 3 --sampled".split()) == 0
    expected = [
        run.evaluate(3, seed=1),
        run.evaluate(4, seed=2),
        run.evaluate(3, seed=1, best=True),
        run.evaluate(3, seed=1, deterministic=False),
    ]
    for rows, evaluation in zip(tables, expected, strict=True):
        assert [score for row in rows for score in row["scores"]] == evaluation.returns.mean(-1).tolist()
        assert [row["episodes"] for row in rows] == [evaluation.returns.shape[-1]] * 2


def test_list(capfd: pytest.CaptureFixture[str]) -> None:
    said, _ = rlmeta_says(capfd, "list")
    for title in ("agents", "tasks", "families", "streams", "methods", "runs"):
        assert f"{title} " in said
    for name in ("ppo", "CartPole-v1, Acrobot-v1", "cartpole-long-pole", "cartpole-physics", "cartpole-conflicts"):
        assert name in said
    said, _ = rlmeta_says(capfd, "list families")
    assert "pendulum-physics" in said
    assert "cartpole-conflicts" not in said
    said, _ = rlmeta_says(capfd, "list methods")
    assert "ewc │ --ewc.strength │ 1000 │ λ: weight of the penalty" in said


def test_list_marks_what_needs_an_extra(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from rlmeta.cli import listing

    installed = {"Box2D"}
    found = types.SimpleNamespace(find_spec=lambda name: object() if name in installed else None)
    monkeypatch.setattr(listing.importlib, "util", found)
    said, _ = rlmeta_says(capfd, "list tasks")
    assert "LunarLander-v3" in said
    assert "pip install 'rlmeta[mujoco]'" in said
    assert "rlmeta[box2d]" not in said
    assert "Ant-v5" in said
    assert "Ant-v4" not in said, "the newest version alone"
    installed.clear()
    assert "pip install 'rlmeta[box2d]'" in rlmeta_says(capfd, "list tasks")[0]


def test_list_runs(project: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, project / "runs" / "good")
    shutil.copytree(trained, project / "runs" / "early")
    (project / "runs" / "early" / "summary.json").unlink()
    (project / "runs" / "bad").mkdir()
    (project / "runs" / "bad" / "config.toml").write_text("exp_name = ")
    said, _ = rlmeta_says(capfd, "list runs")
    assert "runs/good │ ppo │ CartPole-v1 │ 2 │ 64 │ finished" in said
    assert "runs/early │ ppo │ CartPole-v1 │ 2 │ 64 │ unfinished" in said
    assert "runs/bad │ │ │ │ │ unreadable" in said
    assert "(learning_rate=0.001)" in said


def test_bench_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlmeta.bench

    fake = types.ModuleType("rlmeta.bench.agents")
    fake.main = lambda arguments: len(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlmeta.bench.agents", fake)
    monkeypatch.setattr(rlmeta.bench, "agents", fake, raising=False)
    assert main(["bench", "agents", "--scale", "3"]) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--help", ["train AGENT TASK", "resume RUN"]),
        ("train --help", ["AGENT", "rlmeta list tasks"]),
        ("train ppo --help", ["--learning-rate NUMBER[,...]", "Adam's step size. (default: 0.0003)", "--steps INT"]),
        ("train ppo CartPole-v1 --help", ["Adam's step size. (default: 0.001)", "--async", "--env.KEY"]),
        ("eval --help", ["--episodes INT", "(default: 256)", "--best", "--sampled"]),
        ("resume --help", ["--inexact", "--network", "--env"]),
        ("list --help", ["agents|tasks|families|streams|methods|runs"]),
    ],
)
def test_help(arguments: str, parts: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    said, error = rlmeta_says(capfd, arguments)
    said = " ".join(said.replace("│", " ").split())
    assert all(part in said for part in parts), said
    assert error == ""


def test_no_arguments_is_no_success(capfd: pytest.CaptureFixture[str]) -> None:
    said, _ = rlmeta_says(capfd, "", 2)
    assert said.startswith("usage: rlmeta")


# ------------------------------------------------------------------------------------------------------------- package


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_help_load_nothing_heavy() -> None:
    heavy = "{'torch', 'gymnasium', 'matplotlib', 'wandb', 'tensorboard', 'tyro', 'rich', 'numpy'}"
    assert python(f"import sys, rlmeta; dir(rlmeta); print({heavy} & set(sys.modules))") == "set()\n"
    code = f"import sys; from rlmeta.cli.main import main; main(['--help']); print({heavy} & set(sys.modules))"
    assert python(code).endswith("set()\n")


def test_training_help_loads_no_plots_or_trackers() -> None:
    heavy = "{'matplotlib', 'wandb', 'tensorboard', 'torch.utils.tensorboard', 'Box2D', 'pygame'}"
    command = "from rlmeta.cli.main import main; main(['train', 'ppo', '--help'])"
    code = f"import sys; {command}; print({heavy} & set(sys.modules))"
    assert python(code).endswith("set()\n")


def test_python_m_rlmeta() -> None:
    from importlib.metadata import version

    done = subprocess.run(
        [sys.executable, "-m", "rlmeta", "--version"], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert (done.returncode, done.stdout) == (0, version("rlmeta") + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "rlmeta", "trian"], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trian': did you mean train?\n"


def test_everything_exported_is_there() -> None:
    for name in set(rlmeta.__all__) - {"NetworkFactory"}:  # a type alias
        assert getattr(rlmeta, name).__name__.rpartition(".")[2] == name
    shipped = [*AGENTS.values(), *METHODS.values(), rlmeta.PotentialShaping, rlmeta.EpisodicCounts]
    assert all(getattr(rlmeta, cls.__name__) is cls for cls in shipped)
    assert {cls.__name__ for cls in shipped} <= set(rlmeta.__all__) <= set(dir(rlmeta))
    for name in ("trian", "Trian", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'rlmeta' has no attribute '{name}'"):
            getattr(rlmeta, name)


@pytest.mark.parametrize("name", ["my_env.py", "my_native_env.py", "my_family.py", "my_stream.py"])
def test_templates_check_themselves(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REPOSITORY / "envs" / name), run_name="__main__")
    assert "is fine" in capfd.readouterr().out


def test_template_environment_can_be_learned(project: Path) -> None:
    shutil.copytree(REPOSITORY / "envs", project / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    flags = "--steps 1k --num-envs 4 --num-steps 32 --batch-size 64 --num-epochs 4 --learning-rate 3e-3 --seeds 2"
    assert main(f"train ppo my_env:MyEnv-v0 --env.size 4 {flags} --gamma 0.9 --quiet --out a".split()) == 0
    assert min(json.loads(Path("a/summary.json").read_text())["summary"][0]["scores"]) > 0.7


def test_seeds_are_ranges_and_lists_and_epochs_are_a_budget(
    project: Path, tables: list[list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    ppo = "train ppo CartPole-v1 --steps 64 --num-envs 2 --num-steps 8 --batch-size 16 --final-episodes 2 --quiet"
    rlmeta_says(capfd, f"{ppo} --seeds 100-102,7 --out a")
    assert read_config("a")["seeds"] == [100, 101, 102, 7] and tables[-1][0]["seeds"] == 4
    rlmeta_says(capfd, f"{ppo} --seeds 100-100 --out b")
    assert read_config("b")["seeds"] == [100]
    for text, message in (
        ("5-3", "--seeds 5-3: 3 is below 5: the first seed, then the last, as in 3-5"),
        ("1-2-3", "--seeds is '1-2-3', expected a count"),
        ("1-3,2", "--seeds 1-3,2: seeds repeat: [1, 2, 3, 2]"),
        ("0-1000000000", "--seeds is '0-1000000000', expected a count"),
    ):
        assert message in rlmeta_says(capfd, f"{ppo} --seeds {text} --out c", 2)[1]
    classifier = "train classifier split-digits --hidden-sizes 4 --eval-episodes 1"
    said, _ = rlmeta_says(capfd, f"{classifier} --epochs 2 --out d")
    assert "2 epochs each" in said and read_config("d")["budget"]["epochs"] == 2.0
    samples = read_config("d")["budget"]["steps"]
    assert 2 * 288 - 64 <= samples <= 2 * 300 + 320
    assert "epochs is 2, but 'CartPole-v1' has no samples" in rlmeta_says(capfd, f"{ppo} --epochs 2 --out e", 2)[1]
    assert not Path("c").exists() and not Path("e").exists()
