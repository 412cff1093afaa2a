"""Recurrent (GRU) networks of agents: hidden states, and additional inputs such as the last action and reward.

A recurrent network takes `inputs` in the place of an observation:

    observation  `[*L, *lead, ...]`
    hidden       `{network: [*L, *rows, H]}`, its hidden state before the first of the steps
    begins       `[*L, *lead]` bool, absent for a single step: the hidden state is reset to that of an episode's start
    last         `[*L, *lead, D]`, the additional inputs, absent where there are none

where `lead` is `[N]` as it acts, `[T, N]` in a rollout and `[T * B]`, time first, in a loss. A minibatch holds whole
sequences: an item of it is a row of the rollout, `[*L, B, T, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.collect import LAST_REWARD, START, Rollout
from rlmeta.nn import ActionUnits, Block, Context, Encoder, GRUCell, Params

MemoryName: TypeAlias = Literal["none", "gru"]
"""Kind of recurrent network, "none" for feed-forward ones."""

SeenName: TypeAlias = Literal["action", "reward", "start"]
"""Additional input of a recurrent policy: its last action, its last reward, or whether an episode starts."""


class RecurrentBody(Block):
    """Recurrent network: a body, then a gated recurrent unit on its features and the additional inputs."""

    def __init__(self, body: Block, features: int, seen: int, size: int) -> None:
        super().__init__()
        self.body, self.cell = body, GRUCell(features + seen, size)

    def run(self, params: Params, x: tree.Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Forward pass over a step or a sequence: the hidden state after each step, `[*L, *lead, H]`.

        Of the inputs `hidden` `[*L, *rows, H]` is that of this network alone.

        There are as many steps as the leading axes hold more than the rows, and time is the first of them.
        """
        features = self.body.run(params, x["observation"], ctx, f"{prefix}body.")
        if "last" in x:
            features = torch.cat((features, x["last"]), -1)
        axes, hidden, begins = params[f"{prefix}cell.weight_hh"].dim() - 2, x["hidden"], x.get("begins")
        if begins is None:
            return self.cell.run(params, {"input": features, "hidden": hidden}, ctx, f"{prefix}cell.")
        learners, lead = hidden.shape[:axes], begins.shape
        hidden = hidden.flatten(axes, -2)
        steps = (-1, hidden.shape[-2])
        states = self.cell.unroll(
            params,
            features.reshape(*learners, *steps, features.shape[-1]),
            hidden,
            begins.reshape(*learners, *steps),
            f"{prefix}cell.",
        )
        return states.reshape(*lead, -1)


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
    """Hidden states of a recurrent (GRU) agent, and the additional inputs of its networks.

    Args:
        sees: additional inputs beside the observation.
        size: units of every network's hidden state.
        action_space: of one environment.
        networks: of the agent, by name.
    """

    def __init__(
        self, sees: tuple[SeenName, ...], size: int, action_space: gym.Space, networks: Mapping[str, Block]
    ) -> None:
        self.sees, self.size = sees, size
        self.action_features, self.encode = last_action(action_space)
        self.names = [
            name for name, block in networks.items() if isinstance(getattr(block, "body", None), RecurrentBody)
        ]

    def initial(self, rows: tuple[int, ...], device: torch.device) -> tree.Tree:
        """Initial hidden states and additional inputs of `rows` `[*L, N]` environments, at the start of an episode."""
        zero = torch.zeros(rows, dtype=torch.float32, device=device)
        wide = zero.unsqueeze(-1)
        memory: tree.Tree = {"hidden": {name: wide.repeat(*zero.dim() * (1,), self.size) for name in self.names}}
        if "action" in self.sees:
            memory["last_action"] = wide.repeat(*zero.dim() * (1,), self.action_features)
        if "reward" in self.sees:
            memory[LAST_REWARD] = zero
        if "start" in self.sees:
            memory[START] = zero + 1
        return memory

    def of_network(self, inputs: tree.Tree, name: str) -> tree.Tree:
        """Select the inputs of one network: those of all, with its own hidden state.

        Raises:
            SettingError: the inputs are observations without hidden states.
        """
        if not isinstance(inputs, dict) or "hidden" not in inputs:
            raise SettingError(
                "a network with a memory takes sequences of its agent's own steps, not observations alone: "
                "choose memory='none' for this"
            )
        return {**inputs, "hidden": inputs["hidden"][name.partition(".")[0]]}

    # ------------------------------------------------------------------ acting

    def acting_inputs(self, observation: tree.Tree, memory: tree.Tree) -> tree.Tree:
        """Inputs of the recurrent networks for one acting step `[*L, N, ...]`, the additional inputs included."""
        return self._inputs(observation, memory["hidden"], memory)

    def after(self, memory: tree.Tree, hidden: Mapping[str, Tensor], action: Tensor) -> tree.Tree:
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

    def next_inputs(self, rollout: Rollout, hidden: Mapping[str, Tensor]) -> tree.Tree:
        """Network inputs for the next observation of every step, `[*L, T, N, ...]`.

        Args:
            rollout: as it was acted.
            hidden: of every network to run, its hidden state after every step, `[*L, T, N, H]`.
        """
        return self._inputs(rollout["next_observation"], dict(hidden), self._told(rollout))

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
