"""The table of runs: whatever one of them holds, the others are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import rlmeta as rl
from rlmeta.cli.listing import runs_table
from rlmeta.cli.main import main
from rlmeta.runs import folder as run_folder

ID = "0123456789abcdef"
ROW = {"iqm": 12.34, "setting": "", "score": "return"}


def make_run(folder: Path, *rows: Any, **config: Any) -> Path:
    """A run's folder, as far as its line in the table goes."""
    folder.mkdir(parents=True)
    said = {"run": ID, "exp_name": "ppo", "env_id": "CartPole-v1", "seeds": [1, 2], "budget": {"steps": 64}}
    run_folder.write_config(folder, {**said, **config})
    if rows:
        run_folder.write_summary(folder, {"run": ID, "summary": list(rows), "stopped": ""})
    return folder


def shown(folder: Path) -> list[str]:
    """The lines of the table of the runs in a folder."""
    console = Console(width=400, record=True, file=open("/dev/null", "w"), markup=False)  # noqa: SIM115
    console.print(runs_table(folder))
    return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


def summary_of(content: Any) -> Callable[[Path], Any]:
    return lambda run: run_folder.write_summary(run, {"run": ID, "stopped": "", **content})


BAD: dict[str, Callable[[Path], Any]] = {
    "no JSON": lambda run: (run / "summary.json").write_bytes(b"{"),
    "no text": lambda run: (run / "summary.json").write_bytes(b"\xff\xfe"),
    "deep": lambda run: (run / "summary.json").write_bytes(b"[" * 100_000),
    "without a checksum": lambda run: (run / "summary.json").write_text(json.dumps({"summary": [ROW], "stopped": ""})),
    "of another run": lambda run: run_folder.write_summary(run, {"run": "f" * 16, "summary": [ROW], "stopped": ""}),
    "a folder": lambda run: (run / "summary.json").unlink() or (run / "summary.json").mkdir(),
    "a link": lambda run: (run / "summary.json").unlink() or (run / "summary.json").symlink_to("../good/summary.json"),
    "no summary": summary_of({}),
    "a number": summary_of({"summary": 5}),
    "rows of lists": summary_of({"summary": [[1]]}),
    "rows of text": summary_of({"summary": ["x"]}),
    "a row without numbers": summary_of({"summary": [{"setting": ""}]}),
    "a score of text": summary_of({"summary": [{**ROW, "iqm": "high"}]}),
    "a score without end": summary_of({"summary": [{**ROW, "iqm": 10**400}]}),
    "no TOML": lambda run: (run / "config.toml").write_text("exp_name = "),
    "no seeds": lambda run: run_folder.write_config(run, {"run": ID, "exp_name": "ppo", "env_id": "x"}),
    "seeds of a number": lambda run: run_folder.write_config(
        run, {"run": ID, "exp_name": "ppo", "env_id": "x", "seeds": 3, "budget": {"steps": 1}}
    ),
    "no id": lambda run: run_folder.write_config(
        run, {"exp_name": "ppo", "env_id": "x", "seeds": [3], "budget": {"steps": 1}}
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_run_is_a_row_and_the_others_are_shown(tmp_path: Path, bad: str) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "good", ROW)
    make_run(runs / "early")
    BAD[bad](make_run(runs / "bad", ROW))
    found = shown(runs)
    assert any(line.startswith(f"{runs}/good ppo CartPole-v1 2 64 finished 12.3") for line in found)
    assert any(line.startswith(f"{runs}/early ppo CartPole-v1 2 64 unfinished") for line in found)
    assert any(line.startswith(f"{runs}/bad unreadable: ") for line in found)


def test_what_a_run_is_called_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    row = {**ROW, "setting": "\x1b[2Jgone\x07"}
    make_run(tmp_path / "runs" / "a\x1b]0;title\x07", row, env_id="\x1b[31mred\x9b")
    text = "\n".join(shown(tmp_path / "runs"))
    assert all(text.isprintable() for text in shown(tmp_path / "runs"))
    for part in ("a\\x1b]0;title\\x07", "\\x1b[31mred\\x9b", "12.3 (\\x1b[2Jgone\\x07)"):
        assert part in text


def test_the_runs_of_a_folder_are_listed_by_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "here" / "first", ROW)
    make_run(tmp_path / "here" / "groups" / "second", ROW)
    assert main(["list", "runs", str(tmp_path / "here")]) == 0
    text = capfd.readouterr().out
    assert "first" in text and "second" in text and "unreadable" not in text
    assert main(["list", "runs", str(tmp_path / "here" / "first")]) == 0
    text = capfd.readouterr().out
    assert "first" in text and "second" not in text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["list", "runs", "nowhere"], ["list", "nowhere"]):
        assert main(arguments) == 2
        assert "nowhere" in capfd.readouterr().err


def test_a_budget_that_was_extended_is_shown(tmp_path: Path) -> None:
    settings = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(4,))
    rl.train(settings, "CartPole-v1", steps=32, final_episodes=1, out=tmp_path / "run")
    rl.resume(tmp_path / "run", steps=48)
    assert any(f"{tmp_path / 'run'} a2c CartPole-v1 1 48 finished" in line for line in shown(tmp_path))
