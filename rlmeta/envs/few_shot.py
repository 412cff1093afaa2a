"""Few-shot classification: N-way K-shot tasks of labelled images, with disjoint classes in every split."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data.sets import equal_pictures, labelled, omniglot
from rlmeta.envs.task_families import Split, check_sizes, task_keys
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.tree import Tree


@dataclass(frozen=True, eq=False)
class FewShot:
    """N-way K-shot classification tasks: N classes of a split, K support samples of each, and query samples.

    Every task labels its classes anew, 0 ... N − 1, in random order. With `rotations`, the training classes rotated by
    90, 180 and 270 degrees are further classes of their own; the other splits are never rotated. Duplicate images are
    used once, and not at all if their classes differ.

    Source of the protocol: Vinyals et al., "Matching Networks for One Shot Learning", 2016.
    """

    images: Tensor
    """`[n, ...]` float, a tensor or numpy array, as are the labels."""
    labels: Tensor
    """`[n]` integers of any values."""
    classes: Mapping[str, Sequence[int]]
    """Labels of each split."""
    ways: int = 5
    """N, the number of classes of a task."""
    shots: int = 1
    """K, the number of support samples of each class."""
    queries: int = 5
    """Number of query samples of each class."""
    rotations: bool = False
    """Whether to add rotated training classes."""
    dropped: int = field(init=False, default=0)
    """Number of duplicate images that were left out."""
    _pools: dict[str, tuple[Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_sizes("FewShot", self, ("ways", "shots", "queries"))
        if self.ways < 2:
            raise SettingError(f"FewShot: ways is {self.ways}, expected at least 2 classes to tell apart")
        images, labels = _samples(self.images, self.labels)
        if self.rotations and (images.dim() < 3 or images.shape[-1] != images.shape[-2]):
            raise SettingError(f"FewShot: rotations need square images [n, ..., H, H], images are {list(images.shape)}")
        classes = {split: [int(member) for member in members] for split, members in self.classes.items()}
        _check_disjoint(classes)
        kept = _distinct(images, labels, [member for members in classes.values() for member in members])
        clean = {"dropped": len(images) - len(kept), "images": images[kept], "labels": labels[kept], "classes": classes}
        for name, value in clean.items():
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
        """Group the images of a split by class, padded to the largest class.

        Args:
            labels: of all images, `[n]`.
            members: labels of the split.
            split: its name, for the error message.
            turned: whether to add rotated classes.

        Returns:
            Images `[C, most, ...]`, and the number of images of each class `[C]`.

        Raises:
            SettingError: a class has too few images.
        """
        by_class = [self.images[labels == member] for member in members]
        needed = self.shots + self.queries
        for member, images in zip(members, by_class):
            if len(images) < needed:
                raise SettingError(
                    f"class {member} of split {split!r} has {len(images)} samples, {self.shots} shots and "
                    f"{self.queries} queries need {needed}: ask for fewer"
                )
        if turned:
            by_class = [torch.rot90(images, quarter, (-2, -1)) for quarter in range(4) for images in by_class]
        counts = torch.tensor([len(images) for images in by_class], device=self.images.device)
        pool = self.images.new_zeros((len(by_class), int(counts.max()), *self.images.shape[1:]))
        for row, images in zip(pool, by_class):
            row[: len(images)] = images
        return pool, counts

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of one image."""
        low, high = float(self.images.min()), float(self.images.max())
        return gym.spaces.Box(low, high, tuple(self.images.shape[1:]), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of a task's class labels, Discrete(N)."""
        return gym.spaces.Discrete(self.ways)

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """Draw K = `count` tasks; support and query samples are ordered class by class."""
        keys = task_keys(key, counter, count, split)
        if split not in self._pools:
            raise SettingError(
                f"FewShot: there are no classes for split {split!r}, only for {', '.join(self._pools) or 'none'}: "
                "a run trains on 'train', is evaluated during training on 'validation' and at its end on 'test'"
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
    """Convert images `[n, ...]` to float32 and labels `[n]` to int64, after a check of types and shapes."""
    try:
        images, labels = (x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu") for x in (images, labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"FewShot: images and labels must be tensors or arrays of numbers ({error})") from None
    if not images.is_floating_point():
        raise SettingError(f"FewShot: images are {images.dtype}, expected floats: divide images of bytes by 255")
    if labels.is_floating_point() or labels.dim() != 1 or len(labels) != len(images):
        raise SettingError(
            f"FewShot: labels are {labels.dtype} {list(labels.shape)} for images {list(images.shape)}, expected one "
            "whole number for each image"
        )
    if not bool(images.isfinite().all()):
        raise SettingError(f"FewShot: image {int((~images.isfinite()).nonzero()[0, 0])} is not finite")
    return images.float(), labels.to(torch.int64)


def _distinct(images: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Find duplicate images of the used classes, warn about them, and return the indices of the others."""
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
    """Assign classes to splits, with whole groups (alphabets, for example) held out.

    Args:
        groups: the group of each class 0 ... C − 1.
        test: groups of the test split.
        validation: groups of the validation split; every other group is for training.

    Raises:
        SettingError: a group has no class, or is in both lists.
    """
    for group in (*test, *validation):
        if group not in groups:
            raise SettingError(f"no group {group!r}, expected one of {', '.join(map(str, sorted(set(groups))))}")
    if set(test) & set(validation):
        raise SettingError(f"{sorted(set(test) & set(validation))} are both validation and test groups")
    by_split: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, group in enumerate(groups):
        by_split["test" if group in test else "validation" if group in validation else "train"].append(number)
    return {split: members for split, members in by_split.items() if members}


def few_shot_digits(ways: int = 3, shots: int = 1, queries: int = 5) -> FewShot:
    """Few-shot tasks on scikit-learn's digits: 0 to 3 for training (rotated, 16 classes), 4 to 6 and 7 to 9 held out.

    Digits 4 to 6 are the validation split and 7 to 9 the test split.
    """
    data = labelled("digits")
    images = torch.cat([data.train.observation, data.test.observation]).reshape(-1, 8, 8).float() / 255
    classes = {"train": range(4), "validation": range(4, 7), "test": range(7, 10)}
    digits = torch.cat([data.train.target, data.test.target])
    return FewShot(images, digits, classes, ways, shots, queries, rotations=True)


def few_shot_omniglot(ways: int = 5, shots: int = 1, queries: int = 5, fold: int = 0, size: int = 28) -> FewShot:
    """Few-shot tasks on Omniglot, with whole alphabets held out.

    Args:
        ways: N, the number of classes of a task.
        shots: K, the number of support samples of each class.
        queries: number of query samples of each class.
        fold: which alphabets are held out, in alphabetical order: two for testing from number 2 fold on, the next one
            for validation.
        size: width and height of the images, a divisor of 28; smaller ones are averages of pixels.

    Raises:
        SettingError: the size is no divisor of 28, or there is no such fold.
    """
    if size < 1 or 28 % size:
        raise SettingError(f"omniglot: size is {size}, expected a divisor of 28")
    if fold < 0:
        raise SettingError(f"omniglot: fold is {fold}, expected at least 0")
    data = omniglot()
    count = len(data.alphabet_names)
    if 2 * fold >= count:
        raise SettingError(f"omniglot: fold is {fold}, with {count} alphabets expected at most {(count - 1) // 2}")
    images = torch.nn.functional.avg_pool2d(data.image.float().unsqueeze(1) / 255, 28 // size).squeeze(1)
    groups = [int(data.alphabet[data.character == c][0]) for c in range(int(data.character.max()) + 1)]
    test, validation = [2 * fold % count, (2 * fold + 1) % count], [(2 * fold + 2) % count]
    classes = split_classes(groups, test, validation)
    return FewShot(images, data.character, classes, ways, shots, queries, rotations=True)
