"""Learners beside one that goes wrong: bit for bit what they are without it, for every kind of learner and method."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import tree
from tests.envs.bad_environment import Bad

pytestmark = pytest.mark.slow

FINE = 5e-4
BAD = (1e30, 1e10, 1e3)
"""Rates that overflow in a step, in some, or only lead astray."""


class Case(NamedTuple):
    """What is trained with two rates, the first of which is always the same."""

    settings: Callable[[Any], Any]
    problem: Callable[[], Any]
    steps: int
    methods: Callable[[], list[Any]] = list


def _ppo(**settings: Any) -> Callable[[Any], Any]:
    small = {"num_envs": 4, "num_steps": 32, "batch_size": 64, "num_epochs": 4, **settings}
    return lambda rate: rl.PPO(learning_rate=rate, **small)


def _classifier(**settings: Any) -> Callable[[Any], Any]:
    return lambda rate: rl.Classifier(hidden_sizes=(20,), learning_rate=rate, **settings)


def _digits(scenario: Any) -> Callable[[], Any]:
    return lambda: rl.stream("split-digits", scenario=scenario)


def _demonstrations() -> rl.Demonstrations:
    return rl.record(rl.train(_ppo()(1e-3), "CartPole-v1", steps=128, threads=1), 10)


def _dqn(rate: Any) -> Any:
    return rl.DQN(learning_rate=rate, num_envs=8, num_steps=4, gradient_steps=8, batch_size=64, hidden_sizes=(32,))


def _gail(rate: Any) -> Any:
    return rl.GAIL(demonstrations=_demonstrations(), num_steps=128, batch_size=256, num_envs=8, learning_rate=rate)


def _maml(**settings: Any) -> Any:
    return rl.MAML(rl.Regressor(hidden_sizes=(20,)), **settings)


_STREAM = _ppo(num_epochs=2)
_SCALED = {
    "normalise_observation": True,
    "normalise_reward": True,
    "learning_rate_schedule": "constant",
}
_KL = {"stop_kl": 0.02, "share_network": True, "value_clip_range": 0.2}

CASES = {
    "ppo": Case(_ppo(), lambda: "CartPole-v1", 2048),
    "ppo, normalised": Case(_ppo(**_SCALED), lambda: "Pendulum-v1", 2048),
    "ppo, state-dependent": Case(_ppo(state_dependent_exploration=True), lambda: "Pendulum-v1", 2048),
    "ppo, stopped by divergence": Case(_ppo(**_KL), lambda: "CartPole-v1", 2048),
    "ppo, gymnasium": Case(_ppo(), lambda: rl.task("CartPole-v1", native=False), 2048),
    "a2c": Case(lambda rate: rl.A2C(learning_rate=rate), lambda: "CartPole-v1", 4096),
    "reinforce": Case(lambda rate: rl.REINFORCE(learning_rate=rate), lambda: "CartPole-v1", 8192),
    "dqn": Case(_dqn, lambda: "CartPole-v1", 6000),
    "gail": Case(_gail, lambda: "CartPole-v1", 4096),
    "bc": Case(
        lambda rate: rl.BehaviourCloning(demonstrations=_demonstrations(), learning_rate=rate),
        lambda: "CartPole-v1",
        300,
    ),
    "maml": Case(lambda rate: _maml(inner_steps=1, meta_rate=rate), lambda: "sinusoid", 1000),
    "maml, inner": Case(lambda rate: _maml(inner_steps=2, inner_rate=rate), lambda: "sinusoid", 1000),
    "maml, reinforce": Case(
        lambda rate: rl.MAML(rl.REINFORCE(num_steps=20, num_envs=4), num_envs=8, meta_rate=rate),
        lambda: "navigation-short",
        3000,
    ),
    "learned optimizer": Case(lambda rate: rl.LearnedOptimizer(meta_rate=rate), lambda: "quadratics", 6000),
    "no method": Case(_classifier(), _digits("class"), 640),
    "ewc": Case(_classifier(), _digits("class"), 640, lambda: [rl.EWC()]),
    "packnet": Case(_classifier(), _digits("task"), 640, lambda: [rl.PackNet()]),
    "gem": Case(_classifier(), _digits("task"), 640, lambda: [rl.GEM(memory=20)]),
    "replay": Case(_classifier(), _digits("class"), 640, lambda: [rl.Replay(size=50)]),
    "agem": Case(_classifier(), _digits("domain"), 640, lambda: [rl.AGEM(memory=20)]),
    "gem, ewc, sgd": Case(_classifier(optimizer="sgd"), _digits("task"), 640, lambda: [rl.GEM(memory=20), rl.EWC()]),
    "ppo, packnet": Case(_STREAM, lambda: "cartpole-conflicts", 512, lambda: [rl.PackNet()]),
    "ppo, ewc, replay": Case(_STREAM, lambda: "cartpole-conflicts", 512, lambda: [rl.EWC(), rl.Replay()]),
}


def train(case: Case, rates: list[float]) -> rl.Run:
    """Two seeds with each of the rates: learners 0 and 1 have the first."""
    budget = rl.Budget(steps=case.steps, final_episodes=8, eval_episodes=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rl.train(
            case.settings(rates), case.problem(), seeds=2, budget=budget, threads=1, lifelong=case.methods()
        )


def differences(one: rl.Run, other: rl.Run, learners: slice) -> list[str]:
    """What of the state and the final evaluation of these learners is not bit for bit the same."""
    a, b = tree.flatten(one.state), tree.flatten(other.state)
    found = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        x, y = a[name][learners].contiguous(), b[name][learners].contiguous()
        if x.shape != y.shape or x.numpy().tobytes() != y.numpy().tobytes():
            found.append(name)
    assert one.evaluation is not None and other.evaluation is not None
    if not torch.equal(one.evaluation.returns[learners], other.evaluation.returns[learners]):
        found.append("evaluation")
    return found


@pytest.mark.parametrize("name", CASES)
def test_learners_beside_one_with_a_bad_rate(name: str) -> None:
    case = CASES[name]
    alone = train(case, [1e-3, FINE])
    for bad in BAD:
        beside = train(case, [1e-3, bad])
        assert differences(alone, beside, slice(0, 2)) == [], bad
        assert bool(beside.state["active"][:2].all()), bad
        print(f"{name}, beside {bad:g}: equal; active {beside.state['active'].tolist()}")


AGENTS = {
    "ppo": (_ppo(num_envs=2, num_steps=20, batch_size=40, hidden_sizes=(8,)), 400),
    "ppo, normalised": (_ppo(num_envs=2, num_steps=20, batch_size=40, hidden_sizes=(8,), **_SCALED), 400),
    "a2c": (lambda rate: rl.A2C(learning_rate=rate, num_envs=2, hidden_sizes=(8,)), 400),
    "reinforce": (lambda rate: rl.REINFORCE(learning_rate=rate, num_envs=2, hidden_sizes=(8,)), 4000),
    "dqn": (lambda rate: rl.DQN(learning_rate=rate, num_envs=2, hidden_sizes=(8,), batch_size=8), 1200),
}


KINDS = ("NaN observation", "infinite observation", "NaN reward", "infinite reward", "huge reward")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AGENTS)
def test_learners_beside_one_in_a_bad_environment(name: str, kind: str) -> None:
    settings, steps = AGENTS[name]

    def run(kind: str) -> rl.Run:
        made = itertools.count()  # the first is only looked at, then there are two a learner to train in

        def make() -> Bad:
            return Bad(kind if next(made) == 3 else "fine")

        budget = rl.Budget(steps=steps, final_episodes=2, eval_episodes=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return rl.train(settings(1e-3), rl.task(make, name="bad"), seeds=[3, 5], budget=budget, threads=1)

    fine, spoilt = run("fine"), run(kind)
    assert differences(fine, spoilt, slice(0, 1)) == []
    assert bool(spoilt.state["active"][0])
    print(f"{name}, beside one with {kind}: equal; active {spoilt.state['active'].tolist()}")
