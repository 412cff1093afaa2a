"""Thread safety: blocks keep nothing between calls, so that threads may share them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from rlmeta import nn
from rlmeta.functional import random
from tests.nn.learners import keys


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.drop(torch.tanh(self.first(x))))


def in_threads(work: Callable[[int], bool], times: int) -> list[int]:
    """Number of wrong results of each of three threads."""
    wrong = [0, 0, 0]

    def repeat(number: int) -> None:
        wrong[number] = sum(not work(number) for _ in range(times))

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_share_a_lifted_block() -> None:
    block, x, key = nn.lift(Residual()), torch.randn(2, 16, 8), keys(2)
    params = [nn.stack(Residual, keys(2, seed=seed)) for seed in range(3)]

    def run(number: int) -> Tensor:
        return nn.apply(block, params[number], x, nn.Context(training=number > 0, key=key))

    expected = [run(number) for number in range(3)]
    assert in_threads(lambda number: torch.equal(run(number), expected[number]), 60) == [0, 0, 0]


def test_threads_draw_initial_weights_of_their_own() -> None:
    expected = [nn.stack(Residual, keys(2, seed=seed)) for seed in range(3)]

    def same(number: int) -> bool:
        weights = nn.stack(Residual, keys(2, seed=number))
        return all(torch.equal(weights[name], value) for name, value in expected[number].items())

    assert in_threads(same, 30) == [0, 0, 0]


def test_another_threads_draws_are_not_taken_for_the_modules() -> None:
    class Meanwhile(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=torch.rand, args=(10,))
            thread.start()
            thread.join()
            return super().forward(x)

    module, x = Meanwhile(8, 8), torch.randn(3, 8)
    assert torch.equal(nn.apply(nn.lift(module), dict(module.named_parameters()), x), module(x))


def test_random_numbers_after_an_export_are_numbers() -> None:
    key = random.make_keys([3])

    class Noise(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + random.uniform(key, "noise", 0, (23,))

    program = torch.export.export(Noise(), (torch.zeros(1, 23),))
    drawn = random.uniform(key, "noise", 0, (23,))
    assert type(drawn) is Tensor
    assert torch.equal(program.module()(torch.zeros(1, 23)), drawn)
