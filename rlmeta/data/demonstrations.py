"""Demonstrations for imitation and offline learning: whole recorded episodes, in one file without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode
from torch import Tensor

from rlmeta.data.spaces import parts
from rlmeta.errors import DemonstrationError
from rlmeta.functional import random, tree
from rlmeta.functional.shapes import flags

FORMAT = "rlmeta demonstrations 1"
TENSORS = ("observation", "action", "reward", "lengths", "terminated", "truncated")


@dataclass(frozen=True)
class Unread:
    """Placeholder for demonstrations that are not loaded, since only training needs them."""

    name: str
    """Name of the file, or a description of the demonstrations."""


@dataclass(frozen=True, eq=False, repr=False)
class Demonstrations:
    """Expert demonstrations: E concatenated episodes of M steps in all; an episode of T steps has T + 1 observations.

    `join` puts several behind one another, `first` takes some.

    Raises:
        DemonstrationError: no episode, an empty or cut one, what is no tensor, not finite or not of the spaces.
        SettingError: terminated or truncated are no flags.
    """

    observation: tree.Tree
    """`[M + E, ...]` as worlds give them: float32 for Box, int64 counted from 0 if discrete, a dict for Dict, Tuple."""
    action: Tensor
    """`[M, ...]`"""
    reward: Tensor
    """`[M]` float32, the environment's own; offline learners learn from it, imitators do not."""
    lengths: Tensor
    """`[E]` int64, steps of every episode."""
    terminated: Tensor
    """`[E]` bool: the episode ended in a terminal state."""
    truncated: Tensor
    """`[E]` bool: it was cut by a time limit."""
    observation_space: gym.Space
    """Observation space of one environment."""
    action_space: gym.Space
    """Action space of one environment."""
    about: dict[str, Any] = field(default_factory=dict)
    """Metadata: agent, task, learner and seed that the demonstrations come from."""
    path: str = ""
    """File that the demonstrations were loaded from, or ''."""

    def __post_init__(self) -> None:
        self._check_tensors()
        self._check_rows()
        for name in ("terminated", "truncated"):
            object.__setattr__(self, name, flags(getattr(self, name), name))
        self._check_bounds()
        self._check_values()

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"{len(self)} demonstrations, {self.steps:,} steps, digest {self.digest}"

    @property
    def steps(self) -> int:
        """Number of steps M of all episodes."""
        return len(self.action)

    @property
    def returns(self) -> Tensor:
        """Undiscounted return of every episode, `[E]` float64."""
        parts = torch.split(self.reward.double(), self.lengths.tolist())
        return torch.stack([part.sum() for part in parts])

    @cached_property
    def digest(self) -> str:
        """Checksum of all numbers, equal for equal demonstrations."""
        checksum = hashlib.sha256()
        for name, leaf in sorted(tree.flatten(self._tensors()).items()):
            checksum.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
            checksum.update(leaf.contiguous().numpy().tobytes())
        return checksum.hexdigest()[:16]

    # ------------------------------------------------------------------ what imitators read

    def transitions(self) -> dict[str, Any]:
        """Transitions `[M, ...]`: `observation, next_observation, action, reward`, `terminated, truncated` `[M]`."""
        before, after = self._rows()
        last = self.lengths.cumsum(0) - 1
        flags = {
            name: torch.zeros(self.steps, dtype=torch.bool, device=self.lengths.device)
            for name in ("terminated", "truncated")
        }
        flags["terminated"][last], flags["truncated"][last] = self.terminated, self.truncated
        return {
            "observation": tree.map(lambda leaf: leaf[before], self.observation),
            "next_observation": tree.map(lambda leaf: leaf[after], self.observation),
            "action": self.action,
            "reward": self.reward,
            **flags,
        }

    def first(self, episodes: int) -> Demonstrations:
        """Select the first `episodes` episodes.

        Raises:
            DemonstrationError: there are fewer.
        """
        if not 1 <= episodes <= len(self):
            raise DemonstrationError(f"{episodes} episodes of demonstrations asked for, expected 1 to {len(self)}")
        steps = int(self.lengths[:episodes].sum())
        return replace(
            self,
            observation=tree.map(lambda leaf: leaf[: steps + episodes], self.observation),
            action=self.action[:steps],
            reward=self.reward[:steps],
            **{name: getattr(self, name)[:episodes] for name in ("lengths", "terminated", "truncated")},
            path="",
        )

    def shuffled(self, seed: int = 0) -> Demonstrations:
        """Shuffle actions and observations as a control, from which nothing can be learned.

        Actions move to any step of any episode. So do the entries of Box observations, and among one another: moving
        actions alone would leave the visited states, and these teach a good deal. Observations that are counted (and
        each part of a Dict or Tuple) move as a whole.
        """
        key = random.make_keys([seed])[0]

        def moved(name: str, leaf: Tensor) -> Tensor:
            pool = leaf.flatten() if leaf.is_floating_point() else leaf
            order = random.permutation(random.fold(key, name), "shuffled demonstrations", 0, len(pool))
            return pool[order].reshape(leaf.shape)

        named = tree.flatten({"observation": self.observation, "action": self.action})
        content = tree.unflatten({name: moved(name, leaf) for name, leaf in named.items() if name != "action"})
        order = random.permutation(key, "shuffled demonstrations", 0, self.steps)
        about = {**self.about, "shuffled": seed}
        return replace(self, observation=content["observation"], action=self.action[order], about=about, path="")

    def check(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        """Check that the demonstrations have the spaces of a task.

        Raises:
            DemonstrationError: the spaces differ.
        """
        for role, mine, expected in (
            ("observation", self.observation_space, observation_space),
            ("action", self.action_space, action_space),
        ):
            if not _same(mine, expected):
                raise DemonstrationError(
                    f"the demonstrations{self._where()} have {role} space {mine}, the task has {expected}: record them "
                    "on this task"
                )

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to one file: tensors as safetensors, spaces and words as JSON in its header. Atomic.

        Raises:
            DemonstrationError: it can't be written there.
        """
        path = Path(path)
        header = {
            "format": FORMAT,
            "observation_space": _space_to_json(self.observation_space),
            "action_space": _space_to_json(self.action_space),
            "about": self.about,
            "digest": self.digest,
        }
        header["sha256"] = _checksum(header)
        tensors = {name: leaf.contiguous() for name, leaf in tree.flatten(self._tensors()).items()}
        data, written = encode(tensors, {"demonstrations": json.dumps(header)}), path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written.unlink(missing_ok=True)
            with open(written, "xb") as file:  # a file of its own: through a link that lies there nothing is written
                file.write(data)
            os.replace(written, path)
        except OSError as error:
            raise _not_writable(path, error) from error
        return path

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Demonstrations:
        """Load demonstrations from a file of `save`.

        Raises:
            DemonstrationError: no such file, not one of demonstrations, or a damaged one.
        """
        if not isinstance(path, str | os.PathLike):
            raise DemonstrationError(f"demonstrations are {path!r}, expected the name of a file, or Demonstrations")
        path = Path(path)
        if not path.is_file():
            raise DemonstrationError(f"no demonstrations at {path}: record some with `rlmeta record RUN --out {path}`")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("demonstrations", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except (SafetensorError, ValueError, OSError, RecursionError, MemoryError) as error:
            raise DemonstrationError(f"{path} is damaged or no file of demonstrations: {error}") from None
        declared = header.get("format", "no demonstrations") if isinstance(header, dict) else "no demonstrations"
        if declared != FORMAT:
            raise DemonstrationError(f"{path} says it is {declared!r}, expected {FORMAT!r}")
        try:
            spaces: dict[str, Any] = {
                f"{role}_space": _space_from_json(header[f"{role}_space"], role, tensors)
                for role in ("observation", "action")
            }
            demonstrations = Demonstrations(**tree.unflatten(tensors), **spaces, about=header["about"], path=str(path))
        except DemonstrationError:
            raise
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            AssertionError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise DemonstrationError(f"{path} is damaged: {error}; record the demonstrations again") from None
        if header.get("digest") != demonstrations.digest or header.get("sha256") != _checksum(header):
            raise DemonstrationError(f"{path} is damaged: its checksum is wrong; record the demonstrations again")
        return demonstrations

    @staticmethod
    def from_minari(source: Any) -> Demonstrations:
        """Read a Minari data set: the id of one on this machine, or a `minari.MinariDataset`; the extra `minari`.

        Raises:
            MissingExtraError: minari is not installed.
            DemonstrationError: there is no such data set here, it has no episode, one is cut or not of its spaces.
            SpaceError: a space is not supported, or an observation is none of it.
        """
        from rlmeta.data import minari

        return minari.read(source)

    def to_minari(self, dataset_id: str, env: str | None = None) -> Any:
        """Write a Minari data set on this machine, which `from_minari` reads with the same digest.

        Args:
            dataset_id: the new data set's id, such as pendulum/mixed-v0.
            env: id of the Gymnasium environment that Minari is to recover from it; None for none.

        Returns:
            The `minari.MinariDataset`.

        Raises:
            MissingExtraError: minari is not installed.
            DemonstrationError: the id is malformed, or there is such a data set already.
        """
        from rlmeta.data import minari

        return minari.write(self, dataset_id, env)

    # ------------------------------------------------------------------ checks

    def _tensors(self) -> dict[str, tree.Tree]:
        return {name: getattr(self, name) for name in TENSORS}

    def _where(self) -> str:
        return f" of {self.path}" if self.path else ""

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Indices `[M]` of the observations before and after every step."""
        episode = torch.repeat_interleave(torch.arange(len(self), device=self.lengths.device), self.lengths)
        before = torch.arange(self.steps, device=self.lengths.device) + episode
        return before, before + 1

    def _check_tensors(self) -> None:
        for name, leaf in tree.flatten(self._tensors()).items():
            if not isinstance(leaf, Tensor):
                raise DemonstrationError(
                    f"{name} of the demonstrations{self._where()} is {type(leaf).__name__}, expected a tensor: "
                    "torch.as_tensor makes one"
                )

    def _check_rows(self) -> None:
        """Check that rows are not empty: a small file could claim any number of empty rows."""
        for name in ("reward", "lengths", "terminated", "truncated"):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 1:
                raise DemonstrationError(
                    f"{name} of the demonstrations{self._where()} has shape {shape}, expected one number for every "
                    f"{'step' if name == 'reward' else 'episode'}"
                )
        for name, leaf in tree.flatten({"observation": self.observation, "action": self.action}).items():
            if leaf.dim() == 0:
                raise DemonstrationError(
                    f"{name} of the demonstrations{self._where()} is a single number, expected one for every step"
                )

    def _check_bounds(self) -> None:
        episodes, where = self.lengths.numel(), self._where()
        if episodes == 0:
            raise DemonstrationError(f"demonstrations{where} without an episode: record at least one")
        empty = (self.lengths < 1).nonzero().flatten().tolist()
        if empty:
            raise DemonstrationError(f"episodes {empty[:8]} of the demonstrations{where} are empty: leave them out")
        if self.lengths.is_floating_point() or int(self.lengths.max()) > self.steps:  # so that no sum overflows
            raise DemonstrationError(
                f"the lengths of the demonstrations{where} are {self.lengths.dtype} up to {self.lengths.max()}, "
                f"expected whole numbers up to the {self.steps} steps that there are"
            )
        steps = int(self.lengths.sum())
        rows = {name: len(leaf) for name, leaf in tree.flatten({"observation": self.observation}).items()}
        expected = {**dict.fromkeys(rows, steps + episodes), "action": steps, "reward": steps}
        expected |= {"terminated": episodes, "truncated": episodes}
        rows |= {name: len(getattr(self, name)) for name in ("action", "reward", "terminated", "truncated")}
        for name, count in expected.items():
            if rows[name] != count:
                raise DemonstrationError(
                    f"the demonstrations{where} have {rows[name]} rows of {name}, expected {count} for {episodes} "
                    f"episodes of {steps} steps in all (an episode of T steps has T + 1 observations): one is cut"
                )
        cut = (~(self.terminated | self.truncated)).nonzero().flatten().tolist()
        if cut:
            raise DemonstrationError(
                f"episodes {cut[:8]} of the demonstrations{where} are cut: they neither terminated nor reached a time "
                "limit; record whole episodes, or leave them out"
            )

    def _check_values(self) -> None:
        named = tree.flatten({"observation": self.observation, "action": self.action, "reward": self.reward})
        for name, leaf in named.items():
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                row = int((~torch.isfinite(leaf.reshape(len(leaf), -1)).all(-1)).nonzero()[0])
                raise DemonstrationError(
                    f"{name} of the demonstrations{self._where()} is not finite (row {row}): leave that episode out"
                )
        for path, space in _leaves(self.observation_space, "observation"):
            _check_leaf(named, path, space, self._where())
        for path, space in _leaves(self.action_space, "action"):
            _check_leaf(named, path, space, self._where())


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written at `path`, without leaving one.

    Raises:
        DemonstrationError: it can't.
    """
    try:
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: str | os.PathLike[str], error: OSError) -> DemonstrationError:
    return DemonstrationError(f"cannot write demonstrations at {path}: {error.strerror}; use another file")


def join(parts: Sequence[Demonstrations]) -> Demonstrations:
    """Concatenate demonstrations of the same spaces, in order.

    Raises:
        DemonstrationError: there are none, or their spaces differ.
    """
    if not parts:
        raise DemonstrationError("no demonstrations to join: give at least one")
    for other in parts[1:]:
        other.check(parts[0].observation_space, parts[0].action_space)
    joined: dict[str, Any] = {
        name: tree.map(lambda *leaves: torch.cat(leaves), *[getattr(part, name) for part in parts]) for name in TENSORS
    }
    about = {"joined": [part.about for part in parts]} if len(parts) > 1 else parts[0].about
    return replace(parts[0], **joined, about=about, path="")


def _leaves(space: gym.Space, path: str) -> list[tuple[str, gym.Space]]:
    """Leaf spaces by the names of their tensors."""
    if not isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        return [(path, space)]
    return [leaf for name, child in parts(space) for leaf in _leaves(child, f"{path}/{name}")]


def _counts(space: gym.Space) -> np.ndarray | None:
    """Number of values of each entry of a discrete space; None for Box."""
    if isinstance(space, gym.spaces.Discrete):
        return np.asarray(space.n)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.nvec
    if isinstance(space, gym.spaces.MultiBinary):
        return np.full(space.shape, 2)
    return None


def _check_leaf(named: dict[str, Tensor], path: str, space: gym.Space, where: str) -> None:
    """Check that an entry exists, and that its shape and discrete values are those of the space."""
    shape = tuple(space.shape or ())
    actual = tuple(named[path].shape[1:]) if path in named else "missing"
    if actual != shape:
        raise DemonstrationError(f"{path} of the demonstrations{where} has shape {actual}, its space {space} {shape}")
    counts = _counts(space)
    if counts is not None:
        leaf = named[path].numpy()
        if leaf.dtype.kind not in "iub" or (leaf < 0).any() or (leaf >= counts).any():
            raise DemonstrationError(
                f"{path} of the demonstrations{where} holds {leaf.dtype} from {leaf.min()} to {leaf.max()}, expected "
                f"whole numbers of {space}, counted from 0"
            )


def _same(space: gym.Space, other: gym.Space) -> bool:
    """Whether two spaces have the same form; the bounds of a Box may differ, as those of a task's variants do."""
    first, second = _leaves(space, ""), _leaves(other, "")
    if [path for path, _ in first] != [path for path, _ in second]:
        return False
    for (_, a), (_, b) in zip(first, second):
        if type(a) is not type(b) or a.shape != b.shape or _are_bytes(a) != _are_bytes(b):
            return False
        if (counts := _counts(a)) is not None and not np.array_equal(counts, np.asarray(_counts(b))):
            return False
    return True


def _are_bytes(space: gym.Space) -> bool:
    """Whether a space is a Box whose values are stored as bytes."""
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8


def _checksum(header: dict[str, Any]) -> str:
    """Sha256 of a file's header, including the digest of the tensors."""
    content = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _space_to_json(space: gym.Space) -> dict[str, Any]:
    if isinstance(space, gym.spaces.Box):
        bounds = {name: _bound_to_json(getattr(space, name)) for name in ("low", "high")}
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, gym.spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, gym.spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, gym.spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    if isinstance(space, gym.spaces.Dict):
        return {"kind": "Dict", "spaces": {name: _space_to_json(child) for name, child in space.spaces.items()}}
    if isinstance(space, gym.spaces.Tuple):
        return {"kind": "Tuple", "spaces": [_space_to_json(child) for child in space.spaces]}
    raise DemonstrationError(f"demonstrations can't be of space {space}: expected Box, Discrete, Dict and the like")


def _bound_to_json(bound: np.ndarray) -> Any:
    """Encode a bound as text, which keeps infinities; a single number if all entries agree."""
    same = bound.size > 0 and bool((bound == bound.flat[0]).all())
    return repr(bound.flat[0].item()) if same else [repr(value.item()) for value in bound.flat]


def _space_from_json(content: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> gym.Space:
    """Decode a space from a file's header, after a check against the tensor of its name.

    Nothing is made of a shape that only the header claims: it could be of any size.
    """
    kind = content["kind"]
    if kind in ("Box", "MultiBinary"):
        declared = content["shape" if kind == "Box" else "n"]
        shape, actual = (declared,) if isinstance(declared, int) else tuple(declared), tuple(tensors[path].shape[1:])
        if shape != actual:
            raise ValueError(f"{path} has shape {actual}, its space says {shape}")
    if kind == "Box":
        dtype = np.dtype(content["dtype"])
        if dtype.kind not in "fiub":
            raise ValueError(f"the space of {path} has dtype {dtype}")
        low, high = (np.array(content[name], dtype=np.float64) for name in ("low", "high"))
        bounds = [np.broadcast_to(b if b.ndim == 0 else b.reshape(shape), shape).astype(dtype) for b in (low, high)]
        return gym.spaces.Box(bounds[0], bounds[1], dtype=dtype.type)
    if kind == "Discrete":
        return gym.spaces.Discrete(content["n"], start=content["start"])
    if kind == "MultiDiscrete":
        return gym.spaces.MultiDiscrete(content["nvec"], start=content["start"])
    if kind == "MultiBinary":
        return gym.spaces.MultiBinary(content["n"])
    if kind == "Dict":
        return gym.spaces.Dict(
            {name: _space_from_json(child, f"{path}/{name}", tensors) for name, child in content["spaces"].items()}
        )
    if kind == "Tuple":
        children = [_space_from_json(child, f"{path}/{i}", tensors) for i, child in enumerate(content["spaces"])]
        return gym.spaces.Tuple(children)
    raise KeyError(f"space {kind!r}")
