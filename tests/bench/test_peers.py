"""Baselines: settings that SB3 accepts and that say what rl-zoo says, evaluation, and a file that survives a kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlmeta.bench import peers
from rlmeta.errors import MissingExtraError, SettingError, UnknownNameError


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return peers.train_sb3("ppo", "CartPole-v1", steps=512, seed=0)


@pytest.mark.parametrize(("agent", "task"), peers.SETTINGS)
def test_settings_build_a_model_that_holds_them(agent: str, task: str) -> None:
    settings = peers.SETTINGS[agent, task]
    model = peers._build(agent, task, seed=3)
    assert model.n_envs == settings.get("n_envs", 1)
    assert (model.get_vec_normalize_env() is not None) == settings.get("normalize", False)
    for name in ("gamma", "ent_coef", "batch_size", "n_steps", "gradient_steps", "target_update_interval", "use_sde"):
        if name in settings:
            assert getattr(model, name) == settings[name], name
    if agent == "ppo":  # no minibatch is cut short
        assert model.n_envs * model.n_steps % model.batch_size == 0  # type: ignore[attr-defined]


def test_linear_settings_fall_to_zero() -> None:
    model = peers._build("ppo", "CartPole-v1", seed=0)
    for progress_left, rate, clip in ((1.0, 1e-3, 0.2), (0.25, 2.5e-4, 0.05), (0.0, 0.0, 0.0)):
        assert model.lr_schedule(progress_left) == pytest.approx(rate)
        assert model.clip_range(progress_left) == pytest.approx(clip)  # type: ignore[attr-defined]


def test_train_reports_returns_steps_and_speed(trained: dict[str, Any]) -> None:
    assert len(trained["returns"]) == 256
    assert all(1 <= value <= 500 for value in trained["returns"])
    assert trained["steps"] == 512
    assert trained["steps_per_second"] * trained["seconds"] == pytest.approx(512)
    assert trained["steps_per_cpu_second"] * trained["cpu_seconds"] == pytest.approx(512)


def test_a_seed_decides_the_result_and_threads_are_given_back(trained: dict[str, Any]) -> None:
    torch.set_num_threads(2)
    assert peers.train_sb3("ppo", "CartPole-v1", steps=512, seed=0)["returns"] == trained["returns"]
    assert torch.get_num_threads() == 2
    assert peers.train_sb3("ppo", "CartPole-v1", steps=512, seed=1)["returns"] != trained["returns"]


def test_evaluation_normalises_as_training_did_and_reports_raw_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        peers.SETTINGS, ("ppo", "CartPole-v1"), peers.SETTINGS["ppo", "CartPole-v1"] | {"normalize": True}
    )
    monkeypatch.setattr(peers, "EVALUATION_ENVS", 4)
    monkeypatch.setattr(peers, "EVALUATION_EPISODES", 8)
    model = peers._build("ppo", "CartPole-v1", seed=0)
    model.learn(512)
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None and normalizer.gamma == 0.98
    mean = normalizer.obs_rms.mean.copy()
    seen = []
    predict = model.predict

    def spy(observation: np.ndarray, **options: Any) -> Any:
        assert options["deterministic"] is True
        seen.append(observation)
        return predict(observation, **options)

    monkeypatch.setattr(model, "predict", spy)
    returns = peers._evaluate(model, "ppo", "CartPole-v1", seed=0)
    assert all(value == int(value) and value >= 8 for value in returns)  # one a step, as CartPole pays
    np.testing.assert_array_equal(normalizer.obs_rms.mean, mean)
    raw = peers._environments("CartPole-v1", 4, seed=1_000_000, normalize=False, gamma=None).reset()
    np.testing.assert_allclose(seen[0], normalizer.normalize_obs(raw), rtol=1e-6)


def test_record_skips_what_is_there_and_repairs_a_cut_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(agent: str, task: str, steps: int, seed: int) -> dict[str, Any]:
        calls.append((agent, task, steps, seed))
        return {"returns": [1.0, 2.0], "steps_per_cpu_second": 1.0}

    monkeypatch.setattr(peers, "train_sb3", stand_in)
    out = ["--out", str(tmp_path / "sb3")]
    path = tmp_path / "sb3" / "sb3.jsonl"
    assert peers.main(["dqn", "Acrobot-v1", "--steps", "10", "--seeds", "0,1", *out]) == 0
    whole = path.read_text()
    with path.open("a") as file:
        file.write(whole[:20])  # a kill in the middle of a line
    assert peers.main(["dqn", "Acrobot-v1", "--steps", "10", "--seeds", "1,2", *out]) == 0
    assert peers.main(["dqn", "Acrobot-v1", "--seeds", "2", *out]) == 0  # another budget: rl-zoo's
    assert calls == [("dqn", "Acrobot-v1", steps, seed) for steps, seed in ((10, 0), (10, 1), (10, 2), (100_000, 2))]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["budget"], line["seed"]) for line in lines] == [(10, 0), (10, 1), (10, 2), (100_000, 2)]
    assert lines[0]["returns"] == [1.0, 2.0]


def test_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownNameError, match=r"'reinforce' on 'CartPole-v1': choose one of a2c CartPole-v1"):
        peers.train_sb3("reinforce", "CartPole-v1", 10, 0)
    with pytest.raises(SettingError, match="positive"):
        peers.train_sb3("ppo", "CartPole-v1", 0, 0)
    assert peers.main(["ppo", "Nowhere-v0", "--out", str(tmp_path)]) == 2
    assert "'ppo' on 'Nowhere-v0'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingExtraError, match=r"rlmeta\[bench\]"):
        peers.train_sb3("ppo", "CartPole-v1", 10, 0)
