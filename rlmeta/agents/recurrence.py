"""Memories of agents, recurrent networks or attention: their states, and inputs such as the last action and reward.

A network with a memory takes `inputs` in the place of an observation:

    observation  `[*L, *lead, ...]`
    hidden       `{network: {name: [*L, *rows, ...]}}`, the state of its memory before the first of the steps
    begins       `[*L, *lead]` bool, absent for a single step: the state is reset to that of an episode's start
    last         `[*L, *lead, D]`, the additional inputs, absent where there are none
    before       where observation and last are what follows each step: observation, last and begins of the steps

where `lead` is `[N]` as it acts, `[T, N]` in a rollout and `[T * B]`, time first, in a loss. A minibatch holds whole
sequences: an item of it is a row of the rollout, `[*L, B, T, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.collect import LAST_REWARD, START, Rollout
from rlmeta.learning.settings import require, require_range
from rlmeta.nn import ActionUnits, AttentionMemory, Block, Context, Encoder, Params, Recurrent
from rlmeta.nn.block import learner_axes

MemoryName: TypeAlias = Literal["none", "gru", "lstm", "attention"]
"""Kind of memory: a gated recurrent unit (GRU), an LSTM, or attention over the last steps; "none" for no memory."""

SeenName: TypeAlias = Literal["action", "reward", "start"]
"""Additional input of a memory: its last action, its last reward, or whether an episode starts."""


class HasMemory(Protocol):
    """Settings of an agent that may have a memory."""

    @property
    def memory(self) -> MemoryName:
        """Kind of memory."""
        ...

    @property
    def memory_size(self) -> int:
        """Features of the memory."""
        ...

    @property
    def memory_layers(self) -> int:
        """Layers of the memory."""
        ...

    @property
    def context(self) -> int:
        """With attention: steps that the memory holds."""
        ...

    @property
    def attention_heads(self) -> int:
        """With attention: heads of every layer."""
        ...

    @property
    def sees(self) -> tuple[SeenName, ...]:
        """Additional inputs of the memory."""
        ...


def check_memory_settings(settings: HasMemory) -> None:
    """Refuse settings of a memory that contradict each other.

    Raises:
        SettingError: with the reason.
    """
    s, agent = settings, type(settings).__name__
    for name in ("memory_size", "memory_layers", "context", "attention_heads"):
        require_range(s, name, 1)
    require(
        s.memory != "none" or not s.sees,
        f"{agent}: sees={s.sees!r} goes into a memory: set memory='gru', or leave sees empty",
    )
    require(len(set(s.sees)) == len(s.sees), f"{agent}: sees={s.sees!r} names something twice: name it once")
    require(
        s.memory != "attention" or s.memory_size % (2 * s.attention_heads) == 0,
        f"{agent}: memory_size {s.memory_size} does not divide into attention_heads = {s.attention_heads} of an even "
        "size: give a multiple of twice the heads",
    )


class ReplaysSequences(HasMemory, Protocol):
    """Settings of an agent that may learn from sequences of a replay memory."""

    @property
    def batch_size(self) -> int:
        """Transitions in a minibatch."""
        ...

    @property
    def sequence_length(self) -> int:
        """Steps of a sequence."""
        ...

    @property
    def burn_in(self) -> int:
        """First steps of a sequence that are not learned from."""
        ...


def check_sequence_settings(settings: ReplaysSequences) -> None:
    """Refuse settings of a memory that leave no whole sequences to learn from.

    Raises:
        SettingError: with the reason.
    """
    s, agent, length = settings, type(settings).__name__, settings.sequence_length
    check_memory_settings(s)
    require_range(s, "sequence_length", 1)
    require_range(s, "burn_in", 0)
    require(
        s.memory == "none" or s.batch_size % length == 0,
        f"{agent}: batch_size {s.batch_size} is not whole sequences of sequence_length = {length}, which a memory "
        "learns from: give a multiple of it",
    )
    require(
        s.memory == "none" or s.burn_in < length,
        f"{agent}: burn_in {s.burn_in} leaves nothing of sequence_length = {length}: give less",
    )


class Memory(Protocol):
    """Block that carries a state over steps: `nn.Recurrent` and `nn.AttentionMemory`."""

    features: int
    """Size of its output."""

    def initial(self, rows: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """State of `rows` `[*L, *rows]` at the start of an episode."""
        ...

    def step(
        self, params: Params, x: Tensor, state: dict[str, Tensor], ctx: Context, prefix: str = ""
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step `[*L, *rows, in]`: features and the new state."""
        ...

    def unroll(
        self, params: Params, x: Tensor, state: dict[str, Tensor], begins: Tensor | None, ctx: Context, prefix: str = ""
    ) -> Tensor:
        """Features of every step of sequences `[*L, T, B, in]`."""
        ...

    def peek(
        self,
        params: Params,
        x: Tensor,
        following: Tensor,
        state: dict[str, Tensor],
        begins: Tensor | None,
        ctx: Context,
        prefix: str = "",
    ) -> Tensor:
        """Features of what follows each step of sequences `[*L, T, B, in]`."""
        ...


def memory_block(settings: HasMemory, in_features: int) -> Recurrent | AttentionMemory:
    """Build the memory that the settings ask for, of so many input features."""
    s = settings
    if s.memory == "attention":
        return AttentionMemory(in_features, s.memory_size, s.memory_layers, s.context, s.attention_heads)
    assert s.memory != "none"
    return Recurrent(s.memory, in_features, s.memory_size, s.memory_layers)


class RecurrentBody(Block):
    """Network with a memory: a body, then the memory of its features and the additional inputs."""

    def __init__(self, body: Block, memory: Recurrent | AttentionMemory) -> None:
        super().__init__()
        self.body, self.memory = body, memory
        self._axes = {name: leaf.dim() for name, leaf in memory.initial((), torch.device("cpu")).items()}

    def run(self, params: Params, x: tree.Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Forward pass over a step or a sequence: the features after each step, `[*L, *lead, D]`.

        Of the inputs `hidden` is that of this network alone. There are as many steps as the leading axes hold more than
        the rows, and time is the first of them.
        """
        earlier = x.get("before", x)
        if "begins" not in earlier:
            return self.step(params, x, ctx, prefix)[0]
        axes, begins = learner_axes(self.memory, params, ctx, f"{prefix}memory."), earlier["begins"]
        learners, lead = begins.shape[:axes], begins.shape
        state = {name: leaf.flatten(axes, leaf.dim() - 1 - self._axes[name]) for name, leaf in x["hidden"].items()}
        rows = next(leaf.shape[axes] for leaf in state.values())

        def in_sequence(value: Tensor) -> Tensor:
            return value.reshape(*learners, -1, rows, *value.shape[len(lead) :])

        seen, begins = in_sequence(self._features(params, earlier, ctx, prefix)), in_sequence(begins)
        if "before" in x:
            following = in_sequence(self._features(params, x, ctx, prefix))
            out = self.memory.peek(params, seen, following, state, begins, ctx, f"{prefix}memory.")
        else:
            out = self.memory.unroll(params, seen, state, begins, ctx, f"{prefix}memory.")
        return out.reshape(*lead, -1)

    def step(self, params: Params, x: tree.Tree, ctx: Context, prefix: str = "") -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass over one step: features `[*L, N, D]`, and the state of the memory after it."""
        seen = self._features(params, x, ctx, prefix)
        return self.memory.step(params, seen, x["hidden"], ctx, f"{prefix}memory.")

    def _features(self, params: Params, x: tree.Tree, ctx: Context, prefix: str) -> Tensor:
        """Features of observations, and the additional inputs, `[*L, *lead, in]`."""
        features: Tensor = self.body.run(params, x["observation"], ctx, f"{prefix}body.")
        return torch.cat((features, x["last"]), -1) if "last" in x else features


def last_action(action_space: gym.Space) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Encode the last action as a network input: the number of features, and the function that computes them.

    Discrete actions are one-hot, those of a Box are scaled so that its bounds are at -1 and 1.
    """
    encoder = Encoder(action_space)
    if not isinstance(action_space, gym.spaces.Box):
        return encoder.features, lambda action: encoder.run({}, action, Context())
    bounds = (bound.reshape(-1).tolist() for bound in (action_space.low, action_space.high))
    units = ActionUnits(action_space.shape, *bounds)
    return encoder.features, lambda action: units.to_policy(action).float()


def seen_features(sees: tuple[SeenName, ...], action_space: gym.Space) -> int:
    """Number of additional input features of a recurrent network."""
    return sum(last_action(action_space)[0] if name == "action" else 1 for name in sees)


class Recurrence:
    """Memories of an agent's networks, and their additional inputs.

    Args:
        sees: additional inputs beside the observation.
        action_space: of one environment.
        networks: of the agent, by name.
    """

    def __init__(self, sees: tuple[SeenName, ...], action_space: gym.Space, networks: Mapping[str, Any]) -> None:
        self.sees = sees
        self.action_features, self.encode = last_action(action_space)
        self.bodies: dict[str, RecurrentBody] = {
            name: block.body
            for name, block in networks.items()
            if isinstance(getattr(block, "body", None), RecurrentBody)
        }

    def initial(self, rows: tuple[int, ...], device: torch.device) -> tree.Tree:
        """Initial states and additional inputs of `rows` `[*L, N]` environments, at the start of an episode."""
        zero = torch.zeros(rows, dtype=torch.float32, device=device)
        wide = zero.unsqueeze(-1)
        memory: tree.Tree = {"hidden": {name: body.memory.initial(rows, device) for name, body in self.bodies.items()}}
        if "action" in self.sees:
            memory["last_action"] = wide.repeat(*zero.dim() * (1,), self.action_features)
        if "reward" in self.sees:
            memory[LAST_REWARD] = zero
        if "start" in self.sees:
            memory[START] = zero + 1
        return memory

    def of_network(self, inputs: tree.Tree, name: str) -> tree.Tree:
        """Select the inputs of one network: those of all, with its own state.

        Raises:
            SettingError: the inputs are observations without states.
        """
        if not isinstance(inputs, dict) or "hidden" not in inputs:
            raise SettingError(
                "a network with a memory takes sequences of its agent's own steps, not observations alone: "
                "choose memory='none' for this"
            )
        return {**inputs, "hidden": inputs["hidden"][name]}

    # ------------------------------------------------------------------ acting

    def acting_inputs(self, observation: tree.Tree, memory: tree.Tree) -> tree.Tree:
        """Inputs of the recurrent networks for one acting step `[*L, N, ...]`, the additional inputs included."""
        return self._inputs(observation, memory["hidden"], memory)

    def after(self, memory: tree.Tree, hidden: Mapping[str, tree.Tree], action: Tensor) -> tree.Tree:
        """Update the memory after an action `[*L, N, ...]`; its reward is added by `learning.collect.remember`."""
        new = {**memory, "hidden": dict(hidden)}
        if "action" in self.sees:
            new["last_action"] = self.encode(action)
        if "start" in self.sees:
            new[START] = torch.zeros_like(memory[START])
        return new

    # ------------------------------------------------------------------ learning

    def inputs(self, rollout: Rollout) -> tree.Tree:
        """Network inputs for every step of a rollout, `[*L, T, N, ...]`, equal to those while acting."""
        reset, first = rollout["memory_reset"], rollout["first_memory"]
        axis = reset.dim() - 2
        never = torch.zeros_like(reset.narrow(axis, 0, 1))
        begins = torch.cat((never, reset.narrow(axis, 0, reset.shape[axis] - 1)), axis)
        seen = {}
        for name, value in self._told(rollout).items():
            before = torch.cat((first[name].unsqueeze(axis), value.narrow(axis, 0, value.shape[axis] - 1)), axis)
            fresh = begins.reshape(begins.shape + (1,) * (before.dim() - begins.dim()))
            seen[name] = before.masked_fill(fresh, 1.0 if name == START else 0.0)
        return {**self._inputs(rollout["observation"], first["hidden"], seen), "begins": begins}

    def next_inputs(self, rollout: Rollout) -> tree.Tree:
        """Network inputs for the next observation of every step, `[*L, T, N, ...]`, with the memory after that step."""
        before = self.inputs(rollout)
        following = self._inputs(rollout["next_observation"], before.pop("hidden"), self._told(rollout))
        return {**following, "before": before}

    def items(self, batch: tree.Tree, axes: int) -> tree.Tree:
        """Transpose a batch of steps `[*L, T, N, ...]` to sequences `[*L, N, T, ...]`, the items of minibatches."""
        inputs = dict(batch["observation"])
        hidden = inputs.pop("hidden")
        turned = tree.map(lambda x: x.transpose(axes, axes + 1).contiguous(), {**batch, "observation": inputs})
        return {**turned, "observation": {**turned["observation"], "hidden": hidden}}

    def time_first(self, inputs: tree.Tree) -> tree.Tree:
        """Transpose sequences from batch-first `[*L, B, T, ...]` to time-first `[*L, T, B, ...]`."""
        axes = inputs["begins"].dim() - 2
        each = {name: value for name, value in inputs.items() if name != "hidden"}
        return {**tree.map(lambda x: x.transpose(axes, axes + 1), each), "hidden": inputs["hidden"]}

    def blank(self, observation: tree.Tree, rows: tuple[int, ...], steps: int, device: torch.device) -> tree.Tree:
        """Network inputs of constant sequences `[*L, B, T, ...]`: one observation, repeated `steps` times.

        Args:
            observation: `[*L, B, ...]`.
            rows: `[*L, B]`.
            steps: T.
            device: of the tensors.
        """
        inputs = self.acting_inputs(observation, self.initial(rows, device))
        hidden, inputs["begins"] = inputs.pop("hidden"), torch.zeros(rows, dtype=torch.bool, device=device)
        axis = len(rows)
        long = tree.map(lambda x: x.unsqueeze(axis).expand(*rows, steps, *x.shape[axis:]), inputs)
        return {**long, "hidden": hidden}

    def samples(self, batch: tree.Tree) -> tree.Tree:
        """Flatten sequences `[*L, B, T, ...]` to samples `[*L, T * B, ...]`, time first."""
        inputs = dict(batch["observation"])
        hidden = inputs.pop("hidden")
        axes = inputs["begins"].dim() - 2
        flat = tree.map(
            lambda x: x if x.dim() < axes + 2 else x.transpose(axes, axes + 1).flatten(axes, axes + 1),
            {**batch, "observation": inputs},
        )
        return {**flat, "observation": {**flat["observation"], "hidden": hidden}}

    # ------------------------------------------------------------------ additional inputs

    def _told(self, rollout: Rollout) -> dict[str, Tensor]:
        """Additional inputs that every step of a rollout passes to the next step, by their names in a memory.

        The step after a truncation is no start; the first of the next episode is, which `inputs` sets.
        """
        told = {}
        if "action" in self.sees:
            told["last_action"] = self.encode(rollout["action"])
        if "reward" in self.sees:
            told[LAST_REWARD] = rollout["reward"]
        if "start" in self.sees:
            within = rollout["ended"] & ~rollout["memory_reset"] if "ended" in rollout else None
            none = torch.zeros_like(rollout["reward"])
            told[START] = none if within is None else within.to(none.dtype)
        return told

    def _inputs(self, observation: tree.Tree, hidden: tree.Tree, seen: Mapping[str, Tensor]) -> tree.Tree:
        inputs = {"observation": observation, "hidden": hidden}
        parts = [seen["last_action"]] if "action" in self.sees else []
        parts += [seen[name].unsqueeze(-1) for name in (LAST_REWARD, START) if name in seen]
        return {**inputs, "last": torch.cat(parts, -1)} if parts else inputs
