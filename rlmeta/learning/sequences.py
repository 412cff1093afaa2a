"""Replay memory of sequences, for agents with a memory, as of DRQN and R2D2.

It is a replay memory (`learning.replay`) whose rows hold what networks take beside an observation, too. A sequence is
some rows in a row, from where a rollout began: there the state of the networks' memory is stored, as acting had it. It
goes on over the ends of episodes, where that state is reset.

Sources: Hausknecht and Stone, "Deep recurrent Q-learning for partially observable MDPs", 2015; Kapturowski et al.,
"Recurrent experience replay in distributed reinforcement learning", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.functional import random, tree
from rlmeta.learning import replay
from rlmeta.learning.collect import Rollout
from rlmeta.learning.minibatch import gather
from rlmeta.learning.state import State


def init(world: World, world_state: State, capacity: int, num_steps: int, inputs: tree.Tree) -> State:
    """Initial empty replay memory of sequences.

    Args:
        world: the environments.
        world_state: their state.
        capacity: rows for each of them.
        num_steps: steps of a rollout.
        inputs: of the networks for one step, `[*L, N, ...]`, with `hidden`, the state of their memories.
    """
    memory, axes = replay.init(world, world_state, capacity), len(world.learner_shape)
    kept = {name: value for name, value in inputs.items() if name not in ("observation", "hidden")}
    places, rows = -(-capacity // num_steps), memory["reward"].shape[axes]

    def ring(x: Tensor, rows: int = rows) -> Tensor:
        shape = (*x.shape[:axes], rows, *x.shape[axes:])
        return torch.zeros(shape, dtype=x.dtype, device=x.device)

    empty = torch.zeros_like(memory["written"])
    lags = {replay.LAGS: {"observation": memory[replay.LAGS]}} if replay.LAGS in memory else {}
    return {
        **memory,
        **lags,
        "observation": {**tree.map(ring, kept), "observation": memory["observation"], "begins": ring(empty.bool())},
        "hidden": tree.map(lambda x: ring(x, places), inputs["hidden"]),
        "starts": ring(empty, places),
        "rollouts": torch.zeros(world.learner_shape, dtype=torch.int64, device=empty.device),
        "resets": empty.bool(),
    }


@torch.no_grad()
def insert(
    memory: State, rollout: Rollout, inputs: tree.Tree, following: tree.Tree, reward: Tensor, learner_axes: int
) -> State:
    """Append a rollout `[*L, T, N, ...]`, over the oldest rows. Written in place.

    Args:
        memory: of `init`.
        rollout: as it was acted.
        inputs: of the networks for its steps.
        following: of the networks for what follows each step.
        reward: `[*L, T, N]`.
        learner_axes: how many leading axes are learner axes.
    """
    axes, number = learner_axes, memory["rollouts"]
    place = number % memory["starts"].shape[axes]
    begins = torch.cat(
        (memory["resets"].unsqueeze(axes), inputs["begins"].narrow(axes, 1, reward.shape[axes] - 1)), axes
    )

    def put(ring: Tensor, value: Tensor) -> Tensor:
        index = place.reshape(*place.shape, *(1,) * (ring.dim() - axes))
        value = value.unsqueeze(axes)
        return ring.scatter_(axes, index.expand(value.shape), value)

    tree.map(
        put, {n: memory[n] for n in ("hidden", "starts")}, {"hidden": inputs["hidden"], "starts": memory["written"]}
    )
    kept = [name for name in memory["observation"] if name != "begins"]
    rows = {
        "observation": {**{name: inputs[name] for name in kept}, "begins": begins},
        "next_observation": {**{name: following[name] for name in kept}, "begins": torch.zeros_like(begins)},
    }
    memory = replay.insert(memory, {**rollout, **rows}, reward, axes)
    memory["resets"] = rollout["memory_reset"].select(axes, -1).clone()
    memory["rollouts"] = number + 1
    return memory


@torch.no_grad()
def sample(memory: State, key: Tensor, sequences: int, length: int, gamma: Tensor, burn_in: int = 0) -> tree.Tree:
    """Draw sequences uniformly, and flatten them to transitions, time first.

    Args:
        memory: of `init` and `insert`, with at least `length` steps in every environment.
        key: `[K, *L]`: a minibatch for each of them.
        sequences: n, of every minibatch.
        length: T, of a sequence.
        gamma: `[*L]`.
        burn_in: first steps of a sequence that no loss counts, in which a state of old weights is left behind.

    Returns:
        `observation` and `next_observation`, inputs of networks with a memory, `action, reward, discount, valid`,
        `[K, *L, T * n, ...]`
    """
    axes = gamma.dim()
    place, env = _draw(memory, key, sequences, length)
    first = _of(memory, ("starts", "hidden"), (place * memory["written"].shape[-1] + env).unsqueeze(-1), axes)
    steps_in, pick = torch.arange(length + 1, device=key.device), replay.Picker(memory, axes, key.dim())
    rows = pick.rows(first["starts"] + steps_in, env.unsqueeze(-1))
    told = {name: pick(name, rows) for name in ("observation", "action", "reward", "terminated", "valid")}
    inputs = tree.map(lambda x: x.transpose(axes + 1, axes + 2), told.pop("observation"))

    def part(begin: int) -> tree.Tree:
        return tree.map(lambda x: x.narrow(axes + 1, begin, length).flatten(axes + 1, axes + 2), inputs)

    steps, following = part(0), part(1)
    hidden = tree.map(lambda x: x.squeeze(axes + 2), first["hidden"])
    del following["begins"]
    flat = {name: x.narrow(axes + 2, 0, length).transpose(axes + 1, axes + 2) for name, x in told.items()}
    counts = torch.arange(length, device=key.device).unsqueeze(-1) >= burn_in
    flat["valid"] = flat["valid"] & counts
    flat = {name: x.flatten(axes + 1, axes + 2) for name, x in flat.items()}
    return {  # the steps are there twice, as what goes before the following ones
        "observation": {**steps, "hidden": hidden},
        "next_observation": {**following, "hidden": hidden, "before": steps},
        "action": flat["action"],
        "reward": flat["reward"],
        "discount": gamma.unsqueeze(-1) * ~flat["terminated"],
        "valid": flat["valid"],
    }


def _draw(memory: State, key: Tensor, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw places of stored states whose next `length` rows are there, and their environments, `[K, *L, n]` each."""
    starts, written = memory["starts"], memory["written"].unsqueeze(-2)
    num_envs, oldest = written.shape[-1], written - memory["reward"].shape[-2] + replay.frames(memory) - 1
    stored = torch.arange(starts.shape[-2], device=key.device) < memory["rollouts"].unsqueeze(-1)
    whole = (starts + length <= written) & (starts > oldest) & stored.unsqueeze(-1)
    ends = whole.flatten(-2).long().cumsum(-1)
    number = random.integers(key, "replay", 0, (sequences,), ends[..., -1:])
    at = torch.searchsorted(ends.expand(*key.shape, -1).contiguous(), number, right=True)
    return at // num_envs, at % num_envs


def _of(memory: State, names: tuple[str, ...], rows: Tensor, axes: int) -> dict[str, Any]:
    """Gather entries of a ring `[*L, C, N, ...]` at folded rows `[K, *L, n, T]` of it: `[K, *L, n, T, ...]`."""
    index = rows.movedim(0, axes)
    folded = {name: tree.map(lambda x: x.flatten(axes, axes + 1), memory[name]) for name in names}
    found = gather(folded, index.flatten(axes))
    return {
        name: tree.map(lambda x: x.reshape(*index.shape, *x.shape[axes + 1 :]).movedim(axes, 0), value)
        for name, value in found.items()
    }
