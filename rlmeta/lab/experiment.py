"""What a run is of: settings, seeds, a task, a budget; and how that is written down in `config.toml`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta import agents, meta
from rlmeta.agents.agent import NetworkFactory
from rlmeta.envs import families, native, streams
from rlmeta.envs.demonstrations import Demonstrations
from rlmeta.envs.native import NativeEnv
from rlmeta.envs.streams import TaskStream
from rlmeta.envs.task import Task, TaskFamily, task
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional import random
from rlmeta.lab import flags
from rlmeta.learning import settings as settings_
from rlmeta.learning.learner import Learner
from rlmeta.learning.method import Method, check_needs
from rlmeta.learning.settings import require


@dataclass(frozen=True)
class Budget:
    """How long to train and how often to look."""

    steps: int = 100_000
    """Environment steps of each learner (samples, tasks or gradient steps where it does not act), on every task of a
    stream, rounded up to a whole iteration."""
    eval_every: int = 0
    """Environment steps between two evaluations; 0 for a tenth of the budget."""
    eval_episodes: int = 16
    """Episodes of each learner in a periodic evaluation."""
    final_episodes: int = 64
    """Episodes of each learner in the evaluation at the end."""
    target: float = math.inf
    """A learner stops early once the mean score of a periodic evaluation is this good: as high for returns and
    accuracies, as low for losses and errors; inf for never."""
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
    """Variants of settings that share their static values, by orders of a stream, by seeds: one batch of learners."""

    variants: tuple[Any, ...]
    seeds: tuple[int, ...]
    problem: Any
    """A task, a family or a stream: it has a `name`, makes a `world`, and can `describe` itself."""
    budget: Budget = dataclasses.field(default_factory=Budget)
    methods: tuple[Method, ...] = ()
    device: str = "cpu"
    threads: int = 0
    """Processor cores to use; 0 takes all. Equal bits need equal threads, so a resumed run takes the same."""

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "no seeds given, expected at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds repeat: {list(self.seeds)}")
        strange = [one for one in self.methods if not isinstance(one, Method)]
        require(not strange, f"lifelong has {strange[:1]}, expected methods such as [EWC()]")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise SettingError(f"device is {self.device!r}: {str(error).splitlines()[0]}") from None
        if isinstance(self.problem, TaskStream):
            check_needs(self.methods, self.problem.reveals, self.problem.name)
        elif self.methods:
            raise SettingError(
                f"lifelong methods are for streams of tasks, {self.problem.name!r} is none: `rlmeta list streams` "
                "shows them"
            )

    @property
    def learners(self) -> list[tuple[Any, int]]:
        """(settings, seed) of every learner: variant by variant, in each order by order."""
        return [(variant, seed) for variant in self.variants for _ in self._orders for seed in self.seeds]

    @property
    def repeats(self) -> int:
        """Learners of each variant."""
        return len(self._orders) * len(self.seeds)

    @property
    def _orders(self) -> tuple[tuple[int, ...], ...]:
        return self.problem.orders() if isinstance(self.problem, TaskStream) else ((0,),)

    @property
    def orders(self) -> Tensor:
        """The order in which every learner meets the tasks of a stream, `[S, T]`."""
        rows = [order for _ in self.variants for order in self._orders for _ in self.seeds]
        return torch.tensor(rows)

    @property
    def labels(self) -> list[str]:
        """What sets each variant apart; [''] for a single one."""
        own = [settings_.difference(variant, self.variants) for variant in self.variants]
        of_methods = [self._difference_of_methods(i) for i in range(len(self.variants))]
        return [", ".join(filter(None, parts)) for parts in zip(own, of_methods)]

    def _difference_of_methods(self, variant: int) -> str:
        """The methods' settings that differ between variants, as `ewc.strength=10`."""
        said = []
        for method in self.methods:
            for name in _compared(method):
                values = settings_.values_of(getattr(method, name))
                if len(set(values)) > 1:
                    said.append(f"{method.name}.{name}={values[variant]:g}")
        return ", ".join(said)

    @property
    def learner_labels(self) -> list[str]:
        """What sets every learner apart besides its seed, '' for nothing."""
        orders = [f"order={i}" for i in range(len(self._orders))] if len(self._orders) > 1 else [""]
        return [
            ", ".join(filter(None, (label, order))) for label in self.labels for order in orders for _ in self.seeds
        ]

    @property
    def agent_name(self) -> str:
        """As on the command line."""
        return settings_.name_of(type(self.variants[0]))

    def keys(self) -> Tensor:
        """The learners' random keys `[S]`: of the seed alone, so that variants meet the same luck."""
        return random.make_keys([seed for _, seed in self.learners], device=self.device)

    def hyper(self) -> dict[str, Tensor]:
        """The per-learner settings `{name: [S]}`."""
        return settings_.hyper_tensors(self.variants, self.repeats, self.device)

    def world(self, num_envs: int | None = None) -> Any:
        """The learners' rows, as many for each as given or as the settings say."""
        return self.problem.world((len(self.learners),), num_envs or self.variants[0].num_envs)

    def bind(self, world: Any) -> Learner:
        """The learner on the world's spaces."""
        merged = settings_.merge(self.variants)
        learner: Learner = merged.bind(world.observation_space, world.action_space, self.methods)
        learner.num_tasks = len(self.problem) if isinstance(self.problem, TaskStream) else 1
        return learner

    def use_threads(self) -> None:
        """Set torch's threads; a few small learners gain nothing from more than one."""
        threads = self.threads or available_threads()
        torch.set_num_threads(threads if len(self.learners) >= 4 else 1)

    def config(self) -> dict[str, Any]:
        """The table of `config.toml`."""
        return {
            "exp_name": self.agent_name,
            "env_id": self.problem.name,
            "seeds": list(self.seeds),
            "device": self.device,
            "threads": self.threads or available_threads(),
            "task": self.problem.describe(),
            "budget": dataclasses.asdict(self.budget),
            "methods": [_method_table(method) for method in self.methods],
            "variants": [_settings_table(variant) for variant in self.variants],
        }


def compare(agents_: Sequence[Any], methods: Sequence[Method]) -> tuple[tuple[Any, ...], tuple[Method, ...]]:
    """Every agent's settings with every combination of the values that the methods' settings compare.

    Returns:
        The variants, and the methods with one value for each variant in what is compared.
    """
    combinations = list(itertools.product(*(_alone(method) for method in methods)))
    if len(combinations) == 1:
        return tuple(agents_), tuple(methods)
    blocks = [combination for _ in agents_ for combination in combinations]
    merged = [settings_.merge(column) if dataclasses.is_dataclass(column[0]) else column[0] for column in zip(*blocks)]
    return tuple(agent for agent in agents_ for _ in combinations), tuple(merged)


def _compared(method: Method) -> list[str]:
    """The settings in which a method has a value for every variant."""
    if not dataclasses.is_dataclass(method):
        return []
    names: list[str] = settings_.per_learner_names(type(method))
    return [name for name in names if isinstance(getattr(method, name), Sequence)]


def _alone(method: Method) -> list[Any]:
    return settings_.variants(method) if _compared(method) else [method]


def _settings_table(settings: Any) -> dict[str, Any]:
    table = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for name, value in table.items():
        if isinstance(value, Demonstrations):
            table[name] = value.path or f"<{value}>"
        elif dataclasses.is_dataclass(value):
            table[name] = flags.text_of(value)
        elif isinstance(value, tuple):
            plain = all(isinstance(one, int | float | str) for one in value)
            table[name] = list(value) if plain else f"<{', '.join(str(one) for one in value)}>"
        elif callable(value):
            table[name] = f"{value.__module__}:{value.__qualname__}"
    return {name: value for name, value in table.items() if value is not None}


def _method_table(method: Method) -> dict[str, Any]:
    from rlmeta import lifelong

    settings: dict[str, Any] = _settings_table(method) if dataclasses.is_dataclass(method) else {}
    cls = type(method)
    own = {} if cls in lifelong.ALL else {"class": f"{cls.__module__}:{cls.__qualname__}"}
    return {"name": method.name, **own, "settings": settings}


def methods_again(
    tables: Sequence[Mapping[str, Any]], where: str, own: Mapping[str, Any] | None = None
) -> tuple[Method, ...]:
    """The lifelong methods of a saved configuration.

    Args:
        tables: of the configuration.
        where: for error messages.
        own: the user's own classes or instances of methods by name, again: a configuration names them only.
    """
    from rlmeta import lifelong

    given, known = own or {}, {cls.name: cls for cls in lifelong.ALL}
    asked = [table for table in tables if table["name"] not in given]
    strange = [table.get("class", table["name"]) for table in asked if "class" in table or table["name"] not in known]
    if strange:
        raise SettingError(
            f"{where} had lifelong methods of your own: pass them again as lifelong= (on the command line --lifelong "
            f"{','.join(strange)})"
        )
    made: list[Method] = []
    for table in tables:
        found: Any = given.get(table["name"], known.get(table["name"]))
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in table["settings"].items()}
        made.append(found if isinstance(found, Method) else found(**values))
    return tuple(made)


def agent_class(name: str) -> type:
    """The settings class of an agent's command-line name."""
    classes = {settings_.name_of(cls): cls for cls in (*agents.ALL, *meta.ALL)}
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
    own: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment of a saved configuration.

    Args:
        config: as `Experiment.config` gave it.
        where: for error messages.
        network: the user's network again, where the run had one: a configuration names code but never loads it.
        source: the user's environment factory again, where the run had one.
        methods: the lifelong methods again, where the run had some.
        own: other settings that no configuration can hold (rewards, demonstrations that are no file), by name, again.
    """
    try:
        cls = agent_class(config["exp_name"])
        tables = [dict(table) for table in config["variants"]]
        for table in tables:
            if "network" in table:
                table["network"] = _network_again(table["network"], network, where)
            if "learner" in table:
                table["learner"] = _learner_again(table["learner"], network, where)
            table.update({name: tuple(value) for name, value in table.items() if isinstance(value, list)})
            table.update(_own_again(table, own or {}, where))
            settings_.check_names(cls, table, where)
        return Experiment(
            variants=tuple(cls(**table) for table in tables),
            seeds=tuple(config["seeds"]),
            problem=_problem_again(config["task"], source, where),
            budget=Budget(**config["budget"]),
            methods=_same_methods(methods, config["methods"], where) or methods_again(config["methods"], where),
            device=config["device"],
            threads=config["threads"],
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: config.toml lacks {error}; it is not the configuration of a run") from None


def _network_again(name: str, given: NetworkFactory | None, where: str) -> NetworkFactory:
    """The network of this name: rlmeta's own, or the user's, given again."""
    if name.startswith("rlmeta.nn."):
        own: NetworkFactory = flags.load_object(name)
        return own
    if given is None:
        raise SettingError(f"{where} had the network {name}: pass it again as network= (on the command line --network)")
    return given


def _learner_again(text: str, network: NetworkFactory | None, where: str) -> Any:
    """The settings of a learner inside another's; its network is not loaded either."""
    words = text.split()
    names = [word.removeprefix("network=") for word in words if word.startswith("network=")]
    found = flags.learner(" ".join(word for word in words if not word.startswith("network=")))
    return dataclasses.replace(found, network=_network_again(names[0], network, where)) if names else found


def _same_methods(given: tuple[Method, ...], tables: Sequence[dict[str, Any]], where: str) -> tuple[Method, ...]:
    """The methods that were given again, after a check that they are the run's."""
    had = [table["name"] for table in tables]
    if given and [method.name for method in given] != had:
        said = ", ".join(method.name for method in given)
        raise SettingError(f"{where} had lifelong methods {', '.join(had) or '(none)'}, got {said}: give the same")
    return given


def _own_again(table: Mapping[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that a configuration only describes, from those that were given again."""
    described = {n: value for n, value in table.items() if isinstance(value, str) and value[:1] == "<"}
    for name, value in described.items():
        if name not in own:
            raise SettingError(
                f"{where} had the {name} {value}, which a configuration only describes: pass it again as "
                f"own={{{name!r}: ...}} (on the command line --{name})"
            )
    return {name: own[name] for name in table if name in own}


ENV_AGAIN = "pass it again as env= (on the command line --env PACKAGE.MODULE:NAME)"


def _problem_again(described: dict[str, Any], source: Any, where: str) -> Any:
    """The problem of a saved configuration; a user's own data and code have to be given again."""
    kind = described.get("kind", "task")
    if kind == "stream":
        return _stream_again(described, source, where)
    if kind == "family" and source is None and "table" in described:
        return families.from_table(described["name"], described["table"])
    if kind == "family" and source is None and "task" in described:
        ranges = {name: (low, high) for name, (low, high) in described["ranges"].items()}
        base = _task_again(described["task"], None, where)
        return families.NamedFamily(described["name"], TaskFamily(described["name"], base, ranges))
    if kind in ("data", "family"):
        if source is None:
            what = "samples" if kind == "data" else "family"
            raise SettingError(f"{where} learned from your own {what} {described['name']!r}: {ENV_AGAIN}")
        made = kind == "data" or isinstance(source, families.NamedFamily)
        return source if made else families.NamedFamily(described["name"], source)
    return _task_again(described, source, where)


def _stream_again(described: dict[str, Any], source: Any, where: str) -> TaskStream:
    scenario, order = described["scenario"], described["order"]
    if isinstance(source, TaskStream):
        return source if source.order == order else dataclasses.replace(source, order=order)
    if "table" in described:
        table = described["table"]
        return streams.from_table(described["name"], table, scenario if "data" in table else None, order)
    tasks = tuple(_problem_again(one, None, where) for one in described["tasks"])
    reveals, shown = frozenset(described["reveals"]), described["observe_identity"]
    return TaskStream(described["name"], tasks, reveals, order, scenario, shown)


def _task_again(described: dict[str, Any], source: Any, where: str) -> Task:
    """The task of a saved configuration; a user's own code has to be given again."""
    if isinstance(source, Task):
        return source
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
        raise SettingError(f"{where} had environments of {described['source']}: {ENV_AGAIN}")
    else:
        made = task(described["source"], name=name, settings=settings, mode=mode, native=False)
    return dataclasses.replace(made, ranges=ranges)
