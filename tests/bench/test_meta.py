"""`rlmeta bench meta`: tables have seeds that nothing was chosen on, and their files say so."""

from __future__ import annotations

import json

import pytest

from rlmeta.bench import meta
from rlmeta.bench.seeds import BY_HAND_SEEDS, FIRST_SEED, SELECTION_SEEDS, table_seeds
from rlmeta.cli.main import main
from rlmeta.errors import SettingError


def test_seeds_of_tables_and_of_choices_never_meet():
    assert table_seeds(3) == [100, 101, 102]
    assert max(*SELECTION_SEEDS, *BY_HAND_SEEDS) < FIRST_SEED


def test_a_short_table_has_its_own_seeds_and_chooses_rates_on_others(tmp_path, monkeypatch, capsys):
    trained = []
    train = meta.train
    monkeypatch.setattr(meta, "train", lambda *a, **k: trained.append(tuple(k["seeds"])) or train(*a, **k))
    given = ["--parts", "sinusoid,pes", "--seeds", "2", "--budget", "0.001", "--out", str(tmp_path)]
    assert main(["bench", "meta", *given]) == 0
    assert "pre-training + fine-tuning" in capsys.readouterr().out
    content = json.loads((tmp_path / "meta_sinusoid.json").read_text())
    assert content["seeds"] == [100, 101] and content["command"].endswith("--parts sinusoid --budget 0.001")
    assert all(max(seeds) < 100 for seeds in content["chosen_on_seeds"].values())
    assert trained == [(100, 101), (100, 101), SELECTION_SEEDS, (100, 101)]
    rows = {row["what"]: row for row in content["rows"]}
    assert len(rows["MAML"]["scores"]) == 2 and rows["best without adapting, -1.62 cos x"]["mean"] > 2.8
    assert json.loads((tmp_path / "meta_pes.json").read_text())["rows"][-1]["standard errors off"] < 4


def test_wrong_flags_are_refused():
    for flag in (["--budget", "0"], ["--budget", "2"], ["--seeds", "0"]):
        with pytest.raises(SettingError, match="bench meta"):
            meta.main(flag)
