"""A run neither obeys what is global in its process nor moves it: default type, device and modes, generators."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rlmeta as rl
from rlmeta.functional import tree
from rlmeta.nn import stack
from rlmeta.runs.surroundings import undisturbed
from tests.lifelong.toy import learner, points


def generators() -> tuple[Any, ...]:
    name, numbers, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, numbers.tolist(), rest, random.getstate()


@contextmanager
def disturbed() -> Iterator[None]:
    """Everything global set to what no run expects; what a run moves is found at the end."""
    before = torch.get_default_dtype()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    drawn = generators()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            yield
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert generators() == drawn


def budget(steps: int) -> rl.Budget:
    return rl.Budget(steps=steps, final_episodes=2, eval_episodes=2, eval_every=max(1, steps // 2))


@cache
def shown(task: str) -> Any:
    return rl.record(rl.train(rl.A2C(), task, budget=budget(80)), episodes=1)


def body(space: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(space.shape[0], 8), nn.LayerNorm(8), nn.Tanh())


def dropout(space: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(space.shape[0], 8), nn.Dropout(0.2), nn.Tanh())


def draws(space: Any) -> nn.Module:
    """A factory that moves every generator itself."""
    np.random.rand()
    random.random()
    torch.manual_seed(3)
    return body(space)


def own_network(space: Any) -> nn.Module:
    return body(space)


RUNS: dict[str, Callable[[], Any]] = {
    "ppo": lambda: rl.train(rl.PPO(num_steps=32, hidden_sizes=(8,)), "CartPole-v1", seeds=2, budget=budget(512)),
    "gymnasium": lambda: rl.train(rl.A2C(), rl.task("CartPole-v1", native=False), budget=budget(80)),
    "dqn": lambda: rl.train(
        rl.DQN(learning_starts=32, gradient_steps=1, network=own_network), "CartPole-v1", budget=budget(128)
    ),
    "stream": lambda: rl.train(learner(network=dropout), points(2), seeds=2, steps=80, lifelong=[rl.EWC()]),
    "agents in a stream": lambda: rl.train(
        rl.A2C(hidden_sizes=(8,)), "cartpole-conflicts", budget=budget(80), lifelong=[rl.PackNet()]
    ),
    "maml": lambda: rl.train(rl.MAML(), "sinusoid", budget=budget(64)),
    "learned optimizer": lambda: rl.train(rl.LearnedOptimizer(), "quadratics", budget=budget(64)),
    "cloning": lambda: rl.train(
        rl.BehaviourCloning(demonstrations=shown("CartPole-v1")), "CartPole-v1", budget=budget(64)
    ),
    "gail": lambda: rl.train(
        rl.GAIL(demonstrations=shown("CartPole-fixed"), num_steps=32), "CartPole-fixed", budget=budget(256)
    ),
    "irl": lambda: rl.train(rl.IRL(demonstrations=shown("GridWorld-v0")), "GridWorld-v0", budget=budget(4)),
    "rewards": lambda: rl.train(rl.A2C(rewards=(rl.EpisodicCounts(),)), "CartPole-v1", budget=budget(80)),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_the_same_whatever_is_global_and_leaves_it_alone(kind: str) -> None:
    before = generators()
    plain = RUNS[kind]()
    assert generators() == before
    with disturbed():
        moved = RUNS[kind]()
    assert all(tree.flatten(tree.map(torch.equal, plain.state, moved.state)).values())
    assert torch.equal(plain.scores, moved.scores)


def test_what_follows_a_run_leaves_it_alone_too(tmp_path: Path) -> None:
    def stop(run: Any, line: dict[str, Any]) -> bool:
        torch.rand(1)  # a callback's own draws are put back, too
        return True

    agent = rl.A2C(network=draws)
    whole = rl.train(agent, "CartPole-v1", budget=budget(160), seeds=2)
    rl.train(agent, "CartPole-v1", budget=budget(160), seeds=2, out=tmp_path / "run", callbacks=[stop])
    with disturbed():
        rl.load(tmp_path / "run", network=draws)
        resumed = rl.resume(tmp_path / "run", network=draws)
        found = resumed.evaluate(3)
        action = resumed.act(np.zeros(4, np.float32), learner=0)
        demonstrations = rl.record(resumed, episodes=1, learner=0)
    assert torch.equal(resumed.scores, whole.scores) and torch.equal(found.returns, whole.evaluate(3).returns)
    assert action == whole.act(np.zeros(4, np.float32), learner=0)
    assert demonstrations.digest == rl.record(whole, episodes=1, learner=0).digest


def test_all_is_put_back_after_an_error() -> None:
    with disturbed(), pytest.raises(ZeroDivisionError), undisturbed():
        assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        torch.rand(1), np.random.rand(), random.random()
        raise ZeroDivisionError


def test_importing_moves_no_generator() -> None:
    code = "import random; random.seed(0); a = random.getstate(); import rlmeta as rl; rl.train, rl.PPO, rl.record"
    subprocess.run([sys.executable, "-c", f"{code}; assert random.getstate() == a"], check=True)


def test_a_run_that_ends_in_another_thread_does_not_reseed_networks_that_are_being_built() -> None:
    building, ended = threading.Event(), threading.Event()

    def network() -> torch.nn.Module:
        first = torch.nn.Linear(3, 3)
        building.set()
        ended.wait(0.3)
        return torch.nn.Sequential(first, torch.nn.Linear(3, 3))

    def other() -> None:
        with undisturbed():
            building.wait()
        ended.set()

    seeds = torch.tensor([1])
    thread = threading.Thread(target=other)
    ended.set()
    expected = stack(network, seeds)
    building.clear(), ended.clear()
    thread.start()
    found = stack(network, seeds)
    thread.join()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
