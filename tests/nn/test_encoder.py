from __future__ import annotations

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlmeta import nn
from rlmeta.errors import SpaceError

LEAVES: list[gym.Space] = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-np.inf, np.inf, (2, 2)),
    spaces.Box(0, 5, (), dtype=np.float64),
    spaces.Box(-3, 3, (2,), dtype=np.int16),
    spaces.Discrete(3),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [-1, 5]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary((2, 2)),
]


def nested() -> st.SearchStrategy[gym.Space]:
    names = st.text("abcxyz", min_size=1, max_size=3)
    return st.recursive(
        st.sampled_from(LEAVES),
        lambda inner: (
            st.dictionaries(names, inner, min_size=1, max_size=3).map(spaces.Dict)
            | st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple)
        ),
        max_leaves=5,
    )


def as_tensors(space: gym.Space, samples: list[Any]) -> Any:
    """Observations of several rows as a tree of tensors; entries of tuples are named by index, counts start at 0."""
    if isinstance(space, spaces.Dict):
        return {name: as_tensors(child, [sample[name] for sample in samples]) for name, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return {str(i): as_tensors(child, [s[i] for s in samples]) for i, child in enumerate(space.spaces)}
    values = np.stack([np.asarray(sample) for sample in samples])
    return torch.from_numpy(
        values - space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else values
    )


def reshape(tree: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(tree, dict):
        return {name: reshape(value, shape) for name, value in tree.items()}
    return tree.reshape((*shape, *tree.shape[1:]))


@given(space=nested(), seed=st.integers(0, 1000))
def test_equals_gymnasiums_flatten(space: gym.Space, seed: int) -> None:
    space.seed(seed)
    samples = [space.sample() for _ in range(6)]
    encoder = nn.Encoder(space, dtype=torch.float64)
    out = nn.apply(encoder, {}, as_tensors(space, samples))
    expected = np.stack([spaces.flatten(space, sample) for sample in samples]).astype(np.float64)
    np.testing.assert_array_equal(out.numpy(), expected)
    assert out.dtype == torch.float64
    assert encoder.features == expected.shape[1] == spaces.flatdim(space)
    batched = nn.apply(encoder, {}, reshape(as_tensors(space, samples), (3, 2)))
    assert torch.equal(batched, out.reshape(3, 2, -1))


@pytest.mark.parametrize("space", LEAVES)
@pytest.mark.parametrize("batch_shape", [(), (3,), (3, 3, 3)])
def test_any_batch_axes(space: gym.Space, batch_shape: tuple[int, ...]) -> None:
    encoder = nn.Encoder(space)
    x = reshape(as_tensors(space, [space.sample() for _ in range(int(np.prod(batch_shape)))]), batch_shape)
    out = encoder(x)
    assert out.shape == (*batch_shape, encoder.features)
    assert out.dtype == torch.float32


def test_bytes_are_divided_once_by_the_bound_that_the_space_declares() -> None:
    space = spaces.Box(0, 255, (2, 2, 3), dtype=np.uint8)
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 2, 2, 3) + 240
    expected = image.flatten(1).float() / 255
    assert torch.equal(nn.Encoder(space)(image), expected)
    assert torch.equal(nn.Encoder(space)(expected.reshape(image.shape)), expected)  # somebody has scaled them
    assert nn.Encoder(space)(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)).max() == 1.0
    for dtype in (np.int32, np.float32):
        other = spaces.Box(0, 255, (12,), dtype=dtype)
        assert torch.equal(nn.Encoder(other)(image.flatten(1).float()), image.flatten(1).float())


@pytest.mark.parametrize("shape", [(), (2,), (2, 2)])
def test_small_numbers_stored_as_bytes_are_divided_by_their_own_bound(shape: tuple[int, ...]) -> None:
    space = spaces.Box(0, 2, shape, dtype=np.uint8)
    x = torch.tensor([0, 1, 2], dtype=torch.uint8).reshape(3, *(1,) * len(shape)).expand(3, *shape)
    out = nn.Encoder(space)(x)
    assert torch.equal(out, torch.tensor([[0.0], [0.5], [1.0]]).expand(3, int(np.prod(shape))))


def test_every_byte_has_its_own_bound() -> None:
    high = np.array([[1, 255], [0, 10]], dtype=np.uint8)
    space = spaces.Dict(
        a=spaces.Box(0 * high, high, dtype=np.uint8), b=spaces.Tuple([spaces.Box(0, 4, (1,), np.uint8)])
    )
    x = {"a": torch.tensor([[[1, 51], [0, 5]]], dtype=torch.uint8), "b": {"0": torch.tensor([[3]], dtype=torch.uint8)}}
    assert torch.allclose(nn.Encoder(space)(x), torch.tensor([[1.0, 0.2, 0.0, 0.5, 0.75]]))


def test_action_mask_is_no_feature() -> None:
    space = spaces.Dict(
        state=spaces.Box(-1, 1, (2,)),
        action_mask=spaces.MultiBinary(3),
        inner=spaces.Dict(action_mask=spaces.Discrete(2), x=spaces.Discrete(2)),
    )
    encoder = nn.Encoder(space)
    assert encoder.features == 4
    state = torch.tensor([[0.5, -0.5]])
    out = encoder({"state": state, "inner": {"x": torch.tensor([1])}, "action_mask": torch.ones(1, 3)})
    assert torch.equal(out, torch.tensor([[0.0, 1.0, 0.5, -0.5]]))  # inner before state


def test_tuples_may_come_as_tuples() -> None:
    space = spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,))])
    parts = (torch.tensor([1, 0]), torch.tensor([[0.5], [0.25]]))
    expected = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]])
    assert torch.equal(nn.Encoder(space)(parts), expected)
    assert torch.equal(nn.Encoder(space)({"1": parts[1], "0": parts[0]}), expected)


def test_feature_axes() -> None:
    space = spaces.Dict(
        image=spaces.Box(0, 255, (4, 4, 3), dtype=np.uint8),
        pair=spaces.Tuple([spaces.Discrete(2), spaces.MultiDiscrete([2, 2])]),
    )
    assert nn.feature_axes(space) == {"image": 3, "pair": {"0": 0, "1": 1}}
    assert nn.feature_axes(spaces.Box(0, 1, ())) == 0
    assert nn.feature_axes(spaces.MultiBinary((2, 3))) == 2


UNSUPPORTED = [
    spaces.Text(5),
    spaces.Sequence(spaces.Discrete(2)),
    spaces.Graph(spaces.Box(0, 1, (2,)), spaces.Discrete(2)),
    spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
]


@pytest.mark.parametrize("space", UNSUPPORTED)
def test_refuses_spaces_without_a_size(space: gym.Space) -> None:
    with pytest.raises(SpaceError, match=r"observation space is .* expected Box, Discrete.*wrap the environment"):
        nn.Encoder(space)
    with pytest.raises(SpaceError, match=r"observation space\['a'\]\[1\] is"):
        nn.Encoder(spaces.Dict(a=spaces.Tuple([spaces.Discrete(2), space])))


def test_refuses_spaces_with_nothing_in_them() -> None:
    for space in [spaces.Dict(action_mask=spaces.MultiBinary(2)), spaces.Dict(), spaces.Tuple([])]:
        with pytest.raises(SpaceError, match="no entry to learn from"):
            nn.Encoder(space)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"b": torch.zeros(2, 3)}, SpaceError, r"no entry 'a'.*keys \['b'\]"),
        (torch.zeros(2, 3), SpaceError, r"no entry 'a'.*Tensor"),
        ({"a": torch.zeros(2, 4)}, ValueError, r"observation\['a'\] has shape \(2, 4\), expected \('...', 3\)"),
        ({"a": torch.zeros(())}, ValueError, "has shape"),
        ({"a": np.zeros((2, 3))}, ValueError, "ndarray"),
    ],
)
def test_refuses_other_observations(x: Any, error: type[Exception], message: str) -> None:
    encoder = nn.Encoder(spaces.Dict(a=spaces.Box(0, 1, (3,))))
    with pytest.raises(error, match=message):
        encoder(x)


def test_stands_in_a_sequence_with_learner_axes() -> None:
    space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (3, 3)))
    encoder = nn.Encoder(space)
    block = nn.Sequential(encoder, nn.MLP(encoder.features, [3], 2))
    params = nn.stack(lambda: block, torch.arange(3))
    x: dict[str, Tensor] = {"a": torch.randint(0, 3, (3, 3)), "b": torch.randn(3, 3, 3, 3)}
    out = nn.apply(block, params, x)
    for i in range(3):
        alone = nn.apply(block, {k: v[i] for k, v in params.items()}, {k: v[i] for k, v in x.items()})
        torch.testing.assert_close(out[i], alone)


@pytest.mark.parametrize("space", [*LEAVES, spaces.Box(0, 255, (2, 2), np.uint8)], ids=str)
def test_an_encoder_can_be_pickled(space: gym.Space) -> None:
    encoder = pickle.loads(pickle.dumps(nn.Encoder(space)))
    x = torch.ones((5, *(space.shape or ())), dtype=torch.uint8)
    assert torch.equal(encoder(x), nn.Encoder(space)(x))
