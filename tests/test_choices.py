"""A value that is none of a `Literal`'s is refused by every function and dataclass that declares one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta
import rlmeta as rl
from rlmeta import nn
from rlmeta.agents.networks import build_body
from rlmeta.compat import torch as plain
from rlmeta.data import samples, sets, splits
from rlmeta.envs import minimisation, names, regression, streams, task, task_families
from rlmeta.envs.gymnasium import rows, world
from rlmeta.envs.native.cartpole import CartPole
from rlmeta.errors import SettingError, require_choice
from rlmeta.functional import optim, random, schedules
from rlmeta.meta import adapt
from rlmeta.nn import feature_pictures, fisher

KEY = random.make_keys([0])[0]
BOX = gym.spaces.Box(-1, 1, (3,))
PICTURE = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
PIXELS = samples.Samples(torch.zeros(2, 4), torch.arange(2))
LABELLED = sets.Labelled(PIXELS, PIXELS, 2)
TASKS = tuple(splits.split(LABELLED, [[0], [1]], "task"))
WEIGHTS = {"w": torch.zeros(2, requires_grad=True)}
STREAM = {"kind": "stream", "tasks": ["CartPole-v1", "CartPole-v1"]}


def logits(p: Any, batch: Any, ctx: Any) -> Any:
    return batch * p["weights"]["w"]


CALLS: dict[str, Callable[[Any], Any]] = {
    "agents.networks.build_body activation": lambda x: build_body(None, BOX, (4,), x, "torch"),
    "agents.networks.build_body initialiser": lambda x: build_body(None, BOX, (4,), "tanh", x),
    "envs.task_families.task_keys split": lambda x: task_families.task_keys(KEY, 0, 2, x),
    "envs.regression.Sinusoid.tasks split": lambda x: regression.Sinusoid().tasks(KEY, 0, 2, x),
    "envs.minimisation.Quadratics.tasks split": lambda x: minimisation.Quadratics().tasks(KEY, 0, 2, x),
    "envs.minimisation.DigitMLPs.tasks split": lambda x: minimisation.DigitMLPs().tasks(KEY, 0, 2, x),
    "envs.task.TaskFamily.tasks split": lambda x: task.TaskFamily("f", CartPole(), {"length": (0.1, 0.2)}).tasks(
        KEY, 0, 2, x
    ),
    "envs.task.Task mode": lambda x: task.Task("t", "CartPole-v1", mode=x),
    "envs.task.task mode": lambda x: rl.task("CartPole-v1", mode=x),
    "envs.gymnasium.world.GymnasiumWorld mode": lambda x: world.GymnasiumWorld("CartPole-v1", (), 1, x),
    "envs.names.folders kind": names.folders,
    "envs.names.names kind": names.names,
    "envs.names.read_named kind": lambda x: names.read_named(x, "pole"),
    "envs.gymnasium.rows.with_mask source": lambda x: rows.with_mask(gym.make("CartPole-v1"), x),
    "envs.gymnasium.rows.ActionMaskObservation source": lambda x: rows.ActionMaskObservation(
        gym.make("CartPole-v1"), x
    ),
    "envs.streams.TaskStream scenario": lambda x: streams.TaskStream("s", TASKS, scenario=x),
    "envs.streams.TaskStream order": lambda x: streams.TaskStream("s", TASKS, order=x),
    "envs.streams.stream scenario": lambda x: rl.stream(list(TASKS), scenario=x),
    "envs.streams.stream order": lambda x: rl.stream(list(TASKS), order=x),
    "envs.streams.from_table scenario": lambda x: streams.from_table("s", STREAM, scenario=x),
    "envs.streams.from_table order": lambda x: streams.from_table("s", STREAM, order=x),
    "data.splits.split scenario": lambda x: splits.split(LABELLED, [[0], [1]], x),
    "data.samples.DataTask scenario": lambda x: rl.stream([dataclasses.replace(TASKS[0], scenario=x)]),
    "data.samples.DataWorld scenario": lambda x: samples.DataWorld(samples.DataTable(TASKS), (), 1, scenario=x),
    "compat.torch.information.fisher_information kind": lambda x: plain.fisher_information(
        torch.nn.Linear(2, 3), torch.ones(3, 2), kind=x
    ),
    "nn.fisher.categorical_fisher kind": lambda x: fisher.categorical_fisher(
        logits, {"weights": WEIGHTS}, torch.ones(3, 2), 0, x
    ),
    "meta.adapt.adapt order": lambda x: adapt.adapt(lambda w, _: w["w"].sum(), WEIGHTS, optim.sgd(0.1), 1, order=x),
    "meta.adapt.inner_gradient order": lambda x: adapt.inner_gradient(WEIGHTS["w"].sum(), WEIGHTS, x),
    "nn.heads.choose.head_for action_bounds": lambda x: nn.head_for(BOX, 3, action_bounds=x),
    "nn.heads.values.ValueHead initialiser": lambda x: nn.ValueHead(3, initialiser=x),
    "nn.heads.values.QHead initialiser": lambda x: nn.QHead(3, 2, initialiser=x),
    "nn.heads.streams.ActionStreams initialiser": lambda x: nn.ActionStreams(3, 2, initialiser=x),
    "nn.initialisers.initialise initialiser": lambda x: nn.initialisers.initialise(torch.zeros(2, 2), None, x),
    "nn.feature_pictures.feature_network activation": lambda x: feature_pictures.feature_network(
        PICTURE, (3,), 2, activation=x
    ),
    "nn.feature_pictures.FeaturePictures initialiser": lambda x: feature_pictures.FeaturePictures(
        PICTURE, initialiser=x
    ),
    "nn.linear.activation_function activation": nn.linear.activation_function,
    "nn.linear.Activation function": nn.Activation,
    "nn.linear.Linear initialiser": lambda x: nn.Linear(3, 2, initialiser=x),
    "nn.mlp.MLP activation": lambda x: nn.MLP(3, (2,), activation=x),
    "nn.mlp.MLP final_activation": lambda x: nn.MLP(3, (2,), 2, final_activation=x),
    "nn.recurrent.Recurrent cell": lambda x: nn.Recurrent(x, 3, 2),
    "nn.attention.TransformerLayer norm": lambda x: nn.TransformerLayer(4, 2, 4, x),
    "nn.attention.Transformer positions": lambda x: nn.Transformer(3, 4, positions=x),
    "nn.attention.Transformer norm": lambda x: nn.Transformer(3, 4, norm=x),
    "functional.schedules.anneal schedule": lambda x: schedules.anneal(torch.ones(2), x, torch.zeros(2)),
    "nn.mlp.MLP initialiser": lambda x: nn.MLP(3, (2,), initialiser=x),
    "nn.pictures.impala_cnn initialiser": lambda x: nn.impala_cnn(PICTURE, initialiser=x),
    "nn.pictures.minatar_cnn initialiser": lambda x: nn.minatar_cnn(PICTURE, x),
    "nn.pictures.nature_cnn initialiser": lambda x: nn.nature_cnn(PICTURE, x),
    "nn.pictures.picture_cnn initialiser": lambda x: nn.picture_cnn(PICTURE, x),
}

ELSEWHERE = {
    "imitation.gail.AdversarialReward form": "validated with the other fields of a reward, which needs demonstrations",
    "envs.task_families.Family.tasks split": "a protocol",
    "envs.few_shot.FewShot.tasks split": "needs pictures; see tests/envs",
    "envs.families.FamilyWorld.tasks split": "hands it to its family",
    "envs.gymnasium.rows.Template mask": "is made by resolve, which makes it of one of its own",
    "lifelong.ewc.information kind": "hands it to categorical_fisher, or gets it from EWC",
    "meta.learned_optimizer.LearnedOptimizerLearner.adaptation split": "hands it to its family",
    "meta.maml.MAMLLearner.adapted order": "hands it to adapt",
    "meta.maml.MAMLLearner.adaptation split": "hands it to its family",
}


def is_choice(hint: Any) -> bool:
    """Whether a type is a `Literal`, or has one among its alternatives."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(is_choice, typing.get_args(hint)))
    return typing.get_origin(hint) is Literal


def choices_of(owner: Any, name: str) -> Iterator[str]:
    try:
        hints = typing.get_type_hints(owner)
    except NameError:  # of a name that only type checkers see
        return
    for parameter, hint in hints.items():
        if parameter != "return" and is_choice(hint):
            yield f"{name} {parameter}"


def declared() -> tuple[list[str], list[tuple[type, str]]]:
    """The parameters of functions and methods that are a `Literal`, and such fields of settings with defaults."""
    functions: list[str] = []
    fields: list[tuple[type, str]] = []
    for module in pkgutil.walk_packages(rlmeta.__path__, "rlmeta."):
        if module.name == "rlmeta.__main__":
            continue
        content = importlib.import_module(module.name)
        own = {n: x for n, x in vars(content).items() if getattr(x, "__module__", "") == module.name and n[0] != "_"}
        for name, thing in own.items():
            place = f"{module.name}.{name}".removeprefix("rlmeta.")
            if inspect.isfunction(thing):
                functions += choices_of(thing, place)
            elif inspect.isclass(thing):
                if dataclasses.is_dataclass(thing):
                    found = [one.split()[1] for one in choices_of(thing, place)]
                    needed = [f for f in dataclasses.fields(thing) if f.default is f.default_factory]
                    functions += [f"{place} {field}" for field in found if needed]
                    fields += [(thing, field) for field in found if not needed]
                elif "__init__" in vars(thing):
                    functions += choices_of(thing.__init__, place)
                for method, function in vars(thing).items():
                    if inspect.isfunction(function) and method[0] != "_":
                        functions += choices_of(function, f"{place}.{method}")
    return functions, fields


FUNCTIONS, FIELDS = declared()


def test_every_choice_is_tried_here() -> None:
    assert set(FUNCTIONS) == set(CALLS) | set(ELSEWHERE)
    assert len(FIELDS) > 25


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", ["Nonsense", 7.5, ["tanh"]], ids=str)
def test_a_function_refuses_what_is_no_choice(call: str, value: Any) -> None:
    with pytest.raises(SettingError):
        CALLS[call](value)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=[f"{cls.__name__}.{field}" for cls, field in FIELDS])
@pytest.mark.parametrize("value", ["Nonsense", 7.5, None, ["tanh"]], ids=str)
def test_settings_refuse_what_is_no_choice(cls: Any, field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field):
        cls(**{field: value})


def test_a_choice_is_compared_as_text() -> None:
    require_choice("mode", "sync", Literal["sync", "async"])
    require_choice("mode", None, Literal["sync"] | None)
    for value in ("Sync", "", None, 0, True, ["sync"], torch.tensor(0), b"sync"):
        with pytest.raises(SettingError, match=r"mode is .*, expected one of 'sync', 'async'"):
            require_choice("mode", value, Literal["sync", "async"])
