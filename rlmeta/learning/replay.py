"""Replay memory with learner axes: every learner has its own transitions and draws its own minibatches.

A memory is a ring of C rows for each of N environments, `[*L, C, N, ...]`. A row holds an observation, and what was
done there; its successor is the observation of the next row, so no observation is stored twice. The final observation
of an episode has a row of its own, in which nothing was done. Because the order is kept, n-step returns are added up
when a minibatch is drawn, never across the end of an episode.
"""

from __future__ import annotations

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.functional import random, tree
from rlmeta.functional.axes import align
from rlmeta.learning.collect import Rollout
from rlmeta.learning.state import State

FLAGS = ("terminated", "truncated", "valid")

PRIORITY, LARGEST = "priority", "largest"
"""Names of what a prioritised memory has besides: p^α of every row `[*L, C, N]`, 0 where nothing was done (the final
observation of an episode, a row that is about to be overwritten), and the largest so far `[*L]`, 0 before the first."""

_TRIES = 4
"""Rows drawn for a transition; the first in which something was done is taken. Only every so many episodes' length to
the power of this is none found, and then a loss does not count it."""


def init(world: World, world_state: State, capacity: int, prioritised: bool = False) -> State:
    """Initial empty replay memory of `capacity` rows for each of the environments of a world.

    A prioritised one (`learning.prioritised`) has a priority for every row besides.
    """
    axes = len(world.learner_shape)
    observation = world.observation(world_state)
    rows = (*world.learner_shape, capacity, world.num_envs)
    device = next(tree.leaves(observation)).device
    shape, continuous = world.action_space.shape or (), isinstance(world.action_space, gym.spaces.Box)

    def like(x: Tensor) -> Tensor:
        return torch.zeros(*rows, *x.shape[axes + 1 :], dtype=x.dtype, device=device)

    priorities = {
        PRIORITY: torch.zeros(rows, dtype=torch.float32, device=device),
        LARGEST: torch.zeros(world.learner_shape, dtype=torch.float32, device=device),
    }
    return {
        "observation": tree.map(like, observation),
        "action": torch.zeros(*rows, *shape, dtype=torch.float32 if continuous else torch.int64, device=device),
        "reward": torch.zeros(rows, dtype=torch.float32, device=device),
        **{name: torch.zeros(rows, dtype=torch.bool, device=device) for name in FLAGS},
        "written": torch.zeros(*world.learner_shape, world.num_envs, dtype=torch.int64, device=device),
        **(priorities if prioritised else {}),
    }


@torch.no_grad()
def insert(memory: State, rollout: Rollout, reward: Tensor, learner_axes: int) -> State:
    """Append a rollout `[*L, T, N, ...]`, over the oldest transitions. Written in place.

    In a prioritised memory new transitions have the largest priority so far, or 1.
    """
    axes, written = learner_axes, memory["written"]
    capacity, length = memory["reward"].shape[axes], reward.shape[axes]
    ended = rollout["terminated"] | rollout["truncated"]
    finals = ended.long().cumsum(axes) - ended.long()  # rows of final observations before each step
    steps = torch.arange(length, device=reward.device).reshape(length, 1)
    row = written.unsqueeze(axes) + steps + finals
    done = {name: rollout[name] for name in ("action", *FLAGS)} | {"reward": reward}
    _write(memory["observation"], rollout["next_observation"], (row + 1) % capacity, axes)
    _write(memory["observation"], rollout["observation"], row % capacity, axes)
    _write(memory["valid"], torch.zeros_like(ended), (row + 1) % capacity, axes)
    if PRIORITY in memory:
        largest = memory[LARGEST]
        done[PRIORITY] = rollout["valid"] * align(torch.where(largest > 0, largest, 1.0), reward)
        _write(memory[PRIORITY], torch.zeros_like(reward), (row + 1) % capacity, axes)
    _write({name: memory[name] for name in done}, done, row % capacity, axes)
    memory["written"] = written + length + ended.long().sum(axes)
    return memory


def _write(ring: tree.Tree, values: tree.Tree, row: Tensor, axes: int) -> None:
    """Write into the ring buffer, `ring[l, row[l, t, n], n] = values[l, t, n]`, in place."""

    def put(ring: Tensor, value: Tensor) -> Tensor:
        index = row.reshape(*row.shape, *(1,) * (value.dim() - row.dim())).expand(value.shape)
        return ring.scatter_(axes, index, value.to(ring.dtype))

    tree.map(put, ring, values)


@torch.no_grad()
def cut(memory: State, learner_axes: int, rows: Tensor | None = None) -> State:
    """Truncate the running episodes at the newest step, before those of another task. Written in place.

    Args:
        memory: of `init` and `insert`.
        learner_axes: how many leading axes are learner axes.
        rows: `[*L, N]` bool, the environments whose episodes end; None for all.
    """
    axes, written = learner_axes, memory["written"]
    capacity = memory["reward"].shape[axes]
    begun = (written > 0 if rows is None else (written > 0) & rows).unsqueeze(axes)
    newest = ((written - 1).unsqueeze(axes)) % capacity
    last = memory["truncated"].gather(axes, newest)
    already = memory["terminated"].gather(axes, newest) | last | ~memory["valid"].gather(axes, newest)
    memory["truncated"].scatter_(axes, newest, last | (begun & ~already))
    memory["written"] = written + (begun & ~already).squeeze(axes).long()
    if "resets" in memory:  # of sequences
        memory["resets"] = torch.ones_like(memory["resets"]) if rows is None else memory["resets"] | rows
    return memory


@torch.no_grad()
def sample(memory: State, key: Tensor, batch_size: int, gamma: Tensor, n_steps: int = 1) -> tree.Tree:
    """Draw transitions uniformly, with n-step returns.

    reward = sum of gamma^k r_{t+k} for k < m, discount = gamma^m (1 - terminated), with m = n_steps or where the
    episode ended before; `next_observation` is the true successor after these m steps.

    Args:
        memory: of `init` and `insert`, with at least `n_steps` steps in every environment.
        key: `[*K, *L]`: a minibatch for every one of them.
        batch_size: B.
        gamma: `[*L]`.
        n_steps: n.

    Returns:
        `observation, action, reward, discount, next_observation, valid`, `[*K, *L, B, ...]`
    """
    pick = _Picker(memory, gamma.dim(), key.dim())
    t, env = _draw(memory, key, batch_size, n_steps, pick)
    return _transitions(pick, t, env, gamma, n_steps)


def transitions(memory: State, t: Tensor, env: Tensor, gamma: Tensor, n_steps: int = 1) -> tree.Tree:
    """Transitions of rows `t` of environments `env`, `[*K, *L, B]` each; else as `sample`."""
    return _transitions(_Picker(memory, gamma.dim(), t.dim() - 1), t, env, gamma, n_steps)


def _transitions(pick: _Picker, t: Tensor, env: Tensor, gamma: Tensor, n_steps: int) -> tree.Tree:
    """Add up the rewards of the transitions at rows `t` of environments `env`, and gather their observations."""
    gamma = gamma.unsqueeze(-1)
    first = last = pick.rows(t, env)
    reward, after = pick("reward", first), t + 1
    alive, discount = torch.ones_like(first, dtype=torch.bool), gamma * ~pick("terminated", first)
    for k in range(1, n_steps):
        alive = alive & ~(pick("terminated", last) | pick("truncated", last))
        row = pick.rows(t + k, env)
        reward = reward + torch.where(alive, discount * pick("reward", row), 0.0)
        discount = torch.where(alive, discount * gamma * ~pick("terminated", row), discount)
        last, after = torch.where(alive, row, last), torch.where(alive, t + k + 1, after)
    return {
        "observation": pick("observation", first),
        "action": pick("action", first),
        "reward": reward,
        "discount": discount,
        "next_observation": pick("observation", pick.rows(after, env)),
        "valid": pick("valid", first),
    }


def _draw(memory: State, key: Tensor, batch_size: int, n_steps: int, pick: _Picker) -> tuple[Tensor, Tensor]:
    """Draw rows of transitions and their environments uniformly, `[*K, *L, B]` each."""
    written = memory["written"]
    oldest = (written - (pick.capacity - 1)).clamp(min=0)
    rows = (written - n_steps + 1 - oldest).clamp(min=0)
    ends = rows.cumsum(-1)
    number = random.integers(key, "replay", 0, (batch_size * _TRIES,), ends[..., -1:])
    env = torch.searchsorted(ends.expand(*key.shape, -1).contiguous(), number, right=True)
    t = number + (oldest - (ends - rows)).expand(*key.shape, -1).gather(-1, env)
    t, env = (x.reshape(*x.shape[:-1], batch_size, _TRIES) for x in (t, env))
    acted = pick("valid", pick.rows(t, env))
    chosen = acted.long().argmax(-1, keepdim=True)  # the first that is set, or the first of all
    return t.gather(-1, chosen).squeeze(-1), env.gather(-1, chosen).squeeze(-1)


class _Picker:
    """Gather of rows `[*K, *L, ...]` from the memory folded to `[L * C * N, ...]`."""

    def __init__(self, memory: State, axes: int, leading: int) -> None:
        self.memory, self.axes, self.leading = memory, axes, leading
        self.capacity, self.num_envs = memory["reward"].shape[axes : axes + 2]
        learners = memory["reward"].shape[:axes]
        self.base = torch.arange(learners.numel(), device=memory["reward"].device).reshape(learners)

    def rows(self, t: Tensor, env: Tensor) -> Tensor:
        """Convert rows `t` of environments `env` to folded rows."""
        base = self.base.reshape(*self.base.shape, *(1,) * (t.dim() - self.leading))
        return (base * self.capacity + t % self.capacity) * self.num_envs + env

    def __call__(self, name: str, rows: Tensor) -> tree.Tree:
        """Gather a field of the transitions at these rows."""
        axes = self.axes + 2

        def read(x: Tensor) -> Tensor:
            return x.reshape(-1, *x.shape[axes:]).index_select(0, rows.flatten()).reshape(*rows.shape, *x.shape[axes:])

        return tree.map(read, self.memory[name])


def draw(memory: State, key: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Draw the rows `t` of transitions and their environments, `[*K, *L, B]` each, as `sample` does."""
    return _draw(memory, key, batch_size, 1, _Picker(memory, memory["written"].dim() - 1, key.dim()))


def rows_of(memory: State, name: str, t: Tensor, env: Tensor) -> tree.Tree:
    """Gather an entry of a memory at rows `t` of environments `env`, `[*K, *L, B]` each: `[*K, *L, B, ...]`."""
    pick = _Picker(memory, memory["written"].dim() - 1, t.dim() - 1)
    return pick(name, pick.rows(t, env))
