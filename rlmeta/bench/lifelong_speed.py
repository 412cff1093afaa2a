"""Speed of lifelong methods (`rlmeta bench lifelong --speed`): pairs of functions timed alternately."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlmeta.api import train
from rlmeta.data.samples import DataTask, Samples
from rlmeta.envs.streams import stream
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.state import State
from rlmeta.learning.step import step
from rlmeta.lifelong import EWC, GEM, Method
from rlmeta.nn import MLP, Context
from rlmeta.nn.fisher import categorical_fisher
from rlmeta.runs.experiment import Budget
from rlmeta.supervised import Classifier

Side = Callable[[], float]
"""Function that does some work and returns the seconds it took."""


def speed(rounds: int, avalanche: str, out: Path) -> int:
    """Time every pair, print a table of the ratios and write it to JSON; returns the exit status."""
    if rounds < 1:
        raise SettingError(f"bench: rounds is {rounds}, expected at least 1")
    rows = [
        _compare("exact Fisher, 784-400-400-10, 5,000 images", "loop over samples and labels", fisher(), rounds),
        _compare("EWC step after 1 task (784-100-100-10, batch 10)", "after 49 tasks", ewc_steps(), rounds),
        _compare("GEM step, 20 tasks x 256, 784-100-100-10", "plain step", gem_steps(), rounds),
        _compare("GEM step, 20 tasks x 256, 784-100-100-10", "its products alone, by torch", gem_products(), rounds),
        _compare("ten seeds of the rotations with EWC, one run", "ten runs", ten_seeds(), 1),
    ]
    if avalanche:
        rows.append(
            _compare("GEM step, 20 tasks x 256, 784-100-100-10", "Avalanche", against_avalanche(avalanche), rounds)
        )
    table = Table(title=f"Median of {rounds} rounds, {torch.get_num_threads()} threads")
    for column in ("this", "seconds", "against", "seconds", "ratio"):
        table.add_column(column, justify="left" if column in ("this", "against") else "right")
    for row in rows:
        table.add_row(row["this"], f"{row['ours']:.4g}", row["against"], f"{row['other']:.4g}", f"{row['ratio']:.2f}")
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "lifelong_speed.json").write_text(json.dumps({"when": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1))
    return 0


def _compare(this: str, against: str, sides: tuple[Side, Side], rounds: int) -> dict[str, Any]:
    """Time both sides alternately; the ratio is the median of the rounds' ratios."""
    times = [(sides[0](), sides[1]()) for _ in range(rounds)]
    ours, other = (statistics.median(column) for column in zip(*times))
    print(f"{this}: {ours:.4g} s; {against}: {other:.4g} s", flush=True)
    ratio = statistics.median(b / a for a, b in times)
    return {"this": this, "against": against, "ours": ours, "other": other, "ratio": ratio, "rounds": times}


def _timed(work: Callable[[], Any], repeats: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


# ---------------------------------------------------------------------- Fisher information


def fisher(images: int = 5000, looped: int = 20) -> tuple[Side, Side]:
    """Fisher information batched, against a loop with an autograd call for every image and label.

    Args:
        images: number of images.
        looped: number of images that the loop is timed on; its time is scaled to all images.
    """
    network = MLP(784, (400, 400), 10, activation="relu")
    p = {"weights": {name: value.detach() for name, value in network.named_parameters()}}
    x = torch.rand(images, 784, generator=torch.Generator().manual_seed(0))

    def forward(p: Any, batch: Any, ctx: Context) -> Tensor:
        return network.run(p["weights"], batch, ctx)

    def loop() -> None:
        weights = {name: value.clone().requires_grad_() for name, value in p["weights"].items()}
        total = [torch.zeros_like(value) for value in weights.values()]
        for image in torch.split(x[:looped], 1):
            log_p = forward({"weights": weights}, image, Context()).log_softmax(-1)[0]
            for label in range(10):
                gradient = torch.autograd.grad(log_p[label], list(weights.values()), retain_graph=True)
                for sum_, g in zip(total, gradient):
                    sum_.add_(log_p[label].detach().exp() * g.square())

    categorical_fisher(forward, p, x, 0)
    return lambda: _timed(lambda: categorical_fisher(forward, p, x, 0)), lambda: _timed(loop) * images / looped


# ---------------------------------------------------------------------- steps


def _classifier(method: Method | None, tasks: int, memory: int) -> tuple[Any, State, dict[str, Tensor]]:
    """A classifier 784-100-100-10 on random images, its state after `tasks - 1` tasks, and a minibatch of 10."""
    generator = torch.Generator().manual_seed(0)
    count = max(memory, 10)
    x, y = torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)
    task = DataTask("noise", Samples(x, y), Samples(x, y), tuple(range(10)), 10)
    settings = Classifier(batch_size=10, optimizer="sgd", hidden_sizes=(100, 100), learning_rate=1e-6)
    world = task.world((), 10)
    learner: Any = settings.bind(world.observation_space, world.action_space, [] if method is None else [method])
    learner.num_tasks = tasks
    hyper = {name: value[0] for name, value in hyper_tensors([settings], 1).items()}
    state = learner.init(random.make_keys([0])[0], hyper, world)
    _, batch = world.next_batch(state["world"])
    for position in range(tasks - 1 if method is not None else 0):
        state["task"]["index"] = torch.tensor(position)
        draw = lambda n: learner.draw(state, world, n)  # noqa: E731
        _, m = learner.methods[0].task_end(
            learner, state["params"], state["methods"][learner.methods[0].name], state["task"], draw
        )
        state["methods"] = {learner.methods[0].name: m}
    state["task"]["index"] = torch.tensor(max(tasks - 1, 0) if method is not None else 0)
    return learner, state, batch


def _steps(method: Method | None, tasks: int, memory: int, repeats: int) -> Side:
    learner, state, batch = _classifier(method, tasks, memory)
    optimizer = learner.optimizer(state)

    def gradient_step() -> None:
        nonlocal state
        state, _ = step(learner, state, batch, optimizer, methods=learner.methods, report=False)

    _timed(gradient_step, 3)
    return lambda: _timed(gradient_step, repeats)


def ewc_steps() -> tuple[Side, Side]:
    """EWC's gradient step in task 2, and in task 50."""
    return _steps(EWC(samples=10), 2, 10, 200), _steps(EWC(samples=10), 50, 10, 200)


def gem_steps() -> tuple[Side, Side]:
    """GEM's gradient step with 20 old tasks of 256 samples, and a step without a lifelong method."""
    return _steps(GEM(memory=256), 21, 256, 10), _steps(None, 1, 10, 200)


def gem_products() -> tuple[Side, Side]:
    """GEM's gradient step, and the matrix products alone that 20 gradients of 256 samples need in any case."""
    sizes, tasks, memory = (784, 100, 100, 10), 20, 256
    layers = [
        (torch.rand(tasks * memory, fan_in), torch.rand(fan_out, fan_in), torch.rand(tasks * memory, fan_out))
        for fan_in, fan_out in itertools.pairwise(sizes)
    ]

    def products() -> None:
        for i, (x, weight, gradient) in enumerate(layers):
            torch.nn.functional.linear(x, weight)
            grouped = gradient.reshape(tasks, memory, -1), x.reshape(tasks, memory, -1)
            gradients = torch.bmm(grouped[0].mT, grouped[1]).flatten(1)
            torch.mm(gradients, gradients.T)
            if i:
                torch.mm(gradient, weight)

    return _steps(GEM(memory=memory), tasks + 1, memory, 10), lambda: _timed(products, 10)


# ---------------------------------------------------------------------- seeds, and Avalanche


def ten_seeds() -> tuple[Side, Side]:
    """MNIST rotations with EWC: ten seeds in one batch, and ten runs one after another."""
    settings = Classifier(batch_size=10, num_steps=10, optimizer="sgd", hidden_sizes=(100, 100), learning_rate=0.01)
    method, tasks = EWC(strength=10.0, samples=1000), stream("rotated-mnist")

    def run(seeds: list[int]) -> None:
        train(settings, tasks, budget=Budget(steps=1000), seeds=seeds, lifelong=[method], progress=False)

    def ten() -> None:
        for seed in range(10):
            run([seed])

    return lambda: _timed(lambda: run(list(range(10)))), lambda: _timed(ten)


AVALANCHE = """
import time, types, torch
from avalanche.training.plugins import GEMPlugin

torch.manual_seed(0)
linear, relu = torch.nn.Linear, torch.nn.ReLU
model = torch.nn.Sequential(linear(784, 100), relu(), linear(100, 100), relu(), linear(100, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
criterion = torch.nn.CrossEntropyLoss()
plugin = GEMPlugin(patterns_per_experience=256, memory_strength=0.5)
for task in range(20):
    plugin.memory_x[task] = torch.rand(256, 784)
    plugin.memory_y[task] = torch.randint(10, (256,))
    plugin.memory_tid[task] = torch.zeros(256, dtype=torch.int64)
strategy = types.SimpleNamespace(
    model=model, optimizer=optimizer, device="cpu", _criterion=criterion, criterion=criterion, mb_x=torch.rand(10, 784),
    clock=types.SimpleNamespace(train_exp_counter=20), experience=types.SimpleNamespace(current_experience=20),
)
x, y = torch.rand(10, 784), torch.randint(10, (10,))

def step():
    plugin.before_training_iteration(strategy)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    plugin.after_backward(strategy)
    optimizer.step()

for _ in range(3):
    step()
began = time.perf_counter()
for _ in range(10):
    step()
print((time.perf_counter() - began) / 10)
"""
"""Program that times a GEM step of Avalanche's plugin, called as by its training loop."""


def against_avalanche(python: str) -> tuple[Side, Side]:
    """Our GEM step, and Avalanche's in a process with the given Python."""

    def theirs() -> float:
        done = subprocess.run([python, "-c", AVALANCHE], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SettingError(
                f"--avalanche {python}: {last}; expected the Python of an environment with avalanche-lib"
            )
        return float(done.stdout.split()[-1])

    return _steps(GEM(memory=256), 21, 256, 10), theirs
