"""The hooks through which a lifelong method takes part in every gradient step of every learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from rlmeta.functional import tree
from rlmeta.learning.state import Params, State

Memory = State
"""A method's own memory: a nested dictionary of tensors that start with `*L`, kept in `state["methods"]`."""

Task = dict[str, Tensor]
"""What the stream reveals of the current task, as tensors `[*L]`: `index`, `identity`, `progress`."""


class Gradients(NamedTuple):
    """The two gradients a method sees, both `[*L, P]` over the packed weights."""

    task: Tensor
    """Of the learner's own losses alone; to read."""
    total: Tensor
    """Of everything added up so far; a method returns a changed one."""


class StepInfo(NamedTuple):
    """What `after_step` is told."""

    gradient: Tensor
    """The task gradient, `[*L, P]`."""
    delta: Tensor
    """By how much the weights moved, `[*L, P]`: after clipping, the optimizer and the frozen entries."""
    batch: tree.Tree
    """The minibatch of the step."""


class Method:
    """A lifelong method; override the hooks it needs. No hook writes in place: each returns what it changes.

    `p` is the state's params, `m` the method's own memory, `task` what the stream reveals.
    """

    name: str = "method"

    def init(self, learner: Any, state: State) -> Memory:
        """The method's memory at the start of a run."""
        return {}

    def task_start(self, learner: Any, p: Params, m: Memory, task: Task) -> Memory:
        """Before the first step on a task."""
        return m

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """After the last step on a task."""
        return p, m

    def params(self, p: Params, m: Memory, task: Task) -> Params:
        """Parameters as every forward pass sees them, in training and evaluation."""
        return p

    def loss(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task) -> Tensor | None:
        """A further loss `[*L]`, or None."""
        return None

    def grads(self, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """The total gradient `[*L, P]` after this method's penalty or projection."""
        return gradients.total

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Entries `[*L, P]` (bool) that must come out of the step bit-identical, or None."""
        return None

    def after_step(self, info: StepInfo, p: Params, m: Memory, task: Task) -> Memory:
        """After the weights moved."""
        return m


Callback = Callable[[Any, dict[str, Any]], bool | None]
"""A function of (run, metrics) that may stop the run by returning True."""
