"""The table of docs/blocks.md: every row is built, run for several learners, compared with torch's, and recorded."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils import _pytree as pytree

import rlmeta as rl
from rlmeta.engine.capture import Capture
from rlmeta.functional import tree
from tests.markdown import DOCUMENTS, sections, table_rows
from tests.nn.learners import as_torch, assert_equals_loop, keys, scattered

NAMES = {"rl": rl, "nn": torch.nn, "Box": Box, "uint8": np.uint8, "weight_norm": weight_norm}
NAMES["spectral_norm"] = spectral_norm
ROWS = [
    [cell.strip().strip("`") for cell in re.split(r" ?(?<!\\)\|", row)[1:-1]]
    for row in table_rows(sections(DOCUMENTS["docs/blocks.md"])["Shape contracts"])
]
B, L = 3, (3,)


def build(text: str) -> torch.nn.Module:
    made: torch.nn.Module = eval(text, dict(NAMES))
    return made


def shapes(cell: str) -> dict[str, tuple[int, ...]]:
    """`weight [4, 5], bias [4]` -> sizes by name; the name of a tensor alone is ''."""
    parts = re.findall(r"([\w.]*) ?\[([^\]]*)\]", cell)
    return {name: tuple(B if size == "B" else int(size) for size in text.split(", ") if size) for name, text in parts}


def inputs(cell: str, seed: int = 0) -> Any:
    """Numbers of the shapes of a cell, whole ones below a bound where it has one."""
    generator = torch.Generator().manual_seed(seed)
    bound = int(cell.partition("<")[2] or 0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        if bound:
            whole = torch.randint(0, bound, (*L, *shape), generator=generator)
            return whole.to(torch.uint8) if bound == 256 else whole
        return torch.randn(*L, *shape, generator=generator)

    drawn = {name: draw(shape) for name, shape in shapes(cell).items()}
    return drawn.get("", drawn)


def test_every_block_is_in_the_table() -> None:
    listed = " ".join(row[0] for row in ROWS)
    blocks = {
        name
        for name in rl.nn.__all__
        if isinstance(kind := getattr(rl.nn, name), type) and issubclass(kind, rl.nn.Block)
    }
    special = {"Block", "Lifted", "NormedWeight", "TanhGaussianHead", "DeterministicHead", "StateDependentNoiseHead"}
    special |= {"TanhStateDependentNoiseHead", "GatedTransformerLayer"}  # the latter takes a window: AttentionMemory
    missing = {name for name in blocks - special if f"rl.nn.{name}(" not in listed}
    assert missing == set(), "a row of docs/blocks.md says what their shapes are"
    assert all(len(row) == 8 and row[-1] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_so(row: list[str]) -> None:
    text, taken, given, parameters, buffers, torchs, *_ = row
    module = build(text)
    own = {name: tuple(value.shape) for name, value in module.named_parameters()}
    assert parameters == "its layers'" or own == shapes(parameters)
    assert {name: tuple(value.shape) for name, value in module.named_buffers()} == shapes(buffers)
    params, block = rl.nn.stack(lambda: build(text), keys(*L)), rl.nn.lift(module)
    for training in (False, True):
        ctx = rl.nn.Context(training, keys(*L), learner_axes=len(L))
        out = rl.nn.apply(block, params, inputs(taken), ctx)
        found = out if isinstance(out, dict) else {"": out}
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            name: (*L, *shape) for name, shape in shapes(given).items()
        }
        assert ctx.new_buffers.keys() == (shapes(buffers).keys() if training else set())
    if torchs:
        reference = (module if torchs == "itself" else build(torchs)).double().eval()
        x = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs(taken))
        assert_equals_loop(
            lambda p, x: rl.nn.apply(block.double(), p, x, rl.nn.Context(learner_axes=len(L))),
            as_torch(reference),
            scattered(params),
            x,
            L,
        )


@pytest.mark.filterwarnings("error:.*not recorded")
@pytest.mark.parametrize("row", [row for row in ROWS if row[6] == "yes"], ids=lambda row: row[0])
def test_a_row_is_recorded(row: list[str]) -> None:
    text, taken = row[:2]
    block, start = rl.nn.lift(build(text)), rl.nn.stack(lambda: build(text), keys(*L))
    trained = [name for name, _ in block.named_parameters()]

    def step(given: tree.Tree) -> tree.Tree:
        own = {name: v.detach().requires_grad_(name in trained) for name, v in given["params"].items()}
        ctx, leaves = rl.nn.Context(True, given["key"], learner_axes=len(L)), [own[name] for name in trained]
        with torch.enable_grad():
            out = rl.nn.apply(block, own, given["x"], ctx)
            if not trained:
                return {"out": out}
            loss = torch.stack([leaf.square().mean() for leaf in pytree.tree_leaves(out)]).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        moved = {name: own[name].detach() - 0.01 * g for name, g in zip(trained, gradients) if g is not None}
        return {**{f"param {name}": v for name, v in moved.items()}, **ctx.new_buffers}

    capture = Capture(warm_up=1)
    for seed in range(5):
        given = {"params": start, "key": keys(*L, seed=seed), "x": inputs(taken, seed)}
        done, expected = capture("step", step, given), step(given)
        assert all(tree.flatten(tree.map(torch.equal, done, expected)).values())
    assert capture._programs and None not in capture._programs.values()
