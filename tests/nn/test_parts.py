"""Hooks, new layers and parametrizations of modules: they work before lifting and are refused after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, prune, spectral_norm

from rlmeta import nn
from rlmeta.errors import SettingError
from tests.nn.learners import assert_close, data, keys

CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda block: block.register_forward_hook(print),
    "pre-hook": lambda block: block.register_forward_pre_hook(print),
    "backward hook": lambda block: block.register_full_backward_hook(print),
    "backward pre-hook": lambda block: block.register_full_backward_pre_hook(print),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": spectral_norm,
    "prune": lambda block: prune.l1_unstructured(block, "weight", 0.5),
    "new layer": lambda block: block.add_module("9", torch.nn.Tanh()),
    "replaced layer": lambda block: setattr(block, "weight", torch.nn.Linear(3, 3)),
    "new parameter": lambda block: setattr(block, "scale", torch.nn.Parameter(torch.ones(3))),
    "new buffer": lambda block: block.register_buffer("mask", torch.ones(3)),
    "removed parameter": lambda block: delattr(block, "bias"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_takes_no_change_that_it_would_ignore(change: str) -> None:
    block = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    before = block(x)
    with pytest.raises(SettingError, match=r"Linear is a block.*takes no .*the torch\.nn\.Module first, then lift it"):
        CHANGES[change](block)
    assert torch.equal(block(x), before)
    for whole in (nn.MLP(3, [4]), nn.lift(torch.nn.Sequential(torch.nn.Linear(3, 3)))):
        part = next(whole.children())
        with pytest.raises(SettingError, match="Linear is a block"):
            CHANGES[change](part)
        with pytest.raises(SettingError, match="is a block"):
            whole.add_module("9", torch.nn.Tanh())


def test_a_parameter_may_take_the_place_of_its_like() -> None:
    block, other = nn.MLP(3, [4], 2), nn.MLP(3, [4], 2)
    block.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(2, 3)
    assert torch.equal(block(x), other(x))
    assert block.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "training"),
    [
        (lambda: parametrizations.weight_norm(torch.nn.Linear(3, 3)), True),
        (lambda: parametrizations.spectral_norm(torch.nn.Linear(3, 3)), False),
        (lambda: torch.nn.Sequential(parametrizations.orthogonal(torch.nn.Linear(3, 3)), torch.nn.Tanh()), True),
    ],
)
def test_parametrized_modules_are_lifted(build: Callable, training: bool) -> None:
    module = build().double().train(training)
    params = {name: torch.stack([value.detach()] * 2) for name, value in nn.block.own_tensors(module).items()}
    x = data(2, 4, 3)
    out = nn.apply(nn.lift(module), params, x, nn.Context(training=training))
    assert_close(out, torch.stack([module(row) for row in x]))


def test_a_pruned_module_is_refused_with_what_to_do() -> None:
    module = torch.nn.Linear(3, 3)
    prune.l1_unstructured(module, "weight", 0.5)
    with pytest.raises(SettingError, match=r"finish pruning with torch\.nn\.utils\.prune\.remove"):
        nn.lift(module)
    prune.remove(module, "weight")
    x = torch.randn(2, 3)
    assert torch.equal(nn.lift(module)(x), module(x))


class Own(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def test_parts_of_a_lifted_module_behave_as_modules_do() -> None:
    block: Any = nn.lift(Own())
    params, x = nn.stack(Own, keys(2)), torch.randn(2, 4, 3)
    expected = nn.apply(block, params, x)
    handle = block.layer.register_forward_hook(lambda module, inputs, out: out + 1.0)
    assert not torch.equal(nn.apply(block, params, x), expected)
    handle.remove()
    assert torch.equal(nn.apply(block, params, x), expected)
    parametrizations.weight_norm(block.layer)
    with pytest.raises(SettingError, match=r"Own has a tensor 'layer\.parametrizations.* did not have"):
        nn.apply(block, params, x)


def test_bare_blocks_can_be_run_but_not_taken_for_trained_ones() -> None:
    pretrained = torch.nn.Sequential(torch.nn.Linear(3, 3), Own(), torch.nn.LayerNorm(3))
    kept = {name: value.clone() for name, value in pretrained.state_dict().items()}
    block = nn.bare(lambda: {"net": nn.lift(pretrained)})["net"]
    params, x = nn.stack(lambda: pretrained, keys(2)), torch.randn(2, 4, 3)
    assert_close(nn.apply(block, params, x), torch.stack([pretrained(row) for row in x]), rtol=1e-5, atol=1e-6)
    assert_close(dict(pretrained.state_dict()), kept, rtol=0, atol=0)  # the user's module keeps its numbers
    assert all(value.device.type == "meta" for value in block.parameters())
    for use in (
        block,
        next(block.children()),
        lambda x: block.state_dict(),
        lambda x: torch.export.export(block, (x,)),
    ):
        with pytest.raises(SettingError, match=r"run\.module\(learner\) gives a trained"):
            use(x)
    before = torch.get_rng_state()
    nn.bare(lambda: {"net": nn.MLP(3, [4])})
    assert torch.equal(before, torch.get_rng_state())


def test_blocks_are_made_in_float32_on_the_cpu_whatever_torchs_defaults_are() -> None:
    builds = [
        lambda: nn.MLP(3, [4], 2),
        lambda: nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3), nn.Dropout(0.5)),
        lambda: nn.GaussianHead(3, 2),
        lambda: nn.TanhGaussianHead(3, 2),
        lambda: nn.StateDependentNoiseHead(3, 2),
        lambda: nn.TanhStateDependentNoiseHead(3, 2),
    ]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            blocks = [build() for build in builds]
            x = torch.zeros(2, 3, dtype=torch.float32, device="cpu")
            outs = [block(x) for block in blocks]
    finally:
        torch.set_default_dtype(torch.float32)
    for block, out in zip(blocks, outs):
        for value in (*block.parameters(), *block.buffers(), *(out.values() if isinstance(out, dict) else [out])):
            assert value.device.type == "cpu"
            assert value.dtype in (torch.float32, torch.int64)
