"""Trust: files are data. A planted module that leaves a marker when it is imported is named wherever a file can name
something; no command imports it unless its own words say so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import tomli_w
import torch
from safetensors.torch import save_file

import rlmeta as rl
from rlmeta.bench import imitation as benchmarks
from rlmeta.cli import plan as plans
from rlmeta.cli import plan_folder
from rlmeta.cli.main import main
from rlmeta.envs import trusted, user_modules
from rlmeta.errors import SettingError
from rlmeta.runs import objects
from tests.runs.forging import accept_config, change_plan

REPOSITORY = Path(rl.__file__).parents[1]
TINY = "--steps 32 --num-envs 2 --num-steps 16 --batch-size 32 --num-epochs 1 --final-episodes 2 --eval-episodes 2"

PLANTED = """
from pathlib import Path

Path({marker!r}).write_text("ran")

from dataclasses import dataclass

import gymnasium as gym
import torch
from rlmeta.envs.native import NATIVE
from rlmeta.learning.method import Method

class Native(type(NATIVE["CartPole-v1"])):
    pass

class Mine(Method):
    name = "mine"

@dataclass(frozen=True)
class Agent:
    num_envs: int = 1

    def bind(self, observation_space, action_space, methods=()):
        raise NotImplementedError

def make(**settings):
    return gym.make("CartPole-v1")

def network(space):
    return torch.nn.Linear(space.shape[0], 4)

REWARD = object()
gym.register("Planted-v0", make)
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the planted module says that it ran; it lies in the current folder and on `sys.path` besides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "planted.py").write_text(PLANTED.format(marker=str(tmp_path / "marker")))
    yield tmp_path / "marker"
    sys.modules.pop("planted", None)
    gym.registry.pop("Planted-v0", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(f"train ppo CartPole-v1 {TINY} --no-native --quiet --out {folder}".split()) == 0
    return folder


def refused(capfd: pytest.CaptureFixture[str], arguments: str, marker: Path, *parts: str) -> None:
    """The command ends with 2 and one sentence, and nothing planted has run."""
    capfd.readouterr()
    status, error = main(arguments.split()), capfd.readouterr().err
    assert not marker.exists(), f"{arguments}: the planted module was imported"
    assert (status, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ") and all(part in error for part in parts), error


TASK = {"name": "x", "source": "planted:Planted-v0", "settings": {}, "mode": "sync", "ranges": {}}
STREAM: dict[str, Any] = {"kind": "stream", "name": "x", "order": "given", "scenario": "task"}
WAYS: dict[str, dict[str, Any]] = {
    "an id": {"task": TASK},
    "a function": {"task": {**TASK, "source": "planted:make"}},
    "a native environment": {"task": {**TASK, "source": "planted:Native", "constants": {"gravity": 9.0}}},
    "settings": {"task": {**TASK, "source": "CartPole-v1", "settings": {"env_id": "planted:make"}}},
    "settings within": {"task": {**TASK, "source": "CartPole-v1", "settings": {"x": {"y": "planted:Planted-v0"}}}},
    "a stream's table": {"task": {**STREAM, "table": {"kind": "stream", "tasks": ["planted:Planted-v0"]}}},
    "a stream's tasks": {"task": {**STREAM, "tasks": [TASK], "reveals": [], "observe_identity": False}},
    "a family": {"task": {"kind": "family", "name": "x", "task": TASK, "ranges": {}}},
    "an agent": {"exp_name": "planted:Agent"},
    "a learner": {"exp_name": "maml", "variants": [{"learner": "planted:Agent num_envs=2"}]},
    "a network": {"variants": [{"network": "planted:network"}]},
    "a learner's network": {"exp_name": "maml", "variants": [{"learner": "reinforce network=planted:network"}]},
    "a learner's rewards": {"exp_name": "maml", "variants": [{"learner": "reinforce rewards=planted:REWARD"}]},
    "a method": {"methods": [{"name": "mine", "class": "planted:Mine", "settings": {}}]},
    "a method of rlmeta's name": {"methods": [{"name": "ewc", "class": "planted:Mine", "settings": {}}]},
}
"""What a forged `config.toml` may say."""


def forged(trained: Path, changes: dict[str, Any]) -> Path:
    """A copy of the run with another configuration, whose checksums agree with it."""
    folder = Path(shutil.copytree(trained, "forged"))
    config = tomllib.loads((folder / "config.toml").read_text()) | changes
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    accept_config(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_run_folder_imports_nothing(way: str, trained: Path, marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = forged(trained, WAYS[way])
    said = ("forged", "planted", "--code planted")
    for command in (f"eval {folder}", f"resume {folder}", f"record {folder} --out demo", f"adapt {folder}"):
        refused(capfd, command, marker, *said)
    for verb in (rl.load, rl.resume):
        with pytest.raises(SettingError, match=r"code=\['planted'\]"):
            verb(folder)
    assert main(["list", "runs"]) == 0
    assert not marker.exists()


def test_rewards_in_a_run_folder_are_given_again(
    trained: Path, marker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    variants = tomllib.loads((trained / "config.toml").read_text())["variants"]
    refused(capfd, f"resume {forged(trained, {'variants': [{**variants[0], 'rewards': ['planted:REWARD']}]})}", marker)


SAVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "task": ("ppo", "resume", {"task": "planted:make"}),
    "id": ("ppo", "resume", {"task": "planted:Planted-v0"}),
    "env": ("ppo", "resume", {"env": {"env_id": "planted:Planted-v0"}}),
    "network": ("ppo", "eval", {"settings": {"network": "planted:network"}}),
    "networks": ("ppo", "adapt", {"settings": {"network": "planted:network,planted:make"}}),
    "agent": ("ppo", "resume", {"agent": "planted:Agent"}),
    "a learner": ("maml", "adapt", {"settings": {"learner": "planted:Agent num_envs=2"}}),
    "rewards": ("ppo", "record", {"settings": {"rewards": "planted:REWARD"}}),
    "learner": ("maml", "resume", {"settings": {"learner": "reinforce network=planted:network"}}),
    "lifelong": ("ppo", "resume", {"task": "cartpole-conflicts", "run": {"lifelong": "planted:Mine"}}),
}
"""The agent, a command, and what a forged `plan.toml` may say."""


@pytest.mark.parametrize("way", SAVED)
def test_a_saved_plan_imports_nothing(way: str, marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    agent, command, changes = SAVED[way]
    folder, problem = saved_plan(agent, changes), Path("g/plan.toml")
    flags = " --out demo" if command == "record" else ""
    refused(capfd, f"{command} {folder}{flags}", marker, str(problem), "'planted'", "add --code planted")
    refused(capfd, f"resume {folder}", marker, str(problem), "'planted'", "add --code planted")


def saved_plan(agent: str, changes: dict[str, Any]) -> Path:
    """The folder of a plan of two groups of which none has begun."""
    compared = "--hidden-sizes=8,9" if agent == "ppo" else "--inner-steps=1,2"
    small = TINY.split() if agent == "ppo" else []
    problem = "CartPole-v1" if agent == "ppo" else "sinusoid"
    plan = plans.from_flags(agent, problem, [*small, compared])
    plan_folder.begin(plan, Path("g"))
    flags = {name: changes.pop(name) for name in ("settings", "run") if name in changes}

    def change(content: dict[str, Any]) -> None:
        for name, texts in flags.items():
            content["flags"][name] |= texts
        content.update(changes)

    change_plan(Path("g/plan.toml"), change)
    return Path("g")


TABLES = {
    "task": 'env = "planted:Planted-v0"',
    "settings": 'env = "CartPole-v1"\n[settings]\nenv_id = "planted:make"',
    "family": 'kind = "family"\nenv = "planted:Planted-v0"\n[ranges]\nlength = [0.5, 1.0]',
    "stream": 'kind = "stream"\ntasks = ["CartPole-v1", "planted:Planted-v0"]',
    "stream of tables": 'kind = "stream"\n[[tasks]]\nenv = "planted:Planted-v0"',
}


@pytest.mark.parametrize("way", TABLES)
def test_a_file_of_an_environment_imports_nothing(
    way: str, trained: Path, marker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("envs").mkdir()
    Path("envs/mine.toml").write_text(TABLES[way])
    folder = forged(trained, {"task": {**TASK, "source": "mine"}})
    for command in (f"train ppo mine {TINY}", "train maml mine", f"eval {folder}", f"resume {folder}"):
        refused(capfd, command, marker, "mine.toml", "'planted'", "add --code planted")
    assert main(["list"]) == 0
    assert not marker.exists()


@pytest.mark.parametrize(
    ("agent", "line"),
    [
        ("ppo", 'network = "planted:network"'),
        ("ppo", 'rewards = "planted:REWARD"'),
        ("ppo", 'rewards = "rlmeta.rewards:EpisodicCounts+planted:REWARD"'),
        ("maml", 'learner = "reinforce network=planted:network"'),
        ("maml", 'learner = "planted:Agent num_envs=2"'),
    ],
)
def test_a_preset_imports_nothing(agent: str, line: str, marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("agents").mkdir()
    Path(f"agents/{agent}.toml").write_text(f"[defaults]\n{line}\n")
    shutil.copy(f"agents/{agent}.toml", "other.toml")
    said = ("[defaults]", "'planted'", "add --code planted")
    refused(capfd, f"train {agent} CartPole-v1", marker, f"{agent}.toml", *said)
    refused(capfd, f"train {agent} CartPole-v1 --help", marker, f"{agent}.toml", *said)
    refused(capfd, f"train {agent} CartPole-v1 --preset other.toml", marker, "other.toml", *said)
    assert main(["list", "agents"]) == 0
    assert not marker.exists()


def test_a_file_of_demonstrations_imports_nothing(marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for kind, dtype in (("planted:make", "float32"), ("Box", "planted:make")):
        space = {"kind": kind, "shape": [4], "dtype": dtype, "low": "0.0", "high": "1.0"}
        header = {"format": "rlmeta demonstrations 1", "observation_space": space, "action_space": space, "about": {}}
        save_file({"observation": torch.zeros(2, 4)}, "demo", {"demonstrations": json.dumps(header)})
        refused(capfd, "train gail CartPole-v1 --demonstrations demo", marker, "demo is damaged")


# ------------------------------------------------------------------------------------------------- what is allowed


def test_code_allows_what_a_run_folder_names(trained: Path, marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    variants = tomllib.loads((trained / "config.toml").read_text())["variants"]
    for number, task in enumerate((TASK, {**TASK, "source": "planted:make"})):
        folder = forged(trained, {"task": task}).rename(f"copy-{number}")
        assert main(["eval", str(folder), "--episodes", "2", "--code", "planted"]) == 0
        assert rl.load(folder, code=["planted"]).scores.isfinite().all()
        assert rl.resume(folder, code=["planted"]).scores.isfinite().all()
        assert main(["eval", str(folder), "--episodes", "2", "--env", str(task["source"])]) == 0
        refused_after(capfd, f"eval {folder} --network planted:network", "--code planted")
        refused_after(capfd, f"eval {folder}", "--code planted")
        refused_after(capfd, f"eval {folder} --code plant,planted.more", "--code planted")
    folder = forged(trained, {"variants": [{**variants[0], "network": "planted:network"}]})
    capfd.readouterr()
    assert main(["eval", str(folder), "--code", "planted"]) == 2
    assert "of another agent, task" in capfd.readouterr().err, "the network is made; the weights are of another"
    assert marker.exists()


def test_a_name_allows_itself_and_not_its_module(marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for task, networks in (("planted:Planted-v0", "none"), ("planted:make", "planted:network")):
        folder = saved_plan("ppo", {"task": task, "settings": {"network": networks}})
        for other in ("--env planted:Mine", "--lifelong planted:Mine"):
            capfd.readouterr()
            assert main(f"resume {folder} {other}".split()) == 2
            assert "g/plan.toml names code in the module 'planted'" in capfd.readouterr().err
        shutil.rmtree(folder)
    assert marker.exists(), "the module is imported, for the command names it"


def test_a_benchmark_takes_the_program_that_is_shipped(marker: Path) -> None:
    Path("agents").mkdir()
    shutil.copy("planted.py", "agents/reward_shaping.py")
    assert isinstance(benchmarks._energy(), rl.PotentialShaping)
    assert not marker.exists()


def refused_after(capfd: pytest.CaptureFixture[str], arguments: str, part: str) -> None:
    """What was allowed to one command is not to the next."""
    capfd.readouterr()
    assert main(arguments.split()) == 2
    assert part in capfd.readouterr().err


def test_code_allows_what_other_files_name(marker: Path) -> None:
    for folder in ("envs", "agents"):
        Path(folder).mkdir()
    Path("envs/mine.toml").write_text('env = "planted:Planted-v0"')
    Path("agents/ppo.toml").write_text('[defaults]\nnetwork = "planted:network"')
    assert main(f"train ppo mine {TINY} --hidden-sizes 8,9 --quiet --code planted --out a".split()) == 0
    assert "code" not in json.dumps(tomllib.loads(Path("a/plan.toml").read_text())["flags"]["run"])
    assert main(["resume", "a"]) == 2
    shutil.rmtree("a/hidden_sizes=9")
    assert main(["resume", "a", "--network", "planted:network"]) == 2, "a name allows itself, not its module"
    for again in ("--code planted", "--network planted:network --env planted:Planted-v0"):
        assert main(f"resume a {again}".split()) == 0
    assert rl.train(rl.PPO(num_envs=2, num_steps=16, batch_size=32), "mine", steps=32, code=["planted"]).env_steps == 32


def test_an_interrupted_run_says_how_its_code_is_named_again() -> None:
    plan, env = plans.Plan("ppo", "own:make", texts={"run": {}, "budget": {}, "settings": {}}), "--env own:make"
    for change, said in (
        (
            {"settings": {"network": "own:net", "rewards": "a:X+b:Y"}},
            "--network own:net --env own:make --rewards a:X+b:Y",
        ),
        ({"run": {"lifelong": "ewc,own:Mine"}}, f"{env} --lifelong own:Mine"),
        ({"settings": {"network": "none"}}, env),
    ):
        texts = {**plan.texts, **change}
        made = plans.Plan("ppo", "own:make", texts=texts)
        made.__dict__["groups"] = {"": None}
        assert (made.resume_flags(), made.resume_flags(["more"])) == (said, f"{said} --code more")
        named = plans.Plan("own:Agent", "own:make", texts=texts)
        named.__dict__["groups"] = {"": None}
        assert named.resume_flags() == f"--agent own:Agent {said}"
        made.__dict__["groups"] = {"a": None, "b": None}
        assert made.resume_flags(["more"]).startswith("--code more,own")
    made = plans.Plan("ppo", "minigrid:MiniGrid-Empty-v0", texts=plan.texts)
    made.__dict__["groups"] = {"": None}
    assert made.resume_flags() == ""


def test_what_is_rlmetas_gymnasiums_or_a_known_extras_needs_no_word() -> None:
    with trusted.reading("file"):
        for identifier in ("CartPole-v1", "ale_py:ALE/Pong-v5", "minigrid:MiniGrid-Empty-5x5-v0", "envpool:Pong-v5"):
            trusted.check_id(identifier)
        assert objects.load_object("rlmeta.nn:strided_convolutions") is rl.nn.strided_convolutions
        for named in (
            "rlmeta.nn.encoder:torch",
            "rlmeta.__main__:main",
            "rlmeta.cli.main:main",
            "ale_py:roms",
            "os:sep",
        ):
            with pytest.raises(SettingError, match=r"^file names code in the module '.*add --code"):
                objects.load_object(named)
        for identifier in ("rlmeta.__main__:CartPole-v1", "minigrid.more:X-v0", "minigrids:X-v0", "a:minigrid:X-v0"):
            with pytest.raises(SettingError, match="names code in the module"):
                trusted.check_id(identifier)


@pytest.mark.parametrize("name", ["", "a.", "a b", "../a", "a:b", 3])
def test_code_is_names_of_modules(name: Any) -> None:
    with pytest.raises(SettingError, match="expected the names of modules, such as"), trusted.allowing([name]):
        pass


# ----------------------------------------------------------------------------------------------- the current folder

STRAY = ("dill", "torch", "numpy", "gymnasium", "wandb", "tensorboard", "jax", "mujoco", "ale_py", "minigrid", "yaml")

OWN = """
import gymnasium as gym
from helper import Line

def later():
    import second_helper
    return second_helper.LENGTH

def make():
    assert later() == 3
    return Line()

gym.register("Own-v0", make)
"""
HELPER = """
import gymnasium as gym

class Line(gym.Env):
    observation_space, action_space, at = gym.spaces.Box(0.0, 1.0, (1,)), gym.spaces.Discrete(2), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.observation_space.low, {}

    def step(self, action):
        self.at += 1
        return self.observation_space.high, 1.0, self.at >= 3, False, {}
"""


def strays(folder: Path) -> None:
    """Modules with the names of others in a folder, each of which says that it ran."""
    for name in STRAY:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'marker')!r}, 'a').write('{name} ')")


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own in the current folder."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=900)


def test_modules_in_the_current_folder_do_not_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed command has the folder of its script first; `python -m`, which has the current one, has tests of
    its own."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    strays(Path.cwd())
    commands = [
        ["--help"],
        ["--version"],
        ["list"],
        ["eval", str(trained), "--episodes", "2"],
        ["resume", str(trained)],
    ]
    commands += [["train", "ppo", "CartPole-v1", *TINY.split(), "--quiet"]]
    script = tmp_path / "bin" / "rlmeta.script"
    script.write_text(f"from rlmeta.cli.main import main\nprint([main(one) for one in {commands}])")
    done = process(str(script))
    assert done.stdout.endswith("[0, 0, 0, 0, 0, 0]\n"), done.stderr
    assert not Path("marker").exists(), Path("marker").read_text()


def test_named_code_brings_what_it_imports_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In worker processes that are started afresh, too."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "here" / "envs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    strays(Path.cwd())
    Path("envs/own.py").write_text(OWN)
    Path("helper.py").write_text(HELPER)
    Path("second_helper.py").write_text("LENGTH = 3")
    Path("unasked.py").write_text("open('marker', 'a').write('unasked')")
    script = tmp_path / "bin" / "rlmeta.script"
    script.write_text(
        "import importlib.util, multiprocessing\nfrom rlmeta.cli.main import main\n"
        "if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n"
        f"    print(main('train ppo own:Own-v0 --async {TINY} --quiet'.split()))\n"
        "    print([importlib.util.find_spec(name) is None for name in ('dill', 'jax', 'unasked')])\n"
    )
    done = process(str(script))
    assert done.stdout.endswith("0\n[True, True, True]\n"), done.stdout + done.stderr
    assert not Path("marker").exists(), Path("marker").read_text()


def test_a_package_without_init_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("loose_parts").mkdir()
    Path("loose_parts/first.py").write_text("import loose_other\nVALUE = loose_other.VALUE")
    Path("loose_other.py").write_text("VALUE = 5")
    try:
        assert objects.load_object("loose_parts.first:VALUE") == 5
        entries = [entry for entry in sys.path if entry.startswith(user_modules.PREFIX)]
        assert entries[0] == f"{user_modules.PREFIX}loose_parts,loose_other:{tmp_path}"
        with pytest.raises(ModuleNotFoundError):
            __import__("loose_third")
    finally:
        for name in ("loose_parts", "loose_parts.first", "loose_other"):
            sys.modules.pop(name, None)
