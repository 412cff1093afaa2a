from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.nn.block import between
from tests.nn.learners import assert_close, data, keys


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def test_stack_adds_learner_axes_to_every_parameter_and_buffer() -> None:
    params = nn.stack(build, keys(3, 2))
    own = dict(build().state_dict())
    assert params.keys() == own.keys()
    for name, value in params.items():
        assert value.shape == (3, 2, *own[name].shape)
        assert value.dtype == own[name].dtype
        assert not value.requires_grad
    assert {name: value.shape for name, value in nn.stack(build, keys()).items()} == {
        name: value.shape for name, value in own.items()
    }


def test_weights_depend_on_the_own_seed_alone() -> None:
    seeds = torch.tensor([5, 9, 5, -(2**63)])
    stacked = nn.stack(build, seeds)
    alone = nn.stack(build, seeds[1])
    torch.manual_seed(9)
    by_hand = build().state_dict()
    for name, value in stacked.items():
        assert torch.equal(value[1], alone[name])
        assert torch.equal(value[1], by_hand[name])
        assert torch.equal(value[0], value[2])
    assert not torch.equal(stacked["0.weight"][0], stacked["0.weight"][1])
    assert not torch.equal(stacked["0.weight"][0], stacked["0.weight"][3])


def test_stack_leaves_the_generator_and_the_default_device_alone() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        params = nn.stack(build, torch.tensor([1, 2], device="cpu"))
    assert torch.equal(before, torch.get_rng_state())
    assert params["0.weight"].device.type == "cpu"


def test_learners_own_their_memory() -> None:
    module = build()
    params = nn.stack(lambda: module, torch.tensor([0, 0]))
    params["0.weight"].zero_()
    assert module[0].weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("factory", "seeds", "message"),
    [
        (lambda: 3, torch.tensor([0]), "returned int"),
        (lambda: torch.nn.LazyLinear(3), torch.tensor([0]), "lazy"),
        (build, torch.tensor([], dtype=torch.int64), "one or more"),
        (build, torch.tensor([0.5]), "expected integers"),
    ],
)
def test_stack_refuses(factory: object, seeds: Tensor, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        nn.stack(factory, seeds)  # type: ignore[arg-type]


def test_stack_refuses_learners_of_different_shapes() -> None:
    sizes = iter([2, 3])
    with pytest.raises(SettingError, match="different shapes"):
        nn.stack(lambda: torch.nn.Linear(next(sizes), 1), torch.tensor([0, 1]))


def test_split_separates_buffers_and_frozen_parameters() -> None:
    block = nn.lift(build())
    block.get_parameter("1.bias").requires_grad_(False)
    parameters, rest = nn.split(block, nn.stack(build, keys(2)))
    assert set(parameters) == {"0.weight", "0.bias", "1.weight"}
    assert set(rest) == {"1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_block_is_an_ordinary_module() -> None:
    torch.manual_seed(0)
    reference = build().double()
    block = nn.Sequential(nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    block.load_state_dict(reference.state_dict())
    for x in (data(5, 3), data(5, 3, seed=2)):
        assert_close(block(x), reference(x))
    assert_close(dict(block.state_dict()), dict(reference.state_dict()))
    assert block.get_buffer("1.num_batches_tracked") == 2
    block.eval(), reference.eval()
    assert_close(block(data(5, 3)), reference(data(5, 3)))
    block(data(5, 3)).sum().backward()
    assert block.get_parameter("0.weight").grad is not None


def test_forward_draws_from_torchs_generator_only_where_something_draws() -> None:
    plain, dropping = nn.MLP(3, [4], 2), nn.Sequential(nn.MLP(3, [4], 2), nn.Dropout(0.5))
    x = torch.ones(50, 3)
    before = torch.get_rng_state()
    plain(x)
    dropping.eval()(x)
    assert torch.equal(before, torch.get_rng_state())
    dropping.train()
    torch.manual_seed(3)
    first, second = dropping(x), dropping(x)
    torch.manual_seed(3)
    assert torch.equal(dropping(x), first)
    assert not torch.equal(first, second)


def test_context_defaults_are_not_shared() -> None:
    nn.Context().new_buffers["x"] = torch.zeros(1)
    assert nn.Context().new_buffers == {}


def test_between_puts_axes_after_the_learners() -> None:
    parameter, x = data(3, 2, 3), data(3, 2, 3, 3, 3)
    aligned = between(parameter, x, 2)
    assert aligned.shape == (3, 2, 1, 1, 3)
    assert torch.equal(aligned[:, :, 0, 0], parameter)
    with pytest.raises(ValueError, match="learner axes"):
        between(parameter, data(2, 3, 3), 2)
    with pytest.raises(ValueError, match="learner axes"):
        between(parameter, data(3, 2), 2)
