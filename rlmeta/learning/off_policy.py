"""Off-policy learning: fill a replay memory, take gradient steps on its minibatches, update target networks.

What DQN, SAC, TD3 and DDPG share. Their settings have `num_envs, num_steps, gradient_steps, batch_size, capacity,
learning_starts`, and `gamma` is among their settings per learner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.engine.parts import in_parts
from rlmeta.envs.world import World
from rlmeta.functional import random, tree
from rlmeta.functional.schedules import linear
from rlmeta.learning import replay, sequences
from rlmeta.learning.collect import Rollout
from rlmeta.learning.gradients import HasLosses
from rlmeta.learning.groups import Group
from rlmeta.learning.method import Method
from rlmeta.learning.prioritised import Prioritised, fixed, moving, with_moved
from rlmeta.learning.settings import require, require_range
from rlmeta.learning.state import State
from rlmeta.learning.step import replay_steps
from rlmeta.learning.targets import Copy


class OffPolicySettings(Protocol):
    """Settings of an algorithm that learns from a replay memory."""

    @property
    def num_envs(self) -> int:
        """Environments of each learner."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps in every environment between updates."""
        ...

    @property
    def gradient_steps(self) -> int:
        """Gradient steps in each update."""
        ...

    @property
    def batch_size(self) -> int:
        """Transitions in a minibatch."""
        ...

    @property
    def capacity(self) -> int:
        """Transitions that each learner's memory holds."""
        ...

    @property
    def learning_starts(self) -> int:
        """Transitions collected before the first gradient step."""
        ...


class OffPolicyLearner(HasLosses, Protocol):
    """An algorithm that learns from a replay memory."""

    settings: Any
    methods: tuple[Method, ...]
    capture: Any

    @property
    def sequential(self) -> bool:
        """Whether its networks have a memory, and learn from sequences of `sequence_length` steps."""
        ...

    def inputs(self, rollout: Rollout) -> tree.Tree:
        """Network inputs for every step of a rollout."""
        ...

    def next_inputs(self, rollout: Rollout) -> tree.Tree:
        """Network inputs for the next observation of every step of a rollout."""
        ...


def check_settings(settings: OffPolicySettings, n_steps: int = 1) -> None:
    """Check that the settings leave transitions to learn from.

    Raises:
        SettingError: with what to change.
    """
    name = type(settings).__name__
    for field in ("num_envs", "num_steps", "gradient_steps", "batch_size", "capacity"):
        require_range(settings, field, 1)
    require_range(settings, "learning_starts", 0)
    rows, least = settings.capacity // settings.num_envs, 2 * settings.num_steps + n_steps
    require(
        rows >= least,
        f"{name}: capacity {settings.capacity} holds {rows} steps of {settings.num_envs} environments, expected at "
        f"least 2 num_steps + n_steps = {least}",
    )
    require(
        settings.learning_starts <= settings.capacity,
        f"{name}: learning_starts {settings.learning_starts} is more than capacity {settings.capacity}",
    )


def idle_steps(settings: OffPolicySettings, n_steps: int = 1) -> int:
    """Steps of every environment before the first gradient step."""
    return max(-(-settings.learning_starts // settings.num_envs), n_steps)


def init_replay(
    settings: OffPolicySettings,
    world: World,
    state: State,
    inputs: tree.Tree | None = None,
    prioritised: bool = False,
) -> State:
    """Initial empty replay memory, for `state["replay"]`; of sequences, given `inputs` of networks with a memory."""
    rows = settings.capacity // settings.num_envs
    if inputs is None:
        return replay.init(world, state["world"], rows, prioritised)
    return sequences.init(world, state["world"], rows, settings.num_steps, inputs)


def forget(state: State) -> None:
    """Empty the replay memory at the start of a new task."""
    state["replay"] = tree.map(torch.zeros_like, state["replay"])


def remember(learner: OffPolicyLearner, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> None:
    """Write a rollout with its total reward into the replay memory."""
    reward, axes = torch.stack(list(rewards.values())).sum(0), state["key"].dim()
    if learner.sequential:
        inputs = learner.inputs(rollout), learner.next_inputs(rollout)
        state["replay"] = sequences.insert(state["replay"], rollout, *inputs, reward, axes)
    else:
        state["replay"] = replay.insert(state["replay"], rollout, reward, axes)


def ready(learner: OffPolicyLearner, state: State, n_steps: int = 1) -> bool:
    """Whether the replay memory has `learning_starts` transitions, with the rollout of this iteration."""
    s = learner.settings
    steps = int(state["count"]["task_steps"].max()) + s.num_steps
    return steps * s.num_envs >= s.learning_starts and steps >= n_steps


def warms_up(learner: OffPolicyLearner, state: State) -> Tensor:
    """Whether a learner `[*L]` is in its warm-up of random actions, before its first gradient step."""
    return state["count"]["task_steps"] * learner.settings.num_envs < learner.settings.learning_starts


def end_warm_up(state: State) -> None:
    """End the warm-up of random actions."""
    hyper = state["params"]["hyper"]
    hyper["warms_up"] = torch.zeros_like(hyper["warms_up"])


def learn(
    learner: OffPolicyLearner,
    state: State,
    cycle: Callable[[State], Sequence[Sequence[Group]]],
    copies: Mapping[Copy, Tensor],
    n_steps: int = 1,
    *,
    prioritised: bool = False,
    draw: Callable[[State, Tensor, int, Tensor, int], tree.Tree] = replay.sample,
) -> tuple[State, dict[str, Tensor]]:
    """Take `gradient_steps` steps on minibatches from the replay memory, with the learners split over all cores.

    Args:
        learner: gives the losses; where the memory is prioritised also the errors of the samples, in their context.
        state: consumed.
        cycle: from a state to the groups that move in the first step, the second, ..., and again from the start.
        copies: which target networks move after each step, and how far, `[gradient_steps, *L]` each.
        n_steps: rewards that are added up before a target network's value takes over.
        prioritised: whether transitions are drawn by their priorities (`learning.prioritised`), which each step
            changes, instead of uniformly; `priority_exponent` and `importance_exponent` are settings per learner.
        draw: draws the others, as `replay.sample` or `learning.hindsight`.

    Returns:
        The new state, and the means of the reports of the cycles' last steps, `{name: [*L]}`.
    """
    s, axes, memory = learner.settings, state["key"].dim(), state.pop("replay")  # not copied to the cores
    first = state["count"]["gradient_steps"]
    numbers = first + torch.arange(s.gradient_steps, device=first.device).reshape(-1, *(1,) * axes)
    keys = random.fold(state["key"], numbers)
    gamma = state["params"]["hyper"]["gamma"]
    drawn: tree.Tree = {"keys": keys, "rates": {copy.name: rate for copy, rate in copies.items()}}
    source = Prioritised(s.batch_size, n_steps) if prioritised else None
    if prioritised:
        state["source"] = moving(memory, n_steps)
    elif learner.sequential:
        number = s.batch_size // s.sequence_length
        drawn["batches"] = sequences.sample(memory, keys, number, s.sequence_length, gamma, s.burn_in)
    else:
        drawn["batches"] = draw(memory, keys, s.batch_size, gamma, n_steps)

    def steps(state: State, drawn: tree.Tree, memory: State) -> tuple[State, dict[str, Tensor]]:
        moved = {copy: drawn["rates"][copy.name] for copy in copies}
        batches = drawn["batches"] if source is None else _fixed(memory, state)
        return replay_steps(
            learner, state, batches, drawn["keys"], cycle(state), copies=moved, methods=learner.methods, source=source
        )

    def some(state: State, drawn: tree.Tree) -> tuple[State, dict[str, Tensor]]:
        own = drawn.pop("learner").flatten(1)[:, 0]
        part = tree.map(lambda x: x.narrow(0, int(own[0]), len(own)), memory)
        return steps(state, tree.map(lambda x: x.movedim(axes, 0).contiguous(), drawn), part)

    if learner.capture is None or learner.methods or not axes:
        state, info = steps(state, drawn, memory)
    else:
        number = torch.arange(len(first), device=first.device).reshape(-1, *(1,) * (axes - 1)).expand_as(first)
        by_learner = tree.map(lambda x: x.movedim(0, axes), drawn)
        state, info = in_parts(some, state, {**by_learner, "learner": number.unsqueeze(-1)})
    state["replay"] = with_moved(memory, state.pop("source"), n_steps) if prioritised else memory
    return state, info


def _fixed(memory: State, state: State) -> State:
    """What a prioritised source of minibatches reads; the importance exponent rises to 1 with the progress."""
    h = state["params"]["hyper"]
    beta = torch.as_tensor(linear(h["importance_exponent"], 1.0)(state["progress"]))
    return fixed(memory, h["gamma"], h["priority_exponent"], beta)
