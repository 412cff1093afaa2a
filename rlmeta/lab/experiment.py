"""What a run is of: settings, seeds, a task, a budget; and how that is written down in `config.toml`."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta import agents
from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.envs import native
from rlmeta.envs.native import NativeEnv
from rlmeta.envs.task import Task, task
from rlmeta.envs.world import World
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional import random
from rlmeta.learning import settings as settings_
from rlmeta.learning.method import Method
from rlmeta.learning.settings import require


@dataclass(frozen=True)
class Budget:
    """How long to train and how often to look."""

    steps: int = 100_000
    """Environment steps of each learner, rounded up to a whole iteration."""
    eval_every: int = 0
    """Environment steps between two evaluations; 0 for a tenth of the budget."""
    eval_episodes: int = 16
    """Episodes of each learner in a periodic evaluation."""
    final_episodes: int = 64
    """Episodes of each learner in the evaluation at the end."""
    target: float = math.inf
    """A learner stops early once its periodic evaluation reaches this mean return."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    log_points: int = 200
    """Lines in metrics.jsonl over the whole budget, about."""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_episodes", "final_episodes", "log_points"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        require(self.eval_every >= 0, f"eval_every is {self.eval_every}, expected 0 or more steps")
        require(self.checkpoint_seconds >= 0, f"checkpoint_seconds is {self.checkpoint_seconds}, expected 0 or more")


def available_threads() -> int:
    """As many as OMP_NUM_THREADS says, as everywhere in torch; else one a core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else os.cpu_count() or 1


@dataclass(frozen=True)
class Experiment:
    """Variants of an agent's settings that share their static values, by seeds, on a task: one batch of learners."""

    variants: tuple[Any, ...]
    seeds: tuple[int, ...]
    task: Task
    budget: Budget = dataclasses.field(default_factory=Budget)
    methods: tuple[Method, ...] = ()
    device: str = "cpu"
    threads: int = 0
    """Processor cores to use; 0 takes all. Equal bits need equal threads, so a resumed run takes the same."""

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "no seeds given, expected at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds repeat: {list(self.seeds)}")

    @property
    def learners(self) -> list[tuple[Any, int]]:
        """(settings, seed) of every learner, variant by variant."""
        return [(variant, seed) for variant in self.variants for seed in self.seeds]

    @property
    def labels(self) -> list[str]:
        """What sets each variant apart; [''] for a single one."""
        return [settings_.difference(variant, self.variants) for variant in self.variants]

    @property
    def agent_name(self) -> str:
        """As on the command line."""
        return type(self.variants[0]).__name__.lower()

    def keys(self) -> Tensor:
        """The learners' random keys `[S]`: of the seed alone, so that variants meet the same luck."""
        return random.make_keys([seed for _, seed in self.learners], device=self.device)

    def hyper(self) -> dict[str, Tensor]:
        """The per-learner settings `{name: [S]}`."""
        return settings_.hyper_tensors(self.variants, len(self.seeds), self.device)

    def world(self, num_envs: int | None = None) -> World:
        """The learners' environments, as many for each as given or as the settings say."""
        return self.task.world((len(self.learners),), num_envs or self.variants[0].num_envs)

    def bind(self, world: World) -> Agent:
        """The agent on the world's spaces."""
        merged = settings_.merge(self.variants)
        return merged.bind(world.observation_space, world.action_space, self.methods)

    def use_threads(self) -> None:
        """Set torch's threads; a few small learners gain nothing from more than one."""
        threads = self.threads or available_threads()
        torch.set_num_threads(threads if len(self.learners) >= 4 else 1)

    def config(self) -> dict[str, Any]:
        """The table of `config.toml`."""
        return {
            "exp_name": self.agent_name,
            "env_id": self.task.name,
            "seeds": list(self.seeds),
            "device": self.device,
            "threads": self.threads or available_threads(),
            "task": self.task.describe(),
            "budget": dataclasses.asdict(self.budget),
            "methods": [method.name for method in self.methods],
            "variants": [_settings_table(variant) for variant in self.variants],
        }


def _settings_table(settings: Any) -> dict[str, Any]:
    table = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for name, value in table.items():
        if isinstance(value, tuple):
            table[name] = [one if isinstance(one, int | float | str) else str(one) for one in value]
        elif callable(value):
            table[name] = f"{value.__module__}:{value.__qualname__}"
    return {name: value for name, value in table.items() if value is not None}


def agent_class(name: str) -> type:
    """The settings class of an agent's command-line name."""
    classes = {cls.__name__.lower(): cls for cls in agents.ALL}
    if name not in classes:
        from rlmeta.errors import unknown_name

        raise unknown_name("agent", name, classes)
    return classes[name]


def from_config(
    config: dict[str, Any],
    *,
    where: str,
    network: NetworkFactory | None = None,
    source: Any = None,
    methods: tuple[Method, ...] = (),
) -> Experiment:
    """The experiment of a saved configuration.

    Args:
        config: as `Experiment.config` gave it.
        where: for error messages.
        network: the user's network again, where the run had one: a configuration names code but never loads it.
        source: the user's environment factory again, where the run had one.
        methods: the lifelong methods again, where the run had some.
    """
    try:
        cls = agent_class(config["exp_name"])
        tables = [dict(table) for table in config["variants"]]
        for table in tables:
            if "network" in table:
                if network is None:
                    raise SettingError(
                        f"{where} had the network {table['network']}: pass it again as network= "
                        "(on the command line --network)"
                    )
                table["network"] = network
            table.update({name: tuple(value) for name, value in table.items() if isinstance(value, list)})
            settings_.check_names(cls, table, where)
        return Experiment(
            variants=tuple(cls(**table) for table in tables),
            seeds=tuple(config["seeds"]),
            task=_task_again(config["task"], source, where),
            budget=Budget(**config["budget"]),
            methods=methods,
            device=config["device"],
            threads=config["threads"],
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: config.toml lacks {error}; it is not the configuration of a run") from None


def _task_again(described: dict[str, Any], source: Any, where: str) -> Task:
    """The task of a saved configuration; a user's own code has to be given again."""
    name, settings, mode = described["name"], described["settings"], described["mode"]
    ranges = {constant: (low, high) for constant, (low, high) in described["ranges"].items()}
    module, _, cls = described["source"].partition(":")
    if source is not None:
        made = (
            task(source, name=name, mode=mode)
            if isinstance(source, NativeEnv)
            else task(source, name=name, settings=settings, mode=mode)
        )
    elif module.startswith("rlmeta.envs.native.") and cls != "TabularMDP":
        made = Task(name, getattr(native, cls)(**described["constants"]), settings)
    elif "constants" in described or "<" in cls or (cls and "-v" not in cls):
        raise SettingError(
            f"{where} had environments of {described['source']}: pass it again as env= (on the command line --env)"
        )
    else:
        made = task(described["source"], name=name, settings=settings, mode=mode, native=False)
    return dataclasses.replace(made, ranges=ranges)
