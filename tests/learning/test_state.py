"""States are paired by name: in whatever order their dictionaries were filled, a run ends in the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.state import put, select, take
from rlmeta.learning.step import step
from rlmeta.lifelong import EWC, Method
from rlmeta.runs.experiment import Budget
from rlmeta.runs.run import match_checkpoint
from tests.learning.toy import LinearRegression, data
from tests.lifelong.toy import learner, points


def turned(state: Any) -> Any:
    """The same tree, every dictionary filled from its end."""
    if isinstance(state, dict):
        return {name: turned(value) for name, value in reversed(state.items())}
    return state


def equal(one: Any, other: Any) -> bool:
    return all(tree.flatten(tree.map(torch.equal, one, other)).values())


STATE = {"a": torch.arange(6.0).reshape(3, 2), "b": {"c": torch.arange(3), "d": torch.arange(3.0)}}


def test_learners_are_put_and_selected_by_name() -> None:
    part = tree.map(lambda leaf: leaf + 10, take(STATE, [1]))
    assert equal(put(STATE, [0], turned(part)), put(STATE, [0], part))
    where = torch.tensor([True, False, True])
    other = tree.map(lambda leaf: leaf + 10, STATE)
    assert equal(select(where, STATE, turned(other)), select(where, STATE, other))
    with pytest.raises(SettingError, match="different names can't be paired: the second lacks b; the first lacks e"):
        select(where, STATE, {"a": STATE["a"], "e": STATE["b"]})


def test_weights_are_packed_in_the_order_of_others() -> None:
    weights = {"z": torch.randn(2, 3), "a": torch.randn(2, 1, 2)}
    packed = Packed.of(weights, 1)
    again = Packed.like(turned(weights), packed, 1)
    assert torch.equal(again.flat, packed.flat) and list(again) == ["z", "a"]
    assert Packed.like(packed, turned(weights), 1).flat[:, :2].equal(weights["a"].flatten(1))
    assert Packed.like(packed, weights, 1) is packed


def test_a_step_does_not_depend_on_the_order_of_its_batch() -> None:
    keys, task, adam = random.make_keys([0, 1]), LinearRegression(), optim.adam(0.1)
    states = []
    for order in (dict, turned):
        state = task.init(keys, 3, adam)
        for number in range(3):
            state, _ = step(task, state, order(data(keys + number, 8, 3)), adam)
        states.append(state)
    assert equal(*states)


class Turned(Method):
    """Hands weights and buffers back in another order than it got them."""

    name = "turned"

    def params(self, learner: Any, p: Any, m: Any, task: Any) -> Any:
        return {**p, "weights": turned(dict(p["weights"]))}

    def phase_start(self, learner: Any, p: Any, m: Any, task: Any, phase: str) -> Any:
        return turned({**p, "weights": dict(p["weights"])}), m

    def task_end(self, learner: Any, p: Any, m: Any, task: Any, draw: Any) -> Any:
        return turned({**p, "weights": dict(p["weights"])}), m


class Plain(Method):
    name = "turned"


@pytest.mark.parametrize(
    "methods", [lambda first: (first,), lambda first: (first, EWC()), lambda first: (EWC(), first)]
)
def test_what_hooks_hand_back_is_paired_by_name(methods: Any) -> None:
    ends = [
        rl.train(learner(), points(2), steps=80, seeds=2, lifelong=methods(method)).state
        for method in (Plain(), Turned())
    ]
    assert equal(ends[0]["params"], ends[1]["params"]) and equal(ends[0]["optimizer"], ends[1]["optimizer"])


class Two(nn.Module):
    """Two layers whose names are not in the order of the alphabet, registered in one order or the other."""

    def __init__(self, features: int, turned: bool) -> None:
        super().__init__()
        layers = {"second": nn.Linear(8, 6), "first": nn.Linear(features, 8)}
        for name in sorted(layers) if turned else layers:
            self.add_module(name, layers[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_checkpoint_is_loaded_by_name(tmp_path: Path) -> None:
    def network(turned: bool) -> Any:
        return lambda space: Two(space.shape[0], turned)

    budget = Budget(steps=256, final_episodes=2, eval_every=10**6)
    whole = rl.train(
        rl.DQN(network=network(False), learning_starts=64, gradient_steps=1), "CartPole-v1", seeds=2, budget=budget
    )

    def stop(run: Any, line: dict[str, Any]) -> bool:
        return bool(line["env_steps"] >= 128)

    agent = rl.DQN(network=network(False), learning_starts=64, gradient_steps=1)
    rl.train(agent, "CartPole-v1", seeds=2, budget=budget, out=tmp_path / "run", callbacks=[stop])
    for again in (False, True):
        resumed = rl.load(tmp_path / "run", network=network(again))
        assert equal(
            resumed.state["params"]["weights"],
            rl.load(tmp_path / "run", network=network(False)).state["params"]["weights"],
        )
    ended = rl.resume(tmp_path / "run", network=network(True))
    assert equal(ended.state["params"], whole.state["params"]) and equal(
        ended.state["optimizer"], whole.state["optimizer"]
    )


def test_a_saved_state_fits_by_name() -> None:
    run = rl.train(rl.PPO(num_steps=32), "FrozenLake-v1", seeds=2, budget=Budget(steps=256, final_episodes=2))
    assert equal(match_checkpoint(turned(run.state), run.state, "here"), run.state)
