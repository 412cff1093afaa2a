"""`rlmeta bench engine` and `rlmeta bench checkout`: every side runs, and what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlmeta.bench import checkout, engine
from rlmeta.cli.main import main
from rlmeta.errors import SettingError

ROOT = Path(__file__).parents[2]


def test_backends_end_with_equal_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "CASES", {"PPO, 1 learner": ("mlp", 1, 2_560)})

    def side(case, backend):
        monkeypatch.setenv(engine.BACKEND_VARIABLE, "" if backend == engine.DEFAULT else backend)
        return engine.train_and_measure(case)

    monkeypatch.setattr(engine, "_side", side)
    assert engine.main(engine.Engine(rounds=1, out=tmp_path / "engine.json")) == 0
    (row,) = json.loads((tmp_path / "engine.json").read_text())
    assert row["equal_weights"] and set(row["steps_per_second"]) == {"default", "python", "none"}
    assert row["operations"]["gradient steps"] > 100
    assert "1.00x" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkout_is_compared_with_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkout, "CASES", {"A2C": "a2c CartPole-v1 --steps 400 --final-episodes 4"})
    flags = ["--against", str(ROOT), "--rounds", "1", "--out", str(tmp_path / "checkout.json")]
    assert main(["bench", "checkout", *flags]) == 0
    (row,) = json.loads((tmp_path / "checkout.json").read_text())
    assert row["this"] > 0 and row["command"] == "rlmeta train a2c CartPole-v1 --steps 400 --final-episodes 4"
    assert "A2C" in capsys.readouterr().out


def test_a_folder_without_rlmeta_and_no_rounds_are_refused(tmp_path):
    with pytest.raises(SettingError, match="holds no rlmeta"):
        checkout.main(checkout.Checkout(against=tmp_path))
    with pytest.raises(SettingError, match="rounds is at least 1"):
        engine.main(engine.Engine(rounds=0))
