"""What the training loop asks of everything it trains: agents, supervised learners, meta-learners, imitators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlmeta.functional import random, tree
from rlmeta.learning import hooks
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.method import Method
from rlmeta.learning.state import Packed, Params, State
from rlmeta.learning.step import HasLosses
from rlmeta.nn import Block, stack

Metrics = dict[str, Tensor]
"""Figures of one iteration, `[*L]` each."""


class Score(NamedTuple):
    """What an evaluation measures."""

    name: str
    """As tables and plots call it."""
    maximise: bool = True
    """Whether more is better."""

    @property
    def metric(self) -> str:
        """Its name in the records."""
        return f"eval/{self.name.replace(' ', '_')}"

    def reaches(self, score: Tensor, target: float) -> Tensor:
        """Whether scores are as good as a target; nothing is as good as one that is not finite."""
        if not math.isfinite(target):
            return torch.zeros_like(score, dtype=torch.bool)
        return score >= target if self.maximise else score <= target


class Learner(HasLosses, Protocol):
    """A learner bound to its problem's spaces.

    Everything that changes is in the explicit state (see `learning.state`), so a learner itself can be thrown away and
    made again from its settings.
    """

    settings: Any
    """A frozen dataclass; its `num_envs` says how many rows of a world one learner needs."""
    methods: tuple[Method, ...]
    """Lifelong methods, in order."""
    num_tasks: int
    """Tasks of the stream it learns from, 1 without a stream or where boundaries are hidden; set before `init`."""
    reveals: frozenset[str]
    """What the stream reveals of its tasks; set before `init`."""
    task_samples: int | None
    """Training samples of the smallest of them, None where it makes its own by acting; set before `init`."""
    steps_per_iteration: int
    """Steps every row of the world takes in one iteration."""
    counts: str
    """What its budget counts, as plots call it."""
    score: Score

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: Any) -> State:
        """The state at the start of a run."""
        ...

    def begin_task(self, state: State, world: Any, key: Tensor) -> State:
        """Turn to the task that the world has been set to; `key` `[*L]` starts its episodes or its order of samples."""
        ...

    def enter(self, state: State, world: Any, key: Tensor) -> State:
        """Go on in the task that the world has been set to, untold that it is another: nothing but episodes, or the
        order of samples, begins anew."""
        ...

    def iterate(self, state: State, world: Any) -> tuple[State, Metrics]:
        """One iteration: `steps_per_iteration` steps of every row, and what is learned from them."""
        ...

    def seen(self, state: State) -> Params:
        """The parameters as forward passes see them, through the lifelong methods' hooks."""
        ...

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """How many rows a world needs for `evaluate` with so many episodes."""
        ...

    def evaluate(self, p: Params, world: Any, key: Tensor, episodes: int, *, deterministic: bool = True) -> Evaluation:
        """Scores of fixed parameters, as forward passes see them, in another world of the problem."""
        ...

    def draw(self, state: State, world: Any, n: int) -> tree.Tree:
        """n samples `[*L, n, ...]` of what it is trained on now; the state stays as it is."""
        ...


def initial_state(networks: Callable[[], dict[str, Block]], key: Tensor, hyper: dict[str, Tensor]) -> State:
    """What every learner's state starts with: fresh weights from each learner's own key, counters at zero.

    Args:
        networks: makes the blocks by name; called once per learner under that learner's seed.
        key: `[*L]`.
        hyper: settings `[*L]`.
    """
    built = initial_tensors(networks, random.fold(key, "initialisation"))
    trained = {name for name, _ in nn.ModuleDict(networks()).named_parameters()}
    weights = {name: value for name, value in built.items() if name in trained}
    buffers = {name: value for name, value in built.items() if name not in trained}
    zero = torch.zeros(key.shape, dtype=torch.int64, device=key.device)
    counted = ("iterations", "vector_steps", "env_steps", "gradient_steps", "task_steps")
    return {
        "params": {
            "weights": Packed.of(weights, key.dim()),
            "buffers": buffers,
            "normalisers": {},
            "hyper": hyper,
        },
        "key": key,
        "count": {name: zero.clone() for name in counted},
        "progress": torch.zeros(key.shape, dtype=torch.float64, device=key.device),
        "active": torch.ones(key.shape, dtype=torch.bool, device=key.device),
        "task": {
            "index": zero.clone(),
            "identity": zero.clone(),
            "progress": torch.zeros(key.shape, dtype=torch.float64, device=key.device),
        },
    }


def initial_tensors(networks: Callable[[], dict[str, Block]], key: Tensor) -> Params:
    """Fresh parameters and buffers `[*L, ...]` of the blocks that `networks` makes, from every learner's key alone."""
    return stack(lambda: nn.ModuleDict(networks()), key)


def initial_memories(learner: Learner, methods: Sequence[Method], state: State) -> State:
    """The methods' memories by name, made once the rest of the state is there."""
    return {method.name: hooks.first_memory(method, method.init(learner, state), state["key"]) for method in methods}
