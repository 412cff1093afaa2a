"""Convolutional encoders of pictures: which axes are what, the papers' networks, and the default chosen by space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlmeta import nn
from rlmeta.engine.capture import Capture
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import tree
from tests.nn.learners import as_torch, assert_close, assert_equals_loop, data, keys, scattered, take


def box(*shape: int, high: float = 255, dtype: Any = np.uint8, low: float = 0) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


LAYOUTS = [
    (box(210, 160, 3), (3, 210, 160)),
    (box(84, 84, 4), (4, 84, 84)),
    (box(84, 84, 1), (1, 84, 84)),
    (box(4, 84, 84), (4, 84, 84)),
    (box(4, 210, 160), (4, 210, 160)),
    (box(4, 96, 80, 3), (12, 96, 80)),
    (box(2, 3, 96, 80), (6, 96, 80)),
    (box(10, 10, 4, high=1, dtype=np.float32), (4, 10, 10)),
    (box(10, 10, 4, high=1, dtype=bool), (4, 10, 10)),
    (box(10, 10, 10, high=1, dtype=np.int8), (10, 10, 10)),
    (box(7, 7, 20), (20, 7, 7)),
    (box(20, 7, 7), (20, 7, 7)),
    (box(1, 4, 5), (1, 4, 5)),
]
NONE = [
    box(84, 84),
    box(5,),
    box(2, 2, 3),
    box(1, 1, 3),
    box(10, 2, 1),
    box(2, 5, 2),
    box(10, 10, 4, dtype=np.float32),
    box(10, 10, 4, high=1, low=-1, dtype=np.float32),
    box(10, 10, 4, high=2, dtype=np.int32),
    spaces.MultiBinary((10, 10, 4)),
    spaces.Discrete(3),
    spaces.Dict(picture=box(84, 84, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("space", "expected"), LAYOUTS, ids=str)
def test_the_axes_of_a_picture(space: spaces.Box, expected: tuple[int, ...]) -> None:
    layout = nn.picture_layout(space)
    assert layout is not None and layout[:3] == expected
    x = torch.rand(2, *space.shape)
    out = nn.Picture(space)(x)
    assert out.shape == (2, *expected)
    assert_close(out, x.permute(0, *(1 + axis for axis in layout.order)).reshape(2, *expected), rtol=0, atol=0)
    assert torch.equal(out[:, :, 0, 1].flatten(1).sort(1)[0], pixel(x, layout, 0, 1).flatten(1).sort(1)[0])


def pixel(x: Tensor, layout: nn.Layout, row: int, column: int) -> Tensor:
    """What a picture holds at a row and a column, by names of its axes instead of a permutation."""
    *_, height, width = layout.order
    return x.select(1 + max(height, width), column).select(1 + min(height, width), row)


@pytest.mark.parametrize("space", NONE, ids=str)
def test_what_is_no_picture(space: gym.Space) -> None:
    assert nn.picture_layout(space) is None and nn.picture_cnn(space) is None
    with pytest.raises(SpaceError, match=r"is no picture: expected a Box of shape \(H, W, C\) or \(C, H, W\)"):
        nn.impala_cnn(space)


@pytest.mark.parametrize("shape", [(3, 84, 3), (84, 3, 84), (20, 7, 9)])
def test_axes_that_may_be_either_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpaceError, match=r"may be \[H, W, C\] or \[C, H, W\]: transpose it .* or give a network="):
        nn.picture_cnn(box(*shape))


def test_bytes_are_divided_once_by_their_bounds() -> None:
    x = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    picture = nn.Picture(box(5, 4, 3))
    expected = (x / 255).movedim(-1, 1)
    assert_close(picture(x), expected, rtol=0, atol=0)
    assert_close(picture(x / 255), expected, rtol=0, atol=0)  # somebody has scaled them
    bools = torch.rand(2, 5, 4, 3) > 0.5
    assert_close(nn.Picture(box(5, 4, 3, high=1, dtype=bool))(bools), bools.float().movedim(-1, 1), rtol=0, atol=0)
    high = np.full((5, 4, 3), 10, np.uint8)
    high[..., 1] = 0
    high[..., 2] = 4
    own = nn.Picture(spaces.Box(0 * high, high, dtype=np.uint8))(torch.full((1, 5, 4, 3), 2, dtype=torch.uint8))
    assert_close(own[0, :, 0, 0], torch.tensor([0.2, 2.0, 0.5]))
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 5, 3\)"):
        picture(x.movedim(1, 2))


# ---------------------------------------------------------------------- the papers' networks


def sizes(module: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in module.named_parameters() if name.endswith("weight")]


def test_natures_network_has_the_papers_sizes() -> None:
    network = nn.nature_cnn(box(84, 84, 4))
    assert sizes(network) == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)]
    assert sum(p.numel() for p in network.parameters()) == 1_684_128  # 3,136 x 512 is most of it
    assert nn.nature_cnn(box(36, 36, 3))(torch.zeros(2, 36, 36, 3, dtype=torch.uint8)).shape == (2, 512)
    with pytest.raises(SpaceError, match="35 x 36 is too small for Nature's convolutions"):
        nn.nature_cnn(box(35, 36, 3))


def test_minatars_network_has_the_papers_sizes() -> None:
    network = nn.minatar_cnn(box(10, 10, 6, high=1, dtype=bool))
    assert sizes(network) == [(16, 6, 3, 3), (128, 16 * 8 * 8)]


def test_impalas_network_has_the_papers_sizes() -> None:
    network = nn.impala_cnn(box(96, 72, 3))
    convolutions = [size for size in sizes(network) if len(size) == 4]
    assert len(convolutions) == 15 and convolutions[:6] == [(16, 3, 3, 3)] + [(16, 16, 3, 3)] * 4 + [(32, 16, 3, 3)]
    assert sizes(network)[-1] == (256, 32 * 12 * 9)
    for shape in [(10, 10, 4), (3, 3, 1), (11, 5, 2)]:
        assert nn.impala_cnn(box(*shape), (4, 8), 6)(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 6)
    with pytest.raises(SettingError, match="expected one section or more"):
        nn.impala_cnn(box(10, 10, 4), ())


def test_the_default_is_chosen_by_size() -> None:
    assert [len(sizes(nn.picture_cnn(box(side, side, 3)))) for side in (3, 35, 36, 84)] == [2, 2, 4, 4]


def test_the_residual_block_is_its_equation() -> None:
    block = nn.pictures.Residual(3).double()
    x = data(2, 3, 4, 4)
    inner = torch.nn.functional.conv2d(x.relu(), block.first.weight, block.first.bias, padding=1)
    outer = torch.nn.functional.conv2d(inner.relu(), block.second.weight, block.second.bias, padding=1)
    assert_close(block(x), x + outer)


@pytest.mark.parametrize("initialiser", ["torch", "orthogonal"])
def test_initial_weights(initialiser: Any) -> None:
    torch.manual_seed(0)
    for part in nn.nature_cnn(box(36, 36, 3), initialiser).modules():
        if not isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            continue
        weight, bias = part.weight.detach().flatten(1), part.bias
        if initialiser == "orthogonal":
            wide = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
            assert_close(wide, 2.0 * torch.eye(len(wide)), rtol=0, atol=1e-4)
            assert not bias.any()
        else:
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound and 0.5 * bound < bias.abs().max() <= bound


NETWORKS: dict[str, Callable[[gym.Space], torch.nn.Module]] = {
    "minatar": nn.minatar_cnn,
    "impala": lambda space: nn.impala_cnn(space, (3, 3), 3),
}


@pytest.mark.parametrize("learner_shape", [(), (1,), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_learner_has_a_network_of_its_own(name: str, learner_shape: tuple[int, ...]) -> None:
    space = box(3, 3, 3, high=1, dtype=np.float32)
    network = NETWORKS[name](space).double()
    block = nn.lift(network, nn.feature_axes(space))
    params = scattered(nn.stack(lambda: network, keys(*learner_shape)))
    x = data(*learner_shape, 3, 3, 3, 3)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(network), params, x, learner_shape)
    rows = nn.apply(block, params, data(*learner_shape, 3, 3, 3, 3, 3))
    assert rows.shape == (*learner_shape, 3, 3, 3 if name == "impala" else 128)


# ---------------------------------------------------------------------- chosen by space


FUSED = spaces.Dict(
    camera=box(6, 6, 3),
    speed=spaces.Box(-1, 1, (2,)),
    inner=spaces.Tuple([spaces.Discrete(3), box(4, 5, 1, high=1, dtype=np.float32)]),
    action_mask=spaces.MultiBinary(3),
)


def fused(*rows: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return {
        "camera": torch.randint(0, 256, (*rows, 6, 6, 3), dtype=torch.uint8, generator=generator),
        "speed": torch.randn(*rows, 2, generator=generator),
        "inner": {
            "0": torch.randint(0, 3, rows, generator=generator),
            "1": torch.rand(*rows, 4, 5, 1, generator=generator),
        },
        "action_mask": torch.ones(*rows, 3),
    }


def test_a_dictionary_is_the_parts_features_side_by_side() -> None:
    def build() -> nn.Encoder:
        return nn.Encoder(FUSED, choose=nn.picture_cnn)

    encoder, params = build(), nn.stack(build, keys(2))
    assert encoder.features == 128 + 3 + 128 + 2
    assert set(params) == {f"{part}.{name}" for part in (0, 2) for name in ("1.weight", "1.bias", "4.weight", "4.bias")}
    x = fused(2, 5, 4)
    out = nn.apply(encoder, params, x)
    assert out.shape == (2, 5, 4, encoder.features)
    camera = nn.lift(nn.minatar_cnn(FUSED["camera"]), 3)
    own = {name.removeprefix("0."): value for name, value in params.items() if name.startswith("0.")}
    assert_close(out[..., :128], nn.apply(camera, own, x["camera"]), rtol=1e-5, atol=1e-5)
    one_hot = torch.nn.functional.one_hot(x["inner"]["0"], 3).float()
    assert torch.equal(out[..., 128:131], one_hot) and torch.equal(out[..., -2:], x["speed"])
    for i in range(2):
        alone = nn.apply(encoder, take(params, (i,)), take(x, (i,)))
        assert_close(alone, out[i], rtol=1e-4, atol=1e-5)


def test_a_space_without_pictures_has_no_parameters() -> None:
    encoder = nn.Encoder(spaces.Dict(a=box(84, 84), b=spaces.Discrete(3)), choose=nn.picture_cnn)
    assert not nn.block.own_tensors(encoder) and encoder.features == 84 * 84 + 3


class Sum(torch.nn.Module):
    """A set's features: the sum of those of its entities, `[B, entities, D]` -> `[B, 5]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu().sum(-2)


def test_any_part_may_have_a_network_of_its_own() -> None:
    def choose(space: gym.Space) -> torch.nn.Module | None:
        if isinstance(space, spaces.Discrete) and space.n > 100:
            return torch.nn.Embedding(int(space.n), 4)
        return Sum(space.shape[1]) if len(space.shape or ()) == 2 else None

    space = spaces.Dict(name=spaces.Discrete(1000), units=spaces.Box(-1, 1, (7, 3)), own=spaces.Box(-1, 1, (2,)))

    def build() -> nn.Encoder:
        return nn.Encoder(space, choose=choose)

    encoder, params = build(), nn.stack(build, keys(3))
    assert encoder.features == 4 + 2 + 5
    x = {"name": torch.tensor([[1, 999]] * 3), "units": torch.randn(3, 2, 7, 3), "own": torch.randn(3, 2, 2)}
    out = nn.apply(encoder, params, x)
    shuffled = nn.apply(encoder, params, {**x, "units": x["units"].flip(2)})
    assert_close(out, shuffled, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[1, :, :4], params["0.weight"][1][[1, 999]])


def test_a_network_without_features_is_refused() -> None:
    with pytest.raises(SettingError, match=r"must give features \[B, D\]; for B = 2 it gave \(2, 7, 3\)"):
        nn.Encoder(spaces.Box(-1, 1, (7, 3)), choose=lambda space: torch.nn.Identity())


@pytest.mark.filterwarnings("error:.*not recorded")
@pytest.mark.parametrize("learners", [1, 2])
def test_a_gradient_step_of_an_encoder_is_recorded(learners: int) -> None:
    def build() -> nn.Encoder:
        return nn.Encoder(FUSED, choose=lambda s: nn.impala_cnn(s, (2, 2), 4) if nn.picture_layout(s) else None)

    block, start = build(), nn.stack(build, keys(learners))

    def gradient(given: tree.Tree) -> tree.Tree:
        own = {name: value.detach().requires_grad_() for name, value in given["params"].items()}
        with torch.enable_grad():
            loss = nn.apply(block, own, given["x"]).square().sum()
        return dict(zip(own, torch.autograd.grad(loss, list(own.values()))))

    capture = Capture(warm_up=2)
    for seed in range(6):
        torch.manual_seed(seed)
        given = {"params": {name: value + 0.1 * seed for name, value in start.items()}, "x": fused(learners, 3)}
        expected = gradient(given)
        assert all(torch.equal(value, expected[name]) for name, value in capture("step", gradient, given).items())
    assert capture._programs and None not in capture._programs.values()
