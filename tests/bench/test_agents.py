"""`rlmeta bench agents`: what it needs is asked for before anything is trained, and a side that fails is said to."""

from __future__ import annotations

import sys

import pytest

from rlmeta.agents import PPO
from rlmeta.bench import against_rejax, agents, peers
from rlmeta.bench.steady import train_and_time
from rlmeta.cli.main import main
from rlmeta.runs.experiment import Budget


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


def test_rejax_needs_a_python_of_its_own_and_has_the_same_settings(capsys, tmp_path):
    assert main(["bench", "agents", "--jax", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert 'give that of an environment with rejax and "gymnax<1"' in capsys.readouterr().err
    settings = against_rejax.rejax_settings(against_rejax.CLEANRL)
    assert (settings["num_minibatches"], settings["num_epochs"], settings["clip_eps"]) == (4, 4, 0.2)
    assert against_rejax.rejax_settings(agents.ZOO)["num_minibatches"] == 1


def test_the_second_half_of_a_training_is_timed():
    settings = PPO(num_envs=2, num_steps=8, batch_size=16, num_epochs=1)
    budget = Budget(steps=320, final_episodes=2, eval_every=3_200)
    run, steps, seconds = train_and_time(settings, "CartPole-v1", [100, 101], budget)
    assert run.env_steps == 320 and steps == 320 and 0 < seconds < run.seconds  # half of two learners' 320


@pytest.mark.parametrize("name", agents.COMPARISONS)
def test_both_sides_take_as_many_samples_and_gradient_steps(name):
    comparison = agents.COMPARISONS[name]
    model, ours = peers._build(comparison.peer, comparison.task, 0, comparison.peer_changes), comparison.settings
    assert model.batch_size == ours.batch_size and model.gamma == ours.gamma
    if isinstance(ours, PPO):
        assert (model.n_steps, model.n_envs, model.n_epochs) == (ours.num_steps, ours.num_envs, ours.num_epochs)
    else:
        assert model.train_freq.frequency == ours.num_steps and model.gradient_steps == ours.gradient_steps
        assert model.learning_starts == ours.learning_starts and model.n_envs == ours.num_envs
        hidden = tuple(model.policy_kwargs.get("net_arch", (256, 256)))
        assert hidden == ours.hidden_sizes
