"""Benchmark of lifelong learning methods on three streams of tasks: accuracy, transfer, forgetting, and speed.

`rlmeta bench lifelong` trains every method on the MNIST rotations of the GEM paper, on split MNIST (task- and
class-incremental) and, with PPO, on a stream of CartPoles with conflicting dynamics; all seeds of a method are one
batch. `rlmeta bench lifelong --speed` times the Fisher information, EWC's and GEM's gradient steps and ten seeds at
once, each alternating with its baseline.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlmeta.agents import PPO
from rlmeta.api import train
from rlmeta.bench.seeds import BY_HAND_SEEDS, table_seeds
from rlmeta.data.samples import DataTable, DataTask, DataWorld, Samples
from rlmeta.envs.streams import TaskStream, stream
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import random
from rlmeta.learning.settings import hyper_tensors
from rlmeta.lifelong import (
    AGEM,
    DER,
    ERACE,
    EWC,
    GEM,
    HAT,
    L2,
    MAS,
    SI,
    GenerativeReplay,
    LwF,
    Method,
    PackNet,
    Replay,
    RWalk,
    metrics,
)
from rlmeta.runs import stages
from rlmeta.runs.experiment import Budget
from rlmeta.runs.presets import preset
from rlmeta.runs.run import Run
from rlmeta.supervised import Classifier

TABLES = ("rotations", "split", "control")


@dataclass(frozen=True)
class Lifelong:
    """Options of `rlmeta bench lifelong`."""

    tables: str = ",".join(TABLES)
    """Tables to produce: rotations, split, control, separated by commas."""
    only: str = ""
    """Only the rows of these names, separated by semicolons."""
    seeds: int = 10
    """Number of learners of every row, with the seeds 100, 101, ..."""
    control_steps: int = 100_000
    """Environment steps of PPO on every task of the control stream."""
    speed: bool = False
    """Instead, time gradient steps and Fisher information against baselines."""
    rounds: int = 5
    """With --speed: number of measurements of each; medians are printed."""
    avalanche: str = ""
    """With --speed: the Python of an environment with avalanche-lib, whose GEM step is timed as a baseline."""
    out: Path = Path("runs/results")
    """Folder for the results."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, the learner's settings, and the lifelong methods."""

    name: str
    settings: Any
    methods: tuple[Method, ...] = ()


def lifelong(options: Lifelong) -> int:
    """Run `rlmeta bench lifelong`: produce the tables, or measure speed; returns the exit status."""
    if options.speed:
        from rlmeta.bench.lifelong_speed import speed

        return speed(options.rounds, options.avalanche, options.out)
    makers: dict[str, Callable[[Lifelong], None]] = {"rotations": rotations, "split": split, "control": control}
    wanted = options.tables.split(",")
    for name in wanted:
        if name not in makers:
            raise unknown_name("table", name, makers)
    if options.seeds < 1 or options.control_steps < 1:
        raise SettingError(
            f"bench lifelong: seeds is {options.seeds}, control-steps {options.control_steps}, expected at least 1"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        makers[name](options)
    return 0


# ---------------------------------------------------------------------- the GEM paper's rotations

PAPER = Classifier(batch_size=10, num_steps=10, optimizer="sgd", hidden_sizes=(100, 100))
"""The GEM paper's network and minibatch: 784-100-100-10, plain SGD, one epoch over 1,000 samples a task."""

ROTATIONS = (
    Row("single", replace(PAPER, learning_rate=0.004)),
    Row("EWC", replace(PAPER, learning_rate=0.01), (EWC(strength=15.0, samples=1000),)),
    Row("A-GEM", replace(PAPER, learning_rate=0.1), (AGEM(memory=256, batch_size=256),)),
    Row("GEM", replace(PAPER, learning_rate=0.1), (GEM(memory=256, margin=0.5),)),
)
"""Learning rates of GEM and EWC are the paper's; single's, and EWC's strength, were tuned, see docs/measurements.md."""


def rotations(options: Lifelong) -> None:
    """MNIST rotations: 20 tasks of 1,000 samples, one epoch each."""
    tasks = stream("rotated-mnist")
    rows = [_trained(row, tasks, Budget(steps=1000), options.seeds) for row in _chosen(ROTATIONS, options)]
    _report("rotations", f"MNIST rotations, {len(tasks)} tasks of 1,000 samples, one pass", rows, options)


# ---------------------------------------------------------------------- split MNIST

NETWORK = Classifier(batch_size=128, num_steps=50, optimizer="adam", learning_rate=1e-3, hidden_sizes=(200, 200))
"""The optimizer and minibatch of van de Ven et al. (2022), with half of their network's width."""

SPLIT_STEPS = 400
"""Gradient steps on every task: a fifth of their 2,000, with a seventh of their data."""

SPLIT = {
    "task": (
        Row("none", NETWORK),
        Row("EWC", NETWORK, (EWC(strength=1e4),)),
        Row("SI", NETWORK, (SI(strength=300.0),)),
        Row("MAS", NETWORK, (MAS(strength=0.03),)),
        Row("RWalk", NETWORK, (RWalk(strength=10.0),)),
        Row("L2", NETWORK, (L2(strength=0.1),)),
        Row("LwF", NETWORK, (LwF(),)),
        Row("GEM", NETWORK, (GEM(memory=40, margin=0.5),)),
        Row("PackNet", NETWORK, (PackNet(),)),
        Row("HAT", NETWORK, (HAT(s_max=100.0, learning_rate=5e-3),)),
        Row("replay, 20 a class", NETWORK, (Replay(size=200),)),
        Row("generative replay", NETWORK, (GenerativeReplay(),)),
    ),
    "class": (
        Row("none", NETWORK),
        Row("EWC", NETWORK, (EWC(strength=1e4),)),
        Row("GEM", NETWORK, (GEM(memory=40, margin=0.5),)),
        Row("replay, 20 a class", NETWORK, (Replay(size=200),)),
        Row("DER, 200", NETWORK, (DER(distillation=0.1, strength=0.0),)),
        Row("DER++, 200", NETWORK, (DER(distillation=0.3, strength=3.0),)),
        Row("ER-ACE, 200", NETWORK, (ERACE(size=200),)),
        Row("generative replay", NETWORK, (GenerativeReplay(),)),
    ),
}


def split(options: Lifelong) -> None:
    """Split MNIST, task- and class-incremental; baselines: joint training, and training on the replay buffer alone."""
    for scenario, lines in SPLIT.items():
        tasks = stream("split-mnist", scenario=scenario)  # type: ignore[arg-type]
        budget = Budget(steps=SPLIT_STEPS * NETWORK.batch_size)
        rows = []
        buffers: Tensor | None = None
        for row in _chosen(lines, options):
            run_row = _trained(row, tasks, budget, options.seeds)
            if "replay" in run_row["run"].state["methods"]:
                buffers = run_row["run"].state["methods"]["replay"]["samples"]
            rows.append(run_row)
        if not options.only or "joint" in options.only:
            rows.append(_joint(tasks, options.seeds))
        if buffers is not None:
            rows.append(_buffer_only(tasks, buffers))
        _report(f"split_{scenario}", f"Split MNIST, {scenario}-incremental, {SPLIT_STEPS} steps a task", rows, options)


def _joint(tasks: TaskStream, seeds: int) -> dict[str, Any]:
    """Baseline: joint training on all tasks' samples, for the same total number of gradient steps."""
    parts = [task_data.train for task_data in tasks.tasks]
    whole = Samples(torch.cat([p.observation for p in parts]), torch.cat([p.target for p in parts]))
    steps = SPLIT_STEPS * len(tasks)
    return _offline("joint", tasks, [replace(tasks[0], train=whole, classes=tuple(range(10)))] * seeds, steps)


def _buffer_only(tasks: TaskStream, buffers: Any) -> dict[str, Any]:
    """Baseline: training on each seed's final replay buffer alone, for the same total number of gradient steps."""
    kept = [Samples(x, y) for x, y in zip(buffers["observation"], buffers["target"])]
    data = [replace(tasks[0], train=samples, classes=tuple(range(10))) for samples in kept]
    return _offline("buffer only", tasks, data, SPLIT_STEPS * len(tasks))


def _offline(name: str, tasks: TaskStream, data: Sequence[DataTask], steps: int) -> dict[str, Any]:
    """Offline baseline (joint training, or the buffer alone): a learner per data set, evaluated on every task.

    Only the last row of the accuracy matrix is filled.
    """
    began, seeds = time.perf_counter(), len(data)
    distinct = list(data) if data[0] is not data[-1] else [data[0]]
    world = DataWorld(DataTable(distinct), (seeds,), min(NETWORK.batch_size, len(data[0].train.target)))
    world.select(torch.arange(seeds) % len(distinct))
    settings = replace(NETWORK, batch_size=world.num_envs)
    learner = settings.bind(world.observation_space, world.action_space)
    keys = random.make_keys(table_seeds(seeds))
    state = learner.init(keys, hyper_tensors([settings], seeds), world)
    for _ in range(steps // settings.num_steps):
        state, _ = learner.iterate(state, world)
    orders = torch.arange(len(tasks)).expand(seeds, -1)
    evaluations = stages.evaluate_tasks(learner, state, tasks.world((seeds,), 1), tasks, orders, keys, 1)
    final = torch.stack([evaluation.returns.mean(-1) for evaluation in evaluations], -1)
    matrix = torch.full((seeds, len(tasks) + 1, len(tasks)), torch.nan, dtype=torch.float64)
    matrix[:, -1] = final
    return {"name": name, "matrix": matrix, "seconds": time.perf_counter() - began}


# ---------------------------------------------------------------------- conflicting CartPoles


def control(options: Lifelong) -> None:
    """PPO on four CartPoles, in two of which the actions are reversed; first the transfer matrix of single tasks.

    The observation contains the task's identity, and all tasks share every weight.
    """
    tasks, settings = stream("cartpole-conflicts"), preset("ppo", "cartpole-conflicts")
    budget = Budget(steps=options.control_steps, eval_episodes=16, final_episodes=16)
    single = _single_tasks(tasks, settings, budget, options)
    lines = (
        Row("fine-tuning", settings),
        Row("EWC", settings, (EWC(strength=300.0, samples=1000),)),
        Row("replay", settings, (Replay(size=4096, strength=1.0),)),
        Row("PackNet", settings, (PackNet(),)),
    )
    rows = [_trained(row, tasks, budget, options.seeds) for row in _chosen(lines, options)]
    for row in rows:
        row["of_single"] = row["matrix"][:, -1].mean(0) / single
    _report("control", f"PPO on cartpole-conflicts, {options.control_steps:,} steps a task", rows, options)


def _single_tasks(tasks: TaskStream, settings: PPO, budget: Budget, options: Lifelong) -> Tensor:
    """Train on each task alone and print the transfer matrix; returns its diagonal, the single-task returns `[T]`."""
    transfer = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    plain = replace(tasks, observe_identity=False)
    world = plain.world((options.seeds,), 16)
    orders = torch.arange(len(tasks)).expand(options.seeds, -1)
    for i, task in enumerate(tasks.tasks):
        run = train(settings, task, budget=budget, seeds=table_seeds(options.seeds), progress=False)
        evaluations = stages.evaluate_tasks(run.agent, run.state, world, plain, orders, run.state["key"], 16)
        transfer[i] = torch.stack([evaluation.returns.mean() for evaluation in evaluations])
    table = Table(title=f"Transfer: PPO trained on one task (row), its mean return on each, {options.seeds} seeds")
    for column in ("trained on", *(f"task {j + 1}" for j in range(len(tasks)))):
        table.add_column(column, justify="right")
    for i, values in enumerate(transfer.tolist()):
        table.add_row(f"task {i + 1}", *(f"{value:.0f}" for value in values))
    _print(table)
    (options.out / "lifelong_transfer.json").write_text(json.dumps({"transfer": transfer.tolist()}, indent=1) + "\n")
    return transfer.diagonal()


# ---------------------------------------------------------------------- rows and tables


def _chosen(rows: Sequence[Row], options: Lifelong) -> list[Row]:
    names = options.only.split(";") if options.only else []
    return [row for row in rows if not names or row.name in names]


def _trained(row: Row, tasks: TaskStream, budget: Budget, seeds: int) -> dict[str, Any]:
    run: Run = train(row.settings, tasks, budget=budget, seeds=table_seeds(seeds), lifelong=row.methods, progress=False)
    print(f"{row.name}: {run.seconds:.0f} s", flush=True)
    methods = ", ".join(map(repr, row.methods))
    return {"name": row.name, "matrix": run.matrix, "seconds": run.seconds, "run": run, "methods": methods}


COLUMNS = ("accuracy", "backward_transfer", "forward_transfer", "forgetting", "learning_accuracy")


def _report(name: str, title: str, rows: Sequence[dict[str, Any]], options: Lifelong) -> None:
    """Print a table of results and write it to JSON, with every score matrix."""
    table = Table(title=f"{title}; {options.seeds} seeds, mean and 95 % bootstrap interval")
    table.add_column("")
    for column in (*COLUMNS, "seconds"):
        table.add_column(column.replace("_", " "), justify="right")
    record = []
    for row in rows:
        estimates = metrics.estimates(row["matrix"])
        cells = ["-" if estimates[c].mean != estimates[c].mean else _cell(estimates[c]) for c in COLUMNS]
        table.add_row(row["name"], *cells, f"{row['seconds']:.0f}")
        record.append(
            {
                "name": row["name"],
                "methods": row.get("methods", ""),
                "seconds": round(row["seconds"], 1),
                **{key: list(value) for key, value in estimates.items()},
                "matrix": row["matrix"].tolist(),
                **({"of_single": row["of_single"].tolist()} if "of_single" in row else {}),
            }
        )
    table.caption = "-: not defined, as scores of a task before its classes are added; every task counts the same"
    _print(table)
    for row in rows:
        if "of_single" in row:
            shares = ", ".join(f"{value:.0%}" for value in row["of_single"].tolist())
            print(f"{row['name']}: {shares} of single-task training, task by task")
    when = time.strftime("%Y-%m-%d")
    chosen = {"seeds": table_seeds(options.seeds), "chosen_on_seeds": list(BY_HAND_SEEDS)}
    content = {"title": title, **chosen, "when": when, "rows": record}
    text = json.dumps(content).replace("NaN", "null")
    (options.out / f"lifelong_{name}.json").write_text(text + "\n")


def _cell(estimate: metrics.Estimate) -> str:
    big = max(abs(estimate.low), abs(estimate.high)) > 2
    digits = ".1f" if big else ".3f"
    return f"{estimate.mean:{digits}} ({estimate.low:{digits}}, {estimate.high:{digits}})"


def _print(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)  # a log has no width
