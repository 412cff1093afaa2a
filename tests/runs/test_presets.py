from __future__ import annotations

import dataclasses
import shutil
import tomllib
from pathlib import Path

import pytest

import rlmeta as rl
from rlmeta.agents import PPO
from rlmeta.bench.seeds import FIRST_SEED
from rlmeta.cli import plan
from rlmeta.envs import names as names_module
from rlmeta.envs import streams
from rlmeta.envs.names import names, read_toml
from rlmeta.envs.task import Task, TaskFamily, from_table
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional.random import make_keys
from rlmeta.runs.presets import NOTHING, load_preset, preset, preset_files
from rlmeta.runs.shipped import AGENTS, agent_class

REPOSITORY = Path(rl.__file__).parents[1]
FILE = """
[defaults]
max_grad_norm = 1.5
num_steps = 64

["CartPole-v1"]
steps = "200k"
num_steps = 32
learning_rate = [1e-3, 1e-4]
hidden_sizes = [32, 16]
normalise_reward = true
stop_kl = inf
"""


@pytest.fixture
def ppo_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "agents").mkdir()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "agents" / "ppo.toml"
    path.write_text(FILE)
    return path


def test_table_on_top_of_defaults(ppo_file: Path) -> None:
    found = load_preset(PPO, "CartPole-v1")
    assert (found.steps, found.path, found.table) == (200_000, ppo_file, "CartPole-v1")
    assert found.settings == {
        "max_grad_norm": 1.5,
        "num_steps": 32,
        "learning_rate": [1e-3, 1e-4],
        "hidden_sizes": (32, 16),
        "normalise_reward": True,
        "stop_kl": float("inf"),
    }
    assert preset("ppo", "CartPole-v1") == PPO(**found.settings)


def test_seeds_that_settings_were_chosen_on_are_no_settings(ppo_file: Path) -> None:
    assert load_preset(PPO, "CartPole-v1").chosen_on_seeds == ()
    ppo_file.write_text(FILE + "chosen_on_seeds = [0, 3]\n")
    found = load_preset(PPO, "CartPole-v1")
    assert found.chosen_on_seeds == (0, 3) and "chosen_on_seeds" not in found.settings
    assert "[CartPole-v1], chosen on seeds 0, 3" in plan.from_flags("ppo", "CartPole-v1", []).header(Path("runs/x"))


def test_defaults_hold_for_every_task(ppo_file: Path) -> None:
    found = load_preset(PPO, "Acrobot-v1")
    assert (found.settings, found.steps, found.table) == ({"max_grad_norm": 1.5, "num_steps": 64}, None, "defaults")


def test_named_tasks_take_the_preset_of_what_they_are_made_of(ppo_file: Path) -> None:
    envs = ppo_file.parents[1] / "envs"
    envs.mkdir()
    (envs / "short.toml").write_text('env = "CartPole-v1"\n')
    (envs / "wide.toml").write_text('kind = "family"\nenv = "CartPole-v1"\n[ranges]\nlength = [0.5, 1.0]\n')
    (envs / "same.toml").write_text('kind = "stream"\ntasks = ["CartPole-v1", {env = "CartPole-v1"}]\n')
    (envs / "mixed.toml").write_text('kind = "stream"\ntasks = ["CartPole-v1", "Acrobot-v1"]\n')
    for name in ("short", "wide", "same"):
        assert load_preset(PPO, name).table == "CartPole-v1", name
    assert load_preset(PPO, "mixed").table == "defaults"
    ppo_file.write_text(FILE + "\n[short]\nnum_epochs = 3\n")
    assert load_preset(PPO, "short").settings == {"max_grad_norm": 1.5, "num_steps": 64, "num_epochs": 3}


def test_sources(ppo_file: Path) -> None:
    (ppo_file.parent / "fast.toml").write_text('["CartPole-v1"]\nnum_epochs = 1\n')
    other = ppo_file.parents[1] / "mine.toml"
    other.write_text('["CartPole-v1"]\nnum_epochs = 2\n')
    assert load_preset(PPO, "CartPole-v1", "none") == NOTHING
    assert load_preset(PPO, "CartPole-v1", "fast").settings == {"num_epochs": 1}
    assert load_preset(PPO, "CartPole-v1", "mine.toml").settings == {"num_epochs": 2}
    borrowed = load_preset(PPO, "mypkg:Mine-v0", "CartPole-v1")
    assert (borrowed.table, borrowed.settings["num_steps"]) == ("CartPole-v1", 32)
    with pytest.raises(SettingError, match=r"mine\.toml has no table for 'Acrobot-v1': it has CartPole-v1"):
        load_preset(PPO, "Acrobot-v1", "mine.toml")
    with pytest.raises(SettingError, match=r"preset gone\.toml is not a file"):
        load_preset(PPO, "Acrobot-v1", "gone.toml")
    with pytest.raises(UnknownNameError, match=r"unknown preset 'fsat': did you mean fast"):
        load_preset(PPO, "Acrobot-v1", "fsat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rte = 1e-3", "unknown setting of PPO 'learning_rte': did you mean learning_rate"),
        ("learning_rate = 'fast'", "learning_rate is 'fast', expected a number"),
        ("num_steps = 2.5", "num_steps is '2.5', expected a whole number"),
        ("num_steps = true", "num_steps is 'true', expected a whole number"),
        ("normalise_reward = 1", "normalise_reward is '1', expected true or false"),
        ("activation = 'gelu'", "activation is 'gelu', expected one of tanh, relu"),
        ("num_steps = '32,64'", "num_steps has 2 values, expected one"),
        ("steps = 'many'", "steps is 'many', expected a whole number"),
        ("network = 'os:system'", "names code in the module 'os', and a file alone never makes rlmeta import any"),
        ("learning_rate = -1", "learning_rate is -1, expected above 0"),
        ("batch_size = 100", "batch_size 100 does not divide"),
        ("num_steps = ", "not valid TOML"),
        ("chosen_on_seeds = 3", "chosen_on_seeds is 3, expected different whole numbers"),
        ("chosen_on_seeds = [0, 0]", "chosen_on_seeds is [0, 0], expected different"),
        ("chosen_on_seeds = [0.5]", "chosen_on_seeds is [0.5], expected different"),
        ("chosen_on_seeds = [true]", "chosen_on_seeds is [True], expected different"),
    ],
)
def test_wrong_presets_are_refused_with_file_and_place(ppo_file: Path, line: str, message: str) -> None:
    ppo_file.write_text(f'["CartPole-v1"]\n{line}\n')
    with pytest.raises(SettingError) as caught:
        load_preset(PPO, "CartPole-v1")
    assert message in str(caught.value)
    assert str(ppo_file) in str(caught.value)
    if "TOML" not in message:
        assert "[CartPole-v1]" in str(caught.value)


def test_key_outside_tables(ppo_file: Path) -> None:
    ppo_file.write_text("num_steps = 3\n")
    with pytest.raises(SettingError, match=r"'num_steps' is not in a table: put it below \[defaults\]"):
        load_preset(PPO, "CartPole-v1")


def test_preset_of_an_unknown_task_or_agent() -> None:
    with pytest.raises(UnknownNameError, match="unknown preset of ppo for task 'CartPole-v2': did you mean"):
        rl.preset("ppo", "CartPole-v2")
    with pytest.raises(UnknownNameError, match="did you mean ppo"):
        rl.preset("pop", "CartPole-v1")


def test_shipped_presets_are_settings() -> None:
    known = AGENTS
    for name, tables in preset_files().items():
        assert name in known, f"agents/{name}.toml is of no agent"
        assert tables
        for table in tables:
            found = load_preset(known[name], table)
            assert found.table == table
            assert found.steps, f"agents/{name}.toml [{table}] lacks steps"
            said = read_toml(names("agents")[name])[table]
            assert "chosen_on_seeds" in said, f"agents/{name}.toml [{table}] does not say on which seeds it was chosen"
            assert all(seed < FIRST_SEED for seed in found.chosen_on_seeds), "those are of the published tables"
    cartpole = rl.preset("ppo", "CartPole-v1")
    assert dataclasses.replace(PPO(), num_steps=32, num_epochs=20, learning_rate=1e-3) == dataclasses.replace(
        cartpole, gamma=0.99, gae_lambda=0.95, clip_range_schedule="constant"
    )


def test_everything_in_the_folders_of_names_is_shipped() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    for target, patterns in project["tool"]["setuptools"]["data-files"].items():
        folder = REPOSITORY / Path(target).name
        shipped = {path for pattern in patterns for path in REPOSITORY.glob(pattern)}
        assert shipped == {path for path in folder.iterdir() if path.name != "__pycache__"}
    assert set(project["tool"]["setuptools"]["data-files"]) == {"share/rlmeta/agents", "share/rlmeta/envs"}


@pytest.mark.parametrize("prefix", ["venv", "user", "target"])
def test_names_fall_back_to_the_installed_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    shipped = tmp_path / prefix / "share" / "rlmeta" / "agents" / "ppo.toml"
    shipped.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / "agents" / "ppo.toml", shipped)
    monkeypatch.delenv("RLMETA_PATH", raising=False)
    monkeypatch.setattr(names_module, "__file__", str(tmp_path / "target" / "rlmeta" / "envs" / "names.py"))
    monkeypatch.setattr(
        names_module.sysconfig, "get_path", lambda name, scheme="": str(tmp_path / ("user" if scheme else "venv"))
    )
    monkeypatch.chdir(tmp_path)
    assert names("agents") == {"ppo": shipped}
    assert load_preset(PPO, "CartPole-v1").path == shipped
    mine = tmp_path / "agents" / "ppo.toml"
    mine.parent.mkdir()
    mine.write_text("[CartPole-v1]\nsteps = 5\n")
    assert load_preset(PPO, "CartPole-v1").steps == 5, "the user's own file comes first"


def test_shipped_tasks_families_and_streams_run() -> None:
    kinds = set()
    for name, path in names("envs").items():
        table = read_toml(path)
        assert table["description"]
        kinds.add(table.get("kind", "task"))
        if "data" in table or "family" in table:  # of samples: tests/envs/test_streams.py, test_families.py
            continue
        if table.get("kind") == "stream":
            tasks = streams.from_table(name, table).tasks
        else:
            made = from_table(name, table)
            assert isinstance(made, Task | TaskFamily)
            tasks = (made if isinstance(made, Task) else made.task(),)
        assert len({task.name for task in tasks}) == len(tasks)
        for task in tasks:
            world = task.world((2,), 3)
            state = world.reset(make_keys([0, 1]))
            assert agent_class("ppo")().bind(world.observation_space, world.action_space)
            assert len(state["key"].shape) == 2
            world.close()
    assert kinds >= {"task", "family", "stream"}
