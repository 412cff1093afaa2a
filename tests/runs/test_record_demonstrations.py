"""`rlmeta record`, on the command line."""

from __future__ import annotations

import pytest

from rlmeta.cli.main import main
from rlmeta.data.demonstrations import Demonstrations

TINY = "--steps 64 --num-envs 2 --num-steps 16 --batch-size 32 --num-epochs 1 --final-episodes 2 --eval-episodes 2"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ppo", "CartPole-v1", "--seeds", "2", "--out", "run", *TINY.split()]) == 0
    return tmp_path


def test_record_writes_demonstrations_and_says_how_good_they_are(run, capsys):
    assert (
        main(["record", "run", "--episodes", "3", "--learner", "1", "--sampled", "--seed", "4", "--out", "demo"]) == 0
    )
    made = Demonstrations.load(run / "demo")
    assert f"3 episodes of learner 1, {made.steps} steps, returns {made.returns.mean():g}" in capsys.readouterr().out
    assert made.about == {"agent": "ppo", "task": "CartPole-v1", "learner": 1, "deterministic": False, "seed": 4}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("run", "needs a file to write: --out FILE"),
        ("run --out demo --learner 2", "the run has learners 0 to 1"),
        ("none --out demo", "is not the folder of a run"),
        ("run --out demo --episodes 0", "episodes is 0"),
        ("run --out run/config.toml/demo", "cannot write demonstrations at run/config.toml/demo: Not a directory"),
        ("run --out /proc/none/demo", "cannot write demonstrations at /proc/none/demo: "),
        ("", "takes one run folder"),
    ],
)
def test_what_cannot_be_recorded_is_said_in_a_line(run, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("rlmeta.runs.record_demonstrations.play", lambda *_: pytest.fail("it plays"))
    assert main(["record", *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "demo").exists()


@pytest.mark.parametrize(("learner", "problem"), [("classifier", "split-digits"), ("maml", "sinusoid")])
def test_what_does_not_act_in_a_task_is_refused(learner, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", learner, problem, "--steps", "1", "--final-episodes", "1", "--out", "run", "--quiet"]) == 0
    assert main(["record", "run", "--out", "demo"]) == 2
    assert f"a run of {learner} on {problem} can't be recorded" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
