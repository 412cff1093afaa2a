"""Speed, as a ratio against a peer measured in the same go: equal samples and gradient steps per learner, float32.

`rlmeta bench agents --agent NAME` trains PPO or DQN on CartPole-v1, PPO with an LSTM on CartPole-positions, or SAC on
Pendulum-v1, with rl-zoo's settings on both sides, every side in a process of its own, the sides in turn, round after
round; it prints medians, ratios, and each side's final score, so that speed is never bought with learning. `--scale`
plots seconds against the number of learners, and `--jax PYTHON` compares with rejax instead.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from rlmeta.agents import DQN, PPO, SAC
from rlmeta.bench.seeds import FIRST_SEED, table_seeds
from rlmeta.errors import SettingError, require_extra, unknown_name
from rlmeta.learning.settings import check_choices
from rlmeta.runs.experiment import Budget

ZOO = PPO(
    num_envs=8,
    num_steps=32,
    batch_size=256,
    num_epochs=20,
    gamma=0.98,
    gae_lambda=0.8,
    learning_rate=1e-3,
    learning_rate_schedule="linear",
    clip_range=0.2,
    clip_range_schedule="linear",
    entropy_coefficient=0.0,
)
"""rl-zoo's settings of PPO on CartPole-v1."""

ZOO_DQN = DQN(
    num_envs=1,
    num_steps=256,
    gradient_steps=128,
    batch_size=64,
    capacity=100_000,
    learning_starts=1_000,
    learning_rate=2.3e-3,
    double=False,
    target_every=128,
    epsilon_end=0.04,
    exploration_fraction=0.16,
    huber_delta=1.0,
    hidden_sizes=(256, 256),
)
"""rl-zoo's settings of DQN on CartPole-v1. Its target network is copied every 10 environment steps, so always before
the 128 gradient steps that follow 256 of those."""

ZOO_RECURRENT = PPO(
    num_envs=8,
    num_steps=32,
    batch_size=256,
    num_epochs=20,
    gamma=0.98,
    gae_lambda=0.8,
    learning_rate=1e-3,
    learning_rate_schedule="linear",
    clip_range_schedule="linear",
    normalise_observation=True,
    normalise_reward=True,
    activation="relu",
    hidden_sizes=(64,),
    memory="lstm",
    memory_size=64,
)
"""rl-zoo's settings of recurrent PPO on CartPoleNoVel-v1. Its hidden layer lies behind the LSTM, ours before it."""

ZOO_SAC = SAC(
    num_envs=1,
    num_steps=1,
    gradient_steps=1,
    batch_size=256,
    learning_starts=100,
    actor_learning_rate=1e-3,
    critic_learning_rate=1e-3,
    temperature_learning_rate=1e-3,
    hidden_sizes=(256, 256),
)
"""rl-zoo's settings of SAC on Pendulum-v1: a gradient step of everything after each step of the environment."""


@dataclass(frozen=True)
class Comparison:
    """What both sides train."""

    task: str
    settings: PPO | DQN | SAC
    peer: str
    """Stable-Baselines3's or sb3-contrib's agent."""
    peer_changes: dict[str, Any]
    """Arguments of the peer's class that differ from rl-zoo's."""
    learners: int
    """Learners of the side with many."""


SMALL = {"policy_kwargs": {"net_arch": [64, 64]}}

COMPARISONS = {
    "ppo": Comparison("CartPole-v1", ZOO, "ppo", {}, 16),
    "dqn": Comparison("CartPole-v1", ZOO_DQN, "dqn", {}, 16),
    "recurrent-ppo": Comparison("CartPole-positions", ZOO_RECURRENT, "recurrent_ppo", {}, 16),
    "sac": Comparison("Pendulum-v1", dataclasses.replace(ZOO_SAC, hidden_sizes=(64, 64)), "sac", SMALL, 8),
    "sac-256": Comparison("Pendulum-v1", ZOO_SAC, "sac", {}, 8),
}


@dataclass(frozen=True)
class Agents:
    """An agent against Stable-Baselines3 or sb3-contrib, or PPO against rejax."""

    agent: Literal["ppo", "dqn", "recurrent-ppo", "sac", "sac-256"] = "ppo"
    """Which one, against Stable-Baselines3 or sb3-contrib; sac has 64x64 networks."""
    steps: int = 100_000
    """Environment steps of each learner."""
    rounds: int = 3
    """How often every side is measured; medians are printed."""
    seeds: int = 0
    """Learners of the side with many; 0 for 16, of SAC 8."""
    scale: bool = False
    """Instead: seconds against 1 ... 256 learners of PPO, or 1 ... 64 of another agent, as a plot."""
    jax: Path | None = None
    """Instead: against rejax, which is installed in the environment of this Python."""
    out: Path = Path("runs/results")
    """Where the figures go."""

    def __post_init__(self) -> None:
        check_choices(self)


USAGE = """usage: rlmeta bench NAME [flags]

  agents      PPO, DQN, recurrent PPO and SAC against Stable-Baselines3; --jax PYTHON: PPO against rejax; --scale:
              against the number of learners
  checkout    training seconds of this checkout against another one's
  engine      steps/s of each backend of recordings, and of none
  imitation   imitation and shaping; --speed: against the package imitation
  lifelong    lifelong methods on three streams; --speed: against loops and Avalanche
  meta        meta-learners on their families; --speed: against learn2learn
  offline     offline learning on data sets of Pendulum; --d3rlpy PYTHON: beside d3rlpy
  rainbow     Rainbow's parts on MinAtar's Breakout, one taken away at a time

  rlmeta bench NAME --help shows the flags"""


OTHERS = {
    "checkout": ("Checkout", "main"),
    "engine": ("Engine", "main"),
    "imitation": ("Imitation", "imitation"),
    "lifelong": ("Lifelong", "lifelong"),
    "offline": ("Offline", "offline"),
    "rainbow": ("Ablation", "rainbow"),
}
"""Modules of this folder, imported where they are asked for: the class of their flags, and the function to run."""


def main(arguments: Sequence[str]) -> int:
    """`rlmeta bench NAME [flags]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *flags = arguments
    if name == "worker":
        print(json.dumps(_work(json.loads(flags[0]))))
        return 0
    if name == "meta":
        from rlmeta.bench import meta

        return meta.main(flags)
    if name in OTHERS:
        options_class, run = OTHERS[name]
        module = importlib.import_module(f"rlmeta.bench.{name}")
        status: int = getattr(module, run)(
            tyro.cli(getattr(module, options_class), prog=f"rlmeta bench {name}", args=flags)
        )
        return status
    if name != "agents":
        raise unknown_name("benchmark", name, sorted(["agents", "meta", *OTHERS]))
    options = tyro.cli(Agents, prog="rlmeta bench agents", args=flags)
    if options.steps < 1 or options.rounds < 1 or options.seeds < 0:
        raise SettingError("bench: steps and rounds are at least 1, seeds at least 0")
    if options.jax is not None:
        from rlmeta.bench import against_rejax

        return against_rejax.main(options.jax, options.steps, options.rounds, options.out)
    return scale(options) if options.scale else agents(options)


# ---------------------------------------------------------------------- one side, in a process of its own


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """Train one side; seconds count training alone, from the first environment step to the last gradient step."""
    comparison = COMPARISONS[job["agent"]]
    if job["side"] == "sb3":
        from rlmeta.bench.peers import train_sb3

        result = train_sb3(comparison.peer, comparison.task, job["steps"], job["seed"], comparison.peer_changes)
        scores, steps, seconds = [statistics.fmean(result["returns"])], result["steps"], result["seconds"]
    else:
        from rlmeta.api import train

        final = Budget(steps=job["steps"], final_episodes=256, eval_every=10 * job["steps"])
        seeds = table_seeds(job["seeds"])
        run = train(comparison.settings, comparison.task, seeds=seeds, budget=final, threads=job["threads"])
        scores, steps, seconds = run.scores.tolist(), run.env_steps * job["seeds"], run.seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"steps": steps, "seconds": seconds, "scores": scores, "gigabytes": peak}


def _run(jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Run jobs at the same time, a process each; steps add up, seconds are the slowest's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if len(jobs) > 1 else dict(os.environ)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "rlmeta", "bench", "worker", json.dumps(job)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for job in jobs
    ]
    printed = [process.communicate()[0].splitlines() for process in processes]
    if any(process.returncode for process in processes):
        raise SettingError("bench: a side failed, its message stands above")
    results = [json.loads(lines[-1]) for lines in printed]
    seconds = max(result["seconds"] for result in results)
    return {
        "steps_per_second": sum(result["steps"] for result in results) / seconds,
        "scores": [score for result in results for score in result["scores"]],
        "gigabytes": sum(result["gigabytes"] for result in results),
    }


# ---------------------------------------------------------------------- rlmeta against its peer


def agents(options: Agents) -> int:
    """Every side in turn, round after round; the table of medians and ratios."""
    require_extra("stable_baselines3", "bench", "the benchmark beside Stable-Baselines3")
    cores = os.cpu_count() or 1
    ours: dict[str, Any] = {"side": "rlmeta", "agent": options.agent, "steps": options.steps}
    peer: dict[str, Any] = {**ours, "side": "sb3"}
    learners = options.seeds or COMPARISONS[options.agent].learners
    many, single = f"rlmeta, {learners} seeds in one process", "rlmeta, 1 seed"
    alone, each = "Stable-Baselines3, 1 process", f"Stable-Baselines3, {cores} processes, one a core"
    sides = {
        alone: [{**peer, "seed": FIRST_SEED}],
        many: [{**ours, "seeds": learners, "threads": cores}],
        single: [{**ours, "seeds": 1, "threads": 1}],
        each: [{**peer, "seed": seed} for seed in table_seeds(cores)],
    }
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.rounds):
        rounds.append({})
        for side, jobs in sides.items():
            rounds[-1][side] = _run([{**job, "seed": job.get("seed", FIRST_SEED) + cores * number} for job in jobs])
            print(f"round {number + 1}: {side}: {rounds[-1][side]['steps_per_second']:,.0f} steps/s", flush=True)
    rows = [_row(side, rounds, alone, each) for side in sides]
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(_table(options, rows))  # a log has no width
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"steps": options.steps, "cores": cores, "when": time.strftime("%Y-%m-%d"), "rows": rows}
    name = "bench_agents.json" if options.agent == "ppo" else f"bench_agents_{options.agent}.json"
    (options.out / name).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _row(side: str, rounds: Sequence[dict[str, dict[str, Any]]], alone: str, each: str) -> dict[str, Any]:
    def ratio(other: str) -> float:
        return statistics.median(r[side]["steps_per_second"] / r[other]["steps_per_second"] for r in rounds)

    rates = sorted(r[side]["steps_per_second"] for r in rounds)
    return {
        "side": side,
        "steps_per_second": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "ratio_alone": ratio(alone),
        "ratio_each": ratio(each),
        "score": statistics.fmean(score for r in rounds for score in r[side]["scores"]),
        "gigabytes": max(r[side]["gigabytes"] for r in rounds),
    }


def _table(options: Agents, rows: Sequence[dict[str, Any]]) -> Table:
    what = f"{options.agent} on {COMPARISONS[options.agent].task}"
    title = f"{what}, {options.steps:,} steps a learner, median of {options.rounds} rounds"
    table = Table(title=title)
    for column in ("side", "steps/s (lowest-highest)", "x SB3 alone", "x SB3 a core", "mean final score", "peak GB"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for row in rows:
        table.add_row(
            row["side"],
            f"{row['steps_per_second']:,.0f} ({row['lowest']:,.0f}-{row['highest']:,.0f})",
            f"{row['ratio_alone']:.1f}",
            f"{row['ratio_each']:.1f}",
            f"{row['score']:.1f}",
            f"{row['gigabytes']:.2f}",
        )
    return table


# ---------------------------------------------------------------------- seconds against the number of learners


def scale(options: Agents) -> int:
    """Train 1, 2, 4 ... 256 learners for a tenth of the budget each; a plot of seconds and of steps/s."""
    require_extra("matplotlib", "plot", "the plot of bench --scale")
    counts, points = [2**power for power in range(9 if options.agent == "ppo" else 7)], []
    steps = max(256, options.steps // 10)
    for count in counts:
        job = {"side": "rlmeta", "agent": options.agent, "steps": steps, "seeds": count, "threads": os.cpu_count() or 1}
        result = _run([job])
        rate = result["steps_per_second"]
        points.append(
            {
                "learners": count,
                "seconds": steps * count / rate,
                "steps_per_second": rate,
                "gigabytes": result["gigabytes"],
            }
        )
        print(f"{count} learners: {points[-1]['seconds']:.1f} s, {rate:,.0f} steps/s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    name = "bench_scale" if options.agent == "ppo" else f"bench_scale_{options.agent}"
    (options.out / f"{name}.json").write_text(json.dumps({"steps": steps, "points": points}, indent=1) + "\n")
    title = f"{options.agent} on {COMPARISONS[options.agent].task}, {steps:,} steps a learner"
    _plot_scale(points, title, options.out / f"{name}.png")
    return 0


def _plot_scale(points: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Seconds and steps/s against the number of learners, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    learners = [point["learners"] for point in points]
    for axis, name, label in zip(
        figure.subplots(1, 2), ("seconds", "steps_per_second"), ("seconds", "environment steps/s, all learners")
    ):
        axis.loglog(learners, [point[name] for point in points], marker="o", base=2)
        axis.set(xlabel="learners in one process", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
