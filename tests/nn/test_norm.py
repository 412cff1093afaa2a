from __future__ import annotations

import pytest
import torch

from rlmeta import nn
from tests.nn.learners import (
    LEARNER_SHAPES,
    as_torch,
    assert_close,
    assert_equals_loop,
    data,
    indices,
    keys,
    scattered,
    take,
)


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("batch_shape", [(), (3,), (3, 3)])
@pytest.mark.parametrize("shape", [(3,), (3, 3)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_layer_norm_equals_torch(
    learner_shape: tuple[int, ...], batch_shape: tuple[int, ...], shape: tuple[int, ...], options: dict
) -> None:
    block, reference = nn.LayerNorm(shape, **options), torch.nn.LayerNorm(shape, **options)
    assert block.state_dict().keys() == reference.state_dict().keys()
    params = scattered(nn.stack(lambda: reference, keys(*learner_shape)))
    x = data(*learner_shape, *batch_shape, *shape)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(reference), params, x, learner_shape)


def test_layer_norm_refuses_other_shapes() -> None:
    params = nn.stack(lambda: nn.LayerNorm(3), keys(3))
    for shape in [(3, 2, 4), (2, 2, 3), (3,)]:
        with pytest.raises(ValueError, match="x has shape"):
            nn.apply(nn.LayerNorm(3), params, torch.zeros(shape))


BATCH_NORM_OPTIONS = [
    {},
    {"momentum": 0.3, "eps": 0.1},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("options", BATCH_NORM_OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_torch(learner_shape: tuple[int, ...], options: dict, training: bool) -> None:
    block, reference = nn.BatchNorm1d(3, **options), torch.nn.BatchNorm1d(3, **options).train(training)
    assert block.state_dict().keys() == reference.state_dict().keys()
    params = scattered(nn.stack(lambda: reference, keys(*learner_shape)))
    kept = {name: value.clone() for name, value in params.items()}
    x = data(*learner_shape, 3, 3)
    ctx = nn.Context(training=training, learner_axes=len(learner_shape))
    moved: dict[tuple[int, ...], nn.Params] = {}

    def learner(own: nn.Params, x: torch.Tensor, index: tuple[int, ...]) -> torch.Tensor:
        moved[index] = own
        return torch.func.functional_call(reference, own, (x,))

    def run(own: nn.Params, x: torch.Tensor) -> torch.Tensor:
        return nn.apply(block, own, x, ctx)

    assert_equals_loop(run, learner, params, x, learner_shape)
    assert_close(params, kept, rtol=0, atol=0)
    tracked = training and options.get("track_running_stats", True)
    assert set(ctx.new_buffers) == ({"running_mean", "running_var", "num_batches_tracked"} if tracked else set())
    for index in indices(learner_shape) if tracked else []:
        for name, value in ctx.new_buffers.items():
            assert_close(take(value, index), moved[index][name])
    assert all(not value.requires_grad for value in ctx.new_buffers.values())


def test_batch_norm_joins_all_batch_axes() -> None:
    block = nn.BatchNorm1d(3)
    params = scattered(nn.stack(lambda: block, keys(3)))
    x = data(3, 3, 3, 3)
    folded, unfolded = nn.Context(training=True), nn.Context(training=True)
    out = nn.apply(block, params, x, unfolded)
    assert_close(out, nn.apply(block, params, x.flatten(1, 2), folded).reshape(x.shape))
    assert_close(unfolded.new_buffers, folded.new_buffers)


@pytest.mark.parametrize("learner_shape", [(), (3,)])
def test_a_second_pass_in_one_context_continues_the_first(learner_shape: tuple[int, ...]) -> None:
    for reference in (torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm1d(3))):
        reference.double()
        block = nn.lift(reference)
        params = nn.stack(lambda module=reference: module, keys(*learner_shape))
        ctx = nn.Context(training=True)
        x, y = data(*learner_shape, 4, 3), data(*learner_shape, 4, 3, seed=2)
        nn.apply(block, params, x, ctx)
        nn.apply(block, params, y, ctx)
        index = (0,) * len(learner_shape)
        reference(x[index])
        reference(y[index])
        assert_close(take(ctx.new_buffers, index), dict(reference.named_buffers()))


def test_batch_norm_refuses() -> None:
    block = nn.BatchNorm1d(3)
    params = nn.stack(lambda: block, keys(3))
    for shape in [(3, 2, 4), (2, 2, 3), (3,)]:
        with pytest.raises(ValueError, match="x has shape"):
            nn.apply(block, params, torch.zeros(shape))
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.apply(block, params, torch.zeros(3, 1, 3), nn.Context(training=True))
    assert nn.apply(block, params, torch.zeros(3, 1, 3)).shape == (3, 1, 3)


def test_lifted_batch_norm_keeps_torchs_layout() -> None:
    # 8 channels, 8 positions: reading the last axis as channels would go unnoticed by shapes.
    reference = torch.nn.BatchNorm1d(8).double()
    params = scattered(nn.stack(lambda: reference, keys(3)))
    x = data(3, 4, 8, 8)
    out = nn.apply(nn.lift(reference), params, x, nn.Context(training=True))
    for i in range(3):
        state = {name: value[i].clone() for name, value in params.items()}
        assert_close(out[i], torch.func.functional_call(reference, state, (x[i],)))
