from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.nn.initialisers import initialise
from tests.nn.learners import LEARNER_SHAPES, as_torch, assert_close, assert_equals_loop, data, keys, scattered


def reference(activation: type[torch.nn.Module] = torch.nn.Tanh, width: int = 3) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(3, width), activation(), torch.nn.Linear(width, width), activation(), torch.nn.Linear(width, 2)
    )


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("batch_shape", [(), (3,), (3, 3), (0,)])
def test_equals_torch(learner_shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> None:
    params = scattered(nn.stack(reference, keys(*learner_shape)))
    block = nn.MLP(3, [3, 3], 2)
    assert params.keys() == dict(block.state_dict()).keys()
    x = data(*learner_shape, *batch_shape, 3)
    out = assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(reference()), params, x, learner_shape)
    assert out.shape == (*learner_shape, *batch_shape, 2)


@pytest.mark.parametrize(
    ("activation", "module"),
    [
        ("relu", torch.nn.ReLU),
        ("sigmoid", torch.nn.Sigmoid),
        ("gelu", torch.nn.GELU),
        (torch.relu, torch.nn.ReLU),
        (torch.nn.Softsign(), torch.nn.Softsign),
    ],
)
@pytest.mark.parametrize("learner_shape", [(), (3,)])
def test_activations(activation: object, module: type[torch.nn.Module], learner_shape: tuple[int, ...]) -> None:
    params = scattered(nn.stack(lambda: reference(module), keys(*learner_shape)))
    block = nn.MLP(3, [3, 3], 2, activation=activation)  # type: ignore[arg-type]
    x = data(*learner_shape, 3, 3)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(reference(module)), params, x, learner_shape)


def test_the_input_is_not_written_over() -> None:
    block = nn.MLP(3, [3], activation="relu")
    x = data(5, 3).float()
    kept = x.clone()
    block(x)
    assert torch.equal(x, kept)


def test_without_output_layer_the_last_hidden_layer_is_the_output() -> None:
    block = nn.MLP(3, [5, 4])
    assert block.features == 4
    assert set(block.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert block(torch.full((2, 3), 100.0)).abs().max() <= 1.0
    assert nn.MLP(3, [5], 2).features == 2
    assert nn.MLP(3, [], 2).features == 2


def test_final_activation() -> None:
    plain, final = nn.MLP(3, [4], 2), nn.MLP(3, [4], 2, final_activation="sigmoid")
    final.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3)
    assert_close(final(x), plain(x).sigmoid(), rtol=1e-6, atol=1e-6)


def test_state_dicts_go_out_and_in() -> None:
    block, module = nn.MLP(3, [3, 3], 2), reference()
    module.load_state_dict(block.state_dict())
    x = torch.randn(7, 3)
    assert_close(block(x), module(x), rtol=1e-6, atol=1e-6)
    stacked = nn.stack(lambda: nn.MLP(3, [3, 3], 2), keys(3))
    module.load_state_dict({name: value[1] for name, value in stacked.items()})
    out = nn.apply(block, stacked, x.expand(3, 7, 3))
    assert_close(out[1], module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 5, 3), (5, 3), (3,)])
def test_refuses_other_inputs(shape: tuple[int, ...]) -> None:
    params = nn.stack(reference, keys(3))
    with pytest.raises(ValueError, match=r"x has shape .* expected \(3, '...', 3\)"):
        nn.apply(nn.MLP(3, [3, 3], 2), params, torch.zeros(shape))


@pytest.mark.parametrize("arguments", [(3, []), (3, [0], 2), (0, [2]), (3, [2], 0)])
def test_refuses_empty_networks(arguments: tuple) -> None:
    with pytest.raises(SettingError, match="no layer or an empty one"):
        nn.MLP(*arguments)


def test_orthogonal_start() -> None:
    block = nn.MLP(8, [8, 8], 8, final_gain=0.01)
    for name, gain in {"0": math.sqrt(2), "2": math.sqrt(2), "4": 0.01}.items():
        weight = block.get_parameter(f"{name}.weight").double()
        assert_close(weight @ weight.T, gain**2 * torch.eye(8, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        assert block.get_parameter(f"{name}.bias").abs().max() == 0


def test_torch_start_is_bit_for_bit_that_of_torch() -> None:
    torch.manual_seed(5)
    module = reference(width=16)
    torch.manual_seed(5)
    block = nn.MLP(3, [16, 16], 2, initialiser="torch", final_gain=0.01)
    for name, value in module.state_dict().items():
        assert torch.equal(block.state_dict()[name], value)


def test_initialise() -> None:
    torch.manual_seed(1)
    weight, bias, plain = torch.empty(3, 4), torch.empty(3), torch.empty(3, 4)
    initialise(weight, bias, "torch", gain=0.5)
    torch.manual_seed(1)
    initialise(plain, None, "torch")
    assert torch.equal(weight, plain * 0.5)
    assert 0 < bias.abs().max() <= 0.5
    with pytest.raises(SettingError, match="'xavier' is unknown"):
        initialise(weight, bias, "xavier")  # type: ignore[arg-type]


class Operations(TorchDispatchMode):
    """Dispatch mode that records the names of tensor operations, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_learner_takes_the_operations_of_torch() -> None:
    """So it costs no more than torch; `rlmeta bench` measures the time."""
    module, block = reference(width=64), nn.MLP(3, [64, 64], 2)
    params, x = dict(module.state_dict()), torch.randn(8, 3)
    with torch.no_grad(), Operations() as ours:
        nn.apply(block, params, x)
    with torch.no_grad(), Operations() as theirs:
        module(x)
    assert sorted(ours.names) == sorted(theirs.names)
