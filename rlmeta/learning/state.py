"""State of a run: a nested dictionary of tensors that all start with the learner axes `*L`.

Because every leaf carries the learner axes, an index forks, exports or drops learners (`take`), and a learner can be
put back where it was (`put`).

| entry | what it holds |
|---|---|
| `params` | what a forward pass needs: `weights`, `buffers` (frozen parameters, batch-norm statistics, target networks), `normalisers`, `hyper` (settings `[*L]`) |
| `optimizer` | the optimizer's moments |
| `key` | the learner's random key, `[*L]` int64 |
| `count` | iterations, steps of the world and of the environments, gradient steps so far, steps on the task, `[*L]` |
| `progress` | fraction of the budget that is spent, `[*L]` |
| `active` | False for a learner that is frozen (not finite, stopped early), `[*L]` |
| `world`, `memory`, `episode` | environments, the agent's memory, the running episodes, `[*L, N, ...]` |
| `replay`, `rewards`, `values` | transitions an agent learns from again, `[*L, C, N, ...]`; what its rewards remember; value heads of streams of reward |
| `rollouts` | of PPG: those that the next auxiliary phase learns from, `[*L, R, T, N, ...]`, and how many there are, `[*L]` |
| `rates` | of Meta-SGD: the moments of its inner rates, which are buffers |
| `methods`, `task` | the lifelong methods' memories; index, identity and progress of the task as methods are told them |
| `stage`, `identity`, `matrix` | of a run on a stream: how many stages have begun, which task the world is set to, `[*L]` each, and the scores on all tasks |
| `metrics`, `best` | sums since the last entry of the metric log; score and parameters of the best periodic evaluation |
"""  # noqa: E501

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlmeta.functional import tree

State: TypeAlias = dict[str, Any]
"""Nested dictionary of tensors; every leaf starts with the learner axes."""

Params: TypeAlias = dict[str, Any]
"""Parameters of a state: the inputs of a forward pass, and the weights that gradients change."""


def take(state: State, index: Any) -> State:
    """Select learners of a state, as a copy: `index` is anything that indexes the first learner axis."""
    return tree.map(lambda leaf: leaf[index].clone(), state)


def put(state: State, index: Any, part: State) -> State:
    """Replace the learners `index` of a state by those of `part`, in a copy."""

    def write(leaf: Tensor, value: Tensor) -> Tensor:
        leaf = leaf.clone()
        leaf[index] = value
        return leaf

    return tree.map(write, state, part)


def select(condition: Tensor, new: State, old: State) -> State:
    """Select between two states per learner: `new` where `condition` `[*L]` is set, else `old`."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(condition.shape + (1,) * (a.dim() - condition.dim())), a, b)

    return tree.map(choose, new, old)
