"""Rollouts: act in the environments of all learners, and collect the transitions."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.engine.clock import clock
from rlmeta.engine.parts import FEW_ROWS, one_core
from rlmeta.envs.world import Transition, TrialTransition, World
from rlmeta.functional import random, tree
from rlmeta.functional.shapes import flags
from rlmeta.learning.state import Params, State

Rollout = dict[str, Any]
"""Rollout of `observation, next_observation, action, reward, terminated, truncated, valid, memory_reset`, all
`[*L, T, N, ...]`, and `first_memory` `[*L, N, ...]`, the agent's memory before the first step.

`next_observation` is the true successor, the final observation where an episode ended; `observation` at t + 1 is that
of the next episode. `memory_reset` at t says that the memory was cleared *after* step t. Of trials of several episodes
there is `ended` besides, where each of them ends.
"""


LAST_REWARD = "last_reward"
"""Name of the entry of a recurrent memory that holds the reward of the last step, if it is an input."""

START = "start"
"""Name of the entry of a recurrent memory that is 1 at the first step of an episode, else 0, if it is an input."""


class Actor(Protocol):
    """A learner that acts in environments."""

    noise_hold: int
    """Number of steps that share a random key."""

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions `[*L, N, ...]`, a sample or the mode of the policy; returns them and the new memory."""
        ...

    def initial_memory(self, p: Params, rows: tuple[int, ...]) -> tree.Tree:
        """Initial recurrent memory of `rows` `[*L, N]` environments, at the start of an episode."""
        ...

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes."""
        ...


@torch.no_grad()
def collect(agent: Actor, state: State, world: World, num_steps: int) -> tuple[State, Rollout]:
    """Collect a rollout of `num_steps` steps in every environment of every learner.

    Args:
        agent: acts; where it has a `capture`, its steps are recorded and replayed.
        state: consumed; `world`, `memory` and `count` move on.
        world: the environments, `[*L, N]`.
        num_steps: T.
    """
    axes = state["key"].dim()
    counter = state["count"]["vector_steps"]
    draws = torch.arange(num_steps, device=counter.device).reshape(-1, *(1,) * axes) + counter
    keys = random.fold(state["key"], draws // agent.noise_hold)
    take_steps = _recorded_steps if getattr(world, "recordable", False) and _capture(agent) is not None else _steps
    moving: tree.Tree = {"world": state["world"], "memory": state["memory"]}
    p = agent.effective_params(state)
    fixed = {"params": p, "initial": agent.initial_memory(p, (*state["key"].shape, world.num_envs))}
    with one_core(state["key"].numel() * world.num_envs <= FEW_ROWS):
        moving, rollout = take_steps(agent, world, fixed, moving, keys, axes)
    clock.switch("learn")
    first_memory, state["memory"], state["world"] = state["memory"], moving["memory"], moving["world"]
    count = state["count"]
    state["count"] = {
        **count,
        "vector_steps": counter + num_steps,
        "env_steps": count["env_steps"] + num_steps * world.num_envs,
    }
    return state, {**rollout, "first_memory": first_memory}


def _steps(
    agent: Actor, world: World, fixed: tree.Tree, moving: tree.Tree, keys: Tensor, axes: int
) -> tuple[tree.Tree, Rollout]:
    """Take a step with each of the keys `[T, *L]`; `moving` holds `world` and `memory`, and is returned updated.

    `fixed` is `params` and `initial`, the memory at the start of an episode.
    """
    rows: list[Rollout] = []
    acting, observation = {"params": fixed["params"]}, world.observation(moving["world"])
    for key in keys.unbind(0):
        clock.switch("act")
        action, memory = _act(agent, {**acting, "observation": observation, "memory": moving["memory"], "key": key})
        clock.switch("environment")
        world_state, transition = world.step(moving["world"], action)
        moving = {"world": world_state, "memory": remember(memory, fixed["initial"], transition)}
        rows.append({"observation": observation, "action": action, **_entries_of(transition)})
        observation = transition.observation
    return moving, tree.map(lambda *steps: torch.stack(steps, axes), *rows)


def _recorded_steps(
    agent: Any, world: Any, fixed: tree.Tree, moving: tree.Tree, keys: Tensor, axes: int
) -> tuple[tree.Tree, Rollout]:
    """Take steps as `_steps` does, as one recorded program for as many steps as predrawn random numbers suffice."""
    clock.switch("act")

    name, defers = ("steps of the world", world), getattr(world, "defers", False)
    later = {"deferred": True} if defers else {}

    def step(inputs: tree.Tree) -> tree.Tree:
        moving, fixed = inputs["carried"], inputs["fixed"]
        observation = world.observation(moving["world"])
        action, memory = agent.act(fixed["params"], observation, moving["memory"], inputs["each"]["key"])
        world_state, transition = world.step(moving["world"], action, fixed["predrawn_noise"], **later)
        memory = remember(memory, fixed["initial"], transition)
        row = {"observation": observation, "action": action, **_entries_of(transition)}
        return {"carried": {"world": world_state, "memory": memory}, "row": row}

    pieces: list[Rollout] = []
    while len(keys):
        predrawn_noise, lasting = world.predraw_noise(moving["world"])
        now, keys = keys[:lasting], keys[lasting:]
        now_fixed = {**fixed, "predrawn_noise": predrawn_noise}
        moving, rows = agent.capture.scan(name, step, moving, now_fixed, {"key": now}, len(now), axes)
        pieces.append(rows)
    rollout = pieces[0] if len(pieces) == 1 else tree.map(lambda *piece: torch.cat(piece, axes), *pieces)
    if defers:
        rollout["next_observation"] = world.observe(rollout["next_observation"])
    return moving, rollout


def _capture(agent: Actor) -> Capture | None:
    return getattr(agent, "capture", None)


def _act(agent: Actor, inputs: tree.Tree) -> tuple[Tensor, tree.Tree]:
    """Choose actions by `agent.act`, recorded and replayed if the agent has a `capture`."""

    def act(inputs: tree.Tree) -> tree.Tree:
        action, memory = agent.act(inputs["params"], inputs["observation"], inputs["memory"], inputs["key"])
        return {"action": action, "memory": memory}

    capture = _capture(agent)
    outputs = act(inputs) if capture is None else capture("acting", act, inputs)
    return outputs["action"], outputs["memory"]


def _entries_of(transition: Transition | TrialTransition) -> Rollout:
    entries = transition._asdict()
    del entries["observation"]
    return entries | {name: flags(entries[name], name) for name in ("terminated", "truncated", "valid")}


def remember(memory: tree.Tree, initial: tree.Tree, transition: Transition | TrialTransition) -> tree.Tree:
    """Update the recurrent memory `[*L, N, ...]` after a step: add the reward, and reset it at ends of episodes.

    Args:
        memory: as `act` left it.
        initial: at the start of an episode: that of the rows whose memory is to be reset.
        transition: the step; its reward is written where the actor sees rewards (`LAST_REWARD`), and whether an episode
            of a trial ended where it sees starts (`START`).
    """
    if not memory:
        return memory
    if LAST_REWARD in memory:
        memory = {**memory, LAST_REWARD: transition.reward}
    if START in memory and isinstance(transition, TrialTransition):
        memory = {**memory, START: transition.ended.to(memory[START].dtype)}
    reset = transition.memory_reset

    def leaf(fresh: Tensor, kept: Tensor) -> Tensor:
        return torch.where(reset.reshape(reset.shape + (1,) * (kept.dim() - reset.dim())), fresh, kept)

    return tree.map(leaf, initial, memory)


def episode_statistics(state: State, rollout: Rollout) -> tuple[State, dict[str, Tensor]]:
    """Returns and lengths of the episodes that ended within the rollout.

    Returns:
        The state with the running sums moved on, and `[*L]`: `return_sum`, `length_sum` and `episodes` of the episodes
        that ended (the caller divides once it reports).
    """
    axes = state["key"].dim()
    ended = rollout["ended"] if "ended" in rollout else rollout["terminated"] | rollout["truncated"]
    ended, valid = ended & rollout["valid"], rollout["valid"]
    numbers = torch.arange(1, ended.shape[axes] + 1, device=ended.device).unsqueeze(-1)
    last = (ended * numbers).amax(axes)  # the number of the last step, from 1, that ended an episode; 0 without one
    in_ended, has_ended = numbers <= last.unsqueeze(axes), last > 0
    sums, running = [], []
    for value, before in (
        ((rollout["reward"] * valid).double(), state["episode"]["return"]),
        (valid.to(state["episode"]["length"].dtype), state["episode"]["length"]),
    ):
        none, nothing = torch.zeros_like(value), torch.zeros_like(before)
        finished = torch.where(in_ended, value, none).sum(axes) + torch.where(has_ended, before, nothing)
        sums.append(finished.double().sum(-1))
        running.append(torch.where(in_ended, none, value).sum(axes) + torch.where(has_ended, nothing, before))
    state["episode"] = {"return": running[0], "length": running[1]}
    episodes = ended.sum((axes, axes + 1)).double()
    return state, {"return_sum": sums[0], "length_sum": sums[1], "episodes": episodes}
