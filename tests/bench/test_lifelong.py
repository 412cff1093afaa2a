"""The benchmark's tables on digits, small enough to run in a test: every row is there and the files can be read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rlmeta.bench import lifelong, lifelong_speed
from rlmeta.cli.main import main
from rlmeta.envs.streams import stream
from rlmeta.errors import UnknownNameError


@pytest.fixture
def small(monkeypatch):
    """Digits for MNIST, two or three tasks, a small network, a few steps."""

    def digits(name: str, **arguments):
        found = stream(name.replace("mnist", "digits"), **arguments)
        return dataclasses.replace(found, tasks=found.tasks[:2])

    network = dataclasses.replace(lifelong.NETWORK, hidden_sizes=(16,), batch_size=16, num_steps=5)
    for module in (lifelong, lifelong_speed):
        monkeypatch.setattr(module, "stream", digits)
    monkeypatch.setattr(lifelong, "NETWORK", network)
    monkeypatch.setattr(lifelong, "SPLIT_STEPS", 5)
    for rows in ("ROTATIONS", "SPLIT"):
        value = getattr(lifelong, rows)
        tables = value.values() if isinstance(value, dict) else [value]
        for row in [row for table in tables for row in table]:
            monkeypatch.setitem(row.__dict__, "settings", dataclasses.replace(network, optimizer="sgd"))


def test_tables_of_samples(small, tmp_path, capsys):
    arguments = ["--tables", "rotations,split", "--seeds", "2", "--out", str(tmp_path)]
    assert main(["bench", "lifelong", *arguments]) == 0
    printed = capsys.readouterr().out
    for name in ("single", "EWC", "GEM", "A-GEM", "PackNet", "HAT", "joint", "buffer only"):
        assert name in printed
    for table, rows in (("rotations", 4), ("split_task", 14), ("split_class", 10)):
        content = json.loads((tmp_path / f"lifelong_{table}.json").read_text())
        assert len(content["rows"]) == rows and content["seeds"] == [100, 101]
        assert max(content["chosen_on_seeds"]) < 100
        assert all(0 <= row["accuracy"][0] <= 1 for row in content["rows"])


def test_control_table(tmp_path, capsys):
    arguments = ["--tables", "control", "--seeds", "1", "--control-steps", "256", "--only", "PackNet"]
    assert main(["bench", "lifelong", *arguments, "--out", str(tmp_path)]) == 0
    assert "of single-task training" in capsys.readouterr().out
    content = json.loads((tmp_path / "lifelong_control.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["PackNet"]
    assert len(json.loads((tmp_path / "lifelong_transfer.json").read_text())["transfer"]) == 4


def test_unknown_tables_are_refused():
    with pytest.raises(UnknownNameError, match="rotations"):
        lifelong.lifelong(lifelong.Lifelong(tables="rotation"))


def test_sides_of_the_speed_table_run():
    for sides in (
        lifelong_speed.fisher(20, 2),
        lifelong_speed.ewc_steps(),
        lifelong_speed.gem_steps(),
    ):
        assert all(side() > 0 for side in sides)
