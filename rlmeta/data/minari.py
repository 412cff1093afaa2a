"""Minari's data sets of recorded episodes, read and written as demonstrations without loss; the extra `minari`."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import torch

from rlmeta.data.demonstrations import Demonstrations
from rlmeta.data.spaces import Array, Layout
from rlmeta.errors import DemonstrationError, require_extra
from rlmeta.functional import tree


def read(source: Any) -> Demonstrations:
    """Read all episodes of a Minari data set.

    Args:
        source: the id of a data set on this machine, or a `minari.MinariDataset`.

    Raises:
        MissingExtraError: minari is not installed.
        DemonstrationError: there is no such data set here, it has no episode, one is cut or not of its spaces.
        SpaceError: a space is not supported, or an observation is none of it.
    """
    data = _opened(source)
    observation, action = Layout(data.observation_space), Layout(data.action_space, "action")
    where = f"the Minari data set {data.id}"
    parts: dict[str, list[list[Array]]] = {"observation": [], "action": []}
    rewards, lengths, ends = [], [], []
    for episode in data.iterate_episodes():
        steps = len(episode)
        lengths.append(steps)
        for name, layout, value, rows in (
            ("observation", observation, episode.observations, steps + 1),
            ("action", action, episode.actions, steps),
        ):
            parts[name].append(layout.read(value, (rows,), where))
        rewards.append(np.asarray(episode.rewards, np.float32))
        ends.append([bool(steps and flags[-1]) for flags in (episode.terminations, episode.truncations)])
    if not lengths:
        raise DemonstrationError(f"{where} has no episode: give another one")
    joined = {name: [np.concatenate(leaf) for leaf in zip(*arrays)] for name, arrays in parts.items()}
    terminated, truncated = torch.tensor(ends, device="cpu").unbind(-1)
    return Demonstrations(
        observation=observation.tree(joined["observation"], (len(joined["observation"][0]),)),
        action=action.tree(joined["action"], (len(joined["action"][0]),)),
        reward=torch.from_numpy(np.concatenate(rewards)),
        lengths=torch.tensor(lengths, device="cpu"),
        terminated=terminated.clone(),
        truncated=truncated.clone(),
        observation_space=data.observation_space,
        action_space=data.action_space,
        about={"minari": data.id},
    )


def write(recorded: Demonstrations, dataset_id: str, env: str | None = None) -> Any:
    """Write demonstrations as a Minari data set on this machine; pictures are stored as they are, not as JPEG.

    Args:
        recorded: what is written.
        dataset_id: the new data set's id, such as pendulum/mixed-v0.
        env: id of the Gymnasium environment that Minari is to recover from it; None for none.

    Returns:
        The `minari.MinariDataset`.

    Raises:
        MissingExtraError: minari is not installed.
        DemonstrationError: the id is malformed, or there is such a data set already.
    """
    require_extra("minari", "minari", "writing a Minari data set")
    import minari
    from minari.data_collector import EpisodeBuffer

    observations = _values(recorded.observation, recorded.observation_space)
    actions = _values(recorded.action, recorded.action_space)
    flags = recorded.transitions()
    buffers, at = [], 0
    for number, steps in enumerate(recorded.lengths.tolist()):
        rows, own = slice(at + number, at + number + steps + 1), slice(at, at + steps)
        buffers.append(
            EpisodeBuffer(
                observations=_rows(observations, rows),
                actions=_rows(actions, own),
                rewards=recorded.reward[own].tolist(),
                terminations=flags["terminated"][own].tolist(),
                truncations=flags["truncated"][own].tolist(),
            )
        )
        at += steps
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="minari")  # that it knows no author and the like
            return minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=env,
                observation_space=recorded.observation_space,
                action_space=recorded.action_space,
                algorithm_name=str(recorded.about.get("agent", "unknown")),
                description=json.dumps(recorded.about),
                data_format="hdf5",
                jpeg_encoding=False,
            )
    except ValueError as error:
        raise DemonstrationError(f"Minari can't write the data set {dataset_id!r}: {error}") from error


def _opened(source: Any) -> Any:
    """Open a data set by its id; one that is open already is returned as it is."""
    require_extra("minari", "minari", "reading a Minari data set")
    import minari

    if isinstance(source, minari.MinariDataset):
        return source
    if not isinstance(source, str):
        raise DemonstrationError(f"a Minari data set is given as {source!r}, expected its id or a MinariDataset")
    try:
        return minari.load_dataset(source)
    except (FileNotFoundError, ValueError) as error:
        raise DemonstrationError(
            f"no Minari data set {source!r} on this machine: `minari download {source}` fetches it ({error})"
        ) from error


def _values(stored: tree.Tree, space: Any) -> Any:
    """Convert tensors of all rows to one batched value of the space, in its own dtype and not clipped."""
    layout = Layout(space)
    leaves = zip(layout.leaves, layout.unnest(stored, "a recording"))
    arrays = [
        (leaf.numpy() if part.is_box else leaf.numpy() + part.start).astype(part.dtype, copy=False)
        for part, leaf in leaves
    ]
    return layout.assemble(arrays)


def _rows(value: Any, rows: slice) -> Any:
    """Select some rows of a batched value of a space."""
    if isinstance(value, dict):
        return {name: _rows(part, rows) for name, part in value.items()}
    return tuple(_rows(part, rows) for part in value) if isinstance(value, tuple) else value[rows]
