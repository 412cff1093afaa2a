from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.axes import align, masked_mean

# --- axes ---


def test_align_appends_axes() -> None:
    x = torch.zeros(2, 3, 4, 5)
    for axes in range(1, 5):
        setting = torch.randn(x.shape[:axes])
        aligned = align(setting, x)
        assert aligned.shape == setting.shape + (1,) * (4 - axes)
        assert torch.equal(aligned.flatten(), setting.flatten())
    assert align(0.5, x) == 0.5
    assert align(torch.tensor(0.5), x).item() == 0.5


def test_align_puts_settings_on_learners_where_sizes_hide_it() -> None:
    x = torch.ones(3, 3, 3)
    scaled = x * align(torch.tensor([1.0, 2.0, 3.0]), x)
    assert [scaled[s].unique().item() for s in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1,), (2, 1), (2, 3, 4, 1)])
def test_align_refuses_what_is_no_prefix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not a prefix of the data's shape \(2, 3, 4\)"):
        align(torch.zeros(shape), torch.zeros(2, 3, 4))


def test_masked_mean() -> None:
    x = torch.tensor([[1.0, 2, 6], [1, 2, 6]])
    assert masked_mean(x).tolist() == [3, 3]
    assert masked_mean(x, axes=2).item() == 3
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(x.where(valid, math.nan), valid).tolist() == [1.5, 0]
    assert masked_mean(x, valid, axes=2).item() == 1.5
    assert masked_mean(x, torch.tensor([[2.0, 0, 2], [1, 1, 1]])).tolist() == [3.5, 3]
    assert masked_mean(x, torch.tensor([[0.25, 0.25, 0], [0, 0, 0.5]])).tolist() == [1.5, 6]  # weights below 1
    with pytest.raises(ValueError, match="valid has shape"):
        masked_mean(x, valid[:, :1])


def test_masked_mean_gives_no_gradient_to_what_it_leaves_out() -> None:
    x = torch.tensor([1.0, math.inf, 3.0], requires_grad=True)
    masked_mean(x, torch.tensor([True, False, True])).backward()
    assert x.grad.tolist() == [0.5, 0, 0.5]


# --- tree ---


def test_tree_map_leaves_flatten() -> None:
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    nested = {"x": {"y": a, "z": b}, "w": c}
    assert [leaf.item() for leaf in tree.leaves(nested)] == [2, 0, 1]
    assert tree.flatten(nested) == {"x/y": a, "x/z": b, "w": c}
    assert list(tree.flatten({**nested, "a": {}, "x": {"z": b, "y": a}})) == ["w", "x/y", "x/z"]
    assert tree.unflatten(tree.flatten(nested)) == nested
    assert tree.unflatten(tree.flatten(a)) is a
    added = tree.map(lambda x, y, z: x + 10 * y + z, nested, nested, nested)
    assert added == {"x": {"y": 0, "z": 12}, "w": 24}
    assert tree.map(lambda x: x + 1, a) == 1


def test_trees_are_paired_by_name() -> None:
    first, second = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 30, "c": 20}, "a": 10}
    assert list(tree.leaves(first)) == [1, 2, 3] and list(tree.leaves(second)) == [10, 20, 30]
    assert tree.map(lambda x, y: x + y, first, second) == {"a": 11, "b": {"c": 22, "d": 33}}
    rebuilt = tree.rebuild(second, iter([4, 5, 6]))
    assert rebuilt == {"a": 4, "b": {"c": 5, "d": 6}} and list(rebuilt) == ["b", "a"]


@pytest.mark.parametrize(
    "other, message",
    [
        ({"a": 1}, "the second lacks b"),
        ({"a": 1, "b": {"c": 2}, "e": 4, "f": 5}, "the first lacks e, f"),
        ({"a": 1, "x": 2}, "the second lacks b; the first lacks x"),
        ({"a": 1, "b": 2}, "a dictionary against int"),
        ({"a": {}, "b": {"c": 1}}, "int against a dictionary"),
        (7, "a dictionary against int"),
    ],
)
def test_trees_with_other_names_are_refused(other: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tree.map(lambda x, y: x, {"a": 1, "b": {"c": 2}}, other)


# --- random: which numbers ---

KEYS = random.make_keys(range(64))


def test_numbers_are_a_function_of_key_stream_and_counter() -> None:
    expected = random.uniform(KEYS, "policy", 3, (5,))
    assert torch.equal(random.uniform(KEYS, "policy", 3, (5,)), expected)
    for other in (
        random.uniform(KEYS + 1, "policy", 3, (5,)),
        random.uniform(KEYS, "polic", 3, (5,)),
        random.uniform(KEYS, "policy", 4, (5,)),
        random.uniform(random.fold(KEYS, 0), "policy", 3, (5,)),
    ):
        assert not (other == expected).any()


def test_numbers_stay_the_same_for_ever() -> None:
    """Golden values: saved runs resume, and published runs repeat, only with the same random numbers."""
    drawn = random.bits(random.make_keys([0, -3]), "policy", torch.tensor([0, 5]), (2,))
    assert drawn[0].tolist() == [reference(0, "policy", 0, i) for i in (1, 2)]
    assert drawn[1].tolist() == [reference(-3, "policy", 5, i) for i in (1, 2)]


def reference(seed: int, stream: str, counter: int, index: int) -> int:
    """Reference implementation of SplitMix64 in unbounded Python integers."""
    wrap = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((seed * golden + 1) & wrap)
    for data in (zlib.crc32(stream.encode()) | (len(stream) << 32), counter):
        key = mix((key + mix((data * golden + 2) & wrap)) & wrap)
    drawn = mix((key + index * golden) & wrap)
    return drawn - (1 << 64) if drawn >> 63 else drawn


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.integers(0, 2**40))
def test_a_learners_numbers_do_not_depend_on_its_company(seeds: list[int], counter: int) -> None:
    keys = random.make_keys(seeds)
    draws = {
        "bits": lambda key: random.bits(key, "a", counter, (2, 3)),
        "uniform": lambda key: random.uniform(key, "a", counter, (2, 3)),
        "normal": lambda key: random.normal(key, "a", counter, (2, 3)),
        "gumbel": lambda key: random.gumbel(key, "a", counter, ()),
        "integers": lambda key: random.integers(key, "a", counter, (4,), 7),
        "permutation": lambda key: random.permutation(key, "a", counter, 5),
        "fold": lambda key: random.fold(random.fold(key, "name"), counter),
    }
    for draw in draws.values():
        together = draw(keys)
        for i, seed in enumerate(seeds):
            assert torch.equal(together[i], draw(random.make_keys([seed])[0]))
            assert torch.equal(together[i], draw(keys.reshape(-1, 1))[i, 0])


def test_every_learner_has_its_own_counter() -> None:
    counter = torch.arange(64)
    together = random.bits(KEYS, "a", counter, (3,))
    for i in range(64):
        assert torch.equal(together[i], random.bits(KEYS[i], "a", i, (3,)))


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    assert torch.equal(random.bits(KEYS, "a", 0, (3,)), random.bits(KEYS, "a", 0, (4, 5)).flatten(-2)[:, :3])


def test_no_two_keys_streams_counters_or_positions_share_a_number() -> None:
    streams = ["policy", "environment", "minibatch", "dropout", "evaluation"]
    drawn = [random.bits(KEYS, stream, counter, (50,)) for stream, counter in itertools.product(streams, range(20))]
    everything = torch.stack(drawn).flatten()
    assert everything.unique().numel() == everything.numel()


def test_folded_keys_are_distinct() -> None:
    """Environment seeds: keys of every (seed, row, episode) differ, and those of nearby seeds of either sign."""
    rows = random.fold(KEYS.unsqueeze(-1), torch.arange(50))
    episodes = random.fold(rows.unsqueeze(-1), torch.arange(50))
    assert episodes.shape == (64, 50, 50)
    assert episodes.unique().numel() == episodes.numel()
    assert torch.equal(episodes[3, 4, 5], random.fold(random.fold(KEYS[3], 4), 5))
    swapped = random.fold(random.fold(KEYS, 1), 2) == random.fold(random.fold(KEYS, 2), 1)
    assert not swapped.any()
    names = torch.stack([random.fold(KEYS, name) for name in ("a", "b", "ab", "ba", "")])
    assert names.unique().numel() == names.numel()
    assert random.make_keys(range(-5000, 5000)).unique().numel() == 10_000


# --- random: how they are distributed; seeds are fixed, so that a p-value is met once and for all ---


def draws(kind: str) -> dict[str, Tensor]:
    """Many random numbers, varied along one axis at a time: positions, counters, seeds, streams, folds."""
    draw = getattr(random, kind)
    key, count = random.make_keys([7])[0], 40_000
    many = random.make_keys(range(count))
    return {
        "positions": draw(key, "a", 0, (count,)),
        "counters": draw(key.expand(count), "a", torch.arange(count), ()),
        "seeds": draw(many, "a", 0, ()),
        "streams": torch.cat([draw(key, f"stream-{i}", 0, (200,)) for i in range(200)]),
        "folds": draw(random.fold(key, torch.arange(count)), "a", 0, ()),
    }


@pytest.mark.parametrize("axis", ["positions", "counters", "seeds", "streams", "folds"])
def test_distributions(axis: str) -> None:
    for kind, reference_law in (("uniform", "uniform"), ("normal", "norm"), ("gumbel", "gumbel_r")):
        sample = draws(kind)[axis].double().numpy()
        assert scipy.stats.kstest(sample, reference_law).pvalue > 1e-3, kind
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("axis", ["positions", "counters", "seeds", "streams", "folds"])
def test_every_bit_is_fair_and_none_follows_another(axis: str) -> None:
    integer = draws("bits")[axis].numpy().view(np.uint64)
    table = ((integer[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).astype(float) * 2 - 1
    bound = 5 / math.sqrt(len(table))  # five standard deviations
    assert np.abs(table.mean(0)).max() < bound
    assert np.abs(table.T @ table / len(table) - np.eye(64)).max() < bound
    assert np.abs(table[1:].T @ table[:-1] / len(table)).max() < bound


def test_one_flipped_bit_of_a_key_flips_half_the_output() -> None:
    key = random.make_keys(range(1000))
    before = random.bits(key, "a", 0, ())
    for position in range(64):
        flip = torch.tensor(1 << position if position < 63 else -(1 << 63))
        changed = (before ^ random.bits(key ^ flip, "a", 0, ())).numpy().view(np.uint64)
        flipped = np.unpackbits(changed.view(np.uint8)).sum() / 1000
        assert abs(flipped - 32) < 5 * 4 / math.sqrt(1000)  # five standard deviations


def test_streams_and_learners_are_independent() -> None:
    """Chi-squared test of independence on the joint 16 x 16 table of two sources."""
    key, n = random.make_keys([1, 2]), 40_000
    policy, environment = (random.uniform(key, stream, 0, (n,)) for stream in ("policy", "environment"))
    for a, b in ((policy[0], environment[0]), (policy[0], policy[1]), (policy[0], environment[1])):
        table = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256).reshape(16, 16)
        assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 23), (torch.float64, 52)])
def test_uniform_numbers_lie_in_the_open_interval(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, precision: int
) -> None:
    """At both ends of the generator's range, where a log or the inverse normal would be infinite."""
    ends = torch.tensor([0, -1])
    monkeypatch.setattr(random, "bits", lambda *_: ends)
    low, high = random.uniform(KEYS, "a", 0, (), dtype).tolist()
    assert low == 2.0 ** -(precision + 1)
    assert high == 1 - 2.0 ** -(precision + 1)
    assert random.normal(KEYS, "a", 0, (), dtype).isfinite().all()
    assert random.gumbel(KEYS, "a", 0, (), dtype).isfinite().all()
    for n in (1, 3, 10, 2**31 - 1, 2**40 + 1):
        assert random.integers(KEYS, "a", 0, (), n).tolist() == [0, n - 1]


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_uniform_numbers_of_half_precision_never_round_to_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, precision: int
) -> None:
    steps = torch.arange(2**precision) << (64 - precision)
    monkeypatch.setattr(random, "bits", lambda *_: steps | ((1 << (64 - precision)) - 1))
    drawn = random.uniform(KEYS, "a", 0, (), dtype)
    assert drawn.dtype == dtype
    assert drawn.double().tolist() == [(i + 0.5) / 2**precision for i in range(2**precision)]


def test_nothing_stays_behind_from_an_export_or_a_mode() -> None:
    """A cached tensor would be fake, or of inference mode, for all later draws of as many numbers."""
    shape = (7, 13)  # drawn by no other test

    class Draws(torch.nn.Module):
        def forward(self, key: Tensor) -> Tensor:
            return random.uniform(key, "a", 0, shape)

    program = torch.export.export(Draws(), (KEYS,))
    with torch.inference_mode():
        inferred = random.uniform(KEYS, "a", 0, shape)
    drawn = random.uniform(KEYS, "a", 0, shape)
    assert type(drawn) is Tensor and not drawn.is_inference() and not torch._is_functional_tensor(drawn)
    assert torch.equal(drawn, inferred)
    assert torch.equal(program.module()(KEYS), drawn)


def test_keys_of_seeds_that_are_no_integers_are_refused() -> None:
    """A real number would be truncated, so that 0.5 and 0.7 were the same seed; a bool is no number."""
    from rlmeta.errors import SettingError

    strange: list[tuple[object, str]] = [
        ([0.5, 0.7], "0.5 is of type float"),
        (np.array([0.5]), "0.5 is of type float"),
        (torch.tensor([0.0]), "0.0 is of type float"),
        ([True], "True is of type bool"),
        (np.array([True]), "True is of type bool"),
        (["1"], "'1' is of type str"),
        ([None], "None is of type NoneType"),
        ([[0]], r"\[0\] is of type list"),
        ([2**63], "does not fit 64 bits"),
        ([-(2**63) - 1], "does not fit 64 bits"),
        (3, "expected several integers"),
        (torch.tensor(3), "expected several integers"),
    ]
    for seeds, message in strange:
        with pytest.raises(SettingError, match=message):
            random.make_keys(seeds)


def test_equal_seeds_have_equal_keys_and_others_do_not() -> None:
    seeds = [-(2**63), -1, 0, 1, 2**32, 2**62, 2**63 - 1]
    keys = random.make_keys(seeds)
    assert len(keys.unique()) == len(seeds)
    for same in (np.array(seeds), torch.tensor(seeds), tuple(seeds), [np.int64(seed) for seed in seeds]):
        assert torch.equal(random.make_keys(same), keys)
    assert torch.equal(random.make_keys([1, 1]), keys[3].expand(2))
    assert torch.equal(random.make_keys(np.arange(4)), random.make_keys(range(4)))
    assert torch.equal(random.make_keys(torch.arange(4, dtype=torch.uint8)), random.make_keys(range(4)))


def test_what_sets_a_key_apart_is_not_cut() -> None:
    from rlmeta.errors import SettingError

    key = random.make_keys([0])
    for data in (0.5, torch.tensor(0.5), None):
        with pytest.raises(SettingError, match="integers or a name"):
            random.fold(key, data)
    with pytest.raises(SettingError, match=r"key has dtype torch\.int32"):
        random.fold(key.to(torch.int32), 1)
    assert torch.equal(random.fold(key, np.int64(5)), random.fold(key, 5))
    assert torch.equal(random.fold(key, torch.tensor(5)), random.fold(key, 5))


def test_integers_are_uniform() -> None:
    drawn = random.integers(KEYS[0], "a", 0, (60_000,), 6)
    assert drawn.dtype == torch.int64
    assert scipy.stats.chisquare(torch.bincount(drawn, minlength=6).numpy()).pvalue > 1e-3
    high = torch.tensor([1, 2, 5])
    per_entry = random.integers(KEYS[0], "a", 0, (1000, 3), high)
    assert per_entry.amax(0).tolist() == [0, 1, 4]
    assert per_entry.amin(0).tolist() == [0, 0, 0]


def test_gumbel_argmax_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    choice = (logits + random.gumbel(KEYS[0], "a", 0, (40_000, 4))).argmax(-1)
    expected = logits.softmax(0).double().numpy() * 40_000
    assert scipy.stats.chisquare(torch.bincount(choice).numpy(), expected * 40_000 / expected.sum()).pvalue > 1e-3


@given(st.integers(0, 40), st.integers(0, 2**40))
def test_permutations_are_permutations(n: int, counter: int) -> None:
    drawn = random.permutation(KEYS, "a", counter, n)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn.sort(-1).values, torch.arange(n).expand(64, n))


def test_permutations_are_uniform() -> None:
    drawn = random.permutation(random.make_keys(range(24_000)), "a", 0, 4)
    code = (drawn * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = code.unique(return_counts=True)[1].numpy()
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
