"""The programs in agents/, each a whole algorithm on a page: they do the package's maths, and they learn.

Those of reinforcement learning hold the algorithm themselves, so from the same weights, data and keys their parameters
are the package's to the last digits of float64; the others are `rl.train` bit for bit.
"""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import tyro

import rlmeta as rl
from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning import off_policy, replay
from rlmeta.learning.collect import collect
from rlmeta.learning.settings import per_learner_names
from rlmeta.nn import Context, Encoder, pictures
from rlmeta.nn.pictures import Picture
from rlmeta.runs.shipped import AGENTS

PROGRAMS = Path(__file__).parents[2] / "agents"
ON_POLICY, OFF_POLICY = ("ppo", "a2c", "reinforce", "impala", "trpo"), ("dqn", "rainbow", "sac", "td3", "ddpg")
VALUES = ("dqn", "rainbow")
"""Those that learn the values of actions alone."""
LEARNERS = 3
SMALLER = {"hidden_sizes": (16, 16), "num_envs": 3, "max_grad_norm": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "ppo": {**SMALLER, "num_steps": 16, "num_epochs": 2, "batch_size": 12, "entropy_coefficient": 0.02}
    | {"learning_rate": 3e-3, "clip_range": 0.02},
    "a2c": {**SMALLER, "num_steps": 9, "gae_lambda": 0.9, "entropy_coefficient": 0.02},
    "reinforce": {**SMALLER, "num_steps": 20, "entropy_coefficient": 0.02},
    "dqn": {**SMALLER, "num_steps": 12, "capacity": 600, "learning_starts": 40, "gradient_steps": 5, "batch_size": 20}
    | {"huber_delta": 0.3, "target_every": 2, "target_rate": 0.3, "average_rate": 0.2},
    "sac": {"hidden_sizes": (16, 16), "num_envs": 3, "num_steps": 12, "capacity": 600, "learning_starts": 40}
    | {
        "gradient_steps": 4,
        "batch_size": 20,
        "initial_temperature": math.exp(-0.5),
        "target_entropy": -0.7,
        "critics": 3,
    }
    | {"actor_learning_rate": 2e-3, "critic_learning_rate": 3e-3, "temperature_learning_rate": 4e-3},
    "td3": {"hidden_sizes": (16, 16), "num_envs": 3, "num_steps": 12, "capacity": 600, "learning_starts": 40}
    | {"gradient_steps": 6, "policy_delay": 3, "batch_size": 20, "critics": 3, "exploration_noise": 0.5}
    | {
        "target_noise": 0.25,
        "target_noise_clip": 0.125,
        "actor_learning_rate": 2e-3,
        "critic_learning_rate": 3e-3,
        "target_rate": 0.1,
    },
}
CHANGES["ddpg"] = {"hidden_sizes": (16, 16), "num_envs": 3, "num_steps": 12, "capacity": 600, "learning_starts": 40} | {
    "gradient_steps": 6,
    "batch_size": 20,
    "exploration_noise": 0.5,
    "actor_learning_rate": 2e-3,
    "critic_learning_rate": 3e-3,
    "target_rate": 0.1,
}
CHANGES["impala"] = {**SMALLER, "num_steps": 9, "num_epochs": 2, "sequences": 1, "entropy_coefficient": 0.02} | {
    "learning_rate": 3e-3,
    "rho_clip": 1.2,
    "c_clip": 0.9,
    "trace_lambda": 0.95,
}
CHANGES["trpo"] = {"hidden_sizes": (16, 16), "num_envs": 3, "num_steps": 16, "value_epochs": 2, "batch_size": 12} | {
    "kl_target": 0.02,
    "damping": 0.05,
    "conjugate_steps": 6,
    "line_search_steps": 4,
    "line_search_shrink": 0.6,
    "noise_hold": 3,
}
CHANGES["rainbow"] = {"num_envs": 3, "num_steps": 12, "capacity": 600, "learning_starts": 40, "gradient_steps": 5} | {
    "batch_size": 20,
    "max_grad_norm": 0.1,
    "target_every": 2,
    "atoms": 9,
    "v_max": 4.0,
    "head_sizes": (8,),
    "priority_exponent": 0.75,
    "importance_exponent": 0.25,
}
"""Settings that tell every part of an algorithm from its default. Random numbers of float32
are multiplied by powers of two, so that products are the same in float64; the first iteration's 36 transitions are too
few to learn from."""
TASKS = {**dict.fromkeys(OFF_POLICY, "Pendulum-v1"), **dict.fromkeys((*ON_POLICY, "dqn"), "CartPole-v1")}
TASKS |= {"trpo": "Pendulum-v1", "rainbow": "MinAtar/Breakout-v1"}


@pytest.fixture
def in_float64(monkeypatch):
    """Whatever has no type of its own is float64, observations too."""
    monkeypatch.setattr("rlmeta.agents.networks.Encoder", partial(Encoder, dtype=torch.float64))
    network, scaled = pictures._encoder, Picture.run
    monkeypatch.setattr(pictures, "_encoder", lambda *parts: network(*parts).double())
    monkeypatch.setattr(Picture, "run", lambda self, params, x, *rest: scaled(self, params, x.double(), *rest))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def settings_of(program: ModuleType, name: str) -> dict[str, Any]:
    """A program's constants that are settings of the package's agent, by the names that those have."""
    known = [field.name for field in fields(rl.preset(name, TASKS[name]))]
    return {setting: getattr(program, setting.upper()) for setting in known if hasattr(program, setting.upper())}


def programs_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the package's networks under the names that they have in the programs."""
    shorter = [("member.joint.", "member.0."), ("member.head.", "member.1."), ("body.", ""), ("head.", "2.")]
    encoded, layered = (any(f".body.{place}." in name for name in tensors) for place in (0, 1))
    if encoded and not layered:  # an encoder of pictures, which has weights, and no layers after it
        shorter = [("body.", "0."), ("head.", "1.")]
    if any(name.startswith("q.joint.") for name in tensors):  # a critic alone
        shorter = [("q.joint.", "q.0."), ("q.head.", "q.1."), *shorter]
    named = {}
    for name, tensor in tensors.items():
        for long, short in shorter:
            name = name.replace(long, short)
        named[name] = tensor
    return named


def by_network(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`{"q.linear.weight": ...}` as `{"q": {"linear.weight": ...}}`."""
    networks: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        network, own = name.split(".", 1)
        networks.setdefault(network, {})[own] = tensor
    return networks


def flat(networks: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The inverse of `by_network`."""
    return {f"{network}.{part}": tensor for network, own in networks.items() for part, tensor in own.items()}


def both(name: str, task: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A program and the package's agent with the same settings, weights, keys and worlds, in float64."""
    program = load(name)
    monkeypatch.setattr(program, "Encoder", partial(Encoder, dtype=torch.float64), raising=False)
    for setting, value in CHANGES[name].items():
        if hasattr(program, setting.upper()):
            monkeypatch.setattr(program, setting.upper(), value)
    if name == "rainbow":
        monkeypatch.setattr(program, "SOURCE", program.SOURCE._replace(batch_size=program.BATCH_SIZE))
        # a layer's noise depends on its name, which is another in the program
        drawn = SimpleNamespace(
            normal=lambda key, name, *rest: random.normal(key, name.partition("streams.")[2], *rest)
        )
        monkeypatch.setattr("rlmeta.nn.noisy.random", drawn)
    settings = replace(rl.preset(name, TASKS[name]), **{**CHANGES[name], **settings_of(program, name)})
    world = rl.task(task).world((LEARNERS,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    hyper = {h: torch.full((LEARNERS,), float(getattr(settings, h))) for h in per_learner_names(type(settings))}
    key = random.make_keys(range(LEARNERS))
    state = agent.init(key, hyper, world)
    p = state["params"]
    double = partial(tree.map, lambda x: x.double() if x.is_floating_point() else x)
    p["weights"], p["buffers"] = Packed.of(double(dict(p["weights"])), 1), double(p["buffers"])
    state["optimizer"] = double(state["optimizer"])
    weights = tree.map(torch.clone, programs_names({**p["weights"], **p["buffers"]}))
    return SimpleNamespace(
        program=program, settings=settings, agent=agent, world=world, key=key, state=state, weights=weights
    )


def eventful(rollout: dict[str, Any], number: int) -> dict[str, Any]:
    """A rollout `[S, T, N, ...]` in which episodes end, are cut, and steps were none."""
    del rollout["first_memory"]
    generator = torch.Generator().manual_seed(number)
    drawn = torch.rand((3, *rollout["reward"].shape), generator=generator)
    return {**rollout, "terminated": drawn[0] < 0.1, "truncated": drawn[1] < 0.1, "valid": drawn[2] > 0.1}


def assert_same_rollout(mine: dict[str, Any], packages: dict[str, Any]) -> None:
    for name in ("observation", "next_observation", "action", "reward", "terminated", "truncated", "valid"):
        torch.testing.assert_close(mine[name], packages[name], rtol=0, atol=1e-6, check_dtype=False, msg=name)


def assert_same_weights(mine: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    packages = programs_names({**state["params"]["weights"], **state["params"]["buffers"]})
    assert mine.keys() == packages.keys()
    for name, weight in mine.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, packages[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name in ON_POLICY
        for task in ("CartPole-v1", "Pendulum-v1")
        if (name, task) != ("trpo", "CartPole-v1")
    ],
)
def test_updates_from_rollouts_are_the_packages(name, task, in_float64, monkeypatch):
    x = both(name, task, monkeypatch)
    program, state, weights, first = x.program, x.state, x.weights, x.weights
    trained = {part: w for part, w in weights.items() if name != "trpo" or part.startswith("value.")}
    networks, moments = program.make_networks(x.world), program.optim.adam().init(trained, (LEARNERS,))
    if name == "a2c":
        moments = program.optim.rmsprop().init(weights, (LEARNERS,))
    world_state = x.world.reset(random.fold(x.key, "world"))
    for i in range(3):
        state["progress"] = torch.full_like(state["progress"], i / 3)
        state, rollout = collect(x.agent, state, x.world, x.settings.num_steps)
        world_state, mine = program.act(networks, weights, x.world, world_state, x.key, i * x.settings.num_steps)
        assert_same_rollout(mine, rollout)
        rollout = eventful(rollout, i)
        state, _ = x.agent.update(state, rollout, {"task": rollout["reward"]})
        state = x.agent.end_iteration(state, rollout)
        numbers = {"ppo": (x.key, i, i / 3), "impala": (x.key, i, i / 3), "trpo": (x.key, i)}.get(name, (i / 3,))
        weights, moments = program.update(networks, weights, moments, rollout, *numbers)
    assert_same_weights(weights, state)
    assert all(bool((weights[part] != first[part]).reshape(LEARNERS, -1).any(1).all()) for part in weights)


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "impala", "dqn"])
def test_pictures_pass_the_networks_of_the_package(name: str) -> None:
    program = load(name)
    settings = replace(rl.preset(name, "CartPole-v1"), hidden_sizes=program.HIDDEN_SIZES)
    world = rl.task("Catch-v0").world((2,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    hyper = {h: torch.ones(2) for h in per_learner_names(type(settings))}
    weights = by_network(programs_names(agent.init(random.make_keys(range(2)), hyper, world)["params"]["weights"]))
    networks = {"q": program.make_network(world)} if name == "dqn" else program.make_networks(world)
    observation = world.observation(world.reset(random.make_keys(range(2))))
    for network in set(networks) - {"head"}:
        own, package = networks[network], weights[network]
        assert own.state_dict().keys() == package.keys()
        assert max(weight.dim() for weight in package.values()) == 5  # of a convolution, with a learner axis
        output = own.run(package, observation, Context())
        assert next(tree.leaves(output)).shape[:2] == (2, settings.num_envs)


@pytest.mark.parametrize(
    ("name", "task"),
    [("dqn", "CartPole-v1"), ("dqn", "Acrobot-v1"), ("rainbow", "MinAtar/Breakout-v1")]
    + [(name, task) for name in ("sac", "td3", "ddpg") for task in ("Pendulum-v1", "Navigation-v0")],
)
def test_updates_from_memory_are_the_packages(name, task, in_float64, monkeypatch):
    x = both(name, task, monkeypatch)
    program, s, state, weights = x.program, x.settings, x.state, by_network(x.weights)
    networks = program.make_network(x.world) if name in VALUES else program.make_networks(x.world)
    trained = {network: own for network, own in weights.items() if network in ("policy", "q", "temperature")}
    moments = {network: program.optim.adam().init(own, (LEARNERS,)) for network, own in trained.items()}
    moments = moments["q"] if name in VALUES else moments
    world_state = x.world.reset(random.fold(x.key, "world"))
    memory = replay.init(x.world, world_state, program.CAPACITY // s.num_envs, prioritised=name == "rainbow")
    for i in range(4):
        state["progress"] = torch.full_like(state["progress"], i / 12)
        h, warm = state["params"]["hyper"], i * s.num_steps * s.num_envs < s.learning_starts
        if name in VALUES:
            later = program.epsilon(i / 12) if name == "dqn" else 0.0
            h["epsilon"], explore = x.agent.epsilon(state), 1.0 if warm else later
        else:
            h["warms_up"], explore = off_policy.warms_up(x.agent, state), warm
        state, rollout = collect(x.agent, state, x.world, s.num_steps)
        world_state, mine = program.act(networks, weights, x.world, world_state, x.key, i * s.num_steps, explore)
        assert_same_rollout(mine, rollout)
        rollout = eventful(rollout, i)
        state, _ = x.agent.update(state, rollout, {"task": rollout["reward"]})
        state = x.agent.end_iteration(state, rollout)
        memory = replay.insert(memory, rollout, rollout["reward"], learner_axes=1)
        if not i:
            continue
        given = (networks, weights, moments, memory, x.key, (i - 1) * s.gradient_steps)
        if name == "rainbow":
            weights, moments, memory = program.update(*given, i / 12)
        else:
            weights, moments = program.update(*given)
    after = flat(weights)
    assert state["count"]["gradient_steps"].tolist() == [3 * s.gradient_steps] * LEARNERS
    assert_same_weights(after, state)
    assert all(bool((after[part] != x.weights[part]).reshape(LEARNERS, -1).any(1).all()) for part in after)


@pytest.mark.parametrize("name", ON_POLICY + OFF_POLICY)
def test_a_whole_run_is_the_packages(name, in_float64, monkeypatch):
    """From the same initial weights: acting, memory, warm-up, schedules and counters of the loop are the same, too."""
    x = both(name, TASKS[name], monkeypatch)
    networks = by_network(x.weights)
    initial = iter([x.weights] if name in ON_POLICY else [networks[n] for n in ("policy", "q") if n in networks])
    monkeypatch.setattr(x.program, "stack", lambda make, key: next(initial))
    state, iterations, a_step = x.state, 5, x.settings.num_envs * x.settings.num_steps
    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        state, _ = x.agent.iterate(state, x.world)
    _, weights = x.program.train(TASKS[name], LEARNERS, iterations * a_step - 1)
    assert int(state["count"]["gradient_steps"].min()) > 0
    assert_same_weights(weights if name in ON_POLICY else flat(weights), state)


@pytest.mark.parametrize("name", ON_POLICY + OFF_POLICY)
def test_evaluations_are_the_packages(name, in_float64, monkeypatch):
    x = both(name, TASKS[name], monkeypatch)
    p, key = x.state["params"], random.make_keys(range(100, 100 + LEARNERS))
    p["buffers"] = {part: -copy for part, copy in p["buffers"].items()}  # so that copies differ from what they follow
    weights = programs_names({**p["weights"], **p["buffers"]})
    networks = x.program.make_network(x.world) if name in VALUES else x.program.make_networks(x.world)
    world = rl.task(TASKS[name]).world((LEARNERS,), 5)
    mine = x.program.evaluate(networks, weights if name in ON_POLICY else by_network(weights), world, key)
    packages = x.agent.evaluate(p, world, key, 5).returns.mean(-1)
    torch.testing.assert_close(mine.double(), packages, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ON_POLICY + OFF_POLICY)
def test_programs_begin_as_the_packages_agent_does(name, monkeypatch):
    """With its settings for the task, and weights of the same spread."""
    program, settings = load(name), rl.preset(name, TASKS[name])
    constants = settings_of(program, name)
    assert constants.items() <= {field.name: getattr(settings, field.name) for field in fields(settings)}.items()
    assert len(constants) >= 8
    if name in OFF_POLICY:  # of 64 seeds, whose memories stay empty
        monkeypatch.setattr(program, "CAPACITY", 8_000)
        settings = replace(settings, capacity=8_000)
    _, weights = program.train(TASKS[name], seeds=64, steps=0)
    weights = weights if name in ON_POLICY else flat(weights)
    world = rl.task(TASKS[name]).world((64,), 1)
    hyper = {h: torch.full((64,), float(getattr(settings, h))) for h in per_learner_names(type(settings))}
    agent = settings.bind(world.observation_space, world.action_space)
    p = agent.init(random.make_keys(range(64)), hyper, world)["params"]
    packages = programs_names({**p["weights"], **p["buffers"]})
    assert weights.keys() == packages.keys()
    for part, weight in weights.items():
        assert weight.shape == packages[part].shape, part
        torch.testing.assert_close(weight.std(), packages[part].std(), rtol=0.3, atol=1e-6, msg=part)
        torch.testing.assert_close(weight.mean(), packages[part].mean(), rtol=0.01, atol=0.1, msg=part)
        if name in OFF_POLICY and part.startswith(("target", "average")):
            source = {"target_policy": "policy", "average": "q"}.get(part.split(".")[0], "q")
            assert torch.equal(weight, weights[f"{source}.{part.split('.', 1)[1]}"]), part


LIGHTER = {"LEARNING_STARTS": 200, "BATCH_SIZE": 64, "GRADIENT_STEPS": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "steps", "changes", "bar"),
    [
        ("ppo", "CartPole-v1", 8_000, {}, 110.0),  # untrained about 50, falling at once 9
        ("a2c", "CartPole-v1", 20_000, {}, 110.0),
        ("reinforce", "CartPole-v1", 40_000, {}, 110.0),
        ("impala", "CartPole-v1", 16_000, {}, 110.0),
        ("trpo", "Navigation-v0", 8_000, {"NUM_STEPS": 128}, -30.0),
        ("dqn", "CartPole-v1", 4_000, {"LEARNING_STARTS": 500, "GRADIENT_STEPS": 8}, 40.0),  # at random about 22
        ("sac", "Navigation-v0", 1_200, LIGHTER, -30.0),  # who stays where he is gets -42
        ("td3", "Navigation-v0", 1_200, LIGHTER, -30.0),
        ("ddpg", "Navigation-v0", 1_200, LIGHTER, -30.0),
    ],
)
def test_programs_learn(name, task, steps, changes, bar, monkeypatch):
    program = load(name)
    for constant, value in changes.items():
        monkeypatch.setattr(program, constant, value)
    world, key = rl.task(task).world((4,), 16), random.make_keys(range(100, 104))
    before = program.evaluate(*program.train(task, seeds=4, steps=0), world, key)
    after = program.evaluate(*program.train(task, seeds=4, steps=steps), world, key)
    assert before.mean() < bar, before
    assert after.mean() > bar, after


@pytest.mark.parametrize("name", ON_POLICY + OFF_POLICY)
def test_the_command_that_a_program_names_runs(name, capsys):
    program = load(name)
    (command,) = re.findall(rf"^python agents/{name}.py (.*)$", program.__doc__, re.M)
    short = re.sub(r"--steps \S+", "--steps 100", re.sub(r"--seeds \S+", "--seeds 2", command))
    assert short != command
    tyro.cli(program.main, args=short.split())
    (printed,) = re.findall(r"tensor\(\[(.*)\]\)", capsys.readouterr().out)
    assert len(printed.split(",")) == 2


@pytest.mark.parametrize("name", ON_POLICY + OFF_POLICY)
def test_a_program_holds_its_algorithm_on_a_page(name):
    text = (PROGRAMS / f"{name}.py").read_text()
    assert 80 <= len(text.splitlines()) <= 150
    assert "rlmeta.agents" not in text and "preset(" not in text and ".bind(" not in text


def load(name):
    spec = importlib.util.spec_from_file_location(f"program_{name}", PROGRAMS / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_every_agent_has_a_short_program_and_settings():
    others = {"regressor", "protonet", "meta_sgd", "ppg"}  # one serves meta-learners, the others are no core
    others |= {"cql", "decision_transformer"}
    for name in AGENTS.keys() - others:
        assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 150
        assert (PROGRAMS / f"{name}.toml").is_file()


@pytest.mark.parametrize(
    "path", sorted(set(PROGRAMS.glob("*.py")) - {PROGRAMS / "my_agent.py"}), ids=lambda path: path.stem
)
def test_the_command_that_a_program_names_is_one_of_its(path):
    program = load(path.stem)
    (command,) = re.findall(r"^python agents/(\S+) ?(.*)$", program.__doc__, re.M)
    assert command[0] == path.name
    tyro.extras.get_parser(program.main).parse_args(command[1].split())
