"""Parameter groups: own losses, optimizers and clips; what does not move stays bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.errors import SettingError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group, check_partition, entries, spans, with_entries
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import replay_steps, step
from rlmeta.learning.targets import Copy, with_copy

S, B, D = 3, 5, 4
KEYS = random.make_keys(range(S))
TARGET = Copy("target", "q")


class ActorCritic:
    """q fits the data; the actor climbs q, whose weights its loss depends on as well."""

    capture: Capture | None = None

    def losses(self, p: Params, batch: Any, ctx: StepContext) -> dict[str, Tensor]:
        w, target = p["weights"], p["buffers"]["target.weight"]
        value = (batch["x"] * w["q.weight"].unsqueeze(-2)).sum(-1) + w["q.bias"]
        wanted = batch["y"] + 0.1 * (batch["x"] * target.unsqueeze(-2)).sum(-1)
        noise = 0.0 if ctx.key is None else random.normal(ctx.key, "noise", 0, (B,), torch.float64)
        found = {"critic": (value - wanted - noise).square().mean(-1)}
        if ctx.moves("actor"):
            action = (batch["x"] * w["actor.weight"].unsqueeze(-2)).sum(-1).tanh()
            found["actor"] = -(action * w["q.weight"][..., :1]).mean(-1)
        return found


def begin() -> State:
    def draw(name: str, size: int) -> Tensor:
        return random.normal(KEYS, name, 0, (size,), torch.float64)

    weights = {"q.weight": draw("q", D), "actor.weight": draw("actor", D), "q.bias": draw("bias", 1)}
    params = with_copy({"weights": weights, "buffers": {}, "normalisers": {}, "hyper": {}}, TARGET)
    state: State = {
        "params": params,
        "key": KEYS,
        "active": torch.ones(S, dtype=torch.bool),
        "count": {"gradient_steps": torch.zeros(S, dtype=torch.int64)},
    }
    state["optimizer"] = init_optimizer(groups(), state)
    return state


def groups(rate: float = 1e-2) -> tuple[Group, Group]:
    rates = torch.full((S,), rate, dtype=torch.float64)
    return (
        Group("critic", ("q.",), ("critic",), optim.adam(rates), 0.5),
        Group("actor", ("actor.",), ("actor",), optim.adam(rates * 3)),
    )


def batch(count: int | None = None) -> dict[str, Tensor]:
    keys = KEYS if count is None else random.fold(KEYS, torch.arange(count).unsqueeze(-1))
    return {
        "x": random.normal(keys, "x", 0, (B, D), torch.float64),
        "y": random.normal(keys, "y", 0, (B,), torch.float64),
    }


def test_each_group_descends_its_own_loss_as_torchs_optimizers_do() -> None:
    learner, state = ActorCritic(), begin()
    before = {name: value.clone() for name, value in state["params"]["weights"].items()}
    buffers = state["params"]["buffers"]
    for _ in range(3):
        state, _ = step(learner, state, batch(), groups())
    for s in range(S):
        w = {name: value[s].clone().requires_grad_() for name, value in before.items()}
        q, actor = [w["q.weight"], w["q.bias"]], [w["actor.weight"]]
        critic_adam, actor_adam = torch.optim.Adam(q, 1e-2), torch.optim.Adam(actor, 3e-2)
        one = {name: value[s] for name, value in batch().items()}
        for _ in range(3):
            p = {"weights": w, "buffers": {name: value[s] for name, value in buffers.items()}}
            losses = learner.losses(p, one, StepContext(training=True))
            of_q = torch.autograd.grad(losses["critic"], q, retain_graph=True)
            of_actor = torch.autograd.grad(losses["actor"], actor)
            for weight, gradient in zip([*q, *actor], [*of_q, *of_actor]):
                weight.grad = gradient
            torch.nn.utils.clip_grad_norm_(q, 0.5)
            critic_adam.step()
            actor_adam.step()
        for name, value in w.items():
            torch.testing.assert_close(state["params"]["weights"][name][s], value.detach(), rtol=1e-9, atol=1e-12)


def test_a_group_that_does_not_move_stays_bit_for_bit_with_its_moments() -> None:
    learner, state = ActorCritic(), begin()
    state, _ = step(learner, state, batch(), groups())
    actor = state["params"]["weights"]["actor.weight"].clone()
    moments = tree.map(torch.clone, state["optimizer"]["actor"])
    state, info = step(learner, state, batch(), groups()[:1])
    assert torch.equal(state["params"]["weights"]["actor.weight"], actor)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(moments), tree.leaves(state["optimizer"]["actor"])))
    assert "actor" not in info
    assert not torch.equal(state["params"]["weights"]["q.bias"], begin()["params"]["weights"]["q.bias"])


@pytest.mark.parametrize("delay", [1, 2])
def test_recorded_cycles_with_target_copies_equal_steps_one_by_one(delay: int) -> None:
    critic, actor = groups()
    cycle = [(critic,)] * (delay - 1) + [(critic, actor)]
    keys = random.fold(KEYS, torch.arange(8).unsqueeze(-1))
    rates = torch.full((8, S), 0.2, dtype=torch.float64)
    ends = []
    for capture in (None, Capture(warm_up=4)):
        learner, state = ActorCritic(), begin()
        learner.capture = capture
        for _ in range(4):
            state, info = replay_steps(learner, state, batch(8), keys, cycle, copies={TARGET: rates})
        ends.append((tree.flatten({n: state[n] for n in ("params", "optimizer", "count", "active")}), info))
    (by_hand, reports), (recorded, their_reports) = ends
    assert by_hand.keys() == recorded.keys() and reports.keys() == their_reports.keys()
    assert all(torch.equal(value, recorded[name]) for name, value in by_hand.items())
    assert all(torch.equal(value, their_reports[name]) for name, value in reports.items())
    assert any(program is not None for program in capture._programs.values())


def test_a_learner_that_is_not_finite_keeps_weights_moments_and_targets() -> None:
    learner, state = ActorCritic(), begin()
    learner.capture = Capture(warm_up=1)
    before = tree.map(torch.clone, {n: state[n] for n in ("params", "optimizer")})
    wrong = batch(4)
    wrong["y"][:, 1] = torch.nan
    rates = torch.full((4, S), 0.2, dtype=torch.float64)
    keys = random.fold(KEYS, torch.arange(4).unsqueeze(-1))
    state, _ = replay_steps(learner, state, wrong, keys, [groups()], copies={TARGET: rates})
    assert state["active"].tolist() == [True, False, True]
    now, old = tree.flatten({n: state[n] for n in ("params", "optimizer")}), tree.flatten(before)
    assert all(torch.equal(now[name][1], old[name][1]) for name in old)
    assert not torch.equal(now["params/weights/q.weight"][0], old["params/weights/q.weight"][0])


def test_spans_of_weights_that_do_not_lie_side_by_side() -> None:
    weights = Packed.of(begin()["params"]["weights"], 1)
    critic, actor = groups()
    assert spans(critic, weights) == [(0, D), (2 * D, 2 * D + 1)] and spans(actor, weights) == [(D, 2 * D)]
    parts = [(spans(group, weights), entries(weights.flat, spans(group, weights)) + 1) for group in (critic, actor)]
    assert torch.equal(with_entries(weights.flat, parts), weights.flat + 1)
    assert torch.equal(with_entries(weights.flat, parts[1:])[..., :D], weights.flat[..., :D])


@pytest.mark.parametrize("prefixes", [("q.",), ("q.", "q.", "actor.", "other.")])
def test_groups_that_do_not_split_the_weights_are_refused(prefixes: tuple[str, ...]) -> None:
    made = [Group(str(i), (prefix,), None, optim.sgd(0.1)) for i, prefix in enumerate(prefixes)]
    with pytest.raises(SettingError, match="group"):
        check_partition(made, ["q.weight", "actor.weight"])
