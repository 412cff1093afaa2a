"""The folder of several runs: its plan is what the command wrote, and nothing in it leads out of it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlmeta as rl
from rlmeta.cli import groups, plan_folder
from rlmeta.cli import plan as plans
from rlmeta.cli.main import main
from rlmeta.errors import CheckpointError, RlmetaError, RunExistsError, SettingError
from rlmeta.runs import folder as run_folder
from tests.runs.forging import change_plan

TINY = "--steps 32 --num-envs 2 --num-steps 16 --batch-size 32 --num-epochs 1 --final-episodes 2 --eval-episodes 2"
COMMANDS = ("resume g", "eval g", "adapt g", "record g --out demo")


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def begun(flags: str = "--hidden-sizes 8,9") -> plans.Plan:
    """A plan of groups of which none has begun, with its folder `g`."""
    plan = plans.from_flags("ppo", "CartPole-v1", f"{TINY} --quiet {flags}".split())
    plan_folder.begin(plan, Path("g"))
    return plan


def refused(capfd: pytest.CaptureFixture[str], *parts: str) -> None:
    """Every command on the folder ends with 2 and one sentence."""
    for command in COMMANDS:
        capfd.readouterr()
        status, error = main(command.split()), capfd.readouterr().err
        assert (status, error.count("\n")) == (2, 1), error
        assert error.startswith("error: ") and all(part in error for part in parts), error


# ------------------------------------------------------------------------------------------------------- what it says


def test_a_plan_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    plan = begun("--hidden-sizes 8,9 --seeds 2 --learning-rate 1e-3,1e-4")
    again = plan_folder.from_folder(Path("g"))
    assert (again.agent, again.task, again.texts) == (plan.agent, plan.task, plan.texts)
    assert again.groups == plan.groups
    assert main(["resume", "g"]) == 0
    assert main(["eval", "g", "--episodes", "2"]) == 0


def test_no_changed_byte_of_a_plan_goes_unnoticed() -> None:
    begun()
    path = Path("g/plan.toml")
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"plan\.toml is damaged, or not as the command wrote it"):
            plan_folder.from_folder(Path("g"))
    for content in (b"", whole[:-1], whole + b"\n", whole.partition(b"\n")[2], whole.replace(b"\n", b"\r\n")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="the checksum does not match"):
            plan_folder.from_folder(Path("g"))


def test_a_plan_that_was_changed_is_not_gone_on_with(capfd: pytest.CaptureFixture[str]) -> None:
    begun()
    text = Path("g/plan.toml").read_text()
    assert tomllib.loads(text)["flags"]["run"]["seeds"] == "1"
    Path("g/plan.toml").write_text(text.replace('seeds = "1"', 'seeds = "2"'))
    refused(capfd, "g/plan.toml", "restore it from a copy")
    assert not Path("g/hidden_sizes=8").exists()


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no agent": lambda content: content.pop("agent"),
    "an agent that is a number": lambda content: content.update(agent=3),
    "something more": lambda content: content.update(more=1),
    "no flags": lambda content: content.update(flags={}),
    "flags that are no texts": lambda content: content["flags"]["run"].update(seeds=2),
    "a flag that there is not": lambda content: content["flags"]["budget"].update(more="1"),
    "a flag less": lambda content: content["flags"]["settings"].pop("gamma"),
    "methods that are no tables": lambda content: content.update(lifelong={"ewc": 1}),
    "an unknown agent": lambda content: content.update(agent="nobody"),
    "an unknown task": lambda content: content.update(task="nothing"),
    "a setting that is no number": lambda content: content["flags"]["settings"].update(gamma="x"),
    "seeds that fill the memory": lambda content: content["flags"]["run"].update(seeds="9" * 12),
    "no seeds": lambda content: content["flags"]["run"].update(seeds="0"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_plan_that_nobody_wrote_is_refused(forgery: str) -> None:
    begun()
    change_plan(Path("g/plan.toml"), FORGED[forgery])
    with pytest.raises(RlmetaError) as caught:
        plan_folder.from_folder(Path("g")).check()
    assert "\n" not in str(caught.value)


def test_what_a_command_cannot_write_again_is_refused_before_a_folder_is_made() -> None:
    plan = plans.from_flags("ppo", "CartPole-v1", [*TINY.split(), "--hidden-sizes", "8,9"])
    plan.env["name"] = "\udcff"  # what Python makes of a byte that is no text
    with pytest.raises(SettingError, match="not unicode"):
        plan_folder.begin(plan, Path("g"))
    assert not Path("g").exists()


def test_what_a_command_has_left_that_died_over_its_plan_is_used_again() -> None:
    Path("g").mkdir()
    for name in ("plan.toml.tmp", "config.toml.tmp"):
        Path("g", name).write_text("sha256 =")
    begun()
    assert sorted(set(os.listdir("g")) - {"run.lock"}) == ["plan.toml"]
    with pytest.raises(RunExistsError, match=r"'plan\.toml'.*rlmeta resume g"):
        begun()


def test_two_commands_make_no_plan_in_one_folder() -> None:
    Path("g").mkdir()
    with run_folder.lock("g"), pytest.raises(RunExistsError, match="is being written"):
        begun()


def test_groups_that_were_exchanged_are_not_taken_for_one_another(capfd: pytest.CaptureFixture[str]) -> None:
    begun("--hidden-sizes 8,9x8 --learning-rate 1e-3,1e-4")
    assert main(["resume", "g"]) == 0
    for source, target in (("hidden_sizes=8", "away"), ("hidden_sizes=9x8", "hidden_sizes=8")):
        Path("g", source).rename(Path("g", target))
    refused(capfd, "g/hidden_sizes=8 holds a run with hidden_sizes=9x8, the plan above it says 8", "put the folder")
    Path("g/hidden_sizes=8").rename("g/hidden_sizes=9x8")
    Path("g/away").rename("g/hidden_sizes=8")
    assert main(["eval", "g", "--episodes", "2"]) == 0


# ------------------------------------------------------------------------------------------------------- where it leads


@pytest.mark.parametrize("held", [False, True], ids=["empty", "a run"])
def test_a_group_that_is_a_link_is_neither_read_nor_written_through(
    held: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = begun()
    outside = Path("outside")
    if held:
        assert main(f"train ppo CartPole-v1 {TINY} --hidden-sizes=9 --quiet --out {outside}".split()) == 0
        (outside / "summary.json").unlink()
    else:
        outside.mkdir()
    before = {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]}
    Path("g/hidden_sizes=9").symlink_to("../outside")
    refused(capfd, "g/hidden_sizes=9 is a link", "remove it")
    with pytest.raises(CheckpointError, match="hidden_sizes=9 is a link"):
        groups.train(plan, "hidden_sizes=9", Path("g"))
    assert {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]} == before
    assert not Path("g/hidden_sizes=8").exists()


def test_a_plan_behind_a_link_or_in_a_pipe_is_not_read(capfd: pytest.CaptureFixture[str]) -> None:
    begun()
    Path("g/plan.toml").rename("plan.toml")
    for make, said in ((lambda path: path.symlink_to("../plan.toml"), "a link"), (os.mkfifo, "no regular file")):
        make(Path("g/plan.toml"))
        refused(capfd, f"g/plan.toml is {said}")
        Path("g/plan.toml").unlink()
    Path("g/plan.toml").symlink_to("nowhere")
    refused(capfd, "g/plan.toml is a link")


@pytest.mark.parametrize("name", ["wandb.json", "tensorboard.json"])
def test_what_a_tracker_keeps_is_not_read_behind_a_link(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(f"train ppo CartPole-v1 {TINY} --quiet --out a".split()) == 0
    Path("outside.json").write_text('{"last_step": -1, "project": "p", "entity": null}')
    Path("a", name).symlink_to("../outside.json")
    capfd.readouterr()
    assert main(["resume", "a"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: a/{name} is a link"), error


def test_a_user_may_name_a_folder_by_a_link() -> None:
    Path("elsewhere").mkdir()
    Path("g").symlink_to("elsewhere")
    begun()
    assert main(["resume", "g"]) == 0
    assert rl.load("elsewhere/hidden_sizes=9").evaluation is not None
