"""The command line: `rlmeta train | eval | resume | record | adapt | list | bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmeta.cli.terminal import say
from rlmeta.errors import RlmetaError, RunExistsError, SettingError, unknown_name

if TYPE_CHECKING:
    from rlmeta.cli.plan import Plan
    from rlmeta.report.adaptation import AdaptFlags
    from rlmeta.runs.run import Run

USAGE = """usage: rlmeta COMMAND ...

  train AGENT TASK [flags]   train an agent, many seeds at once
  eval RUN [flags]           play fresh episodes with a run's learners
  resume RUN [flags]         go on with a run that was interrupted or killed
  adapt RUN [flags]          follow a meta-learner as it adapts to held-out tasks
  record RUN [flags]         write demonstrations: whole episodes of one of its learners
  list [agents|tasks|families|streams|methods|runs]
                             what can be named
  bench NAME [flags]         measure speed and scores

  rlmeta train ppo CartPole-v1 --seeds 16 --steps 100k
  rlmeta train ppo CartPole-v1 --learning-rate 1e-4,3e-4,1e-3 --seeds 8     (24 learners at once)
  rlmeta train ppo mypkg:MyEnv-v0 --env.size 7
  rlmeta COMMAND --help, rlmeta train AGENT --help, rlmeta --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0, 2 after an error of the user's, 1 after any other, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("RLMETA_DEBUG") == "1"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {message}", error=True)
            return _dispatch(arguments)
    except RlmetaError as error:
        if debug:
            raise
        return _complain(" ".join(str(error).split()), 2)
    except SystemExit as stop:  # of tyro: 0 after its help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return 130
    except BrokenPipeError:  # `rlmeta list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
        place = f"{last.filename}:{last.lineno}, in {last.name}"
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return _complain(f"{message} ({place}); RLMETA_DEBUG=1 shows the traceback", 1)


def _complain(message: str, status: int) -> int:
    say(f"error: {message}", error=True)
    return status


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "eval": evaluate,
        "resume": resume,
        "record": record,
        "adapt": adapt,
        "list": show_list,
        "bench": bench,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("rlmeta"))
        return 0
    if arguments[0] not in commands:
        raise unknown_name("command", arguments[0], commands)
    return commands[arguments[0]](arguments[1:])


def _names(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The names at the start of the arguments, and the flags after them."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return arguments[:count], arguments[count:]


def _one_folder(arguments: list[str], command: str) -> tuple[Path, list[str]]:
    names, rest = _names(arguments)
    if len(names) != 1 and not {"-h", "--help"} & set(rest):
        raise SettingError(
            f"rlmeta {command} takes one run folder, got {' '.join(names) or 'none'}: rlmeta {command} RUN"
        )
    return Path(names[0] if names else "RUN"), rest


# ----------------------------------------------------------------------------------------------------------- train


def train(arguments: list[str]) -> int:
    """`rlmeta train AGENT TASK`."""
    from rlmeta.cli import plan as plans

    names, rest = _names(arguments)
    if len(names) != 2 and not {"-h", "--help"} & set(rest):
        raise SettingError(
            f"rlmeta train takes an agent and a task first, got {' '.join(names) or 'none'}: rlmeta train AGENT TASK"
        )
    if not names:
        print(USAGE.split("\n\n")[0], "", plans.AGENT_AND_TASK, sep="\n")
        return 0
    from rlmeta.runs.own_code import allowed_here

    code = plans.code_of(rest)
    with allowed_here(code):
        plan = plans.from_flags(names[0], names[1] if len(names) > 1 else "TASK", rest)
        folder = plan.folder()
        plan.begin(folder)
        return _run_groups(plan, folder, plan.again(code), header="" if plan.options.quiet else plan.header(folder))


def _run_groups(plan: Plan, folder: Path, again: str, inexact: bool = False, header: str = "") -> int:
    """Train, or go on with, every group of the plan; the header stands before the first.

    Args:
        plan: what to train.
        folder: of the whole plan.
        again: the flags that a resume needs for the user's own code.
        inexact: as for `rlmeta resume`.
        header: '' for none.
    """
    rows: list[dict[str, Any]] = []
    runs: list[Run] = []
    try:
        for label in plan.groups:
            runs.append(run := plan.train(label, folder, inexact, "" if runs else header))
            if run.stopped == "interrupted":
                raise KeyboardInterrupt
            rows += [{**row, "setting": ", ".join(filter(None, (label, row["setting"])))} for row in run.summary()]
    except KeyboardInterrupt:
        return _interrupted(folder, again)
    _print_results(rows)
    for run in runs:
        _print_ends(run)
    say(f"saved in {folder}")
    return 0


def _interrupted(folder: Path, again: str) -> int:
    from rlmeta.cli.plan import is_run

    command = " ".join(filter(None, (f"rlmeta resume {folder}", again)))
    say(f"interrupted; resume with: {command}" if is_run(folder) else "interrupted", error=True)
    return 130


# ---------------------------------------------------------------------------------------------------- eval and resume


@dataclass(frozen=True)
class OwnCode:
    """Your own code, where the run had some: a run folder names it but never loads it by itself."""

    code: str = ""
    """Modules that the folder may name and so import, package.module, joined by commas."""
    network: str | None = None
    """The network again, as package.module:Name."""
    env: str | None = None
    """The environment's factory again, or the stream or family, as package.module:name."""
    lifelong: str = ""
    """The lifelong methods again, as package.module:MyMethod, joined by commas."""
    rewards: str = "none"
    """To go on: the rewards again, as package.module:Name, joined by +."""
    demonstrations: str | None = None
    """To go on: the file of the demonstrations again, where it is no longer where it was."""

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Within, a folder may name what these flags name, and that may come from the current folder."""
        from rlmeta.runs.own_code import allowed_here, names_in, own_names

        texts = (self.network, self.env, self.lifelong, self.rewards)
        with allowed_here(names_in(self.code), [name for text in texts for name in own_names(text)]):
            yield

    def again(self, folder: Path) -> dict[str, Any]:
        """What `load` and `resume` are given of it for the run in a folder."""
        from rlmeta.runs import own_code
        from rlmeta.runs.grammar import load_objects

        rewards = load_objects(self.rewards)
        own: dict[str, Any] = {"rewards": rewards} if rewards else {}
        if self.demonstrations is not None:
            own["demonstrations"] = self.demonstrations
        return {
            "network": own_code.network_again(self.network),
            "env": own_code.env_again(folder, self.env),
            "lifelong": own_code.own_methods_again(folder, self.lifelong),
            "own": own,
        }

    def words(self) -> str:
        """The flags that were given, to be given again."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items())


@dataclass(frozen=True)
class EvaluateFlags:
    """The episodes."""

    episodes: int = 256
    """Episodes of each learner."""
    best: bool = False
    """The parameters of each learner's best periodic evaluation instead of the final ones."""
    sampled: bool = False
    """Sample actions instead of taking the policy's mode."""
    seed: int = 1
    """Another seed plays other episodes."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise SettingError(f"--episodes is {self.episodes}, expected at least 1")


@dataclass(frozen=True)
class ResumeFlags:
    """The run."""

    inexact: bool = False
    """Go on even where the environments cannot be brought back to where they were."""
    quiet: bool = False
    """No live progress."""
    wandb: str = ""
    """Log on to this project of Weights & Biases, or ENTITY/PROJECT: a run folder alone never sends anything there."""


@dataclass(frozen=True)
class RecordFlags:
    """The episodes."""

    out: str = ""
    """The file to write; needed."""
    episodes: int = 60
    """How many."""
    learner: int = -1
    """Which learner plays; -1 for the best in the final evaluation."""
    best: bool = False
    """The parameters of its best periodic evaluation instead of the final ones."""
    sampled: bool = False
    """Sample actions instead of taking the policy's mode."""
    seed: int = 0
    """Another seed plays other episodes."""

    def __post_init__(self) -> None:
        if not self.out:
            raise SettingError("rlmeta record needs a file to write: --out FILE")
        if os.path.lexists(self.out):
            raise RunExistsError(f"{self.out} exists: record into another file, or delete it first")
        from rlmeta.data.demonstrations import check_writable

        check_writable(self.out)
        if self.learner < -1:
            raise SettingError(f"--learner is {self.learner}, expected 0 or more, or -1 for the best")


def evaluate(arguments: list[str]) -> int:
    """`rlmeta eval RUN`."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar

    folder, rest = _one_folder(arguments, "eval")
    groups: dict[str, Any] = {"evaluation": (EvaluateFlags, {}), "own_code": (OwnCode, {})}
    texts = flags.read(f"rlmeta eval {folder}", "Play fresh episodes with a run's learners.", groups, rest)
    chosen, own = grammar.build(EvaluateFlags, texts["evaluation"]), grammar.build(OwnCode, texts["own_code"])
    with own.allowed():
        return _evaluate(folder, chosen, own)


def _evaluate(folder: Path, chosen: EvaluateFlags, own: OwnCode) -> int:
    from rlmeta.cli.plan import members
    from rlmeta.runs.run import load

    rows: list[dict[str, Any]] = []
    for label, member in members(folder).items():
        run = load(member, **own.again(member))
        try:
            run.evaluation = run.evaluate(
                chosen.episodes, deterministic=not chosen.sampled, best=chosen.best, seed=chosen.seed
            )
        finally:
            run.close()
        rows += [{**row, "setting": ", ".join(filter(None, (label, row["setting"])))} for row in run.summary()]
    _print_results(rows)
    return 0


def resume(arguments: list[str]) -> int:
    """`rlmeta resume RUN`."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar

    folder, rest = _one_folder(arguments, "resume")
    groups: dict[str, Any] = {"run": (ResumeFlags, {}), "own_code": (OwnCode, {})}
    texts = flags.read(f"rlmeta resume {folder}", "Go on with a run; it ends as if never stopped.", groups, rest)
    chosen, own = grammar.build(ResumeFlags, texts["run"]), grammar.build(OwnCode, texts["own_code"])
    with own.allowed():
        return _resume(folder, chosen, own)


def _resume(folder: Path, chosen: ResumeFlags, own: OwnCode) -> int:
    from rlmeta.cli import plan as plans

    if plans.is_plan(folder):
        plan = dataclasses.replace(plans.from_folder(folder), wandb=chosen.wandb)
        return _run_groups(plan, folder, own.words(), chosen.inexact)
    again = own.again(folder)
    run = plans.go_on(folder, **again, wandb=chosen.wandb, progress=not chosen.quiet, inexact=chosen.inexact)
    if run.stopped == "interrupted":
        return _interrupted(folder, own.words())
    _print_results(run.summary())
    _print_ends(run)
    return 0


def record(arguments: list[str]) -> int:
    """`rlmeta record RUN --out FILE`."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar

    folder, rest = _one_folder(arguments, "record")
    groups: dict[str, Any] = {"episodes": (RecordFlags, {}), "own_code": (OwnCode, {})}
    about = "Write demonstrations: whole episodes of one of a run's learners."
    texts = flags.read(f"rlmeta record {folder}", about, groups, rest)
    chosen, own = grammar.build(RecordFlags, texts["episodes"]), grammar.build(OwnCode, texts["own_code"])
    with own.allowed():
        return _record(folder, chosen, own)


def _record(folder: Path, chosen: RecordFlags, own: OwnCode) -> int:
    from rlmeta.cli import plan as plans
    from rlmeta.runs.record import record as play
    from rlmeta.runs.run import load

    if plans.is_plan(folder):
        raise SettingError(
            f"{folder} holds several runs: record one of {', '.join(map(str, plans.members(folder).values()))}"
        )
    run = load(folder, **own.again(folder))
    try:
        made = play(
            run,
            chosen.episodes,
            learner=None if chosen.learner < 0 else chosen.learner,
            best=chosen.best,
            deterministic=not chosen.sampled,
            seed=chosen.seed,
        )
    finally:
        run.close()
    made.save(chosen.out)
    returns = made.returns
    say(
        f"{len(made)} episodes of learner {made.about['learner']}, {made.steps:,} steps, returns "
        f"{returns.mean():g} ({returns.min():g} to {returns.max():g}), saved in {chosen.out}"
    )
    return 0


# ------------------------------------------------------------------------------------------------------ list and bench


def adapt(arguments: list[str]) -> int:
    """`rlmeta adapt RUN`."""
    from rlmeta.cli import flags
    from rlmeta.report import adaptation
    from rlmeta.runs import grammar

    folder, rest = _one_folder(arguments, "adapt")
    groups: dict[str, Any] = {"adaptation": (adaptation.AdaptFlags, {}), "own_code": (OwnCode, {})}
    about = "Adapt a meta-learner to held-out tasks: the score against inner steps, as a table and a picture."
    texts = flags.read(f"rlmeta adapt {folder}", about, groups, rest)
    chosen, own = grammar.build(adaptation.AdaptFlags, texts["adaptation"]), grammar.build(OwnCode, texts["own_code"])
    with own.allowed():
        return _adapt(folder, chosen, own)


def _adapt(folder: Path, chosen: AdaptFlags, own: OwnCode) -> int:
    from rlmeta.cli.plan import members
    from rlmeta.report import adaptation
    from rlmeta.runs.run import load

    for label, member in members(folder).items():
        run = load(member, **own.again(member))
        try:
            found = adaptation.adapt(run, chosen.tasks, chosen.steps, chosen.seed)
            title = f"{run.experiment.agent_name} on {run.experiment.problem.name}" + (f", {label}" if label else "")
            seeds, tasks = len(run.experiment.learners), chosen.tasks
            learners = f"{seeds} learner{'s' if seeds > 1 else ''}"
            title = f"{title}: {learners}, {tasks} held-out task{'s' if tasks > 1 else ''} each"
            _console().print(adaptation.table(found, title))
            say("saved " + " and ".join(map(str, adaptation.write(run, found, member, chosen.seed))))
        finally:
            run.close()
    return 0


def show_list(arguments: list[str]) -> int:
    """`rlmeta list [KIND]`."""
    from rlmeta.cli.listing import TABLES

    if {"-h", "--help"} & set(arguments):
        say(f"usage: rlmeta list [{'|'.join(TABLES)}]")
        return 0
    for kind in arguments:
        if kind not in TABLES:
            raise unknown_name("kind of name", kind, TABLES)
    for kind in arguments or TABLES:
        _console().print(TABLES[kind]())
    return 0


def bench(arguments: list[str]) -> int:
    """`rlmeta bench NAME`."""
    from rlmeta.bench import agents as benchmarks

    return benchmarks.main(arguments)


# ------------------------------------------------------------------------------------------------------------- output


def _console() -> Any:
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def _print_results(rows: Sequence[dict[str, Any]]) -> None:
    from rlmeta.report.tables import result_table

    _console().print(result_table(rows))


def _print_ends(run: Run) -> None:
    """Name the learners that ended early."""
    state, target, score = run.state, run.experiment.budget.target, run.agent.score
    learners = zip(run.experiment.learner_labels, run.experiment.learners)
    for i, (label, (_, seed)) in enumerate(learners):
        if not bool(state["active"][i]):
            reached = "best" in state and bool(score.reaches(state["best"]["score"][i], target))
            why = f"reached {target:g}" if reached else "turned NaN and was frozen"
            name = f"learner {i} (seed {seed}{', ' + label if label else ''})"
            say(f"{name} {why} after {int(state['count']['env_steps'][i]):,} steps")
    if run.stopped:
        say(f"stopped: {run.stopped}")


if __name__ == "__main__":
    sys.exit(main())
