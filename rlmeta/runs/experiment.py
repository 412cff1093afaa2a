"""Experiment: settings, seeds, problem and budget of a run, and its configuration for `config.toml`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.kinds import evaluated
from rlmeta.envs.streams import TaskStream
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning import settings as settings_
from rlmeta.learning.digests import digest_of
from rlmeta.learning.field_types import check_values, require_type
from rlmeta.learning.learner import Learner
from rlmeta.learning.method import Method, check_needs, checked_methods
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import require
from rlmeta.runs import populations
from rlmeta.runs.descriptions import settings_table
from rlmeta.runs.populations import POPULATIONS
from rlmeta.runs.shipped import METHODS, name_on_command_line


@dataclass(frozen=True)
class Budget:
    """Training budget: how long to train, how often to evaluate, log and save."""

    steps: int = 100_000
    """Environment steps of each learner (samples, tasks or gradient steps for learners that do not act), on every task
    of a stream, rounded up to a whole iteration."""
    epochs: float = 0.0
    """Instead of steps, epochs over the training samples of every task, rounded up to a whole iteration; 0 for
    steps."""
    eval_every: int = 0
    """Environment steps between two evaluations; 0 for a tenth of the budget, or more if gymnasium's episodes may be so
    long that evaluation would take more than a fifth of the steps. On a stream all tasks are evaluated after each task
    instead."""
    eval_episodes: int = 0
    """Episodes of each learner in a periodic evaluation, on every task of a stream; 0 for 16, or fewer (at least 4) if
    these would take more than a fifth of the steps."""
    final_episodes: int = 0
    """Episodes of each learner in the final evaluation; 0 for 64, or fewer (at least 4) if these would take more than a
    fifth of the steps."""
    target: float = math.inf
    """Early stopping: a learner stops once the mean score of a periodic evaluation reaches this value (at least for
    returns and accuracies, at most for losses and errors); inf for never, as always on a stream."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    log_points: int = 200
    """Approximate number of lines in metrics.jsonl over the whole budget."""

    def __post_init__(self) -> None:
        check_values(Budget, vars(self), "budget")
        for name in ("steps", "log_points"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("eval_every", "eval_episodes", "final_episodes", "checkpoint_seconds"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        require(0 <= self.epochs < math.inf, f"epochs is {self.epochs:g}, expected a number of at least 0")


MOST_THREADS = 4096
MOST_SEEDS = 1_000_000


def chosen_seeds(value: Any) -> tuple[int, ...]:
    """Seeds as a tuple: n means 0 to n - 1, a sequence, array or tensor lists them.

    Raises:
        SettingError: neither, a negative or repeated seed, or none at all.
    """
    expected = f"seeds is {value!r}, expected how many (16), or which: whole numbers from 0 on, such as range(100, 116)"
    if isinstance(value, bool | str | bytes):
        raise SettingError(expected)
    if isinstance(value, Integral):
        require(1 <= int(value) <= MOST_SEEDS, f"seeds is {value}, expected 1 to {MOST_SEEDS:,} of them")
        return tuple(range(int(value)))
    listed = value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    if not isinstance(listed, Iterable):
        raise SettingError(expected)
    seeds = tuple(itertools.islice(listed, MOST_SEEDS + 1))
    require(len(seeds) <= MOST_SEEDS, f"seeds are more than {MOST_SEEDS:,}, expected at most that many")
    if not all(isinstance(s, Integral) and not isinstance(s, bool) and 0 <= int(s) < 1 << 63 for s in seeds):
        raise SettingError(expected)
    require(len(seeds) > 0, "no seeds given, expected at least one")
    require(len(set(seeds)) == len(seeds), f"seeds repeat: {list(seeds)}")
    return tuple(int(seed) for seed in seeds)


def available_threads() -> int:
    """Number of threads: OMP_NUM_THREADS, as in torch, else the number of cores."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) > 0 else os.cpu_count() or 1


def check_method_names(methods: Sequence[Method]) -> None:
    """Refuse lifelong methods without a valid name of their own, by which the state stores their memory."""
    for method in methods:
        cls, name = type(method).__name__, method.name
        valid = isinstance(name, str) and name != "" and "/" not in name
        if not valid or (name == Method.name and len(methods) > 1):
            raise SettingError(
                f"the lifelong method {cls} is named {name!r}: give its class a name of its own without '/', such as "
                f"name = {cls.lower()!r}"
            )


class Problem(Protocol):
    """Protocol of a training problem: a task, labelled samples, a family, or a stream of tasks."""

    @property
    def name(self) -> str:
        """Name in tables, plots and folders."""
        ...

    @property
    def native(self) -> bool:
        """Whether the environments' state is rlmeta's own tensors: cheap to step, and restorable for each learner."""
        ...

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> Any:
        """Create environments `[*L, N]`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Table for `config.toml`, from which the problem can be restored unless it is user code."""
        ...


@dataclass(frozen=True)
class Experiment:
    """A batch of learners: every variant of the settings, in every order of a stream's tasks, with every seed.

    The variants share their static settings, so that all learners fit into one batch.
    """

    variants: tuple[Any, ...]
    seeds: tuple[int, ...]
    problem: Problem
    budget: Budget = dataclasses.field(default_factory=Budget)
    methods: tuple[Method, ...] = ()
    population: Population | None = None
    """Population-based training, with the variants as its members; every seed is a population of its own."""
    device: str = "cpu"
    threads: int = 0
    """Threads for torch; 0 for one a core. Bit-equality needs equal threads, so a resumed run uses the same number."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", chosen_seeds(self.seeds))
        require_type(self.threads, int, "threads")
        require(0 <= self.threads <= MOST_THREADS, f"threads is {self.threads}, expected 0 to {MOST_THREADS}")
        require_type(self.device, str, "device")
        check_method_names(checked_methods(self.methods))
        for settings in (*self.variants, *filter(dataclasses.is_dataclass, self.methods)):
            settings_.check_choices(settings)
        try:
            torch.empty(0, device=self.device).cpu()  # refuses "meta", whose tensors hold no numbers
        except (RuntimeError, AssertionError) as error:
            raise SettingError(f"device is {self.device!r}: {str(error).splitlines()[0]}") from None
        if self.population is not None:
            populations.refuse(self)
        if isinstance(self.problem, TaskStream):
            check_needs(self.methods, self.problem.revealed, self.problem.name)
            require(
                not math.isfinite(self.budget.target),
                f"target is {self.budget.target:g}, but every task of the stream {self.problem.name!r} is trained on "
                "for the whole budget: leave it out",
            )
        elif self.methods:
            raise SettingError(
                f"lifelong methods are for streams of tasks, {self.problem.name!r} is none: `rlmeta list streams` "
                "shows them"
            )

    @property
    def learners(self) -> list[tuple[Any, int]]:
        """(settings, seed) of every learner, with variants outermost, then orders, then seeds."""
        return [(variant, seed) for variant in self.variants for _ in self._orders for seed in self.seeds]

    @property
    def repeats(self) -> int:
        """Number of learners of each variant: orders times seeds."""
        return len(self._orders) * len(self.seeds)

    @property
    def _orders(self) -> tuple[tuple[int, ...], ...]:
        return self.problem.orders() if isinstance(self.problem, TaskStream) else ((0,),)

    @property
    def orders(self) -> Tensor:
        """Order of a stream's tasks for every learner, `[S, T]`."""
        rows = [order for _ in self.variants for order in self._orders for _ in self.seeds]
        return torch.tensor(rows, device="cpu")

    @property
    def labels(self) -> list[str]:
        """Label of every variant: the settings in which it differs from the others; [''] for a single one."""
        own = [settings_.difference(variant, self.variants) for variant in self.variants]
        of_methods = [self._difference_of_methods(i) for i in range(len(self.variants))]
        begins = "from " if self.population is not None else ""
        return [begins + ", ".join(filter(None, parts)) for parts in zip(own, of_methods)]

    def _difference_of_methods(self, variant: int) -> str:
        """Settings of methods that differ between variants, as `ewc.strength=10`."""
        differences = []
        for method in self.methods:
            for name in _compared(method):
                values = settings_.values_of(getattr(method, name))
                if len(set(values)) > 1:
                    differences.append(f"{method.name}.{name}={values[variant]:g}")
        return ", ".join(differences)

    @property
    def learner_labels(self) -> list[str]:
        """Label of every learner: its variant's label and the order of its tasks, '' if there is only one of each."""
        orders = [f"order={i}" for i in range(len(self._orders))] if len(self._orders) > 1 else [""]
        return [
            ", ".join(filter(None, (label, order))) for label in self.labels for order in orders for _ in self.seeds
        ]

    @property
    def agent_name(self) -> str:
        """Agent's name in tables and plots: as on the command line, a user's own without its module."""
        return settings_.name_of(type(self.variants[0]))

    def keys(self) -> Tensor:
        """Random keys `[S]` of the learners.

        They depend on the seed alone, so that variants are compared with common random numbers; in a population also on
        the variant, since clones with one key would act alike.
        """
        keys = random.make_keys([seed for _, seed in self.learners], device=self.device)
        members = torch.arange(len(keys), device=keys.device) // self.repeats
        return keys if self.population is None else random.fold(random.fold(keys, "population"), members)

    def hyper(self) -> dict[str, Tensor]:
        """Per-learner settings (hyperparameters) as tensors, `{name: [S]}`."""
        return settings_.hyper_tensors(self.variants, self.repeats, self.device)

    def world(self, num_envs: int | None = None) -> Any:
        """Create the environments `[S, N]`, N from `num_envs` or else from the settings."""
        return self.problem.world((len(self.learners),), num_envs or self.variants[0].num_envs)

    def evaluation_world(self, num_envs: int) -> Any:
        """Create environments `[S, N]` for an evaluation, of the problem as it is evaluated."""
        return evaluated(self.problem).world((len(self.learners),), num_envs)

    def bind(self, world: Any) -> Learner:
        """Create the learner for the world's observation and action spaces."""
        merged = settings_.merge(self.variants)
        learner: Learner = merged.bind(world.observation_space, world.action_space, self.methods)
        if isinstance(self.problem, TaskStream):
            learner.reveals = self.problem.revealed
            learner.num_tasks = len(self.problem) if "boundaries" in learner.reveals else 1
        learner.task_samples = getattr(world, "task_samples", None)
        return learner

    def use_threads(self) -> None:
        """Set torch's number of threads; fewer than four learners use one, as more would not help."""
        threads = self.threads or available_threads()
        torch.set_num_threads(threads if len(self.learners) >= 4 else 1)

    def digests(self) -> dict[str, str]:
        """Checksums of the arrays that the problem, the settings and the methods contain, by name."""
        settings = settings_.static_values(self.variants[0])
        digests = {"data of the problem": digest_of(self.problem)}
        digests |= {name: digest_of(value) for name, value in settings.items()}
        digests |= {f"data of {method.name}": digest_of(method) for method in self.methods}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def config(self) -> dict[str, Any]:
        """Configuration as a table for `config.toml`."""
        return {
            "exp_name": name_on_command_line(type(self.variants[0])),
            "env_id": self.problem.name,
            "seeds": list(self.seeds),
            "device": self.device,
            "threads": self.threads or available_threads(),
            "task": self.problem.describe(),
            "budget": dataclasses.asdict(self.budget),
            "digests": self.digests(),
            "methods": [method_table(method) for method in self.methods],
            "population": None if self.population is None else method_table(self.population),
            "variants": [settings_table(variant) for variant in self.variants],
        }


def compare(agents_: Sequence[Any], methods: Sequence[Method]) -> tuple[tuple[Any, ...], tuple[Method, ...]]:
    """Cross every agent's settings with every combination of the methods' settings that compare values.

    Returns:
        The variants, and the methods whose compared settings have one value for each variant.
    """
    combinations = list(itertools.product(*(_alone(method) for method in methods)))
    if len(combinations) == 1:
        return tuple(agents_), tuple(methods)
    blocks = [combination for _ in agents_ for combination in combinations]
    merged = [settings_.merge(column) if dataclasses.is_dataclass(column[0]) else column[0] for column in zip(*blocks)]
    return tuple(agent for agent in agents_ for _ in combinations), tuple(merged)


def _compared(method: Method) -> list[str]:
    """Names of the settings in which a method has a value for every variant."""
    if not dataclasses.is_dataclass(method):
        return []
    names: list[str] = settings_.per_learner_names(type(method))
    return [name for name in names if isinstance(getattr(method, name), Sequence)]


def _alone(method: Method) -> list[Any]:
    return settings_.variants(method) if _compared(method) else [method]


def method_table(method: Method | Population) -> dict[str, Any]:
    """A lifelong method's or population's name and settings as a table, with the class of the user's own."""
    settings: dict[str, Any] = settings_table(method) if dataclasses.is_dataclass(method) else {}
    cls = type(method)
    own = {} if cls in (*METHODS.values(), *POPULATIONS.values()) else {"class": f"{cls.__module__}:{cls.__qualname__}"}
    return {"name": method.name, **own, "settings": settings}
