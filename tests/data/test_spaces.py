"""Conversion between gymnasium's values and trees of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from rlmeta.data.spaces import Layout, batch_size, check_space, to_numpy, to_tree
from rlmeta.errors import SpaceError
from rlmeta.functional import tree

_discrete = st.builds(
    lambda n, start, dtype: spaces.Discrete(n, start=start, dtype=dtype),
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from([np.int64, np.int32, np.uint8]),
)
_multi_discrete = st.lists(st.tuples(st.integers(1, 5), st.integers(-3, 3)), min_size=1, max_size=3).map(
    lambda pairs: spaces.MultiDiscrete([n for n, _ in pairs], start=[start for _, start in pairs])
)
_box = st.builds(
    lambda shape, dtype: spaces.Box(-3 if dtype != np.uint8 else 0, 7, tuple(shape), dtype),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from([np.float32, np.float64, np.float16, np.uint8, np.int32, np.int8]),
)
_flat = st.one_of(_discrete, _multi_discrete, _box, st.integers(1, 4).map(spaces.MultiBinary))
supported = st.recursive(
    _flat,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "wide"]), inner, min_size=1, max_size=3).map(spaces.Dict),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=4,
)
seeds = st.integers(0, 2**31)


def _expected(space: Any, value: Any) -> Any:
    """The tree of one value, by the table of the module."""
    if isinstance(space, spaces.Dict):
        return {name: _expected(part, value[name]) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return {str(i): _expected(part, value[i]) for i, part in enumerate(space.spaces)}
    if isinstance(space, spaces.Box):
        return torch.as_tensor(np.asarray(value)).to(torch.uint8 if space.dtype == np.uint8 else torch.float32)
    return torch.as_tensor(np.asarray(value, np.int64)) - torch.as_tensor(
        np.asarray(getattr(space, "start", 0)).astype(int)
    )


def _same(a: Any, b: Any) -> None:
    flat_a, flat_b = tree.flatten(a), tree.flatten(b)
    assert list(flat_a) == list(flat_b)
    for name, leaf in flat_a.items():
        assert leaf.dtype == flat_b[name].dtype and torch.equal(leaf, flat_b[name]), name


@given(space=supported, seed=seeds)
def test_one_value_becomes_a_tree(space: Any, seed: int) -> None:
    space.seed(seed)
    value = space.sample()
    _same(to_tree(space, value), _expected(space, value))


@given(space=supported, seed=seeds, batch=st.sampled_from([(1,), (2, 2), (3,), (2, 1, 3)]))
def test_batched_values_become_trees_row_by_row(space: Any, seed: int, batch: tuple[int, ...]) -> None:
    rows = int(np.prod(batch))
    batched = batch_space(space, rows)
    batched.seed(seed)
    layout = Layout(space)
    value = batched.sample()
    got = to_tree(space, value, batch)
    ones = layout.rows([_at(value, leaf.path) for leaf in layout.leaves])
    assert len(ones) == rows
    flat = [tree.flatten(_expected(space, one)) for one in ones]
    for name, leaf in tree.flatten(got).items():
        assert leaf.shape[: len(batch)] == batch
        assert torch.equal(leaf.flatten(0, len(batch) - 1), torch.stack([one[name] for one in flat]))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


@given(space=supported, seed=seeds)
def test_actions_return_to_where_they_came_from(space: Any, seed: int) -> None:
    space.seed(seed)
    value = space.sample()
    back = to_numpy(space, to_tree(space, value))
    assert space.contains(back)
    _same(to_tree(space, back), to_tree(space, value))


@given(space=supported, seed=seeds)
def test_batched_actions_are_those_of_a_vector_env(space: Any, seed: int) -> None:
    batched = batch_space(space, 4)
    batched.seed(seed)
    value = to_numpy(space, to_tree(space, batched.sample(), (2, 2)), (2, 2))
    assert batched.contains(value)
    layout = Layout(space)
    assert all(space.contains(row) for row in layout.rows([_at(value, leaf.path) for leaf in layout.leaves]))


def test_dtypes_and_start() -> None:
    assert to_tree(spaces.Box(-1, 1, (2,), np.float64), np.zeros(2)).dtype == torch.float32
    assert to_tree(spaces.Box(0, 255, (2,), np.uint8), np.full(2, 200, np.uint8)).tolist() == [200, 200]
    assert to_tree(spaces.Box(0, 9, (1,), np.int16), np.array([7], np.int16)).dtype == torch.float32
    assert to_tree(spaces.Discrete(3, start=-1), -1).item() == 0
    assert to_tree(spaces.MultiDiscrete([2, 3], start=[5, -2]), np.array([6, 0])).tolist() == [1, 2]
    assert to_numpy(spaces.Discrete(3, start=-1), torch.tensor(2)) == 1
    assert to_numpy(spaces.MultiDiscrete([2, 3], start=[5, -2]), torch.tensor([1, 2])).tolist() == [6, 0]


def test_observations_have_memory_of_their_own() -> None:
    value = np.zeros(2, np.float32)
    got = to_tree(spaces.Box(-1, 1, (2,)), value)
    value[:] = 1
    assert got.tolist() == [0, 0]


def test_not_finite_observations_pass() -> None:
    got = to_tree(spaces.Box(-1, 1, (3,)), np.array([np.nan, np.inf, -5], np.float32))
    assert got.isnan().tolist() == [True, False, False] and got[1] == np.inf and got[2] == -5


def test_box_actions_are_clipped_to_each_bound() -> None:
    space = spaces.Box(np.array([-1, 0, -np.inf], np.float32), np.array([1, np.inf, 2], np.float32))
    action = torch.tensor([[-3.0, -1.0, -9.0], [3.0, 7.0, 9.0], [0.5, 0.25, 0.125]])
    assert to_numpy(space, action, (3,)).tolist() == [[-1, 0, -9], [1, 7, 2], [0.5, 0.25, 0.125]]


def test_clipping_respects_bounds_that_float32_cannot_hold() -> None:
    space = spaces.Box(-0.1, 0.1, (1,), np.float64)
    got = to_numpy(space, torch.tensor([[1.0], [-1.0], [0.1]]), (3,))
    assert got.dtype == np.float64 and all(space.contains(row) for row in got)


def test_integer_boxes_round_and_clip() -> None:
    space = spaces.Box(-2, 5, (1,), np.int32)
    got = to_numpy(space, torch.tensor([[-7.0], [1.6], [9.0]]), (3,))
    assert got.dtype == np.int32 and got.tolist() == [[-2], [2], [5]]
    pixels = to_numpy(spaces.Box(3, 250, (1,), np.uint8), torch.tensor([[-7.0], [255.7], [9.4], [np.nan]]), (4,))
    assert pixels.dtype == np.uint8 and pixels.tolist() == [[3], [250], [9], [3]]


def test_nan_actions_become_zero_within_the_bounds() -> None:
    nan = torch.full((1,), float("nan"))
    assert to_numpy(spaces.Box(-1, 1, (1,)), nan).tolist() == [0]
    assert to_numpy(spaces.Box(2, 3, (1,)), nan).tolist() == [2]
    assert to_numpy(spaces.Box(-np.inf, np.inf, (1,)), nan).tolist() == [0]


def test_actions_of_learners_and_gradients() -> None:
    """Any float dtype, on a graph or not."""
    action = torch.full((2, 3, 1), 0.5, dtype=torch.float64, requires_grad=True)
    assert to_numpy(spaces.Box(-1, 1, (1,)), action, (2, 3)).shape == (6, 1)


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.Box(-1, 1, (2,)), np.zeros((1, 2), np.float32)),
        (spaces.Box(-1, 1, (2,)), np.zeros((), np.float32)),
        (spaces.Box(-1, 1, (2,)), np.zeros(1, np.float32)),
        (spaces.Box(-1, 1, (2,)), [[1], [1, 2]]),
        (spaces.Box(-1, 1, (2,)), np.array(["a", "b"])),
        (spaces.Box(-1, 1, (2,)), np.zeros(2, np.complex64)),
        (spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.float32)),
        (spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.int64)),
        (spaces.Box(0, 255, (2,), np.int32), np.zeros(2, np.float64)),
        (spaces.Discrete(3), 1.0),
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3, start=1), 0),
        (spaces.Discrete(3), np.array([1])),
        (spaces.MultiDiscrete([2, 3]), np.array([2, 0])),
        (spaces.MultiBinary(2), np.array([0, 2])),
        (spaces.Dict(a=spaces.Discrete(2)), {"b": 0}),
        (spaces.Dict(a=spaces.Discrete(2)), 0),
        (spaces.Tuple([spaces.Discrete(2)] * 2), (0,)),
        (spaces.Dict(a=spaces.Box(-1, 1, (2,))), {"a": np.zeros(3, np.float32)}),
    ],
)
def test_observation_that_does_not_fit_is_refused(space: Any, value: Any) -> None:
    with pytest.raises(SpaceError, match="Toy-v0"):
        to_tree(space, value, source="environment 'Toy-v0'")


def test_message_says_what_was_given_and_expected() -> None:
    with pytest.raises(SpaceError) as error:
        to_tree(spaces.Dict(a=spaces.Box(-1, 1, (2,))), {"a": np.zeros(3, np.float64)}, source="environment 'Toy-v0'")
    for part in ("environment 'Toy-v0'", "'a'", "(3,)", "float64", "(2,)", "float32"):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [np.zeros(2, np.float64), [0, 1], (0.5, 1), np.zeros(2, np.int64), np.zeros(2, bool)])
def test_values_of_the_same_kind_are_taken(value: Any) -> None:
    """Environments that declare float32 and compute in float64 are common; only precision is lost."""
    assert to_tree(spaces.Box(-1, 1, (2,)), value).dtype == torch.float32


@pytest.mark.parametrize(
    ("space", "action", "match"),
    [
        (spaces.Discrete(3), torch.zeros(2, 1, dtype=torch.int64), "shape"),
        (spaces.Discrete(3), torch.zeros(1, dtype=torch.int64), "shape"),
        (spaces.Discrete(3), torch.zeros(2), "float32"),
        (spaces.Discrete(3), torch.tensor([0, 3]), "element 3"),
        (spaces.Discrete(3), torch.tensor([-1, 0]), "element -1"),
        (spaces.Box(-1, 1, (1,)), torch.zeros(2), "shape"),
        (spaces.MultiBinary(1), torch.tensor([[0], [2]]), "element 2"),
        (spaces.Dict(a=spaces.Discrete(2)), torch.zeros(2, dtype=torch.int64), "parts"),
        (spaces.Dict(a=spaces.Discrete(2)), {"b": torch.zeros(2, dtype=torch.int64)}, "parts"),
    ],
)
def test_action_that_does_not_fit_is_refused(space: Any, action: Any, match: str) -> None:
    with pytest.raises(SpaceError, match=match):
        to_numpy(space, action, (2,))


@pytest.mark.parametrize("role", ["observation", "action"])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_other_spaces_are_refused_with_advice(space: Any, role: str) -> None:
    for outer in (space, spaces.Dict(a=spaces.Tuple([space]))):
        with pytest.raises(SpaceError, match=rf"{role} space .*{type(space).__name__}.*not supported.*wrap"):
            check_space(outer, role)


@pytest.mark.parametrize(
    "space",
    [spaces.Dict(), spaces.Tuple([]), spaces.Dict({"a/b": spaces.Discrete(2)}), spaces.Dict({"": spaces.Discrete(2)})],
    ids=["empty dict", "empty tuple", "slash", "no name"],
)
def test_names_that_trees_cannot_have_are_refused(space: Any) -> None:
    with pytest.raises(SpaceError):
        check_space(space)


def test_keys_that_are_no_strings_are_refused() -> None:
    with pytest.raises(SpaceError, match="key 1"):
        check_space(spaces.Dict({1: spaces.Discrete(2)}))


class Mission(spaces.Text):
    """As MiniGrid's MissionSpace: a space of another package that extends Text."""


@pytest.mark.parametrize("role", ["observation", "action"])
def test_the_entry_that_is_not_supported_is_named_with_what_to_do(role: str) -> None:
    space = spaces.Dict(image=spaces.Box(0, 255, (7, 7, 3), np.uint8), mission=Mission(9))
    with pytest.raises(SpaceError) as error:
        check_space(space, role)
    said = str(error.value)
    assert said.startswith(f"the entry 'mission' of the {role} space") and "is a Mission (a Text), which is not" in said
    assert said.endswith("or gymnasium.wrappers.FilterObservation to leave 'mission' out")
    with pytest.raises(SpaceError, match=r"the entry 'more/1' of the observation space .*is a Graph"):
        check_space(spaces.Dict(more=spaces.Tuple([spaces.Discrete(2), spaces.Graph(spaces.Discrete(2), None)])))
    with pytest.raises(SpaceError, match="the entry 'a' of the observation space has the key 'x/y'"):
        check_space(spaces.Dict(a=spaces.Dict({"x/y": spaces.Discrete(2)})))


def _filled(names: list[str]) -> spaces.Dict:
    """A Dict whose entries stand in this order."""
    parts = {
        "zeta": spaces.Box(-1, 1, (2,)),
        "alpha": spaces.Dict(**{name: spaces.Discrete(3) for name in (names[0], names[-1])}),
        "mid": spaces.Discrete(4),
    }
    made = spaces.Dict(**{name: parts[name] for name in names})
    assert list(made.spaces) == names
    return made


def test_the_order_in_which_a_dict_was_filled_does_not_matter() -> None:
    one, other = _filled(["zeta", "mid", "alpha"]), _filled(["alpha", "mid", "zeta"])
    assert one == other
    first, second = Layout(one), Layout(other)
    names = ["alpha/alpha", "alpha/zeta", "mid", "zeta"]
    assert [leaf.name for leaf in first.leaves] == names == [leaf.name for leaf in second.leaves]
    assert first.signature == second.signature
    one.seed(0)
    value = one.sample()
    turned = {name: value[name] for name in reversed(value)}
    _same(to_tree(one, value), to_tree(other, turned))
    assert list(tree.flatten(to_tree(one, value))) == names
    back = to_numpy(one, to_tree(other, turned))
    assert one.contains(back) and other.contains(back) and back["mid"] == value["mid"]
    assert np.array_equal(back["zeta"], value["zeta"]) and back["alpha"] == value["alpha"]


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.int64, -(2**63), 2**63 - 1),
        (np.int64, -(2**62) - 1, 2**62 + 1),
        (np.uint64, 0, 2**64 - 1),
        (np.int32, -(2**31), 2**31 - 1),
        (np.uint8, 3, 250),
        (np.int8, -128, 127),
    ],
)
def test_whole_numbers_reach_bounds_that_no_float_holds(dtype: Any, low: int, high: int) -> None:
    space = spaces.Box(low, high, (4,), dtype)
    got = to_numpy(space, torch.tensor([-1e30, 1e30, torch.inf, 7.0]))
    assert got.dtype == dtype and space.contains(got) and [int(x) for x in got] == [low, high, high, 7]


def test_half_infinite_bounds_of_every_dtype_clip_one_side() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        for low, high, expected in ((-np.inf, 2, [-9, 2]), (-2, np.inf, [-2, 9]), (-np.inf, np.inf, [-9, 9])):
            space = spaces.Box(low, high, (2,), dtype)
            got = to_numpy(space, torch.tensor([-9.0, 9.0]))
            assert got.dtype == dtype and space.contains(got) and got.tolist() == expected


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (spaces.Discrete(3, start=1), torch.tensor([[0, 2]]), [1, 3]),
        (spaces.Discrete(3, start=-5), torch.tensor([[0, 2]]), [-5, -3]),
        (spaces.Discrete(3, dtype=np.uint8), torch.tensor([[0, 2]]), [0, 2]),
        (spaces.MultiBinary(2), torch.tensor([[[0, 1], [1, 1]]]), [[0, 1], [1, 1]]),
        (spaces.MultiBinary((2, 1)), torch.tensor([[[[0], [1]], [[1], [1]]]]), [[[0], [1]], [[1], [1]]]),
        (spaces.MultiDiscrete([[2], [3]], start=[[1], [-1]]), torch.tensor([[[[0], [1]], [[1], [2]]]]),
         [[[1], [0]], [[2], [1]]]),
        (spaces.Box(-1, 1, ()), torch.tensor([[0.5, 9.0]]), [0.5, 1.0]),
    ],
)  # fmt: skip
def test_every_row_of_an_action_is_in_the_space(space: Any, action: torch.Tensor, expected: Any) -> None:
    layout = Layout(space, "action")
    rows = layout.rows(layout.to_env_actions(layout.to_stored_actions(action, (1, 2))))
    assert all(space.contains(row) for row in rows)
    assert [np.asarray(row).tolist() for row in rows] == expected
    assert batch_space(space, 2).contains(to_numpy(space, action, (1, 2)))


@given(space=supported, seed=seeds)
def test_what_is_written_row_by_row_is_what_is_read(space: Any, seed: int) -> None:
    """Whatever form a value has: the space's own, a list, another dtype of the same kind."""
    space.seed(seed)
    layout = Layout(space)
    buffers, values = layout.empty(3), [space.sample() for _ in range(3)]
    write = layout.writer(buffers, "it")
    for row, value in enumerate(values):
        write(row, value)
    for row, value in enumerate(values):
        _same(layout.tree([buffer[row : row + 1] for buffer in buffers], ()), _expected(space, value))


@pytest.mark.parametrize("value", [[0.5, 1], np.array([0.5, 1]), np.array([0.5, 1], np.float16), (0.5, 1)])
def test_a_box_is_written_from_everything_of_its_kind(value: Any) -> None:
    layout = Layout(spaces.Box(-1, 1, (2,)))
    buffers = layout.empty(1)
    layout.writer(buffers, "it")(0, value)
    assert buffers[0].tolist() == [[0.5, 1.0]] and buffers[0].dtype == np.float32


@pytest.mark.parametrize("value", [np.zeros(1, np.float32), np.zeros(3, np.float32), np.zeros((1, 2)), 0.0, "ab"])
def test_a_box_is_not_written_from_another_shape(value: Any) -> None:
    layout = Layout(spaces.Box(-1, 1, (2,)))
    with pytest.raises(SpaceError, match="it gave an observation"):
        layout.writer(layout.empty(1), "it")(0, value)


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (spaces.Discrete(256), np.uint8),
        (spaces.Discrete(257), np.int64),
        (spaces.Discrete(2, start=1000), np.uint8),  # counted from 0
        (spaces.MultiDiscrete([2, 256]), np.uint8),
        (spaces.MultiDiscrete([2, 257]), np.int64),
        (spaces.MultiBinary(3), np.uint8),
        (spaces.Box(0, 1, (2,)), np.float32),
        (spaces.Box(0, 1, (2,), np.uint8), np.uint8),
    ],
)
def test_logs_of_actions_take_as_little_room_as_they_can(space: Any, dtype: Any) -> None:
    assert Layout(space, "action").leaves[0].log_dtype == dtype


PARTS = spaces.Dict({"a": spaces.Box(0, 1, (2,)), "b": spaces.Discrete(3)})


@pytest.mark.parametrize(
    ("space", "value", "reason"),
    [
        (
            spaces.Box(-1, 1, (2,)),
            np.zeros(3),
            r"observation to act on has the shape \[3\] and dtype float64",
        ),
        (
            spaces.Box(-1, 1, (2,)),
            np.zeros((1, 2, 2)),
            r"\[1, 2, 2\] .* expected \[2\], or \[B, 2\] for a batch",
        ),
        (spaces.Box(-1, 1, (2,)), np.zeros(2, complex), "dtype complex128"),
        (spaces.Box(-1, 1, (2,)), [[0.0], [0.0, 1.0]], "dtype object"),
        (spaces.Box(-1, 1, (2,)), "left", "dtype <U4"),
        (spaces.Discrete(3), 1.0, "dtype float64"),
        (PARTS, {"a": np.zeros(3), "b": 1}, r"the observation at 'a' to act on has the shape \[3\]"),
        (PARTS, {"a": np.zeros((4, 2)), "b": np.zeros(3, int)}, "have batches of"),
        (PARTS, {"a": np.zeros(2)}, "the caller gave an observation without 'b'"),
    ],
)
def test_what_a_caller_cannot_act_on_is_the_callers(space: Any, value: Any, reason: str) -> None:
    with pytest.raises(SpaceError, match=reason) as caught:
        batch_size(space, value)
    assert "correct the environment" not in str(caught.value)


def test_the_size_of_a_batch_is_that_of_every_part() -> None:
    assert batch_size(PARTS, {"a": np.zeros((4, 2)), "b": np.zeros(4, int)}) == 4
    assert batch_size(PARTS, {"a": np.array([0, 7], np.uint8), "b": 1}) is None, "an environment may show these, too"
