"""`rlmeta bench agents`: what it needs is asked for before anything is trained, and a side that fails is said to."""

from __future__ import annotations

import sys

import pytest

from rlmeta.bench import agents
from rlmeta.cli.main import main


@pytest.mark.parametrize(("flags", "package"), [([], "stable_baselines3"), (["--scale"], "matplotlib")])
def test_a_missing_package_is_named_before_anything_is_trained(flags, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(agents, "_run", lambda jobs: pytest.fail("it trains"))
    assert main(["bench", "agents", *flags]) == 2
    assert f"needs {package}, which is not installed: pip install" in capsys.readouterr().err


def test_a_side_that_fails_is_said_to(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(agents, "require_extra", lambda *_: None)
    failing = [sys.executable, "-c", "raise SystemExit(2)"]
    started = agents.subprocess.Popen
    monkeypatch.setattr(agents.subprocess, "Popen", lambda command, **given: started(failing, **given))
    assert main(["bench", "agents", "--rounds", "1", "--out", str(tmp_path / "figures")]) == 2
    assert "bench: a side failed, its message stands above" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()
