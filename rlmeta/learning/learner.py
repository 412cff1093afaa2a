"""Learner protocol of the training loop, for agents, supervised learners, meta-learners and imitators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning import hooks
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.gradients import HasLosses
from rlmeta.learning.method import Method
from rlmeta.learning.settings import require
from rlmeta.learning.state import Params, State
from rlmeta.nn import Block, stack

Metrics = dict[str, Tensor]
"""Metrics of one iteration, `[*L]` each."""


class Score(NamedTuple):
    """Score of an evaluation: its name, and whether more is better."""

    name: str
    """Name of the score in tables and plots."""
    maximise: bool = True
    """Whether a higher score is better."""

    @property
    def metric(self) -> str:
        """Name of the score in the metric log."""
        return f"eval/{self.name.replace(' ', '_')}"

    def reaches(self, score: Tensor, target: float) -> Tensor:
        """Whether scores reach a target; one that is not finite reaches none, and none that is not finite is
        reached."""
        if not math.isfinite(target):
            return torch.zeros_like(score, dtype=torch.bool)
        return (score >= target if self.maximise else score <= target) & score.isfinite()

    def better(self, score: Tensor, other: Tensor) -> Tensor:
        """Whether scores are better than others; a finite one is better than one that is not, never the reverse."""
        gained = score > other if self.maximise else score < other
        return score.isfinite() & (gained | ~other.isfinite())

    def best(self, scores: Tensor) -> int:
        """Index of the best finite score of `[S]`.

        Raises:
            SettingError: none is.
        """
        finite = scores.isfinite()
        require(bool(finite.any()), f"none of the {len(scores)} learners has a finite {self.name}: none is the best")
        worst = -math.inf if self.maximise else math.inf
        ranked = scores.masked_fill(~finite, worst)
        return int(ranked.argmax() if self.maximise else ranked.argmin())


class Learner(HasLosses, Protocol):
    """Learner for the spaces of its problem.

    Everything that changes is in the explicit state (see `learning.state`), so a learner itself can be thrown away and
    made again from its settings.
    """

    settings: Any
    """Settings, a frozen dataclass; `num_envs` is the number of rows of a world that a learner needs."""
    methods: tuple[Method, ...]
    """Lifelong methods, in order."""
    num_tasks: int
    """Number of tasks of the stream, 1 without a stream or with hidden boundaries; set before `init`."""
    reveals: frozenset[str]
    """Information that the stream reveals of its tasks; set before `init`."""
    task_samples: int | None
    """Number of training samples of the smallest task, None for learners that act; set before `init`."""
    steps_per_iteration: int
    """Steps of every row of the world in one iteration."""
    idle_steps: int
    """Steps of every row on a task before the first gradient step; 0 if every iteration learns."""
    counts: str
    """Unit of the budget in plots, such as environment steps."""
    score: Score
    acts: bool
    """Whether the learner acts in environments, by the method `act`."""
    answers: bool
    """Whether the learner predicts from a support set, by the method `answer` (see `learning.predictive`)."""

    @property
    def predicts(self) -> tuple[str, ...]:
        """Names of the networks of its `distribution` (see `learning.predictive`); () if it predicts none."""
        ...

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: Any) -> State:
        """Initial state of a run."""
        ...

    def begin_task(self, state: State, world: Any, key: Tensor) -> State:
        """Begin the task that the world has been set to; `key` `[*L]` seeds its episodes or its order of samples."""
        ...

    def enter(self, state: State, world: Any, key: Tensor) -> State:
        """Switch to another task without a task boundary: reset the episodes, or the order of samples, alone."""
        ...

    def iterate(self, state: State, world: Any) -> tuple[State, Metrics]:
        """One training iteration: take `steps_per_iteration` steps in every row, and learn from them."""
        ...

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes: the weights after the lifelong methods' hooks."""
        ...

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Number of parallel rows that `evaluate` needs for `episodes` episodes."""
        ...

    def evaluate(self, p: Params, world: Any, key: Tensor, episodes: int, *, deterministic: bool = True) -> Evaluation:
        """Evaluate effective parameters in another world of the problem."""
        ...

    def draw(self, state: State, world: Any, n: int) -> tree.Tree:
        """Sample n training samples `[*L, n, ...]` of the current task; the state stays as it is."""
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """On-policy agent, which learns from its own rollouts."""

    def credit(self, p: Params, rollout: State, rewards: dict[str, Tensor]) -> tree.Tree:
        """Training data of `losses` for every step of a rollout `[*L, T, N, ...]`, such as advantages."""
        ...


def initial_state(networks: Callable[[], dict[str, Block]], key: Tensor, hyper: dict[str, Tensor]) -> State:
    """Initial state of every learner: random weights from each learner's own key, counters at zero.

    Parameters with `requires_grad=False` are among the buffers: nothing that trains sees them.

    Args:
        networks: makes the blocks by name; called once per learner under that learner's seed.
        key: `[*L]`.
        hyper: settings `[*L]`.

    Raises:
        SettingError: every parameter is frozen, or others in one learner than in another.
    """
    weights, buffers = _built(networks, key)
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
            "phase": zero.clone(),
        },
    }


def _built(networks: Callable[[], dict[str, Block]], key: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stack the learners' networks: parameters and buffers `{name: [*L, ...]}`; frozen parameters are buffers."""
    trained: list[set[str]] = []
    tied: dict[str, str] = {}

    def build() -> nn.Module:
        modules = nn.ModuleDict(networks())
        trained.append({name for name, value in modules.named_parameters() if value.requires_grad})
        tied.update(_ties(modules))
        return modules

    built = stack(build, random.fold(key, "initialisation"))
    for names in trained:
        other = sorted(names ^ trained[0])
        require(
            not other,
            f"{', '.join(other)}: frozen (requires_grad=False) in the network of one learner and trained in that of "
            "another: freeze the same layers whenever the network is built",
        )
    require(
        bool(trained[0]), "every parameter of the networks is frozen (requires_grad=False): nothing is left to train"
    )
    for name, first in tied.items():
        require(
            first not in trained[0],
            f"{first} and {name} are one tensor, but every place has weights of its own: build new layers whenever the "
            "network is built, or freeze what is shared; a tie within one module of your own class is kept",
        )
        built[name] = built[first].clone()
    weights = {name: value for name, value in built.items() if name in trained[0]}
    return weights, {name: value for name, value in built.items() if name not in weights}


def _ties(module: nn.Module) -> dict[str, str]:
    """Further names of tensors that stand in several places, and the first name of each, but for ties that a block
    keeps itself."""
    modules = module.named_modules(remove_duplicate=False)
    parts = [f"{path}." for path, part in modules if isinstance(part, Block) and part.keeps_ties()]
    first: dict[int, str] = {}
    ties = {}
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        other = first.setdefault(id(tensor), name)
        if other != name and not any(name.startswith(path) and other.startswith(path) for path in parts):
            ties[name] = other
    return ties


def initial_tensors(networks: Callable[[], dict[str, Block]], key: Tensor) -> Params:
    """Initial parameters and buffers `[*L, ...]` of the blocks of `networks`, from every learner's key alone."""
    return stack(lambda: nn.ModuleDict(networks()), key)


def initial_memories(learner: Learner, methods: Sequence[Method], state: State) -> State:
    """Initial memories of the lifelong methods by name, after the rest of the state."""
    return {method.name: hooks.init_memory(method, method.init(learner, state), state["key"]) for method in methods}
