"""Rainbow's parts, each alone and together: they train, recorded and resumed, and learners stay apart."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import gymnasium as gym
import pytest
import torch

import rlmeta as rl
from rlmeta.agents import DQN, Rainbow
from rlmeta.engine import capture
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.distributional import categorical_projection
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.replay import LARGEST, PRIORITY
from rlmeta.learning.state import take
from tests.agents.worlds import Target, start, train

SMALL = DQN(num_envs=4, num_steps=4, gradient_steps=4, batch_size=8, capacity=400, learning_starts=32,
            learning_rate=1e-3, target_every=3, hidden_sizes=(8,))  # fmt: skip
PARTS = {
    "dueling": {"dueling": True, "head_sizes": (8,)},
    "prioritised": {"prioritised": True},
    "noisy": {"noisy": True, "epsilon_start": 0.0, "epsilon_end": 0.0},
    "categorical": {"distribution": "categorical", "atoms": 11, "v_max": 50.0},
    "quantile": {"distribution": "quantile", "atoms": 7, "huber_delta": 1.0},
    "n-step": {"n_steps": 3},
    "not double": {"double": False},
}
TOGETHER = {k: v for name in ("dueling", "prioritised", "noisy", "n-step") for k, v in PARTS[name].items()}
AGENTS = {name: replace(SMALL, **parts) for name, parts in PARTS.items()}
AGENTS["categorical rainbow"] = replace(SMALL, **TOGETHER, **PARTS["categorical"])
AGENTS["quantile rainbow"] = replace(SMALL, **TOGETHER, **PARTS["quantile"])
EACH = pytest.mark.parametrize("name", AGENTS)


def same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(bool(((a[n] == b[n]) | (a[n] != a[n])).all()) for n in a)


@EACH
def test_each_trains_recorded_and_equal_to_what_is_not_recorded(name, monkeypatch):
    monkeypatch.setattr(capture, "WARM_UP", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent, state = train(AGENTS[name], "CartPole-v1", 16)
    operations = agent.capture.operations()
    assert operations["gradient steps"] > 20 and operations["steps of the world"] > 20
    monkeypatch.setattr(capture, "WARM_UP", 10**9)
    _, plain = train(AGENTS[name], "CartPole-v1", 16)
    assert same(state, plain)
    _, before, _ = start(AGENTS[name], "CartPole-v1")
    for weight, value in state["params"]["weights"].items():
        assert not torch.equal(value, before["params"]["weights"][weight]), weight
    assert bool(state["active"].all())


@EACH
def test_each_is_the_same_alone_and_in_company(name):
    _, state = train(AGENTS[name], "CartPole-v1", 6, seeds=3)
    _, alone = train(AGENTS[name], "CartPole-v1", 6, seeds=[1])
    for path, value in tree.flatten(alone["params"]).items():
        ours = tree.flatten(state["params"])[path][1:2]
        torch.testing.assert_close(ours, value, rtol=1e-3, atol=1e-4)
    assert torch.equal(alone["replay"]["action"], state["replay"]["action"][1:2])


@pytest.mark.parametrize("name", ["categorical rainbow", "quantile rainbow"])
def test_a_resumed_run_ends_as_the_one_that_was_not(name, tmp_path):
    budget = rl.Budget(steps=256, final_episodes=4, eval_every=10**6, checkpoint_seconds=0.0, log_points=16)
    whole = rl.train(AGENTS[name], "CartPole-v1", budget=budget, seeds=2, threads=1)

    def crash(run, line):
        if line["iteration"] >= 8:
            raise ConnectionError

    folder = tmp_path / "run"
    with pytest.raises(ConnectionError):
        rl.train(AGENTS[name], "CartPole-v1", budget=budget, seeds=2, threads=1, out=folder, callbacks=[crash])
    again = rl.resume(folder)
    assert same(whole.state, again.state)
    if AGENTS[name].prioritised:
        assert len(again.state["replay"][PRIORITY].unique()) > 20


@pytest.mark.parametrize("name", ["prioritised", "categorical rainbow", "quantile rainbow"])
def test_a_learner_that_fails_does_not_touch_the_others(name):
    def run(poisoned):
        agent, state, world = start(AGENTS[name], "CartPole-v1", 3)
        for i in range(8):
            state["progress"] = torch.full_like(state["progress"], i / 8)
            if i == 4 and poisoned:
                state["replay"]["reward"][1] = math.nan
                kept.append(tree.map(torch.clone, {"params": state["params"]["weights"], "replay": state["replay"]}))
            state, _ = agent.iterate(state, world)
        return state

    kept = []
    clean, state = run(False), run(True)
    assert state["active"].tolist() == [True, False, True]
    for i in (0, 2):
        for part in ("params", "replay", "optimizer"):
            assert same(take(clean[part], i), take(state[part], i))
    for weight, value in state["params"]["weights"].items():
        assert torch.equal(value[1], kept[0]["params"][weight][1])
    if AGENTS[name].prioritised:
        old = kept[0]["replay"][PRIORITY][1]
        changed = state["replay"][PRIORITY][1] != old
        assert bool((state["replay"][PRIORITY][1][changed] <= state["replay"][LARGEST][1].clamp(min=1)).all())


@EACH
def test_masked_actions_are_never_taken(name):
    problem = rl.task(lambda: Target(masked=True), name="masked")
    _, state = train(AGENTS[name], problem, 8)
    assert bool(state["active"].all())


@pytest.mark.parametrize("part", [{}, PARTS["categorical"], PARTS["quantile"]])
def test_the_loss_is_that_of_a_loop(part):
    settings = replace(SMALL, **part, gamma=[0.9, 0.5])
    agent, state = train(settings, "CartPole-v1", 4, seeds=1)
    g, p = torch.Generator().manual_seed(0), state["params"]
    for weight, value in p["buffers"].items():  # the target network prefers other actions than the online one
        p["buffers"][weight] = -value if ".head." in weight else value
    batch = {
        "observation": torch.randn(2, 5, 4, generator=g),
        "next_observation": torch.randn(2, 5, 4, generator=g),
        "action": torch.randint(0, 2, (2, 5), generator=g),
        "reward": torch.rand(2, 5, generator=g),
        "discount": torch.tensor([[0.9, 0.0, 0.9, 0.9, 0.9], [0.5, 0.5, 0.5, 0.0, 0.5]]),
        "valid": torch.tensor([[True] * 5, [True, True, False, True, True]]),
        "weight": torch.rand(2, 5, generator=g),
    }
    ctx = StepContext()
    loss = agent.losses(p, batch, ctx)["q"]
    now, online, target = (
        agent.outputs(n, p, batch[o], None)
        for n, o in (("q", "observation"), ("q", "next_observation"), ("target", "next_observation"))
    )
    kind, values = settings.distribution, agent.q.head.values
    assert not torch.equal(values(online).argmax(-1), values(target).argmax(-1))
    for s in range(2):
        terms = []
        for b in range(5):
            a, r, d = int(batch["action"][s, b]), float(batch["reward"][s, b]), float(batch["discount"][s, b])
            best = int(agent.q.head.values(online)[s, b].argmax())
            if kind == "none":
                error = 0.5 * (float(now[s, b, a]) - r - d * float(target[s, b, best])) ** 2
                size = (2 * error) ** 0.5
            elif kind == "categorical":
                m = categorical_projection(
                    target["logits"][s, b, best].softmax(-1).unsqueeze(0), torch.tensor([r]), torch.tensor([d]), -10, 50
                )[0]
                log = now["logits"][s, b, a].log_softmax(-1)
                error = size = sum(float(m[i] * (m[i].log() - log[i])) for i in range(11) if m[i] > 0)
            else:
                error = 0.0
                for i in range(7):
                    for j in range(7):
                        u = r + d * float(target["quantiles"][s, b, best, j]) - float(now["quantiles"][s, b, a, i])
                        huber = 0.5 * u * u if abs(u) < 1 else abs(u) - 0.5
                        error += abs((2 * i + 1) / 14 - (u < 0)) * huber / 7
                size = error
            if bool(batch["valid"][s, b]):  # others have no priority
                assert float(ctx.errors[s, b]) == pytest.approx(size, rel=1e-4, abs=1e-5)
            terms.append(error * float(batch["weight"][s, b]) * float(batch["valid"][s, b]))
        assert float(loss[s]) == pytest.approx(sum(terms) / int(batch["valid"][s].sum()), rel=1e-4)


def test_environments_explore_with_noise_of_their_own_and_evaluation_has_none():
    agent, state = train(AGENTS["noisy"], "CartPole-v1", 4)
    p = state["params"]
    p["weights"] = {n: 20 * w if "sigma" in n else w for n, w in p["weights"].items()}
    same_rows = torch.randn(4, generator=torch.Generator().manual_seed(1)).expand(2, 64, 4)
    actions, _ = agent.act(p, same_rows, {}, state["key"])
    assert bool((actions.float().std(-1) > 0).all())
    other, _ = agent.act(p, same_rows, {}, random.fold(state["key"], 1))
    assert not torch.equal(actions, other)
    greedy, _ = agent.act(p, same_rows, {}, state["key"], True)
    assert bool((greedy == greedy[:, :1]).all())
    assert torch.equal(greedy, agent.outputs("q", p, same_rows, None).argmax(-1))


def test_priorities_follow_the_errors_within_an_update():
    settings = replace(AGENTS["prioritised"], priority_exponent=1.0, learning_rate=1e-12, gradient_steps=40)
    agent, state = train(settings, "CartPole-v1", 3, seeds=1)
    memory = state["replay"]
    seen = (memory[PRIORITY] > 0) & (memory[PRIORITY] != memory[LARGEST].reshape(-1, 1, 1))
    assert int(seen.sum()) > 20
    rows = seen[0].nonzero()
    observation, following = memory["observation"][0, rows[:, 0], rows[:, 1]], (rows[:, 0] + 1) % 100
    batch = {
        "observation": observation.unsqueeze(0),
        "next_observation": memory["observation"][0, following, rows[:, 1]].unsqueeze(0),
        "action": memory["action"][0, rows[:, 0], rows[:, 1]].unsqueeze(0),
        "reward": memory["reward"][0, rows[:, 0], rows[:, 1]].unsqueeze(0),
        "discount": 0.99 * (~memory["terminated"][0, rows[:, 0], rows[:, 1]]).float().unsqueeze(0),
        "valid": torch.ones(1, len(rows), dtype=torch.bool),
    }
    ctx = StepContext()
    agent.losses(state["params"], batch, ctx)
    torch.testing.assert_close(memory[PRIORITY][0][seen[0]], ctx.errors[0], rtol=1e-3, atol=1e-4)


def test_learners_split_over_two_cores_draw_from_their_own_memories():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, split = train(AGENTS["prioritised"], "CartPole-v1", 6, seeds=3)
        torch.set_num_threads(1)
        _, whole = train(AGENTS["prioritised"], "CartPole-v1", 6, seeds=3)
    finally:
        torch.set_num_threads(before)
    for path, value in tree.flatten(whole["params"]).items():
        torch.testing.assert_close(tree.flatten(split["params"])[path], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(split["replay"][PRIORITY], whole["replay"][PRIORITY], rtol=1e-3, atol=1e-4)


def test_a_new_task_begins_without_priorities():
    agent, state, world = start(AGENTS["prioritised"], "CartPole-v1")
    for _ in range(6):
        state, _ = agent.iterate(state, world)
    assert bool((state["replay"][LARGEST] > 0).all())
    state = agent.begin_task(state, world, random.fold(state["key"], 1))
    assert not bool(state["replay"][PRIORITY].any()) and not bool(state["replay"][LARGEST].any())


def test_rainbow_is_all_of_it():
    s = Rainbow()
    assert (s.double, s.dueling, s.prioritised, s.noisy, s.distribution, s.n_steps) == (
        True, True, True, True, "categorical", 3
    )  # fmt: skip
    assert s.num_envs * s.num_steps == 4 * s.gradient_steps
    run = rl.train(
        replace(s, learning_starts=64, hidden_sizes=(8,), head_sizes=(8,)), "CartPole-v1", seeds=2, steps=160, threads=1
    )
    assert bool(run.scores.isfinite().all()) and type(run.agent.settings) is Rainbow


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"distribution": "quantile"}, "huber_delta is inf, expected a finite one for quantiles"),
        ({"distribution": "gaussian"}, "distribution is 'gaussian', expected one of none, categorical, quantile"),
        ({"v_min": 1.0, "v_max": 1.0}, "v_min is 1, expected less than v_max, 1"),
        ({"v_max": math.inf}, "v_max is inf, expected a number that is finite"),
        ({"atoms": 1}, "atoms is 1, expected at least 2"),
        ({"priority_exponent": 1.5}, "priority_exponent is 1.5, expected at least 0 and at most 1"),
        ({"importance_exponent": [0.4, -1.0]}, "importance_exponent is -1"),
        ({"adam_epsilon": 0.0}, "adam_epsilon is 0, expected above 0"),
    ],
)
def test_settings_that_can_not_be_are_refused(wrong, said):
    with pytest.raises(SettingError, match=said):
        DQN(**wrong)


def test_pictures_stay_bytes():
    class Pixels(Target):
        observation_space = gym.spaces.Box(0, 255, (4, 4, 1), "uint8")

        def __init__(self):
            super().__init__()
            self.observation_space = Pixels.observation_space

        def _observe(self):
            import numpy as np

            return np.full((4, 4, 1), 255 * self.goal, np.uint8)

    _, state = train(AGENTS["categorical rainbow"], rl.task(Pixels, name="pixels"), 6)
    assert state["replay"]["observation"].dtype == torch.uint8
