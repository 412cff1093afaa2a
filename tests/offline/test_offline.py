"""Offline learners: what they learn from bad data, resumed and isolated runs, the command line, bad input."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import DemonstrationError, SettingError, SpaceError
from rlmeta.functional import tree
from rlmeta.learning.state import take
from tests.agents.worlds import Target, start, train
from tests.offline.data import NETWORK, SETTINGS, SMALL, guesses, recorded
from tests.runs.test_resume import assert_same_run

FEW = rl.Budget(steps=16, eval_every=8, eval_episodes=1, final_episodes=1, checkpoint_seconds=0.0, log_points=4)
FAST = {
    "td3_bc": {"actor_learning_rate": 1e-2, "critic_learning_rate": 1e-2},
    "iql": {"actor_learning_rate": 1e-2, "critic_learning_rate": 1e-2, "beta": 10.0, "target_rate": 0.1},
    "cql": {"actor_learning_rate": 1e-2, "critic_learning_rate": 1e-2, "conservative_weight": 0.1},
    "decision_transformer": {"learning_rate": 1e-2, "return_scale": 1.0, "context": 1, "max_grad_norm": 10.0},
}
TD3_ALONE = ("td3_bc", "discrete")
"""TD3's actions are in a Box."""


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in SETTINGS for kind in ("box", "discrete") if (name, kind) != TD3_ALONE]
)
def test_what_is_better_than_the_data_is_learned(name, kind):
    """The data's actions are random, so a clone has a return of about 0; a policy that learns from rewards more."""
    problem = rl.task(partial(Target, kind), name="target")
    own = {**FAST[name], "num_steps": 20, "batch_size": 32}
    if name == "cql":
        own["initial_temperature"] = 0.1
    budget = rl.Budget(steps=200, eval_every=10**4, final_episodes=16)
    run = rl.train(SETTINGS[name](guesses(kind), **own), problem, seeds=2, budget=budget)
    assert (run.scores > 0.6).all(), run.scores


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_and_resumed_equals_never_stopped(name, tmp_path):
    given = recorded()
    settings = SETTINGS[name](given)
    whole = rl.train(settings, "Pendulum-v1", seeds=2, out=tmp_path / "whole", budget=FEW, threads=1)
    stop = lambda run, line: line["iteration"] >= 2  # noqa: E731
    rl.train(settings, "Pendulum-v1", seeds=2, out=tmp_path / "half", budget=FEW, callbacks=[stop], threads=1)
    with pytest.raises(SettingError, match="which a configuration only describes"):
        rl.resume(tmp_path / "half")
    assert_same_run(whole, rl.resume(tmp_path / "half", own={"demonstrations": given}))
    assert int(whole.state["count"]["gradient_steps"].max()) == 16


@pytest.mark.parametrize("name", SETTINGS)
def test_a_learner_that_overflows_changes_no_bit_of_another(name):
    rate = "learning_rate" if name == "decision_transformer" else "actor_learning_rate"
    ends = [train(SETTINGS[name](recorded(), **{rate: [1e-3, bad]}), "Pendulum-v1", 3)[1] for bad in (1e-3, 1e38)]
    fine, beside = (tree.flatten(take(state, slice(0, 2))) for state in ends)
    assert all(torch.equal(leaf, beside[path]) for path, leaf in fine.items())
    assert ends[0]["active"].all() and ends[1]["active"].tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_steps_equal_unrecorded_ones(name):
    ends = []
    for recording in (True, False):
        agent, state, world = start(SETTINGS[name](recorded()), "Pendulum-v1", 2)
        agent.capture = agent.capture if recording else None
        for _ in range(4):
            state, _ = agent.iterate(state, world)
        ends.append(state["params"])
    ours, theirs = map(tree.flatten, ends)
    for path, leaf in ours.items():
        torch.testing.assert_close(leaf, theirs[path], rtol=1e-4, atol=1e-5)


def test_targets_follow_and_td3_bcs_policy_moves_in_every_other_step():
    agent, state, world = start(SETTINGS["td3_bc"](recorded(), num_steps=2), "Pendulum-v1", 2)
    before = tree.map(torch.clone, state["params"])
    state, _ = agent.iterate(state, world)
    after, rate = state["params"], agent.settings.target_rate
    assert state["optimizer"]["critic"]["count"].tolist() == [2, 2]
    assert state["optimizer"]["actor"]["count"].tolist() == [1, 1]
    for copy in agent.copies:
        for name, source in copy.sources(after["weights"], after["buffers"]).items():
            expected = torch.lerp(before["buffers"][name], source, rate)
            torch.testing.assert_close(after["buffers"][name], expected, rtol=1e-6, atol=1e-7)


def test_the_command_line_is_pythons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = recorded()
    given.save("data")
    flags = "--num-steps 4 --batch-size 8 --hidden-sizes 8 --final-episodes 1 --eval-every 8 --eval-episodes 1 --quiet"
    assert main(f"train iql Pendulum-v1 --demonstrations data --steps 8 --out run {flags}".split()) == 0
    budget = rl.Budget(steps=8, eval_every=8, eval_episodes=1, final_episodes=1)
    settings = replace(rl.preset("iql", "Pendulum-v1"), demonstrations=given, **SMALL, **NETWORK)
    run = rl.train(settings, "Pendulum-v1", budget=budget)
    assert torch.equal(rl.load("run").evaluation.returns, run.evaluation.returns)


def test_wrong_settings_are_refused():
    for name in SETTINGS:
        with pytest.raises(DemonstrationError, match="nothing to imitate"):
            start(SETTINGS[name](None), "Pendulum-v1")
        with pytest.raises(SettingError, match="batch_size is 0"):
            SETTINGS[name](recorded(), batch_size=0)
    with pytest.raises(SettingError, match="no multiple of policy_delay"):
        SETTINGS["td3_bc"](recorded(), num_steps=3)
    with pytest.raises(SettingError, match=r"expectile is 1\.5"):
        SETTINGS["iql"](recorded(), expectile=1.5)
    with pytest.raises(SettingError, match="target_return is nan"):
        SETTINGS["decision_transformer"](recorded(), target_return=float("nan"))
    with pytest.raises(SettingError, match="do not divide into heads"):
        SETTINGS["decision_transformer"](recorded(), heads=3)
    for name in ("td3_bc", "iql", "cql", "decision_transformer"):
        with pytest.raises(SpaceError, match="acts in a Box with finite bounds"):
            SETTINGS[name](recorded()).bind(recorded().observation_space, gym.spaces.Box(-np.inf, np.inf, (1,)))
