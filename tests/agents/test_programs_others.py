"""The programs in agents/ that meta-learn, learn along a stream, imitate or shape: the package's numbers, in sight.

From the same initial weights, batches and keys three updates of a program end, in float64, where the package's end.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro

import rlmeta as rl
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.minimisation import Quadratics
from rlmeta.functional import optim, random, tabular, tree
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.minibatch import flatten_time, minibatches
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step
from rlmeta.nn import Encoder
from rlmeta.runs.record import joined, play

PROGRAMS = Path(__file__).parents[2] / "agents"
OTHERS = (
    "maml",
    "ewc",
    "gem",
    "packnet",
    "learned_optimizer",
    "gail",
    "irl",
    "behaviour_cloning",
    "reward_shaping",
    "classifier",
)
S = 2  # learners
KEYS = random.make_keys(range(S))


def load(name):
    spec = importlib.util.spec_from_file_location(f"program_{name}", PROGRAMS / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.fixture
def double(monkeypatch):
    """Encoders give float64."""
    monkeypatch.setattr(Encoder.__init__, "__defaults__", (torch.float64,))


def doubled(part):
    return tree.map(lambda x: x.double() if x.is_floating_point() else x, part)


def bound(settings, world, methods=(), tasks=1):
    """The package's learner of these settings, and its state in float64."""
    learner = settings.bind(world.observation_space, world.action_space, methods)
    learner.capture, learner.num_tasks = None, tasks
    if hasattr(learner, "inner"):
        learner.inner.capture = None
    state = learner.init(KEYS, hyper_tensors([settings], S), world)
    state["params"], state["optimizer"] = doubled(state["params"]), doubled(state["optimizer"])
    state["methods"] = doubled(state["methods"])
    hyper = state["params"]["hyper"]
    of = {name: s for s in (getattr(learner, "inner_settings", settings), settings) for name in hyper if hasattr(s, name)}
    state["params"]["hyper"] = {n: torch.full((S,), float(getattr(of[n], n)), dtype=torch.float64) for n in hyper}
    return learner, state


def renamed(weights, places):
    """The package's weights under a program's names; `places` goes from the program's prefixes to the package's."""
    found = {
        mine + name.removeprefix(theirs): weight
        for mine, theirs in places.items()
        for name, weight in weights.items()
        if name.startswith(theirs)
    }
    assert len(found) == len(weights), list(weights)
    return found


def descend(learner, state, batch, **more):
    """One step of the package."""
    most = state["params"]["hyper"]["max_grad_norm"]
    return step(learner, state, batch, learner.optimizer(state), max_grad_norm=most, methods=learner.methods, **more)[0]


def assert_same(mine, weights, places, before=None):
    theirs = renamed(weights, places)
    torch.testing.assert_close({n: mine[n] for n in theirs}, dict(theirs), rtol=0, atol=1e-9)
    if before is not None:
        assert all(not torch.equal(theirs[name], before[name]) for name in theirs)


# ---------------------------------------------------------------------- meta-learning

REGRESSOR = {"0.": "net.0.1.0.", "2.": "net.0.1.2.", "4.": "net.1."}


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_three_updates_of_maml_are_the_packages(inner_steps, double):
    program = load("maml")
    settings = replace(rl.preset("maml", "sinusoid"), inner_steps=inner_steps)
    learner, state = bound(settings, NamedFamily("sinusoid", program.FAMILY).world((S,), 25))
    s, weights = replace(program.SETTINGS, inner_steps=inner_steps), renamed(state["params"]["weights"], REGRESSOR)
    before, moments = weights, optim.adam().init(weights, (S,))
    for i in range(3):
        tasks = doubled(program.FAMILY.tasks(KEYS, i, s.tasks, "train"))
        state = descend(learner, state, tasks)
        weights, moments = program.update(weights, moments, tasks, s.meta_rate, s)
    assert_same(weights, state["params"]["weights"], REGRESSOR, before)


def test_maml_adapts_better_than_joint_training_can():
    """The best answer that does not adapt costs 3.01."""
    program = load("maml")
    errors = program.evaluate(program.train(seeds=2, steps=7_500), tasks=100, steps=1)
    assert (errors[:, 1] < 2.0).all() and (errors[:, 1] < errors[:, 0] - 1.0).all(), errors


@dataclass(frozen=True)
class DoubleQuadratics(Quadratics):
    """Quadratics in float64."""

    def tasks(self, key, counter, count, split):
        return doubled(super().tasks(key, counter, count, split))


def test_three_updates_of_the_learned_optimizer_are_the_packages():
    """Over the end of a problem's horizon, where another takes its place."""
    program = load("learned_optimizer")
    s = replace(program.SETTINGS, horizon=10, unroll=5, problems=4)
    settings = replace(rl.preset("learned_optimizer", "quadratics"), horizon=10, unroll=5, num_envs=4)
    family = DoubleQuadratics()
    world = NamedFamily("quadratics", family).world((S,), 4)
    learner, state = bound(settings, world)
    places = {"first.": "optimizer.cells.0.", "second.": "optimizer.cells.1.", "output.": "optimizer.output."}
    phi = before = renamed(state["params"]["weights"], places)
    moments, carry = optim.adam().init(phi, (S,)), program.begin(family.tasks(KEYS, 0, 4, "train"))
    carry["age"] = state["params"]["buffers"]["carry"]["age"].clone()
    settings_bound = torch.full((S,), s.max_grad_norm, dtype=torch.float64)
    assert torch.equal(state["params"]["hyper"]["max_grad_norm"], settings_bound)
    for i in range(3):
        state, _ = learner.iterate(state, world)
        carry = program.renew(carry, program.begin(family.tasks(KEYS, i, 4, "train")), s)
        phi, moments, carry = program.update(phi, moments, carry, s.meta_rate, s)
    assert_same(phi, state["params"]["weights"], places, before)
    torch.testing.assert_close(carry["x"], state["params"]["buffers"]["carry"]["weights"]["x"], rtol=0, atol=1e-9)


def test_the_learned_optimizer_learns_to_minimise():
    program = load("learned_optimizer")
    untrained = program.evaluate(program.train(seeds=2, steps=0), problems=32)
    trained = program.evaluate(program.train(seeds=2, steps=16_000), problems=32)
    assert (trained[:, -1] < 0.3 * trained[:, 0]).all() and (untrained[:, -1] > untrained[:, 0]).all(), (trained, untrained)


# ---------------------------------------------------------------------- along a stream

CLASSIFIER = {"1.0.": "net.0.1.0.", "1.2.": "net.0.1.2.", "1.4.": "net.1."}


def stream_of(scenario="task"):
    stream = rl.stream("split-digits", scenario=scenario)
    return stream.world((S,), 32), len(stream)


def turn(learner, state, world, task):
    """The package's learner at the start of a task, with fresh moments."""
    world.select(torch.full_like(KEYS, task))
    state = reset_optimizer(learner.begin_task(state, world, random.fold(KEYS, task)))
    state["task"] = {**state["task"], "index": torch.full_like(KEYS, task), "identity": torch.full_like(KEYS, task)}
    return state


def batches_of(world, state, count):
    """The next minibatches of the world, and the state after them."""
    found = []
    for _ in range(count):
        state["world"], batch = world.next_batch(state["world"])
        found.append(batch)
    return state, found


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_three_updates_of_the_classifier_are_the_packages(scenario, double):
    program, (world, tasks) = load("classifier"), stream_of(scenario)
    learner, state = bound(rl.preset("classifier", "split-digits"), world, tasks=tasks)
    weights = before = renamed(state["params"]["weights"], CLASSIFIER)
    net, born = program.network(world), world.born().expand(S, -1)
    for task in range(2):
        state, moments = turn(learner, state, world, task), optim.adam().init(weights, (S,))
        born = born | world.classes()
        state, batches = batches_of(world, state, 3)
        for batch in batches:
            state = descend(learner, state, batch)
            weights, moments = program.update(net, weights, moments, batch, born)
    assert_same(weights, state["params"]["weights"], CLASSIFIER, before)


def test_three_updates_of_ewc_are_the_packages(double):
    """In each of three tasks: the package sums its springs in closed form, the program one after another."""
    program, (world, tasks) = load("ewc"), stream_of()
    ewc = rl.EWC(program.SETTINGS.strength, samples=program.SETTINGS.samples)
    learner, state = bound(rl.preset("classifier", "split-digits"), world, (ewc,), tasks)
    weights = before = renamed(state["params"]["weights"], CLASSIFIER)
    net, springs = program.network(world), []
    for task in range(3):
        state, moments = turn(learner, state, world, task), optim.adam().init(weights, (S,))
        state, batches = batches_of(world, state, 3)
        for batch in batches:
            state = descend(learner, state, batch)
            weights, moments = program.update(net, weights, moments, batch, springs)
        samples = world.sample(KEYS, program.SETTINGS.samples)
        p, memory = state["params"], state["methods"]["ewc"]
        _, state["methods"]["ewc"] = ewc.task_end(learner, p, memory, state["task"], lambda n, samples=samples: samples)
        springs.append(program.spring(net, weights, samples))
    assert_same(weights, state["params"]["weights"], CLASSIFIER, before)
    assert (springs[0][0] > 0).any()


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_three_updates_of_gem_are_the_packages(margin, double):
    program, (world, tasks) = load("gem"), stream_of()
    s, gem = replace(program.SETTINGS, margin=margin), rl.GEM(program.SETTINGS.memory, margin=margin)
    learner, state = bound(rl.preset("classifier", "split-digits"), world, (gem,), tasks)
    weights = before = renamed(state["params"]["weights"], CLASSIFIER)
    net, memories, projected = program.network(world), [], False
    for task in range(3):
        state, moments = turn(learner, state, world, task), optim.adam().init(weights, (S,))
        state, batches = batches_of(world, state, 3)
        for batch in batches:
            state = descend(learner, state, batch)
            g = program.gradient(net, weights, batch)
            projected |= any((g * program.gradient(net, weights, m)).sum() < 0 for m in memories)
            weights, moments = program.update(net, weights, moments, batch, memories, s)
        samples = world.sample(KEYS, s.memory)
        p, memory = state["params"], state["methods"]["gem"]
        _, state["methods"]["gem"] = gem.task_end(learner, p, memory, state["task"], lambda n, samples=samples: samples)
        memories.append(samples)
    assert projected
    assert_same(weights, state["params"]["weights"], CLASSIFIER, before)


def test_three_updates_of_packnet_are_the_packages(double):
    """In both phases of three tasks, and what becomes of the weights between them."""
    program, (world, tasks) = load("packnet"), stream_of()
    packnet = rl.PackNet()
    learner, state = bound(rl.preset("classifier", "split-digits"), world, (packnet,), tasks)
    weights = renamed(state["params"]["weights"], CLASSIFIER)
    owner = {n: torch.zeros_like(w, dtype=torch.int64) for n, w in weights.items() if w.dim() > 2}
    net = program.network(world)

    def hook(call, *more):
        state["params"], state["methods"]["packnet"] = call(
            learner, state["params"], state["methods"]["packnet"], state["task"], *more
        )

    for task in range(3):
        state = turn(learner, state, world, task)
        hook(packnet.task_start)
        fresh = renamed(state["params"]["weights"], CLASSIFIER)  # drawn by the package
        weights = {n: torch.where(owner[n] == 0, fresh[n], w) if n in owner else w for n, w in weights.items()}
        for phase in ("train", "retrain"):
            hook(packnet.phase_start, phase)
            state, batches = batches_of(world, reset_optimizer(state), 3)
            for batch in batches:
                state = descend(learner, state, batch)
            wanted = 0 if phase == "train" else task + 1
            weights, useful = program.learn(net, weights, batches, {n: who == wanted for n, who in owner.items()})
            if phase == "train":
                weights, owner = program.prune(weights, owner, useful, task, tasks)
        hook(packnet.task_end, None)
        weights, owner = program.give_back(weights, owner, useful, task)
        assert_same(weights, state["params"]["weights"], CLASSIFIER)
    theirs = state["methods"]["packnet"]["owner"]
    mine = torch.cat([owner[n].flatten(1) if n in owner else torch.full_like(w, -1).long().flatten(1) for n, w in weights.items()], -1)
    assert torch.equal(mine, theirs.long()) and set(mine.unique().tolist()) == {-1, 0, 1, 2, 3}


def lost(accuracy):
    """How much worse the earlier tasks are at the end than when they were learned, mean over tasks `[seeds]`."""
    best = accuracy.diagonal(dim1=1, dim2=2)[:, :-1]
    return (best - accuracy[:, -1, :-1]).mean(-1)


def test_the_classifier_learns_each_task_and_forgets_the_others():
    accuracy = load("classifier").train("split-digits", "class", seeds=2, steps=1_600)["accuracy"]
    assert (accuracy.diagonal(dim1=1, dim2=2) > 0.9).all(), accuracy
    assert (lost(accuracy) > 0.8).all(), accuracy
    assert accuracy[:, 0, 1:].isnan().all()  # nobody could be right about classes that were not met


@pytest.mark.parametrize("name", ["ewc", "gem", "packnet"])
def test_a_lifelong_program_learns_every_task_and_forgets_less_than_fine_tuning(name):
    """Domain-incremental, where forgetting is plain: pairs of digits as one and the same two classes."""
    stream = partial(rl.stream, scenario="domain")
    program, plain = load(name), load("classifier")
    program.rl = type("rl", (), {"stream": staticmethod(stream)})
    found = program.train("split-digits", seeds=2, steps=1_600)["accuracy"]
    fine = plain.train("split-digits", "domain", seeds=2, steps=1_600)["accuracy"]
    print(name, lost(found), lost(fine), found[:, -1], found.diagonal(dim1=1, dim2=2))
    assert (lost(found) < 0.5 * lost(fine)).all()
