"""What is not finite is never the best, poisons nothing silently, and a learner that stops again stays where it is."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional.packed import Packed
from rlmeta.learning.learner import Score
from rlmeta.learning.state import put, take
from rlmeta.report.adaptation import Adaptation
from rlmeta.report.adaptation import table as adaptation_table
from rlmeta.report.tables import result_table
from rlmeta.runs.loop import Loop

NAN = math.nan
TINY = rl.A2C(num_envs=2, num_steps=5, hidden_sizes=(4,), learning_rate=1e-9)


@pytest.mark.parametrize("maximise", [True, False])
def test_only_finite_scores_are_compared(maximise):
    score, sign = Score("x", maximise), 1.0 if maximise else -1.0
    values = torch.tensor([NAN, sign * 1.0, sign * 3.0, math.inf, -math.inf, sign * 2.0])
    assert score.best(values) == 2
    assert score.best(torch.tensor([NAN, -sign * 7.0, math.inf])) == 1
    with pytest.raises(SettingError, match="none of the 2 learners has a finite x"):
        score.best(torch.tensor([NAN, math.inf]))
    old = torch.tensor([NAN, NAN, 1.0, 1.0, math.inf])
    new = torch.tensor([1.0, NAN, NAN, 1.0 + sign, 1.0])
    assert score.better(new, old).tolist() == [True, False, False, True, True]
    assert score.reaches(values, sign * 3.0).tolist() == [False, False, True, False, False, False]


class Broken(gym.Env):
    """Pays 0.1 a step; an episode of the action 1 alone has no finite return."""

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Box(0, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = self.ones = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t, self.ones = self.t + 1, self.ones + int(action)
        reward = NAN if self.ones == 10 else 0.1
        return np.full(1, self.t / 10, np.float32), reward, False, self.t >= 10, {}


def test_a_learner_without_a_finite_score_is_named_counted_and_never_the_best():
    with pytest.warns(RuntimeWarning, match="2 of 8 final scores are not finite: seed 4, seed 7"):
        settings = rl.A2C(num_envs=1, num_steps=5, hidden_sizes=(4,), learning_rate=1e-9)
        run = rl.train(settings, rl.task(Broken, name="broken"), steps=200, seeds=8)
    assert not run.scores[[4, 7]].isfinite().any() and run.best_learner == 0
    (row,) = run.summary()
    assert row["not_finite"] == 2 and math.isnan(row["iqm"])
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result_table([row]))
    assert "nan (2 of 8 not finite; IQM of the others 1.0)" in console.export_text()
    run.evaluation = run.evaluation._replace(returns=torch.full_like(run.evaluation.returns, NAN))
    for asked in (lambda: run.best_learner, lambda: run.act(np.zeros(1, np.float32)), lambda: rl.record(run, 2)):
        with pytest.raises(SettingError, match="none of the 8 learners has a finite return"):
            asked()


class Late(Broken):
    """Has no finite return while `broken` is set."""

    broken = False

    def step(self, action):
        observation, reward, *rest = super().step(0)
        return observation, NAN if Late.broken else reward, *rest


def test_a_first_evaluation_that_is_not_finite_does_not_stay_the_best(monkeypatch):
    lines = []

    def evaluate(self, before=Loop._evaluate):
        Late.broken = len(lines) == 1
        found = before(self)
        Late.broken = False
        return found

    monkeypatch.setattr(Loop, "_evaluate", evaluate)
    budget = rl.Budget(steps=200, eval_every=20, eval_episodes=2, final_episodes=2)
    look = lambda run, line: lines.append(line.get("eval/return", [0.0])[0])  # noqa: E731
    run = rl.train(TINY, rl.task(Late, name="late"), budget=budget, callbacks=[look])
    assert math.isnan(lines[1]) and run.state["best"]["score"].tolist() == pytest.approx([1.0])
    assert run.evaluate(2, best=True).returns.isfinite().all()
    run.state["best"]["score"].fill_(NAN)
    with pytest.raises(SettingError, match="no periodic evaluation gave a finite score"):
        run.best_state()


def test_a_learner_that_never_had_a_finite_evaluation_keeps_its_final_parameters():
    budget = rl.Budget(steps=200, eval_every=20, eval_episodes=2, final_episodes=2)
    run = rl.train(TINY, "CartPole-v1", seeds=2, budget=budget)
    run.state["best"]["score"][0] = NAN
    for leaf in run.state["best"]["params"]["weights"].values():
        leaf.fill_(7.0)
    chosen, final = run.best_state()["params"]["weights"], run.state["params"]["weights"]
    for name, leaf in final.items():
        assert chosen[name][0].equal(leaf[0]) and (chosen[name][1] == 7.0).all()


@pytest.mark.parametrize("within_an_iteration", [False, True])
def test_a_revived_learner_that_stops_again_stays_where_it_is_then(within_an_iteration, monkeypatch):
    weights = []
    settings = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(8,))
    dies = [2, 7]

    def hook(run, line):
        n, bias = len(weights) + 1, run.state["params"]["weights"]["policy.head.linear.bias"]
        weights.append(bias[1].clone())
        if n in dies:
            run.state["active"] = torch.tensor([True, False])
        if n == 4:
            part = {name: run.state[name] for name in ("params", "optimizer", "active")}
            copied = put(part, torch.tensor([1]), take(part, torch.tensor([0])))
            copied["params"]["weights"] = Packed.of(copied["params"]["weights"], 1)
            run.state = {**run.state, **copied}

    if within_an_iteration:  # it dies in the very iteration that follows its revival
        dies.remove(7)
        from rlmeta.agents.agent import Agent

        def iterate(self, state, world, before=Agent.iterate):
            state, metrics = before(self, state, world)
            if len(weights) == 4:
                state["active"] = torch.tensor([True, False])
            return state, metrics

        monkeypatch.setattr(Agent, "iterate", iterate)
    budget = rl.Budget(steps=16 * 10, eval_every=10_000, final_episodes=2, log_points=10)
    rl.train(settings, "CartPole-v1", seeds=2, budget=budget, callbacks=[hook])
    last = 4 if within_an_iteration else 6  # the line at which it was seen as it stays
    assert weights[2].equal(weights[1]) and not weights[last].equal(weights[1])
    assert all(one.equal(weights[last]) for one in weights[last:])


def test_tasks_without_a_finite_score_are_counted_where_an_adaptation_is_shown():
    scores = np.ones((2, 3, 2))
    scores[1, 2, 1] = np.nan
    shown = adaptation_table(Adaptation(scores, "accuracy"), "title")
    assert shown.caption == "1 of 6 tasks end without a finite score"
