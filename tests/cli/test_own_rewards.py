"""Rewards on the command line: their settings are flags, and a resume brings them back; modules that end a program."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import SettingError
from tests.runs.killer import Killer
from tests.runs.test_signals import send_at

FLAGS = "--num-envs 2 --num-steps 8 --hidden-sizes 4 --steps 32 --final-episodes 1 --eval-every 1M --quiet"

OWN_CODE = """
from dataclasses import dataclass
from rlmeta.learning.settings import PerLearner

@dataclass(frozen=True)
class Centre:
    coefficient: float = 0.5
    name: str = "centre"

    def init(self, agent, state, world):
        return {}

    def relabel(self, agent, state, memory, rollout, rewards):
        return memory, {**rewards, "centre": -self.coefficient * rollout["next_observation"][..., 0].abs()}, {}

class Plain:
    name = "plain"

    def init(self, agent, state, world):
        return {}

    def relabel(self, agent, state, memory, rollout, rewards):
        return memory, rewards, {}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_rewards.py").write_text(OWN_CODE)
    Path("exits.py").write_text("import sys\nsys.exit(0)\n")
    yield tmp_path
    sys.modules.pop("own_rewards", None)


def command(text: str) -> int:
    return main(shlex.split(text))


def rewards_of(folder: str, code: tuple[str, ...] = ("own_rewards",)) -> list[object]:
    return [variant.rewards for variant in rl.resume(folder, code=code).experiment.variants]


def test_settings_of_rewards_are_flags_and_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert command(f"train a2c CartPole-v1 {FLAGS} --rewards own_rewards:Centre --centre.coefficient 2 --out run") == 0
    ((reward,),) = rewards_of("run")
    assert reward.coefficient == 2.0
    for again in ("--code own_rewards", "--rewards own_rewards:Centre"):
        assert command(f"resume run --quiet {again}") == 0, capfd.readouterr().err
    assert command("resume run --quiet") == 2
    assert "had the rewards <own_rewards:Centre(coefficient=2" in capfd.readouterr().err


def test_rewards_of_rlmeta_compare_values_and_need_no_word_at_a_resume(capfd: pytest.CaptureFixture[str]) -> None:
    rewards = "--rewards rlmeta.rewards:RND+own_rewards:Plain --rnd.coefficient 0,0.5 --rnd.batch-size=8"
    assert command(f"train a2c CartPole-v1 {FLAGS} {rewards} --out run") == 0
    assert command("resume run --quiet --rewards own_rewards:Plain") == 0, capfd.readouterr().err
    loaded = rl.load("run").experiment
    assert loaded.budget.steps == 32 and len(loaded.variants) == 2
    assert command(f"train a2c CartPole-v1 {FLAGS} --rewards rlmeta.rewards:RND --rnd.batch-size 8 --out rnd") == 0
    assert rewards_of("rnd", ()) == [(rl.RND(batch_size=8),)] and command("resume rnd --quiet") == 0


def test_a_plan_of_several_groups_keeps_them(capfd: pytest.CaptureFixture[str]) -> None:
    flags = FLAGS.replace("--num-steps 8", "--num-steps 8,16")
    assert command(f"train a2c CartPole-v1 {flags} --rewards own_rewards:Centre --centre.coefficient 2 --out plan") == 0
    (Path("plan/num_steps=16/summary.json")).unlink()
    assert command("resume plan --code own_rewards") == 0, capfd.readouterr().err
    for steps in (8, 16):
        ((reward,),) = rewards_of(f"plan/num_steps={steps}")
        assert reward.coefficient == 2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rewards own_rewards:Centre --centre.coeficient 2", "--centre: unknown setting of Centre 'coeficient': did"),
        ("--rewards own_rewards:Centre --centre.coefficient x", "--centre.coefficient is 'x', expected a number"),
        ("--rewards own_rewards:Centre --centre.coefficient 1,2", "expected one value"),
        ("--rewards own_rewards:Plain --plain.x 1", "--plain.x: plain has no settings here, leave the flag out"),
        ("--centre.coefficient 2", "unknown flag --centre.coefficient"),
        (
            "--rewards exits:Centre",
            "the module 'exits' ends the program while it is imported (SystemExit: 0): put what",
        ),
    ],
)
def test_what_is_wrong_is_said(flags: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(f"train a2c CartPole-v1 {FLAGS} {flags} --out run") == 2
    assert message in capfd.readouterr().err and not Path("run").exists()


def test_code_that_ends_the_program_is_no_success(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingError, match="the module 'exits' ends the program"):
        rl.train("exits:Agent", "CartPole-v1", steps=8)
    Path("own_rewards.py").write_text(
        OWN_CODE.replace('name = "plain"', 'name = "plain"\n    def __init__(self): exit(0)')
    )
    assert command(f"train a2c CartPole-v1 {FLAGS} --rewards own_rewards:Plain --out run") == 1
    assert "ended the program (SystemExit: 0)" in capfd.readouterr().err
    assert command("train a2c CartPole-v1 --help") == 0


def terminated(folder: str) -> None:
    """Train on the command line in a process that gets SIGTERM."""
    os.chdir(folder)
    send_at(pytest.MonkeyPatch(), 1, signal.SIGTERM)
    flags = FLAGS.replace("--steps 32", "--steps 320")
    command(f"train a2c CartPole-v1 {flags} --rewards own_rewards:Centre --out run")
    print("not reached")


def test_sigterm_says_how_to_go_on(project: Path) -> None:
    killer = Killer()
    try:
        status, output = killer.run("tests.cli.test_own_rewards:terminated", str(project))
    finally:
        killer.close()
    assert status == -signal.SIGTERM
    assert output.splitlines()[-2:] == [
        "terminated: finishing this iteration and saving",
        "terminated; resume with: rlmeta resume run --rewards own_rewards:Centre",
    ]
