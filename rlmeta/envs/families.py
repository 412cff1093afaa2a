"""Families of supervised and optimisation problems: distributions that meta-learners draw tasks from.

A family draws K tasks for every learner: `tasks(key, counter, K, split)`. What belongs to the splits "train",
"validation" and "test" never overlaps; every draw is a function of the learner's key, the counter and the split alone.
A supervised task is `{"support": {observation, target}, "query": {...}}`; an optimisation problem is whatever its
family's `loss` needs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, Protocol, TypeAlias, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data.sets import equal_pictures, labelled, omniglot
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import random, tree
from rlmeta.functional.tree import Tree

Split: TypeAlias = Literal["train", "validation", "test"]

Weights: TypeAlias = dict[str, Tensor]


class Family(Protocol):
    """A distribution over tasks."""

    @property
    def observation_space(self) -> gym.Space:
        """Of one input."""

    @property
    def action_space(self) -> gym.Space:
        """Of one target: Discrete classes, or a Box."""

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """K = `count` tasks for each key `[*L]`, every leaf `[*L, K, ...]`; `counter` is a number or `[*L]`."""
        ...


class Problems(Family, Protocol):
    """A distribution over functions to minimise."""

    def start(self, problem: Tree) -> Weights:
        """Where the minimisation begins, `{name: [*L, K, ...]}`."""

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """The loss `[*L, K]` at step `[*L, K]`, or `[]` where it is the same for all: minibatches are drawn by it."""
        ...


def minimises(family: Any) -> bool:
    """Whether it is a family of `Problems`."""
    return all(callable(getattr(family, name, None)) for name in ("start", "loss"))


def check_family(family: Any) -> None:
    """Refuse what is no `Family`: its spaces and how its `tasks` are asked for are looked at, nothing is drawn.

    Raises:
        SettingError: it is a class, lacks a space, or its `tasks` take other arguments.
    """
    if isinstance(family, type):
        raise SettingError(f"{family.__name__} is the class of a family: give one of it, such as {family.__name__}()")
    name = type(family).__name__
    for attribute, what in (("observation_space", "input"), ("action_space", "target")):
        space = getattr(family, attribute, None)
        if not isinstance(space, gym.Space):
            raise SettingError(f"{name}: {attribute} is {space!r}, expected the gymnasium space of one {what}")
    tasks = getattr(family, "tasks", None)
    if not callable(tasks):
        raise SettingError(f"{name} has no tasks(key, counter, count, split), which draws them")
    try:
        inspect.signature(tasks).bind(None, 0, 1, "train")
    except TypeError as error:
        raise SettingError(
            f"{name}: tasks{inspect.signature(tasks)} can't be called as tasks(key, counter, count, split): {error}"
        ) from None


def as_tensors(drawn: Any, device: torch.device) -> Tree:
    """Tasks whose leaves are tensors on the device where they were numpy's arrays, doubles as floats."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        made = torch.as_tensor(leaf, device=device)
        return made.float() if made.dtype == torch.float64 else made

    return tree.map(convert, drawn)


def task_keys(key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tensor:
    """One key for each of `count` tasks, `[*L, K]`."""
    if split not in get_args(Split):
        raise SettingError(f"split is {split!r}, expected one of {', '.join(get_args(Split))}")
    if count < 1:
        raise SettingError(f"{count} tasks, expected at least 1")
    start = random.fold(random.fold(key, f"family/{split}"), counter)
    return random.fold(start.unsqueeze(-1), torch.arange(count, device=key.device))


# ---------------------------------------------------------------------- regression


@dataclass(frozen=True)
class Sinusoid:
    """y = amplitude · sin(x − phase), amplitude uniform in [0.1, 5], phase in [0, π], x in [−5, 5].

    Predicting 0 costs 4.25, the best prediction that does not adapt, −1.62 cos x, costs 3.01 (mean squared error).

    Source: Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, section 5.1.
    """

    shots: int = 10
    """Points to adapt to."""
    queries: int = 10
    """Further points to learn from, or to be measured by."""

    def __post_init__(self) -> None:
        _check_sizes("Sinusoid", self)

    @cached_property
    def observation_space(self) -> gym.Space:
        """x."""
        return gym.spaces.Box(-5.0, 5.0, (1,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """y."""
        return gym.spaces.Box(-5.0, 5.0, (1,), np.float32)

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """K sine waves and points on them."""
        keys, points = task_keys(key, counter, count, split), self.shots + self.queries
        draw = random.uniform(keys, "sinusoid", 0, (points + 2, 1))
        amplitude, phase = 0.1 + 4.9 * draw[..., :1, :], math.pi * draw[..., 1:2, :]
        x = 10.0 * draw[..., 2:, :] - 5.0
        return _episode(x, amplitude * torch.sin(x - phase), self.shots)


def _episode(observation: Tensor, target: Tensor, shots: int) -> Tree:
    """The first `shots` of the samples `[*L, K, n, D]` as support, the rest as query."""
    pair, axis = {"observation": observation, "target": target}, observation.dim() - 2
    return {
        "support": {name: value.narrow(axis, 0, shots) for name, value in pair.items()},
        "query": {name: value.narrow(axis, shots, value.shape[axis] - shots) for name, value in pair.items()},
    }


def _check_sizes(name: str, family: Any, sizes: Sequence[str] = ("shots", "queries")) -> None:
    for size in sizes:
        value = getattr(family, size)
        if not isinstance(value, Integral):
            raise SettingError(f"{name}: {size} is {value!r}, expected a whole number")
        if value < 1:
            raise SettingError(f"{name}: {size} is {value}, expected at least 1")


# ---------------------------------------------------------------------- classification


@dataclass(frozen=True, eq=False)
class FewShot:
    """N-way K-shot classification: N classes of a split, K samples of each to adapt to, others of them to be asked.

    Every task numbers its classes anew, 0 ... N − 1, in random order. With `rotations`, the classes to train on come
    turned by 90, 180 and 270 degrees too, as classes of their own; those of the other splits never do. Equal images are
    taken once; where they are of different classes, which nothing can tell apart, none is.

    Source of the protocol: Vinyals et al., "Matching Networks for One Shot Learning", 2016.
    """

    images: Tensor
    """`[n, ...]`, float; numpy arrays will do, here and below."""
    labels: Tensor
    """`[n]` whole numbers, of any values."""
    classes: Mapping[str, Sequence[int]]
    """For each split, the labels that belong to it."""
    ways: int = 5
    """N."""
    shots: int = 1
    """K."""
    queries: int = 5
    """Samples of each class in the query set."""
    rotations: bool = False
    """Whether to turn the training classes."""
    dropped: int = field(init=False, default=0)
    """How many images equal others and were left out."""
    _pools: dict[str, tuple[Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_sizes("FewShot", self, ("ways", "shots", "queries"))
        if self.ways < 2:
            raise SettingError(f"FewShot: ways is {self.ways}, expected at least 2 classes to tell apart")
        images, labels = _samples(self.images, self.labels)
        if self.rotations and (images.dim() < 3 or images.shape[-1] != images.shape[-2]):
            raise SettingError(f"FewShot: rotations turn squares [n, ..., H, H], images are {list(images.shape)}")
        classes = {split: [int(member) for member in members] for split, members in self.classes.items()}
        _check_disjoint(classes)
        kept = _distinct(images, labels, [member for members in classes.values() for member in members])
        given = {"dropped": len(images) - len(kept), "images": images[kept], "labels": labels[kept], "classes": classes}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        labels = self.labels
        pools: dict[str, tuple[Tensor, Tensor]] = {}
        for split, members in classes.items():
            turned = self.rotations and split == "train"
            count = len(members) * (4 if turned else 1)
            if count < self.ways:
                raise SettingError(
                    f"{self.ways} ways, but split {split!r} has {count} classes: ask for fewer ways or give it more"
                )
            pools[split] = self._pool(labels, members, split, turned)
        object.__setattr__(self, "_pools", pools)

    def _pool(self, labels: Tensor, members: Sequence[int], split: str, turned: bool) -> tuple[Tensor, Tensor]:
        """Images of the split's classes `[C, most, ...]`, and how many each class has `[C]`."""
        found = [self.images[labels == member] for member in members]
        needed = self.shots + self.queries
        for member, images in zip(members, found):
            if len(images) < needed:
                raise SettingError(
                    f"class {member} of split {split!r} has {len(images)} samples, {self.shots} shots and "
                    f"{self.queries} queries need {needed}: ask for fewer"
                )
        if turned:
            found = [torch.rot90(images, quarter, (-2, -1)) for quarter in range(4) for images in found]
        counts = torch.tensor([len(images) for images in found], device=self.images.device)
        pool = self.images.new_zeros((len(found), int(counts.max()), *self.images.shape[1:]))
        for row, images in zip(pool, found):
            row[: len(images)] = images
        return pool, counts

    @cached_property
    def observation_space(self) -> gym.Space:
        """One image."""
        low, high = float(self.images.min()), float(self.images.max())
        return gym.spaces.Box(low, high, tuple(self.images.shape[1:]), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """The task's own numbers of its classes."""
        return gym.spaces.Discrete(self.ways)

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """K tasks; the samples of support and query are ordered class by class."""
        keys = task_keys(key, counter, count, split)
        if split not in self._pools:
            raise SettingError(
                f"FewShot: there are no classes for split {split!r}, only for {', '.join(self._pools) or 'none'}: "
                "a run learns from 'train', is followed on 'validation' and scored on 'test'"
            )
        pool, counts = (part.to(key.device) for part in self._pools[split])
        chosen = random.permutation(keys, "classes", 0, len(pool))[..., : self.ways]
        class_keys = random.fold(keys.unsqueeze(-1), torch.arange(self.ways, device=key.device))
        order = random.uniform(class_keys, "samples", 0, (pool.shape[1],), torch.float64)
        missing = torch.arange(pool.shape[1], device=key.device) >= counts[chosen].unsqueeze(-1)
        rows = order.masked_fill(missing, 2.0).argsort(-1)[..., : self.shots + self.queries]
        images = pool[chosen.unsqueeze(-1), rows]  # [*L, K, ways, shots + queries, ...]
        label = torch.arange(self.ways, device=key.device).unsqueeze(-1).expand(rows.shape)
        axes = keys.dim()

        def flat(x: Tensor, start: int, stop: int) -> Tensor:
            return x.narrow(axes + 1, start, stop - start).flatten(axes, axes + 1)

        cuts = {"support": (0, self.shots), "query": (self.shots, self.shots + self.queries)}
        return {name: {"observation": flat(images, *cut), "target": flat(label, *cut)} for name, cut in cuts.items()}


def _samples(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Images `[n, ...]` float32 and labels `[n]` int64, refused where they are anything else."""
    try:
        images, labels = (x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu") for x in (images, labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"FewShot: images and labels must be tensors or arrays of numbers ({error})") from None
    if not images.is_floating_point():
        raise SettingError(f"FewShot: images are {images.dtype}, expected floats: divide pictures of bytes by 255")
    if labels.is_floating_point() or labels.dim() != 1 or len(labels) != len(images):
        raise SettingError(
            f"FewShot: labels are {labels.dtype} {list(labels.shape)} for images {list(images.shape)}, expected one "
            "whole number for each image"
        )
    if not bool(images.isfinite().all()):
        raise SettingError(f"FewShot: image {int((~images.isfinite()).nonzero()[0, 0])} is not finite")
    return images.float(), labels.to(torch.int64)


def _distinct(images: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """The numbers of the images to keep, so that no two of the classes are equal; a warning says how many are not."""
    used = torch.isin(labels, torch.tensor(classes, dtype=torch.int64, device=labels.device)).nonzero().flatten().cpu()
    repeated, ambiguous = equal_pictures(images.cpu()[used].numpy(), labels.cpu()[used].numpy())
    if repeated or ambiguous:
        warnings.warn(
            f"FewShot: of {len(images)} images {len(repeated)} equal others of their class and are left out, and "
            f"{len(ambiguous)} equal ones of other classes, none of which is used: a query must not be a support image",
            RuntimeWarning,
            stacklevel=4,
        )
    kept = torch.ones(len(images), dtype=torch.bool, device="cpu")
    kept[used[torch.tensor([*repeated, *ambiguous], dtype=torch.int64, device="cpu")]] = False
    return kept.nonzero().flatten().to(images.device)


def _check_disjoint(classes: Mapping[str, Sequence[int]]) -> None:
    """Refuse splits that share a class."""
    owner: dict[int, str] = {}
    for split, members in classes.items():
        if split not in get_args(Split):
            raise SettingError(f"split {split!r} is unknown, expected {', '.join(get_args(Split))}")
        for member in members:
            if owner.get(member) == split:
                raise SettingError(f"class {member} stands twice in split {split!r}: give every class once")
            if member in owner:
                raise SettingError(
                    f"class {member} is in split {owner[member]!r} and in {split!r}: a class belongs to one split"
                )
            owner[member] = split


def split_classes(groups: Sequence[Any], test: Sequence[Any], validation: Sequence[Any] = ()) -> dict[str, list[int]]:
    """Classes by split, where whole groups (alphabets, say) are held out.

    Args:
        groups: the group of each class 0 ... C − 1.
        test: groups of the test split.
        validation: groups of the validation split; every other group is trained on.

    Raises:
        SettingError: a group is asked for that no class belongs to, or stands in both lists.
    """
    for group in (*test, *validation):
        if group not in groups:
            raise SettingError(f"there is no group {group!r}; there are {', '.join(map(str, sorted(set(groups))))}")
    if set(test) & set(validation):
        raise SettingError(f"{sorted(set(test) & set(validation))} are both validation and test groups")
    found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, group in enumerate(groups):
        found["test" if group in test else "validation" if group in validation else "train"].append(number)
    return {split: members for split, members in found.items() if members}


# ---------------------------------------------------------------------- functions to minimise


@dataclass(frozen=True)
class Quadratics:
    """f(x) = ‖W x − y‖² with W `[d, d]` and y `[d]` standard normal, from x ~ N(0, 0.01²).

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016, section 3.1.
    """

    dimensions: int = 10
    """d."""

    def __post_init__(self) -> None:
        _check_sizes("Quadratics", self, ("dimensions",))

    @cached_property
    def observation_space(self) -> gym.Space:
        """x."""
        return gym.spaces.Box(-np.inf, np.inf, (self.dimensions,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """A move of x."""
        return self.observation_space

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """K quadratic functions, and where each begins."""
        keys, d = task_keys(key, counter, count, split), self.dimensions
        draw = random.normal(keys, "quadratic", 0, (d, d + 2))
        return {"matrix": draw[..., :d], "target": draw[..., d], "start": 0.01 * draw[..., d + 1]}

    def start(self, problem: Tree) -> Weights:
        """x `[*L, K, d]`."""
        return {"x": problem["start"]}

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """f, `[*L, K]`."""
        x = weights["x"]
        return ((problem["matrix"] @ x.unsqueeze(-1)).squeeze(-1) - problem["target"]).square().sum(-1)


@dataclass(frozen=True)
class DigitMLPs:
    """Perceptrons of one hidden layer that learn digits by cross-entropy, from different weights and minibatches.

    Training problems see one half of the images, those of validation and of test a quarter each.

    Source: Andrychowicz et al., 2016, section 3.2, on the 8 x 8 digits of scikit-learn.
    """

    hidden: int = 20
    """Units of the hidden layer."""
    batch_size: int = 128
    """Images of a minibatch."""
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    """Of the hidden layer."""

    def __post_init__(self) -> None:
        _check_sizes("DigitMLPs", self, ("hidden", "batch_size"))
        if self.activation not in ("sigmoid", "relu", "tanh"):
            raise SettingError(f"DigitMLPs: activation is {self.activation!r}, expected sigmoid, relu or tanh")

    @cached_property
    def observation_space(self) -> gym.Space:
        """One image."""
        return gym.spaces.Box(0.0, 1.0, (64,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """The digit."""
        return gym.spaces.Discrete(10)

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        found = labelled("digits")
        images = torch.cat([found.train.observation, found.test.observation]).reshape(-1, 64).float() / 255
        return images, torch.cat([found.train.target, found.test.target])

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """K keys, and which part of the images each uses."""
        keys = task_keys(key, counter, count, split)
        return {"key": keys, "part": torch.full_like(keys, get_args(Split).index(split))}

    def start(self, problem: Tree) -> Weights:
        """Weights with deviation 1 / √inputs, biases 0."""
        key, h = problem["key"], self.hidden
        first = random.normal(key, "first layer", 0, (h, 64)) / 8.0
        second = random.normal(key, "second layer", 0, (10, h)) / math.sqrt(h)
        zeros = first.new_zeros
        return {
            "0.weight": first,
            "0.bias": zeros((*key.shape, h)),
            "1.weight": second,
            "1.bias": zeros((*key.shape, 10)),
        }

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """Cross-entropy of a minibatch, `[*L, K]`, in nats."""
        images, digits = (part.to(step.device) for part in self._digits)
        quarter, part = len(images) // 4, problem["part"].unsqueeze(-1)
        index = random.integers(problem["key"], "minibatch", step, (self.batch_size,), 2 * quarter)
        index = torch.where(part == 0, index, (part + 1) * quarter + index % quarter)
        hidden = images[index] @ weights["0.weight"].mT + weights["0.bias"].unsqueeze(-2)
        hidden = getattr(torch, self.activation)(hidden)
        logits = hidden @ weights["1.weight"].mT + weights["1.bias"].unsqueeze(-2)
        log_prob = logits.log_softmax(-1).gather(-1, digits[index].unsqueeze(-1))
        return -log_prob.squeeze(-1).mean(-1)


# ---------------------------------------------------------------------- as a problem to train on


@dataclass(frozen=True)
class NamedFamily:
    """A family under its name: what a meta-learner is trained on."""

    name: str
    source: Any
    """A `Family`, or a `TaskFamily` of environments."""
    table: dict[str, Any] = field(default_factory=dict)
    """The TOML table it was made from, {} for one made in code."""

    native = True

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> FamilyWorld:
        """The tasks of every learner."""
        return FamilyWorld(self.source, learner_shape, num_envs)

    def describe(self) -> dict[str, Any]:
        """What a saved configuration needs to make it again; a family made in code is the user's to give again."""
        from rlmeta.envs.task import TaskFamily

        made: dict[str, Any] = {"table": self.table} if self.table else {"settings": _plain_settings(self.source)}
        if isinstance(self.source, TaskFamily):
            made = {"task": self.source.base.describe(), "ranges": {n: list(r) for n, r in self.source.ranges.items()}}
        return {"kind": "family", "name": self.name, **made}


def _plain_settings(family: Any) -> dict[str, Any]:
    """The settings of a family that is a dataclass, as far as they are numbers, switches or text."""
    made = [f.name for f in dataclasses.fields(family) if f.init] if dataclasses.is_dataclass(family) else []
    values = {name: getattr(family, name) for name in made}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def few_shot_digits(ways: int = 3, shots: int = 1, queries: int = 5) -> FewShot:
    """scikit-learn's digits: 0 to 3 to train on (in four turns, 16 classes), 4 to 6 to validate, 7 to 9 to test."""
    found = labelled("digits")
    images = torch.cat([found.train.observation, found.test.observation]).reshape(-1, 8, 8).float() / 255
    classes = {"train": range(4), "validation": range(4, 7), "test": range(7, 10)}
    digits = torch.cat([found.train.target, found.test.target])
    return FewShot(images, digits, classes, ways, shots, queries, rotations=True)


def few_shot_omniglot(ways: int = 5, shots: int = 1, queries: int = 5, fold: int = 0, size: int = 28) -> FewShot:
    """Omniglot with whole alphabets held out.

    Args:
        ways: N.
        shots: K.
        queries: samples of each class in the query set.
        fold: which alphabets, in the order of their names: two to test from number 2 fold on, the next to validate.
        size: side of the images, which divides 28; smaller ones are means of pixels.
    """
    if size < 1 or 28 % size:
        raise SettingError(f"omniglot: size is {size}, expected a divisor of 28")
    if fold < 0:
        raise SettingError(f"omniglot: fold is {fold}, expected at least 0")
    found = omniglot()
    count = len(found.alphabet_names)
    if 2 * fold >= count:
        raise SettingError(f"omniglot: fold is {fold}, with {count} alphabets expected at most {(count - 1) // 2}")
    images = torch.nn.functional.avg_pool2d(found.image.float().unsqueeze(1) / 255, 28 // size).squeeze(1)
    groups = [int(found.alphabet[found.character == c][0]) for c in range(int(found.character.max()) + 1)]
    test, validation = [2 * fold % count, (2 * fold + 1) % count], [(2 * fold + 2) % count]
    classes = split_classes(groups, test, validation)
    return FewShot(images, found.character, classes, ways, shots, queries, rotations=True)


MADE: dict[str, Callable[..., Any]] = {
    "sinusoid": Sinusoid,
    "few-shot-digits": few_shot_digits,
    "few-shot-omniglot": few_shot_omniglot,
    "quadratics": Quadratics,
    "digit-mlps": DigitMLPs,
}
"""What `family = ` in a file of the `envs` folders may be, and what makes it."""


def from_table(name: str, table: dict[str, Any], settings: dict[str, Any] | None = None) -> NamedFamily:
    """The family that a TOML table with the keys `family` and `settings` describes.

    Args:
        name: of the table's file.
        table: what it says.
        settings: further ones, which win.

    Raises:
        UnknownNameError: there is no such family, or it has no such setting.
        SettingError: it can't be made with these settings.
    """
    if table["family"] not in MADE:
        raise unknown_name(f"family in envs/{name}.toml", str(table["family"]), MADE)
    make, given = MADE[table["family"]], {**table.get("settings", {}), **(settings or {})}
    known = inspect.signature(make).parameters
    for setting, value in given.items():
        if setting not in known:
            raise unknown_name(f"setting of {name}", setting, known)
        if not isinstance(value, type(known[setting].default)):
            raise SettingError(f"{name}: {setting} is {value!r}, expected as {known[setting].default!r}")
    return NamedFamily(name, make(**given), {**table, "settings": given})


class FamilyWorld:
    """The tasks of `*L` learners; nothing in it changes.

    Args:
        family: what to draw from.
        learner_shape: `*L`.
        num_envs: K, tasks of a meta-batch.
    """

    exact_resume = True
    split: Split = "test"
    """Of the tasks that an evaluation adapts to."""

    def __init__(self, family: Family, learner_shape: tuple[int, ...], num_envs: int) -> None:
        if num_envs < 1:
            raise SettingError(f"{num_envs} tasks in a meta-batch, expected at least 1")
        check_family(family)
        self.family = family
        self.observation_space, self.action_space = family.observation_space, family.action_space
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """`count` tasks of the split for each learner, every leaf `[*L, K, ...]`."""
        return as_tensors(self.family.tasks(key, counter, count, split), key.device)

    def reset(self, key: Tensor) -> dict[str, Any]:
        """Nothing to remember but whose it is."""
        return {"key": key}

    def restore(self, state: dict[str, Any], inexact: bool = False) -> dict[str, Any]:
        """Nothing is hidden."""
        return state

    def close(self) -> None:
        """Nothing to release."""
