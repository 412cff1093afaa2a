"""Plan of `rlmeta train`: an agent on a task, split into groups that are trained one after another.

Learners of one batch share their static settings. A comma in one of those (`--num-steps 32,128`) makes a group for
every value, each a run in a folder of its own below the common one, which keeps the plan so that it can be resumed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlmeta.cli import flags
from rlmeta.cli.options import ABOUT, Code, Options
from rlmeta.envs import streams, trusted
from rlmeta.envs.kinds import is_problem
from rlmeta.envs.streams import TaskStream
from rlmeta.envs.task import Mode, TaskFamily, family, is_data_family, task
from rlmeta.errors import SettingError
from rlmeta.learning.method import Method
from rlmeta.learning.numbers import whole
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import per_learner_names
from rlmeta.report.trackers import TrackerFactory, to_tensorboard, to_wandb, wandb_of
from rlmeta.runs import grammar, presets, user_code
from rlmeta.runs import train as training
from rlmeta.runs.experiment import Budget, Problem, chosen_seeds
from rlmeta.runs.populations import POPULATIONS
from rlmeta.runs.shipped import METHODS, agent_class, check_family

MOST_SEEDS = 100_000
"""Largest number of seeds; more are taken for a typing error."""


@dataclass(frozen=True)
class Plan:
    """Training plan of a command: names, the text of flags, and the settings of environment, methods and population."""

    agent: str
    task: str
    env: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment."""
    lifelong: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of lifelong methods, by method."""
    population_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the population."""
    reward_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of rewards, by reward."""
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Text of the flags, in the groups `run`, `budget` and `settings`."""
    preset: presets.Preset = presets.NOTHING
    file: str = ""
    """The file that the plan was loaded from; '' for the plan of a command line."""
    wandb: str = ""
    """W&B project that the resume of a saved plan logs to; for the plan of a command line its flags decide."""

    @cached_property
    def options(self) -> Options:
        """Options of the run: seeds, folder, device, trackers."""
        return grammar.build(Options, self.texts["run"])

    @cached_property
    def budget(self) -> Budget:
        """Training budget."""
        return grammar.build(Budget, self.texts["budget"])

    @cached_property
    def groups(self) -> dict[str, Any]:
        """Settings of every group by its label; '' is the label of a single group."""
        with trusted.reading(self.file):
            cls = agent_class(self.agent)
            per_learner = per_learner_names(cls)
            combinations: list[Any] = grammar.combinations(cls, self.texts["settings"], per_learner)
            combinations = [user_code.with_reward_settings(each, self.reward_settings) for each in combinations]
        static = {n: text for n, text in self.texts["settings"].items() if n not in per_learner}
        compared = [n for n, text in static.items() if _has_several_values(cls, n, text)]
        return {",".join(f"{n}={grammar.text_of(getattr(s, n))}" for n in compared): s for s in combinations}

    @property
    def seeds(self) -> int | tuple[int, ...]:
        """Number of seeds, or the seeds.

        Raises:
            SettingError: neither a number nor different seeds.
        """
        text = self.options.seeds.strip()
        try:
            if "," not in text and "-" not in text[1:]:
                return _count_of(text)
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return chosen_seeds([seed for part in parts for seed in _seeds_of(part)])
        except ValueError as error:
            if isinstance(error, SettingError):
                raise SettingError(f"--seeds {text}: {error}") from None
            raise SettingError(f"--seeds is {text!r}, expected a count (16), or seeds (3,5,7 or 100-115)") from None

    def methods(self) -> tuple[Method, ...]:
        """Build the lifelong methods, in the order they are named.

        Raises:
            SettingError, UnknownNameError: no such method, no such setting of it, or settings of one that is not named.
        """
        with trusted.reading(self.file):
            classes = user_code.methods_named(self.options.lifelong)
        for name in self.lifelong:
            if name not in [method.name for method in classes]:
                flag = "--population" if name in POPULATIONS else "--lifelong"
                raise SettingError(f"--{name}.{next(iter(self.lifelong[name]), '')}: add {name} to {flag}")
        return tuple(user_code.build_method(method, self.lifelong.get(method.name, {})) for method in classes)

    def population(self) -> Population | None:
        """Build the population; None without one.

        Raises:
            SettingError, UnknownNameError: no such population, no such setting of it, or settings without its name.
        """
        name = self.options.population
        with trusted.reading(self.file):
            return user_code.population_named(name, self.population_settings) if name else None

    @cached_property
    def source(self) -> Any:
        """The task's name, or the user's object that it names."""
        with trusted.reading(self.file):
            trusted.check_settings(self.env)
            source = user_code.source_of(self.task, self.env)
            if isinstance(source, str):
                trusted.check_id(source)
            return source

    def problem(self) -> Problem | TaskFamily:
        """Create the training problem: a task, family or stream.

        Raises:
            SettingError, UnknownNameError: no such problem, or flags that are not for one of its kind.
        """
        source, options, cls = self.source, self.options, agent_class(self.agent)
        meta = getattr(cls, "learns_from_tasks", False)
        if meta and isinstance(source, str):
            check_family(source, cls.__name__)
        order: Any = options.order if options.order in ("given", "all") else _whole(options.order, "--order")
        if isinstance(source, str) and streams.is_stream(source):
            if self.env:
                raise SettingError(
                    f"--env.{next(iter(self.env))}: the tasks of the stream {source!r} have their own settings, leave "
                    "the flag out"
                )
            scenario: Any = options.scenario or None
            restarts = None if options.restart_optimizer else False
            return streams.stream(source, scenario=scenario, order=order, restart_optimizer=restarts)
        if isinstance(source, TaskStream):
            if options.scenario:
                raise SettingError(f"--scenario: the stream {self.task!r} has its own scenario, leave the flag out")
            if not options.restart_optimizer:
                source = dataclasses.replace(source, restart_optimizer=False)
            return source if order == "given" else dataclasses.replace(source, order=order)
        if options.lifelong or options.scenario or options.order != "given" or not options.restart_optimizer:
            raise SettingError(
                "--lifelong, --order, --scenario and --no-restart-optimizer are for streams of tasks, "
                f"{self.task!r} is none: `rlmeta list streams` shows them"
            )
        if isinstance(source, str) and (is_data_family(source) or (meta and not self.env)):
            return family(source, self.env)
        if is_problem(source):
            return source
        mode: Mode = "async" if options.async_ else "sync"
        created = task(
            source,
            name=self.task,
            settings=self.env,
            mode=mode,
            native=options.native,
            max_episode_steps=options.max_episode_steps,
            worker_timeout=options.worker_timeout,
        )
        if created.native and options.async_:
            raise SettingError(
                f"--async is for gymnasium's environments, {self.task!r} is rlmeta's own: add --no-native"
            )
        return created

    def check(self) -> None:
        """Validate the task, the seeds and all groups before anything is written or trained."""
        if self.options.wandb_project != Options.wandb_project and not self.options.wandb:
            raise SettingError("--wandb-project is given without --wandb: add --wandb")
        if not self.seeds or (isinstance(self.seeds, int) and self.seeds < 1):
            raise SettingError(f"--seeds is {self.options.seeds!r}, expected at least one")
        try:
            torch.empty(0, device=self.options.device)
        except (RuntimeError, AssertionError) as error:
            raise SettingError(f"--device is {self.options.device!r}: {str(error).splitlines()[0]}") from None
        self.trackers()
        groups, problem, methods, population = self.groups, self.problem(), self.methods(), self.population()
        if len(groups) > 1:
            for settings in groups.values():
                training.prepare(settings, problem, self.budget, lifelong=methods, population=population).close()

    # ------------------------------------------------------------------ printed texts

    def header(self, folder: Path) -> str:
        """Header printed before training: task, budget, preset, and settings that differ from the agent's defaults."""
        seeds = f"seeds {self.options.seeds.rstrip(',')}"
        if isinstance(self.seeds, int):
            seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        constants = ", ".join(f"{name}={grammar.text_of(value)}" for name, value in self.env.items())
        env = f" ({constants})" if constants else ""
        budget = self.budget
        length = f"{budget.epochs:g} epochs" if budget.epochs else f"{budget.steps:,} steps"
        lines = [f"{self.agent} on {self.task}{env}: {seeds}, {length} each, into {folder}"]
        path, name = self.preset.path, agent_class(self.agent).__name__
        tuning_seeds = ", ".join(map(str, self.preset.chosen_on_seeds))
        chosen = f", chosen on seeds {tuning_seeds}" if tuning_seeds else ""
        lines += [f"preset {_short(path)} [{self.preset.table}]{chosen}" if path else "no preset"]
        differing = [
            f"{setting}={text} ({grammar.text_of(f.default)})"
            for f in dataclasses.fields(agent_class(self.agent))
            for setting, text in [(f.name, self.texts["settings"][f.name])]
            if text != grammar.text_of(f.default)
        ]
        lines += [f"settings ({name}'s default): {', '.join(differing)}" if differing else f"{name}'s default settings"]
        if len(self.groups) > 1:
            lines += [f"{len(self.groups)} groups, one after another: {' | '.join(self.groups)}"]
        return "\n".join(lines)

    def resume_flags(self, code: Sequence[str] = ()) -> str:
        """Flags that a resume needs for user code; a saved plan of several groups needs only the modules.

        Args:
            code: further modules that the command allows.
        """
        texts = self.texts["settings"]
        within = [word.removeprefix("network=") for word in texts.get("learner", "").split() if "network=" in word]
        network = ",".join([text for text in (texts.get("network", "none"), *within) if text != "none"])
        methods = ",".join(name for name in self.options.lifelong.split(",") if ":" in name)
        learner = ",".join(user_code.user_names((texts.get("learner", "none").split() or [""])[0]))
        agent = self.agent if ":" in self.agent else learner
        code = [*code, *user_code.modules_of(self.options.population)]
        named = {
            "agent": agent,
            "network": network,
            "env": self.task,
            "lifelong": methods,
            "rewards": texts.get("rewards", ""),
        }
        modules_by_flag = {flag: modules for flag, text in named.items() if (modules := user_code.modules_of(text))}
        texts_of_flags = [f"--{flag} {shlex.quote(named[flag])}" for flag in modules_by_flag]
        if len(self.groups) > 1:
            code = [*code, *(module for modules in modules_by_flag.values() for module in modules)]
            texts_of_flags = []
        return " ".join([*texts_of_flags, *([f"--code {','.join(dict.fromkeys(code))}"] if code else [])])

    # ------------------------------------------------------------------ folder and trackers

    def folder(self) -> Path:
        """Folder of the run: --out, or the first unused runs/AGENT-TASK-N."""
        if self.options.out is not None:
            return Path(self.options.out)
        name = re.sub(r"[^\w.-]+", "-", f"{self.agent}-{self.task}")
        n = 1
        while os.path.lexists(f"runs/{name}-{n}"):
            n += 1
        return Path(f"runs/{name}-{n}")

    def trackers(self) -> list[TrackerFactory]:
        """Trackers of the run; W&B only if the command asks for it, whatever a saved plan says."""
        options, chosen = self.options, [to_tensorboard()] if self.options.tensorboard else []
        if self.file:
            return [*chosen, *wandb_of(self.wandb)]
        return [*chosen, to_wandb(options.wandb_project)] if options.wandb else chosen


def code_of(arguments: Sequence[str]) -> list[str]:
    """Modules that the flag --code names."""
    return user_code.names_in(_peek(arguments, "--code") or "")


def from_flags(agent: str, task_name: str, arguments: Sequence[str]) -> Plan:
    """Parse a command line to a plan, with the preset as the flags' defaults; `--help` prints them and exits.

    Raises:
        SettingError, UnknownNameError: a name, a flag or a value that is wrong.
    """
    cls = agent_class(agent)
    method_settings, rest = dotted_settings(arguments)
    env = method_settings.pop("env", {})
    chosen = _peek(arguments, "--population")
    population_settings = method_settings.pop(user_code.population_class(chosen).name, {}) if chosen else {}
    source = _peek(rest, "--preset")
    preset = presets.load_preset(cls, task_name, None if source in (None, "auto") else source)
    steps = {} if preset.steps is None else {"steps": preset.steps}
    title = "agent" if ":" in agent else agent
    groups = {"run": (Options, {}), "budget": (Budget, steps), title: (cls, preset.settings), "user_code": (Code, {})}
    texts = flags.read(f"rlmeta train {agent} {task_name}", ABOUT, groups, rest)
    texts["settings"] = texts.pop(title)
    del texts["user_code"]  # a saved plan must not allow user code
    rewards = [name for name in user_code.reward_names(_peek(arguments, "--rewards")) if name in method_settings]
    reward_settings = {name: method_settings.pop(name) for name in rewards}
    plan = Plan(agent, task_name, env, method_settings, population_settings, reward_settings, texts, preset)
    plan.check()
    return plan


def _has_several_values(cls: type, name: str, text: str) -> bool:
    return len(grammar.values(cls, name, text)) > 1


def _count_of(text: str) -> int:
    """Parse a number of seeds.

    Raises:
        ValueError: malformed, or too many.
    """
    count = whole(text)
    if count > MOST_SEEDS:
        raise ValueError(text)
    return count


def _seeds_of(text: str) -> range:
    """Parse a range of seeds, `100-115` with both ends included, or a single seed.

    Raises:
        SettingError: the last seed is below the first.
        ValueError: malformed, or too many.
    """
    first, dash, last = text.partition("-")
    low, high = whole(first), whole(last if dash else first)
    if high < low:
        raise SettingError(f"{high} is below {low}: the first seed, then the last, as in {high}-{low}")
    if high - low >= MOST_SEEDS:
        raise ValueError(text)
    return range(low, high + 1)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _whole(text: str, flag: str) -> int:
    try:
        return whole(text)
    except ValueError:
        raise SettingError(f"{flag} is {text!r}, expected given, all, or a whole number") from None


def dotted_settings(arguments: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Parse dotted flags: `--env.KEY VALUE` of the environment, `--ewc.KEY VALUE` of a method, and so of a population
    and of rewards.

    Returns:
        Settings by owner, and the other arguments.
    """
    user_classes = user_code.methods_named(_peek(arguments, "--lifelong") or "")
    population = _peek(arguments, "--population")
    user_classes += [user_code.population_class(population)] if population else []
    rewards = user_code.reward_names(_peek(arguments, "--rewards"))
    owners = ("env", *METHODS, *POPULATIONS, *(owner.name for owner in user_classes), *rewards)
    settings: dict[str, dict[str, Any]] = {}
    others, rest = [], deque(arguments)
    while rest:
        token = rest.popleft()
        flag, equals, value = token.partition("=")
        owner, dot, key = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not dot or owner not in owners:
            others.append(token)
            continue
        name, values = key.replace("-", "_"), settings.setdefault(owner, {})
        if not name.isidentifier() or name in values:
            problem = "is given twice" if name in values else f"names no argument: --{owner}.KEY VALUE"
            raise SettingError(f"{flag} {problem}")
        if not equals and (not rest or rest[0].startswith("--")):
            raise SettingError(f"{flag} needs a value")
        values[name] = grammar.scalar(value if equals else rest.popleft())
    return settings, others


def _peek(arguments: Sequence[str], flag: str) -> str | None:
    """Value of a flag that is needed before all flags are parsed; None without it."""
    for token, following in zip(arguments, [*arguments[1:], ""]):
        if token == flag:
            return following
        if token.startswith(f"{flag}="):
            return token.removeprefix(f"{flag}=")
    return None
