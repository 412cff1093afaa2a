"""Replay memory with learner axes: every learner has its own transitions and draws its own minibatches.

A memory is a ring of C rows for each of N environments, `[*L, C, N, ...]`. A row holds an observation, and what was
done there; its successor is the observation of the next row, so no observation is stored twice. The final observation
of an episode has a row of its own, in which nothing was done. Because the order is kept, n-step returns are added up
when a minibatch is drawn, never across the end of an episode.

Of a stack of frames (`data.spaces.FrameStack`) a row holds the newest one, and `lags`, how many rows before it each of
its frames lies: k - 1, ..., 1, 0, and at most as many as its episode has, whose first frame fills the stack up. Stacks
are put together when a minibatch is drawn. The ring is k - 1 rows longer, which hold frames of rows after them alone.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.data.spaces import FrameStack, Layout
from rlmeta.envs.world import World
from rlmeta.functional import random, tree
from rlmeta.functional.axes import align
from rlmeta.learning.collect import Rollout
from rlmeta.learning.state import State

FLAGS = ("terminated", "truncated", "valid")

PRIORITY, LARGEST = "priority", "largest"
"""Names of what a prioritised memory has besides: p^α of every row `[*L, C, N]`, 0 where nothing was done (the final
observation of an episode, a row that is about to be overwritten), and the largest so far `[*L]`, 0 before the first."""

LAGS, AGE = "lags", "age"
"""Names of what a memory of stacked frames has besides: rows between a row and each of its frames `[*L, C, N, k]`, a
tree of the observation's stacks alone, and the steps since the start of each environment's episode `[*L, N]`."""

_TRIES = 4
"""Rows drawn for a transition; the first in which something was done is taken. Only every so many episodes' length to
the power of this is none found, and then a loss does not count it."""


def init(world: World, world_state: State, capacity: int, prioritised: bool = False) -> State:
    """Initial empty replay memory of `capacity` rows for each of the environments of a world.

    A prioritised one (`learning.prioritised`) has a priority for every row besides. Of observations that the world's
    space declares to be stacks of frames, each frame is stored once.
    """
    axes = len(world.learner_shape)
    observation = world.observation(world_state)
    stacks = _stacks(world)
    rows = (*world.learner_shape, capacity + max(stacks.values(), default=1) - 1, world.num_envs)
    device = next(tree.leaves(observation)).device
    shape, continuous = world.action_space.shape or (), isinstance(world.action_space, gym.spaces.Box)
    empty = torch.zeros(*world.learner_shape, world.num_envs, dtype=torch.int64, device=device)

    def like(name: str, x: Tensor) -> Tensor:
        return torch.zeros(*rows, *x.shape[axes + 1 + (name in stacks) :], dtype=x.dtype, device=device)

    lags = {name: torch.zeros(*rows, k, dtype=torch.int64, device=device) for name, k in stacks.items()}

    priorities = {
        PRIORITY: torch.zeros(rows, dtype=torch.float32, device=device),
        LARGEST: torch.zeros(world.learner_shape, dtype=torch.float32, device=device),
    }
    return {
        "observation": tree.unflatten({name: like(name, x) for name, x in tree.flatten(observation).items()}),
        "action": torch.zeros(*rows, *shape, dtype=torch.float32 if continuous else torch.int64, device=device),
        "reward": torch.zeros(rows, dtype=torch.float32, device=device),
        **{name: torch.zeros(rows, dtype=torch.bool, device=device) for name in FLAGS},
        "written": empty,
        **({LAGS: tree.unflatten(lags), AGE: empty.clone()} if lags else {}),
        **(priorities if prioritised else {}),
    }


def _stacks(world: World) -> dict[str, int]:
    """Frames of every leaf of an observation that is a stack of them."""
    leaves = Layout(world.observation_space).leaves
    return {leaf.name: leaf.shape[0] for leaf in leaves if isinstance(leaf.space, FrameStack)}


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
    _write_seen(memory, rollout, row, axes)
    _write(memory["valid"], torch.zeros_like(ended), (row + 1) % capacity, axes)
    if PRIORITY in memory:
        largest = memory[LARGEST]
        done[PRIORITY] = rollout["valid"] * align(torch.where(largest > 0, largest, 1.0), reward)
        for ahead in range(frames(memory), 0, -1):  # of these the frames, or the successor's, are overwritten
            _write(memory[PRIORITY], torch.zeros_like(reward), (row + ahead) % capacity, axes)
    _write({name: memory[name] for name in done}, done, row % capacity, axes)
    memory["written"] = written + length + ended.long().sum(axes)
    return memory


def _write_seen(memory: State, rollout: Rollout, row: Tensor, axes: int) -> None:
    """Write the observations of rows `[*L, T, N]`, and of what follows them; of stacks the newest frames."""
    capacity = memory["reward"].shape[axes]
    seen, following = rollout["observation"], rollout["next_observation"]
    if LAGS in memory:
        age = _ages(memory, rollout["memory_reset"], axes)
        _write(memory[LAGS], _lags_at(age + 1, memory[LAGS]), (row + 1) % capacity, axes)
        _write(memory[LAGS], _lags_at(age, memory[LAGS]), row % capacity, axes)
        seen, following = (_with_lags(_newest, x, memory[LAGS]) for x in (seen, following))
    _write(memory["observation"], following, (row + 1) % capacity, axes)
    _write(memory["observation"], seen, row % capacity, axes)


def _ages(memory: State, resets: Tensor, axes: int) -> Tensor:
    """Steps of its episode before every step of a rollout `[*L, T, N]`; the memory's own then counts on after it."""
    steps = torch.arange(resets.shape[axes], device=resets.device).unsqueeze(-1)
    earlier = resets.narrow(axes, 0, resets.shape[axes] - 1)
    begun = torch.where(earlier, steps[1:], -memory[AGE].unsqueeze(axes))
    first = torch.cat((-memory[AGE].unsqueeze(axes), begun), axes).cummax(axes).values
    age = steps - first
    memory[AGE] = torch.where(resets.select(axes, -1), 0, age.select(axes, -1) + 1)
    return age


def _lags_at(age: Tensor, lags: tree.Tree) -> tree.Tree:
    """Rows before rows of this age at which their frames lie, `[..., k]` each, for rings of such lags."""

    def of_stack(ring: Tensor) -> Tensor:
        return torch.minimum(torch.arange(ring.shape[-1] - 1, -1, -1, device=age.device), age.unsqueeze(-1))

    return tree.map(of_stack, lags)


def _newest(x: Tensor, lags: Tensor | None) -> Tensor:
    """The newest frame of a stack, anything else as it is."""
    return x if lags is None else x.select(lags.dim() - 1, -1)


def _with_lags(function: Callable[[Tensor, Tensor | None], Tensor], x: tree.Tree, lags: tree.Tree | None) -> tree.Tree:
    """Apply a function to all leaves of an observation, and to the lags of those that are stacks."""
    if isinstance(x, dict):
        parts = lags if isinstance(lags, dict) else {}
        return {name: _with_lags(function, value, parts.get(name)) for name, value in x.items()}
    return function(x, lags)


def frames(memory: State) -> int:
    """Frames of the longest stack; 1 without stacks."""
    return max((x.shape[-1] for x in tree.leaves(memory.get(LAGS, {}))), default=1)


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
    if LAGS in memory:
        memory[AGE] = torch.zeros_like(written) if rows is None else memory[AGE].masked_fill(rows, 0)
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
    pick = Picker(memory, gamma.dim(), key.dim())
    t, env = _draw(memory, key, batch_size, n_steps, pick)
    return _transitions(pick, t, env, gamma, n_steps)


def transitions(memory: State, t: Tensor, env: Tensor, gamma: Tensor, n_steps: int = 1) -> tree.Tree:
    """Transitions of rows `t` of environments `env`, `[*K, *L, B]` each; else as `sample`."""
    return _transitions(Picker(memory, gamma.dim(), t.dim() - 1), t, env, gamma, n_steps)


def _transitions(pick: Picker, t: Tensor, env: Tensor, gamma: Tensor, n_steps: int) -> tree.Tree:
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


def _draw(memory: State, key: Tensor, batch_size: int, n_steps: int, pick: Picker) -> tuple[Tensor, Tensor]:
    """Draw rows of transitions and their environments uniformly, `[*K, *L, B]` each."""
    written = memory["written"]
    oldest = (written - (pick.capacity - pick.frames)).clamp(min=0)
    rows = (written - n_steps + 1 - oldest).clamp(min=0)
    ends = rows.cumsum(-1)
    number = random.integers(key, "replay", 0, (batch_size * _TRIES,), ends[..., -1:])
    env = torch.searchsorted(ends.expand(*key.shape, -1).contiguous(), number, right=True)
    t = number + (oldest - (ends - rows)).expand(*key.shape, -1).gather(-1, env)
    t, env = (x.reshape(*x.shape[:-1], batch_size, _TRIES) for x in (t, env))
    acted = pick("valid", pick.rows(t, env))
    chosen = acted.long().argmax(-1, keepdim=True)  # the first that is set, or the first of all
    return t.gather(-1, chosen).squeeze(-1), env.gather(-1, chosen).squeeze(-1)


class Picker:
    """Gather of rows `[*K, *L, ...]` from the memory folded to `[L * C * N, ...]`.

    Args:
        memory: of `init` and `insert`.
        axes: how many leading axes of it are learner axes.
        leading: of the rows, K included.
    """

    def __init__(self, memory: State, axes: int, leading: int) -> None:
        self.memory, self.axes, self.leading = memory, axes, leading
        self.capacity, self.num_envs = memory["reward"].shape[axes : axes + 2]
        self.frames = frames(memory)
        learners = memory["reward"].shape[:axes]
        self.base = torch.arange(learners.numel(), device=memory["reward"].device).reshape(learners)

    def rows(self, t: Tensor, env: Tensor) -> Tensor:
        """Convert rows `t` of environments `env` to folded rows."""
        base = self.base.reshape(*self.base.shape, *(1,) * (t.dim() - self.leading))
        return (base * self.capacity + t % self.capacity) * self.num_envs + env

    def __call__(self, name: str, rows: Tensor) -> tree.Tree:
        """Gather a field of the transitions at these rows, stacks of frames put together."""
        lags = self.memory.get(LAGS) if name == "observation" else None
        return _with_lags(lambda x, back: self._read(x, self._frames_of(rows, back)), self.memory[name], lags)

    def _frames_of(self, rows: Tensor, lags: Tensor | None) -> Tensor:
        """Folded rows of the frames of stacks, `[..., k]`; the rows themselves without."""
        if lags is None:
            return rows
        place = rows.div(self.num_envs, rounding_mode="floor").unsqueeze(-1) % self.capacity
        earlier = (place - self._read(lags, rows)) % self.capacity
        return rows.unsqueeze(-1) + (earlier - place) * self.num_envs

    def _read(self, x: Tensor, rows: Tensor) -> Tensor:
        inner = x.shape[self.axes + 2 :]
        return x.reshape(-1, *inner).index_select(0, rows.flatten()).reshape(*rows.shape, *inner)


def draw(memory: State, key: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Draw the rows `t` of transitions and their environments, `[*K, *L, B]` each, as `sample` does."""
    return _draw(memory, key, batch_size, 1, Picker(memory, memory["written"].dim() - 1, key.dim()))


def rows_of(memory: State, name: str, t: Tensor, env: Tensor) -> tree.Tree:
    """Gather an entry of a memory at rows `t` of environments `env`, `[*K, *L, B]` each: `[*K, *L, B, ...]`."""
    pick = Picker(memory, memory["written"].dim() - 1, t.dim() - 1)
    return pick(name, pick.rows(t, env))
