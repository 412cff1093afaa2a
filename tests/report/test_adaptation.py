"""`rlmeta adapt`: the adaptation of a saved run, as a table, figures and a picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.minimisation import Quadratics
from rlmeta.envs.regression import Sinusoid
from rlmeta.functional import random
from rlmeta.report.adaptation import Adaptation, AdaptFlags, _predictions, adapt

TEST = {"split": "test"}
SMALL = rl.Regressor(hidden_sizes=(4,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rl.train(rl.MAML(SMALL, num_envs=3), "sinusoid", steps=6, seeds=2, out=folder / "sinusoid")
    agent = rl.REINFORCE(num_envs=2, num_steps=20, hidden_sizes=(4,), baseline="batch")
    rl.train(rl.MAML(agent, num_envs=2), "navigation-short", steps=160, seeds=2, out=folder / "navigation")
    rl.train(rl.MAML(SMALL, num_envs=3), "sinusoid", steps=6, out=folder / "one")
    rl.train(rl.PPO(num_envs=2, num_steps=8, batch_size=16), "CartPole-v1", steps=16, out=folder / "ppo")
    return folder


@pytest.mark.parametrize(("name", "score"), [("sinusoid", "squared error"), ("navigation", "return")])
def test_adapt_writes_table_figures_and_picture(runs, name, score, capsys):
    assert main(["adapt", str(runs / name), "--tasks", "5", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    said = " ".join(said.split())
    assert f"mean {score}" in said and "adaptation.png" in said and "2 learners, 5 held-out tasks each" in said
    record = json.loads((runs / name / "adaptation.json").read_text())
    assert record["score"] == score and record["tasks"] == 5
    assert np.shape(record["learners"]) == (2, 3)
    np.testing.assert_allclose(np.mean(record["learners"], 0), record["mean"])
    assert (runs / name / "adaptation.png").stat().st_size > 5_000


def test_one_learner_and_one_task_are_singular(runs, capsys):
    assert main(["adapt", str(runs / "one"), "--tasks", "1", "--steps", "0"]) == 0
    assert "1 learner, 1 held-out task each" in " ".join(capsys.readouterr().out.split())


def test_it_is_the_learners_own_adaptation_and_repeats(runs):
    run = rl.load(runs / "sinusoid")
    found, again = adapt(run, 7, 1), adapt(run, 7, 1)
    assert np.array_equal(found.scores, again.scores) and found.scores.shape == (2, 7, 2)
    assert not np.array_equal(found.scores, adapt(run, 7, 1, seed=2).scores)


def test_adaptation_is_to_test_tasks_unless_told_otherwise(runs):
    run = rl.load(runs / "sinusoid")
    p, world, key = run.agent.effective_params(run.state), run.experiment.world(), run.state["key"]
    own, test, train = (run.agent.adaptation(p, world, key, 3, 1, **split) for split in ({}, TEST, {"split": "train"}))
    assert torch.equal(own, test) and not torch.equal(own, train)


def test_the_interval_is_of_the_mean_over_tasks_of_all_learners():
    scores = np.random.default_rng(0).normal(size=(2, 50, 1))
    expected = 1.96 * scores.std(ddof=1) / 10
    assert Adaptation(scores, "x").half_width == pytest.approx(expected)
    assert Adaptation(scores, "x").mean == pytest.approx(scores.mean())
    assert Adaptation(np.ones((1, 1, 1)), "x").half_width == 0


def test_what_does_not_adapt_is_refused(runs, capsys):
    assert main(["adapt", str(runs / "ppo")]) == 2
    assert "a run of ppo does not adapt step by step: give a run of MAML" in capsys.readouterr().err
    with pytest.raises(rl.RlmetaError, match="--tasks is 0"):
        AdaptFlags(tasks=0)


def test_a_family_made_in_code_is_given_again(tmp_path):
    family = NamedFamily("mine", Sinusoid(shots=3))
    rl.train(rl.MAML(SMALL, num_envs=3), family, steps=6, out=tmp_path / "run")
    with pytest.raises(rl.RlmetaError, match="'mine': pass it again as env="):
        rl.load(tmp_path / "run")
    assert rl.load(tmp_path / "run", env=family).experiment.problem is family
    rl.train(rl.LearnedOptimizer(num_envs=2), NamedFamily("mine", Quadratics(2)), steps=40)


def test_the_line_of_the_picture_is_the_learners_answer_before_and_after(runs):
    run = rl.load(runs / "one")
    line = _predictions(run, 1)
    tasks = run.experiment.world().tasks(random.fold(run.state["key"], 1), 0, 1, "test")
    p, inner = run.agent.start(run.agent.effective_params(run.state), 1), run.agent.inner
    x = {"observation": torch.as_tensor(line["x"], dtype=torch.float32).reshape(1, 1, -1, 1)}
    after = run.agent.adapted(p, tasks["support"], run.agent.settings.inner_steps, "none")
    for name, weights in (("before", p), ("after", after)):
        np.testing.assert_allclose(line[name], inner.output(weights, x).detach().flatten(), atol=1e-5)
    assert not np.allclose(line["before"], line["after"], atol=1e-5)
