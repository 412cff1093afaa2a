"""Benchmark of the meta-learners against baselines (`rlmeta bench meta`), and the speed of a meta-update.

Every part trains its learners (10 seeds from 100 on, in one process), evaluates them on held-out tasks, prints a table
with the target and writes `meta_PART.json`. The baselines' learning rates are tuned on other seeds and the validation
tasks; the file names them. Intervals are bootstrap 95 % intervals of the mean over seeds. `--speed` times second-order
MAML on the sinusoid against learn2learn, whose source RLMETA_LEARN2LEARN names, on one thread.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import statistics as python_statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rlmeta.api import train
from rlmeta.bench.seeds import SELECTION_SEEDS, table_seeds
from rlmeta.data import sets
from rlmeta.envs.families import FamilyWorld, NamedFamily
from rlmeta.envs.minimisation import Quadratics
from rlmeta.envs.regression import Sinusoid
from rlmeta.envs.task import family as family_named
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import optim, random, statistics
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step
from rlmeta.meta.estimators import backpropagated, evolved
from rlmeta.meta.learned_optimizer import LearnedOptimizer, minimise
from rlmeta.meta.maml import MAML
from rlmeta.meta.protonet import ProtoNet
from rlmeta.runs.experiment import Budget
from rlmeta.runs.presets import load_preset
from rlmeta.runs.run import Run

Row = dict[str, Any]


@dataclass(frozen=True)
class Meta:
    """Options of `rlmeta bench meta`."""

    parts: str = "sinusoid,omniglot,navigation,optimizer,pes"
    """Parts to run, joined by commas; also protonet and evolved-optimizer."""
    seeds: int = 10
    """Number of learners of each row, with the seeds 100, 101, ..."""
    budget: float = 1.0
    """Fraction of the training budget; below 1 only to try the command."""
    speed: bool = False
    """Instead, time a meta-update against learn2learn's."""
    rounds: int = 5
    """With --speed: number of measurements of each."""
    out: Path = Path("runs/results")
    """Folder for the results."""


def main(flags: Sequence[str]) -> int:
    """Run `rlmeta bench meta [flags]`; returns the exit status."""
    options = tyro.cli(Meta, prog="rlmeta bench meta", args=list(flags))
    if options.seeds < 1 or options.rounds < 1:
        raise SettingError(f"bench meta: seeds is {options.seeds}, rounds {options.rounds}, expected at least 1")
    if not 0 < options.budget <= 1:
        raise SettingError(f"bench meta: budget is {options.budget:g}, expected above 0 and at most 1")
    parts: dict[str, Callable[[Meta], list[Row]]] = {
        "sinusoid": sinusoid,
        "omniglot": omniglot,
        "protonet": protonet,
        "navigation": navigation,
        "optimizer": optimizer,
        "evolved-optimizer": evolved_optimizer,
        "pes": pes,
    }
    if options.speed:
        return _publish("speed", speed(options), options)
    for part in options.parts.split(","):
        if part not in parts:
            raise unknown_name("part of bench meta", part, parts)
        _publish(part, parts[part](options), options)
    return 0


def _publish(part: str, rows: list[Row], options: Meta) -> int:
    """Print a part's rows and write them to JSON; returns the exit status."""
    table = Table(title=f"bench meta: {part}", title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("scores", "folds")))
    for column in columns:
        table.add_column(column, justify="left" if column in ("what", "reach") else "right", overflow="fold")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    command = "rlmeta bench meta --speed" if part == "speed" else f"rlmeta bench meta --parts {part}"
    record = {
        "command": command if options.budget == 1 else f"{command} --budget {options.budget:g}",
        "when": time.strftime("%Y-%m-%d"),
        "seeds": table_seeds(options.seeds),
        "chosen_on_seeds": {
            "settings": _chosen_on(part),
            "rates of baselines": list(SELECTION_SEEDS),
        },
        "rows": rows,
    }
    (options.out / f"meta_{part}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


PRESETS = {
    "sinusoid": (MAML, "sinusoid"),
    "omniglot": (MAML, "few-shot-omniglot"),
    "protonet": (ProtoNet, "few-shot-omniglot"),
    "navigation": (MAML, "navigation-short"),
    "optimizer": (LearnedOptimizer, "quadratics"),
    "evolved-optimizer": (LearnedOptimizer, "quadratics"),
}
"""Learner and task of the parts that use a preset."""


def _chosen_on(part: str) -> list[int]:
    """Seeds on which the settings of a part were tuned; [] without a preset."""
    return list(load_preset(*PRESETS[part]).chosen_on_seeds) if part in PRESETS else []


def _row(what: str, scores: Tensor, reach: str = "", **further: Any) -> Row:
    """Build a row of the table: the mean over seeds of scores `[S]`, with its interval; `reach` is the target."""
    values = scores.double().numpy()
    low, high = statistics.stratified_bootstrap_interval(values, statistics.mean)
    shown = {"mean": float(values.mean()), "low": float(low), "high": float(high)}
    return {"what": what, **shown, "seeds": len(values), "reach": reach, **further, "scores": values.tolist()}


def _trained(settings: Any, problem: NamedFamily, options: Meta, steps: int) -> Run:
    return train(settings, problem, steps=_shorter(steps, options), seeds=table_seeds(options.seeds))


def _shorter(steps: int, options: Meta) -> int:
    return max(1, round(options.budget * steps))


def _settings(part: str) -> tuple[Any, int]:
    """Settings and training steps of the part's preset."""
    cls, problem = PRESETS[part]
    loaded = load_preset(cls, problem)
    return cls(**loaded.settings), loaded.steps or 1


def _curve(run: Run, tasks: int, steps: int, rate: float | None = None, split: str | None = None) -> Tensor:
    """Adaptation curve on held-out tasks, `[S, E, steps + 1]`; `rate` replaces the inner learning rate."""
    agent: Any = run.agent
    p = agent.effective_params(run.state)
    if rate is not None:
        hyper = {**p["hyper"], "inner_rate": torch.full_like(p["hyper"]["inner_rate"], rate)}
        p = {**p, "hyper": hyper}
    key = random.fold(run.state["key"], "bench")
    scores: Tensor = agent.adaptation(p, run.experiment.world(), key, tasks, steps, split=split)
    return scores


def _best_rate(settings: Any, problem: NamedFamily, steps: int, rates: Sequence[float]) -> float:
    """Select the inner learning rate with the best validation score after one step, on seeds that no table uses."""
    run = train(settings, problem, steps=steps, seeds=SELECTION_SEEDS)
    sign = 1.0 if run.agent.score.maximise else -1.0
    scores = [sign * float(_curve(run, 100, 1, rate, "validation")[..., -1].mean()) for rate in rates]
    return rates[max(range(len(rates)), key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)]


# ---------------------------------------------------------------------- sinusoid


def sinusoid(options: Meta) -> list[Row]:
    """Sinusoid regression, 10-shot: mean squared error after one inner step, on 600 held-out tasks for every seed."""
    settings, steps = _settings("sinusoid")
    problem = family_named("sinusoid")
    assert isinstance(problem, NamedFamily)
    rows = []
    for what, changed in (
        ("MAML", {}),
        ("MAML, first order", {"first_order": True}),
        ("pre-training + fine-tuning", {"inner_steps": 0}),
    ):
        own, rate = dataclasses.replace(settings, **changed), settings.inner_rate
        if "inner_steps" in changed:
            rates = [10 ** (-e / 4) for e in range(2, 15)]
            rate = _best_rate(own, problem, _shorter(steps, options), rates)
        run = _trained(own, problem, options, steps)
        curve = _curve(run, 600, 10, rate)
        further = {"before": float(curve[..., 0].mean()), "after 10 steps": float(curve[..., 10].mean())}
        reach = "<= 0.67" if what == "MAML" else ""
        rows.append(_row(what, curve[..., 1].mean(-1), reach, **further, rate=rate, seconds=run.seconds))
    rows.append(_row("best without adapting, -1.62 cos x", _floor(options.seeds), "3.01"))
    return rows


def _floor(seeds: int) -> Tensor:
    """Mean squared error `[S]` of the best prediction without adaptation."""
    query = Sinusoid().tasks(random.make_keys(table_seeds(seeds)), 0, 6000, "test")["query"]
    return (query["target"] + 1.62 * query["observation"].cos()).square().double().mean((1, 2, 3))


# ---------------------------------------------------------------------- Omniglot


def omniglot(options: Meta) -> list[Row]:
    """Omniglot, 5-way 1-shot: accuracy on held-out alphabets, the mean over four folds of 600 episodes each."""
    scores: dict[str, list[Tensor]] = {"MAML": [], "before": [], "nearest pixel": [], "after 5 steps": []}
    settings, steps = _settings("omniglot")
    seconds = 0.0
    for fold in range(4):
        run = _on_fold(fold, settings, steps, options)
        curve = _curve(run, 600, 5)
        scores["MAML"].append(curve[..., settings.inner_steps].mean(-1))
        scores["before"].append(curve[..., 0].mean(-1))
        scores["after 5 steps"].append(curve[..., 5].mean(-1))
        scores["nearest pixel"].append(nearest_pixel(run.experiment.world(), options.seeds))
        seconds += run.seconds
        print(f"fold {fold}: MAML {float(scores['MAML'][-1].mean()):.3f}, {run.seconds:.0f} s", flush=True)
    percent = {name: 100 * torch.stack(values).mean(0) for name, values in scores.items()}
    further = {"before": float(percent["before"].mean()), "after 5 steps": float(percent["after 5 steps"].mean())}
    what = f"MAML, 4 convolutions of 32, 1 step, {_shorter(steps, options) // settings.num_envs} meta-batches"
    folds = {"folds": [[100 * float(score) for score in fold_scores] for fold_scores in scores["MAML"]]}
    characters = sets.omniglot()
    pictures = {"pictures": len(characters.image), "copies left out": characters.dropped}
    return [
        _row(what, percent["MAML"], "its number", **further, seconds=seconds, **folds, **pictures),
        _row("nearest pixel", percent["nearest pixel"]),
    ]


def _on_fold(fold: int, settings: Any, steps: int, options: Meta) -> Run:
    """Train on Omniglot with the alphabets of one fold held out."""
    problem = family_named("few-shot-omniglot", {"fold": fold})
    assert isinstance(problem, NamedFamily)
    budget = Budget(steps=_shorter(steps, options), eval_every=steps, final_episodes=10)
    return train(settings, problem, budget=budget, seeds=table_seeds(options.seeds))


def protonet(options: Meta) -> list[Row]:
    """Prototypical network on Omniglot: accuracy on the same episodes as `omniglot`."""
    settings, steps = _settings("protonet")
    folds, seconds = [], 0.0
    for fold in range(4):
        run = _on_fold(fold, settings, steps, options)
        key, world = random.fold(run.state["key"], "bench"), run.experiment.world()
        folds.append(100 * run.agent.evaluate(run.agent.effective_params(run.state), world, key, 600).returns.mean(-1))
        seconds += run.seconds
        print(f"fold {fold}: ProtoNet {float(folds[-1].mean()):.1f}, {run.seconds:.0f} s", flush=True)
    what = f"ProtoNet, 4 convolutions of 32, {_shorter(steps, options) // settings.num_envs} meta-batches"
    return [_row(what, torch.stack(folds).mean(0), seconds=seconds, folds=torch.stack(folds).tolist())]


def nearest_pixel(world: FamilyWorld, seeds: int) -> Tensor:
    """Baseline: nearest neighbour in pixel space; accuracy `[S]` on 600 episodes."""
    scores = []
    for number in range(6):
        tasks = world.tasks(random.make_keys(table_seeds(seeds)), number, 100, "test")
        support, query = (tasks[part]["observation"].flatten(3) for part in ("support", "query"))
        nearest = torch.cdist(query, support).argmin(-1)
        label = tasks["support"]["target"].gather(-1, nearest)
        scores.append((label == tasks["query"]["target"]).double().mean((-2, -1)))
    return torch.stack(scores).mean(0)


# ---------------------------------------------------------------------- 2D navigation


def navigation(options: Meta) -> list[Row]:
    """2D navigation: return after one policy-gradient step, on 40 held-out goals for every seed."""
    settings, steps = _settings("navigation")
    family: Any = family_named("navigation-short")
    problem = NamedFamily(family.name, family)
    rates = [0.03, 0.1, 0.3, 1.0, 3.0]
    rows = []
    for what, changed, budget in (
        ("MAML over REINFORCE", {}, steps),
        ("joint training", {"inner_steps": 0}, steps),
        ("random initial weights", {"meta_rate": 0.0}, 1),
    ):
        own, rate = dataclasses.replace(settings, **changed), settings.inner_rate
        if not what.startswith("MAML"):
            rate = _best_rate(own, problem, _shorter(budget, options), rates)
        run = _trained(own, problem, options, budget)
        curve = _curve(run, 40, 3, rate)
        further = {"before": float(curve[..., 0].mean()), "after 3 steps": float(curve[..., 3].mean())}
        reach = "above both" if what.startswith("MAML") else ""
        rows.append(_row(what, curve[..., 1].mean(-1), reach, **further, rate=rate, seconds=run.seconds))
    return rows


# ---------------------------------------------------------------------- learned optimizer

RATES = [10 ** (-e / 4) for e in range(1, 15)]
"""14 learning rates, from 0.56 down to 0.0003."""

TUNED: dict[str, Callable[[float], optim.Optimizer]] = {
    "Adam": optim.adam,
    "RMSProp": optim.rmsprop,
    "SGD": optim.sgd,
    "SGD with momentum 0.9": lambda rate: optim.sgd(rate, momentum=0.9),
}


def optimizer(options: Meta) -> list[Row]:
    """Learned optimizer on 10-d quadratics: mean held-out loss at step 100; baselines tuned over 14 rates x 5 seeds."""
    settings, steps = _settings("optimizer")
    problem = NamedFamily("quadratics", Quadratics())
    run = _trained(settings, problem, options, steps)
    curve = _curve(run, 256, 300)
    rows = [_loss_row("LSTM, truncated backpropagation", curve, "below all", seconds=run.seconds)]
    key = random.fold(run.state["key"], "bench")
    held_out = problem.source.tasks(key, 0, 256, "test")
    for name, make in TUNED.items():
        validation = problem.source.tasks(random.make_keys(SELECTION_SEEDS), 0, 256, "validation")
        losses = [float(minimise(problem.source, validation, make(r), 100)[..., 100].mean()) for r in RATES]
        best = RATES[min(range(len(RATES)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)]
        tuned = minimise(problem.source, held_out, make(best), 300)
        rows.append(_loss_row(name, tuned, rate=best))
    return [*rows, _parabola(options)]


def evolved_optimizer(options: Meta) -> list[Row]:
    """Learned optimizer (LSTM) meta-trained by persistent evolution strategies (PES), with four times the steps."""
    settings, steps = _settings("optimizer")
    problem = NamedFamily("quadratics", Quadratics())
    evolving = dataclasses.replace(settings, estimator="pes", sigma=0.03, meta_rate=1e-2)
    run = _trained(evolving, problem, options, 4 * steps)
    curve = _curve(run, 256, 300)
    return [_loss_row("LSTM, PES", curve, seconds=run.seconds)]


def _loss_row(what: str, curve: Tensor, reach: str = "", **further: Any) -> Row:
    """Build a row from loss curves `[S, E, steps + 1]`: the loss at step 100, and at steps 20 and 300."""
    beside: dict[str, Any] = {f"step {i}": float(curve[..., i].mean()) for i in (20, 300)}
    return _row(what, curve[..., 100].mean(-1), reach, **beside, **further)


class Parabola(Quadratics):
    """f(x) = x² from x = 1: the convergence test of DeepMind's learning-to-learn."""

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Any) -> Any:
        """`count` copies of the single problem."""
        ones = torch.ones(*key.shape, count, 1, dtype=torch.float32, device=key.device)
        return {"matrix": ones.unsqueeze(-1), "target": torch.zeros_like(ones), "start": ones}


def _parabola(options: Meta) -> Row:
    """Linear learned optimizer on the parabola: 500 epochs of 5 unrolls of 20 steps."""
    linear: dict[str, Any] = {"hidden_sizes": (), "zero_output": True, "preprocess": 0.0, "output_scale": 1.0}
    settings = LearnedOptimizer(num_envs=1, meta_rate=1e-2, **linear)
    run = _trained(settings, NamedFamily("parabola", Parabola(1)), options, 500 * 100)
    return _row("x², linear, 500 epochs: loss at step 100", _curve(run, 1, 100)[..., 100].mean(-1), "< 1e-5")


# ---------------------------------------------------------------------- PES


def pes(options: Meta) -> list[Row]:
    """Bias of meta-gradient estimators against the exact one: unrolls of 12 steps in pieces of 3, 4,000 repetitions."""
    theta, expected = torch.tensor([[0.3]], dtype=torch.float64), _scalar_gradient(12)
    rows: list[Row] = [
        {"what": "whole unroll, exact", "mean": expected},
        {"what": "truncated backpropagation", "mean": _scalar_gradient(3)},
    ]
    for what, persistent in (("ES on pieces", False), ("PES", True)):
        keys = random.make_keys(table_seeds(4000))
        carry: Any = {"x": torch.full((4000, 8), 2.0, dtype=torch.float64)}
        accumulator = torch.zeros(4000, 8, 1, dtype=torch.float64) if persistent else None
        total = torch.zeros(4000, dtype=torch.float64)
        for piece in range(4):
            estimate = evolved(_scalar(3), {"a": theta.expand(4000, 1)}, carry, keys, piece, 0.01, accumulator)
            carry, total = estimate.carry, total + estimate.gradient[:, 0] / 4
            accumulator = estimate.accumulator if persistent else None
        error = float(total.std() / len(total) ** 0.5)
        row = {"what": what, "mean": float(total.mean()), "low": float(total.mean()) - 1.96 * error}
        off = abs(float(total.mean()) - expected) / error
        rows.append({**row, "high": float(total.mean()) + 1.96 * error, "standard errors off": off})
    rows[-1]["reach"] = "unbiased"
    return rows


def _scalar(steps: int) -> Callable[[dict[str, Tensor], Any], tuple[Tensor, Any]]:
    """Unroll of x ← 0.9 x + θ with loss (x - 1)², in which early updates have lasting effects."""

    def unroll(theta: dict[str, Tensor], carry: Any) -> tuple[Tensor, Any]:
        x, total = carry["x"], torch.zeros_like(carry["x"])
        for _ in range(steps):
            x = 0.9 * x + theta["a"][..., 0].reshape(*theta["a"].shape[:-1], *(1,) * (x.dim() + 1 - theta["a"].dim()))
            total = total + (x - 1.0).square()
        return total / steps, {"x": x}

    return unroll


def _scalar_gradient(piece: int) -> float:
    leaf = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    carry: Any = {"x": torch.full((1, 1), 2.0, dtype=torch.float64)}
    total = 0.0
    for _ in range(12 // piece):
        loss, carry = backpropagated(_scalar(piece), {"a": leaf}, carry)
        total += float(torch.autograd.grad(loss.sum(), leaf)[0]) / (12 // piece)
    return total


# ---------------------------------------------------------------------- speed


def learn2learn_maml() -> Any:
    """Import learn2learn's MAML without the rest of its package, which needs gym and lightning.

    Raises:
        SettingError: RLMETA_LEARN2LEARN is not the folder of its unpacked source.
    """
    source = os.environ.get("RLMETA_LEARN2LEARN", "")
    if not (Path(source) / "learn2learn" / "algorithms").is_dir():
        raise SettingError(
            f"RLMETA_LEARN2LEARN is {source!r}: let it name the unpacked source of learn2learn 0.2.0, whose three .pyx "
            "were built in place with Cython < 3.1"
        )
    package = types.ModuleType("learn2learn")
    package.__path__ = [str(Path(source) / "learn2learn")]
    sys.path.insert(0, source)
    sys.modules["learn2learn"] = package
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def speed(options: Meta) -> list[Row]:
    """Time a second-order meta-update with Adam: 25 tasks, 10-shot, 40-40, 1 and 5 inner steps, one thread."""
    theirs_class = learn2learn_maml()
    torch.set_num_threads(1)
    rows = []
    for steps in (1, 5):
        ours, theirs = _our_update(steps), _their_update(theirs_class, steps)
        for _ in range(60):  # record
            ours()
        times: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            times.append((_seconds(ours, 40), _seconds(theirs, 5)))
        a, b = (python_statistics.median(column) for column in zip(*times))
        ratio = python_statistics.median(b / a for a, b in times)
        reach = ">= 25" if steps == 5 else ""
        what = f"meta-update, {steps} inner steps"
        rows.append({"what": what, "rlmeta ms": 1e3 * a, "learn2learn ms": 1e3 * b, "ratio": ratio, "reach": reach})
    return rows


def _seconds(update: Callable[[], None], count: int) -> float:
    update()
    started = time.perf_counter()
    for _ in range(count):
        update()
    return (time.perf_counter() - started) / count


def _our_update(steps: int) -> Callable[[], None]:
    settings = MAML(inner_steps=steps)
    world = NamedFamily("sinusoid", Sinusoid()).world((1,), settings.num_envs)
    learner = settings.bind(world.observation_space, world.action_space)
    key = random.make_keys([0])
    state = learner.init(key, hyper_tensors([settings], 1), world)
    tasks = world.tasks(key, 0, settings.num_envs, "train")

    def update() -> None:
        nonlocal state
        state, _ = step(learner, state, tasks, learner.optimizer(state), report=False)

    return update


def _their_update(theirs: Any, steps: int) -> Callable[[], None]:
    module = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    maml = theirs(module, lr=0.01)
    adam = torch.optim.Adam(maml.parameters(), 1e-3)
    tasks = Sinusoid().tasks(random.make_keys([0]), 0, 25, "train")
    support, query = tasks["support"], tasks["query"]

    def update() -> None:
        adam.zero_grad()
        total = torch.zeros(())
        for k in range(25):
            clone = maml.clone()
            for _ in range(steps):
                error = nn.functional.mse_loss(clone(support["observation"][0, k]), support["target"][0, k])
                clone.adapt(error)
            total = total + nn.functional.mse_loss(clone(query["observation"][0, k]), query["target"][0, k])
        (total / 25).backward()  # type: ignore[no-untyped-call]
        adam.step()

    return update
