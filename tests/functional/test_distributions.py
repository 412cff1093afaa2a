from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as td
from torch.distributions.kl import kl_divergence

from rlmeta.functional import distributions as D
from rlmeta.functional.random import fold, make_keys

SHAPES = [(4,), (3, 4), (3, 3, 3), (2, 5, 4, 3)]  # the third with S = N = A, where a misaligned broadcast hides
SIZES = (3, 2, 4)


def randn(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def assert_equal_with_gradients(ours, reference, *params: Tensor) -> None:
    """Equal values, and equal gradients of a random weighting of them."""
    params = tuple(p.detach().requires_grad_() for p in params)
    value, expected = ours(*params), reference(*params)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    weights = randn(*value.shape, seed=99)
    grads = torch.autograd.grad((value * weights).sum(), params, allow_unused=True, materialize_grads=True)
    expected_grads = torch.autograd.grad((expected * weights).sum(), params, allow_unused=True, materialize_grads=True)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)


def independent(distribution: td.Distribution) -> td.Independent:
    return td.Independent(distribution, 1)


# --------------------------------------------------------------------------------------------------------- categorical


@pytest.mark.parametrize("shape", SHAPES)
def test_categorical_equals_torch(shape: tuple[int, ...]) -> None:
    logits, other = randn(*shape), randn(*shape, seed=1)
    action = td.Categorical(logits=logits).sample()
    assert_equal_with_gradients(
        lambda x: D.categorical_log_prob(x, action), lambda x: td.Categorical(logits=x).log_prob(action), logits
    )
    assert_equal_with_gradients(D.categorical_entropy, lambda x: td.Categorical(logits=x).entropy(), logits)
    assert_equal_with_gradients(
        D.categorical_kl,
        lambda p, q: kl_divergence(td.Categorical(logits=p), td.Categorical(logits=q)),
        logits,
        other,
    )
    assert torch.equal(D.categorical_mode(logits), td.Categorical(logits=logits).mode)


def test_categorical_entropy_and_kl_by_hand() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log() + 7.0  # unnormalised
    uniform = torch.zeros(3, dtype=torch.float64)
    assert D.categorical_entropy(logits).item() == pytest.approx(1.5 * math.log(2))
    assert D.categorical_kl(logits, uniform).item() == pytest.approx(math.log(3) - 1.5 * math.log(2))
    assert D.categorical_kl(uniform, logits).item() == pytest.approx(math.log(2) * 5 / 3 - math.log(3))


def test_categorical_log_prob_survives_extreme_logits() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    value = D.categorical_log_prob(logits, torch.tensor([1, 1]))
    assert value.tolist() == [-1e4, 0.0]
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_categorical_refuses_mismatching_actions() -> None:
    logits = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"action has shape \(5, 1\), expected \(5,\)"):
        D.categorical_log_prob(logits, torch.zeros(5, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected integers"):
        D.categorical_log_prob(logits, torch.zeros(5))
    with pytest.raises(ValueError, match=r"logits_q has shape \(1, 3\)"):
        D.categorical_kl(logits, torch.zeros(1, 3))


def test_categorical_accepts_small_integers() -> None:
    logits = randn(5, 3)
    action = torch.tensor([0, 2, 1, 1, 0])
    assert torch.equal(D.categorical_log_prob(logits, action.to(torch.uint8)), D.categorical_log_prob(logits, action))


def assert_frequencies(sample: Tensor, probabilities: Tensor) -> None:
    """Chi-squared test at about 1e-4 (Wilson and Hilferty's normal approximation); the draws are seeded."""
    counts = torch.bincount(sample.flatten(), minlength=len(probabilities)).double()
    expected = probabilities * sample.numel()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts - expected)[kept].square() / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.7, f"chi-squared {statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_categorical_samples_have_the_right_frequencies(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -3.0], [3.0, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    sample = D.categorical_sample(logits[:, None].expand(2, 100_000, 5), make_keys([3, 4]))
    assert sample.shape == (2, 100_000) and sample.dtype == torch.int64
    for row, probabilities in zip(sample, logits.double().softmax(-1)):
        assert_frequencies(row, probabilities)


def test_samples_along_the_batch_are_independent() -> None:
    sample = D.categorical_sample(torch.zeros(4, 20_000, 2), make_keys(range(4))).double() - 0.5
    correlation = 4 * torch.cat([(sample[:, :-1] * sample[:, 1:]).mean(-1), (sample[:-1] * sample[1:]).mean(-1)])
    assert correlation.abs().max() < 4.5 / math.sqrt(20_000)


SAMPLERS = {
    "categorical": D.categorical_sample,
    "multi_discrete": lambda x, key: D.multi_discrete_sample(x, SIZES, key),
    "bernoulli": D.bernoulli_sample,
    "normal": lambda x, key: D.normal_sample(x, -x, key),
    "tanh_normal": lambda x, key: D.tanh_normal_sample(x, -x, key),
    "tanh_normal_with_log_prob": lambda x, key: torch.cat(
        [out.flatten(key.dim()) for out in D.tanh_normal_sample_log_prob(x, -x, key)], -1
    ),
    "tanh_normal_entropy": lambda x, key: D.tanh_normal_entropy(x, -x, key),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_a_learner_ignore_the_other_learners(name: str) -> None:
    sampler = SAMPLERS[name]
    logits, key = randn(9, 9, 9), make_keys(range(9))  # S = N = A
    together = sampler(logits, key)
    for learner in range(9):
        assert torch.equal(together[learner], sampler(logits[learner], key[learner])), "`*L = ()` differs from a row"
    shuffled = torch.tensor([4, 0, 8, 2, 2, 7])
    assert torch.equal(sampler(logits[shuffled], key[shuffled]), together[shuffled])
    grid = sampler(logits.reshape(3, 3, 9, 9), key.reshape(3, 3))
    assert torch.equal(grid.reshape(together.shape), together)
    assert torch.equal(sampler(logits, key), together)
    other = sampler(logits, fold(key, 1))
    assert not any(torch.equal(other[i], together[i]) for i in range(9)), "the key changes nothing"


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_refuse_a_key_of_other_learners(name: str) -> None:
    with pytest.raises(ValueError, match=r"key has learner axes \(4,\)"):
        SAMPLERS[name](randn(3, 9), make_keys(range(4)))


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_logits_equal_the_smaller_distribution(dtype: torch.dtype) -> None:
    logits = randn(6, 5).to(dtype)
    mask = torch.tensor([True, False, True, True, False]).expand(6, 5)
    masked, small = D.mask_logits(logits, mask), logits[:, [0, 2, 3]]
    action = torch.tensor([0, 2, 3, 3, 2, 0])
    position = torch.tensor([0, 1, 2, 2, 1, 0])
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(D.categorical_log_prob(masked, action), D.categorical_log_prob(small, position), **close)
    torch.testing.assert_close(D.categorical_entropy(masked), D.categorical_entropy(small), **close)
    reversed_masked = D.mask_logits(logits.flip(0), mask)
    torch.testing.assert_close(
        D.categorical_kl(masked, reversed_masked), D.categorical_kl(small, small.flip(0)), **close
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_actions_are_never_taken_and_get_no_gradient(dtype: torch.dtype) -> None:
    logits = randn(8, 2_000, 6).to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(8, 2_000, 6, generator=generator) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    masked = D.mask_logits(logits, mask)
    for action in (D.categorical_sample(masked, make_keys(range(8))), D.categorical_mode(masked)):
        assert mask.gather(-1, action.unsqueeze(-1)).all()
    loss = D.categorical_log_prob(masked, D.categorical_mode(masked)).sum() + D.categorical_entropy(masked).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()
    assert (masked.softmax(-1)[~mask] == 0).all()


def test_a_mask_beats_any_logit() -> None:
    masked = D.mask_logits(torch.tensor([[9e9, -9e9]]), torch.tensor([[False, True]]))
    assert D.categorical_log_prob(masked, torch.tensor([1])).item() == 0.0
    assert D.categorical_entropy(masked).item() == 0.0


def test_masked_samples_have_the_right_frequencies() -> None:
    mask = torch.tensor([True, False, True, True])
    logits = torch.tensor([0.0, 5.0, 1.0, -1.0])
    masked = D.mask_logits(logits, mask).expand(100_000, 4)
    probabilities = torch.where(mask, logits, -math.inf).double().softmax(-1)
    assert_frequencies(D.categorical_sample(masked, make_keys([0])[0]), probabilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_allowed_actions_stays_finite(dtype: torch.dtype) -> None:
    logits = randn(3, 4).to(dtype).requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    masked = D.mask_logits(logits, mask)
    action = torch.zeros(3, dtype=torch.int64)
    log_prob, entropy = D.categorical_log_prob(masked, action), D.categorical_entropy(masked)
    assert log_prob[1].item() == pytest.approx(-math.log(4)) and entropy[1].item() == pytest.approx(math.log(4))
    kl = D.categorical_kl(masked, D.mask_logits(logits.flip(1), mask))
    assert kl.isfinite().all() and kl[1] == 0
    (grad,) = torch.autograd.grad((log_prob + entropy + kl).sum(), logits)
    assert grad.isfinite().all() and (grad[1] == 0).all()
    assert D.categorical_sample(masked, make_keys([0])[0]).shape == (3,)


def test_mask_accepts_gymnasiums_int8_and_refuses_other_shapes() -> None:
    logits = randn(2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    assert torch.equal(D.mask_logits(logits, mask.to(torch.int8)), D.mask_logits(logits, mask.bool()))
    with pytest.raises(ValueError, match="mask has shape"):
        D.mask_logits(logits, mask[0])


# ------------------------------------------------------------------------------------------------------ multi-discrete


@pytest.mark.parametrize("sizes", [SIZES, (3, 3, 3), (5,)])
@pytest.mark.parametrize("batch", [(), (3,), (3, 3)])
def test_multi_discrete_equals_a_sum_of_categoricals(sizes: tuple[int, ...], batch: tuple[int, ...]) -> None:
    logits, other = randn(*batch, sum(sizes)), randn(*batch, sum(sizes), seed=1)

    def parts(x: Tensor) -> list[td.Categorical]:
        return [td.Categorical(logits=group) for group in x.split(sizes, -1)]

    action = torch.stack([part.sample() for part in parts(logits)], -1)
    assert_equal_with_gradients(
        lambda x: D.multi_discrete_log_prob(x, action, sizes),
        lambda x: sum(part.log_prob(a) for part, a in zip(parts(x), action.unbind(-1))),
        logits,
    )
    assert_equal_with_gradients(
        lambda x: D.multi_discrete_entropy(x, sizes), lambda x: sum(part.entropy() for part in parts(x)), logits
    )
    assert_equal_with_gradients(
        lambda p, q: D.multi_discrete_kl(p, q, sizes),
        lambda p, q: sum(kl_divergence(a, b) for a, b in zip(parts(p), parts(q))),
        logits,
        other,
    )
    expected_mode = torch.stack([part.mode for part in parts(logits)], -1)
    assert torch.equal(D.multi_discrete_mode(logits, sizes), expected_mode)


def test_multi_discrete_samples_have_the_right_joint_frequencies() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0, 2.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    sample = D.multi_discrete_sample(logits.expand(200_000, 9), SIZES, make_keys([1])[0])
    assert sample.shape == (200_000, 3) and sample.dtype == torch.int64
    a, b, c = (group.softmax(-1) for group in logits.split(SIZES))
    joint = (a[:, None, None] * b[None, :, None] * c[None, None, :]).flatten()
    assert_frequencies((sample[:, 0] * 2 + sample[:, 1]) * 4 + sample[:, 2], joint)


def test_multi_discrete_refuses_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="logits have 8 columns, expected 9"):
        D.multi_discrete_entropy(torch.zeros(2, 8), SIZES)
    with pytest.raises(ValueError, match=r"action has shape \(2, 2\), expected \(2, 3\)"):
        D.multi_discrete_log_prob(torch.zeros(2, 9), torch.zeros(2, 2, dtype=torch.int64), SIZES)


# ----------------------------------------------------------------------------------------------------------- bernoulli


@pytest.mark.parametrize("shape", SHAPES)
def test_bernoulli_equals_torch(shape: tuple[int, ...]) -> None:
    logits, other = randn(*shape), randn(*shape, seed=1)
    action = td.Bernoulli(logits=logits).sample()
    for kind in (torch.float64, torch.int64, torch.bool, torch.int8):
        assert_equal_with_gradients(
            lambda x, kind=kind: D.bernoulli_log_prob(x, action.to(kind)),
            lambda x: independent(td.Bernoulli(logits=x)).log_prob(action),
            logits,
        )
    assert_equal_with_gradients(D.bernoulli_entropy, lambda x: independent(td.Bernoulli(logits=x)).entropy(), logits)
    assert_equal_with_gradients(
        D.bernoulli_kl,
        lambda p, q: kl_divergence(independent(td.Bernoulli(logits=p)), independent(td.Bernoulli(logits=q))),
        logits,
        other,
    )
    assert torch.equal(D.bernoulli_mode(logits), (logits.sigmoid() > 0.5).long())


def test_bernoulli_samples_have_the_right_frequencies() -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    sample = D.bernoulli_sample(logits.expand(1, 100_000, 3), make_keys([2]))[0]
    assert sample.dtype == torch.int64
    p = logits.sigmoid()
    joint = torch.stack([p * 0 + 1 - p, p])  # [value, component]
    codes = (sample * torch.tensor([4, 2, 1])).sum(-1)
    probabilities = torch.stack(
        [joint[a, 0] * joint[b, 1] * joint[c, 2] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    )
    assert_frequencies(codes, probabilities)


def test_bernoulli_survives_extreme_logits() -> None:
    logits = torch.tensor([[200.0], [-200.0], [-200.0]], requires_grad=True)
    value = D.bernoulli_log_prob(logits, torch.tensor([[1], [0], [1]]))
    assert value.tolist() == [0.0, 0.0, -200.0]
    loss = (value + D.bernoulli_entropy(logits) + D.bernoulli_kl(logits, -logits)).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- normal


@pytest.mark.parametrize("shape", SHAPES)
def test_normal_equals_torch(shape: tuple[int, ...]) -> None:
    params = randn(*shape), randn(*shape, seed=1, scale=0.7), randn(*shape, seed=2), randn(*shape, seed=3, scale=0.7)
    action = randn(*shape, seed=4)
    assert_equal_with_gradients(
        D.normal_log_prob, lambda m, s, a: independent(td.Normal(m, s.exp())).log_prob(a), *params[:2], action
    )
    assert_equal_with_gradients(D.normal_entropy, lambda s: independent(td.Normal(0 * s, s.exp())).entropy(), params[1])
    assert_equal_with_gradients(
        D.normal_kl,
        lambda m, s, n, r: kl_divergence(independent(td.Normal(m, s.exp())), independent(td.Normal(n, r.exp()))),
        *params,
    )
    assert torch.equal(D.normal_mode(params[0]), params[0])


def test_normal_kl_of_nearly_equal_distributions_keeps_its_digits() -> None:
    mean, delta = torch.zeros(1), torch.full((1,), 1e-5)
    assert D.normal_kl(mean, delta, mean, mean).item() == pytest.approx(1e-10, rel=1e-2)  # δ² to second order


def test_normal_refuses_parameters_that_would_broadcast() -> None:
    """A state-independent log_std [S, A] against means [S, N, A] with S = N would pair learners with environments."""
    mean, log_std = torch.zeros(3, 3, 2), torch.zeros(3, 2)
    key = make_keys(range(3))
    for call in (
        lambda: D.normal_log_prob(mean, log_std, mean),
        lambda: D.normal_log_prob(mean, mean, log_std),
        lambda: D.normal_sample(mean, log_std, key),
        lambda: D.normal_kl(mean, mean, mean, log_std),
        lambda: D.tanh_normal_log_prob(mean, mean, log_std),
    ):
        with pytest.raises(ValueError, match=r"has shape \(3, 2\), expected \(3, 3, 2\)"):
            call()


def standard_normal_moments(x: Tensor) -> None:
    """First four moments of each column within 4.5 standard errors, and no correlation of columns."""
    n = x.shape[0]
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (x.pow(power).mean(0) - mean).abs().max() < 4.5 * math.sqrt(variance / n), f"moment {power}"
    correlation = (x.T @ x / n).fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_samples_have_the_right_moments(dtype: torch.dtype) -> None:
    mean = torch.tensor([1.0, -2.0, 0.0], dtype=dtype).expand(2, 100_000, 3)
    log_std = torch.tensor([0.5, -1.0, 0.0], dtype=dtype).expand(2, 100_000, 3)
    sample = D.normal_sample(mean, log_std, make_keys([0, 1]))
    assert sample.dtype == dtype
    for standard in (sample - mean) / log_std.exp():
        standard_normal_moments(standard.double())


def test_normal_samples_are_reparameterised() -> None:
    mean, log_std = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1).requires_grad_()
    sample = D.normal_sample(mean, log_std, make_keys([0, 1]))
    weights = randn(2, 3, 4, seed=2)
    by_mean, by_log_std = torch.autograd.grad((weights * sample).sum(), (mean, log_std))
    torch.testing.assert_close(by_mean, weights)
    torch.testing.assert_close(by_log_std, (weights * (sample - mean)).detach())


def test_half_precision_samples_are_finite() -> None:
    zeros = torch.zeros(1, 200_000, 1, dtype=torch.bfloat16)
    sample = D.normal_sample(zeros, zeros, make_keys([0]))
    assert sample.dtype == torch.bfloat16 and sample.isfinite().all()
    assert sample.float().std().item() == pytest.approx(1.0, abs=0.02)


# --------------------------------------------------------------------------------------------------------- tanh normal


def torch_tanh_normal(mean: Tensor, log_std: Tensor) -> td.Distribution:
    transform = td.transforms.TanhTransform(cache_size=0)
    return independent(td.TransformedDistribution(td.Normal(mean, log_std.exp()), [transform]))


@pytest.mark.parametrize("shape", SHAPES)
def test_tanh_normal_equals_torch(shape: tuple[int, ...]) -> None:
    mean, log_std = randn(*shape, scale=0.5), randn(*shape, seed=1, scale=0.5)
    pre_tanh = randn(*shape, seed=2)
    action = pre_tanh.tanh()

    def reference(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
        return torch_tanh_normal(mean, log_std).log_prob(action)

    assert_equal_with_gradients(D.tanh_normal_log_prob, reference, mean, log_std, action)
    assert_equal_with_gradients(
        D.tanh_normal_log_prob_pre_tanh, lambda m, s, u: reference(m, s, u.tanh()), mean, log_std, pre_tanh
    )
    assert torch.equal(D.tanh_normal_mode(mean), mean.tanh())


@given(st.floats(-300, 300))
def test_tanh_jacobian_is_exact_at_any_saturation(u: float) -> None:
    """Against log(1 − tanh² u) = log 4 − 2|u| − 2 log(1 + e^(−2|u|)), and its derivative −2 tanh u."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        zero = torch.zeros(1, dtype=dtype)
        pre_tanh = torch.tensor([u], dtype=dtype, requires_grad=True)
        jacobian = D.normal_log_prob(pre_tanh.detach(), zero, pre_tanh.detach()) - D.tanh_normal_log_prob_pre_tanh(
            pre_tanh, zero, pre_tanh
        )
        magnitude = abs(pre_tanh.item())
        expected = math.log(4) - 2 * magnitude - 2 * math.log1p(math.exp(-2 * magnitude))
        assert jacobian.item() == pytest.approx(expected, rel=10 * tolerance, abs=10 * tolerance)
        (slope,) = torch.autograd.grad(jacobian, pre_tanh)
        assert slope.item() == pytest.approx(-2 * math.tanh(pre_tanh.item()), abs=10 * tolerance)


def test_tanh_normal_density_integrates_to_one() -> None:
    mean, log_std = torch.full((1,), 0.4, dtype=torch.float64), torch.full((1,), -0.3, dtype=torch.float64)
    edges = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2)[:, None]
    density = D.tanh_normal_log_prob(mean.expand_as(middle), log_std.expand_as(middle), middle).exp()
    assert (density.sum() * 2 / 200_000).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_normal_log_prob_of_a_saturated_action_is_finite(dtype: torch.dtype) -> None:
    mean = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    log_std = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    value = D.tanh_normal_log_prob(mean, log_std, torch.tensor([[1.0], [-1.0]], dtype=dtype))
    grads = torch.autograd.grad(value.sum(), (mean, log_std))
    assert all(x.isfinite().all() for x in (value, *grads))
    inside = torch.tensor([[0.999], [-0.999]], dtype=dtype)  # actions that can be inverted are left alone
    torch.testing.assert_close(
        D.tanh_normal_log_prob(mean, log_std, inside),
        D.tanh_normal_log_prob_pre_tanh(mean, log_std, inside.atanh()),
        rtol=0,
        atol=0,
    )


def test_tanh_normal_samples_and_their_log_prob() -> None:
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(2, 50_000, 2)
    log_std = torch.tensor([0.5, -1.0], dtype=torch.float64).expand(2, 50_000, 2)
    key = make_keys([0, 1])
    action, log_prob = D.tanh_normal_sample_log_prob(mean, log_std, key)
    assert torch.equal(action, D.tanh_normal_sample(mean, log_std, key))
    assert action.abs().max() <= 1
    torch.testing.assert_close(log_prob, torch_tanh_normal(mean, log_std).log_prob(action), rtol=1e-6, atol=1e-6)
    for standard in (action.atanh() - mean) / log_std.exp():
        standard_normal_moments(standard)


def test_gradient_of_a_saturated_sac_loss_is_finite() -> None:
    mean = torch.full((2, 4, 1), 30.0, requires_grad=True)
    log_std = torch.full((2, 4, 1), 1.0, requires_grad=True)
    action, log_prob = D.tanh_normal_sample_log_prob(mean, log_std, make_keys([0, 1]))
    grads = torch.autograd.grad((log_prob - action.sum(-1)).sum(), (mean, log_std))
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[0], torch.full((2, 4, 1), 2.0))  # d/du of −log(1 − tanh² u), far out


def quadrature_entropy(mean: Tensor, log_std: Tensor) -> Tensor:
    u = torch.linspace(-15, 15, 60_001, dtype=torch.float64).reshape(-1, *(1,) * mean.dim())
    log_density = td.Normal(mean, log_std.exp()).log_prob(u)
    jacobian = math.log(4) - 2 * u.abs() - 2 * torch.log1p((-2 * u.abs()).exp())
    return (log_density.exp() * (jacobian - log_density)).sum(0).mul(30 / 60_000).sum(-1)


def test_tanh_normal_entropy_is_unbiased_as_is_its_gradient() -> None:
    n = 40_000
    mean = torch.tensor([0.7, -1.0], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([0.2, -0.5], dtype=torch.float64, requires_grad=True)
    estimates = D.tanh_normal_entropy(mean.expand(n, 2), log_std.expand(n, 2), make_keys([7])[0])
    expected = quadrature_entropy(mean, log_std)
    assert abs(estimates.mean() - expected) < 4.5 * estimates.std() / math.sqrt(n)
    grads = torch.autograd.grad(estimates.mean(), (mean, log_std))
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, (mean, log_std))):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0.03)


def test_tanh_normal_kl_equals_an_integral_over_actions() -> None:
    p = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)
    q = torch.tensor([-0.2], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    edges = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2)[:, None]
    log_p, log_q = (D.tanh_normal_log_prob(m.expand_as(middle), s.expand_as(middle), middle) for m, s in (p, q))
    integral = (log_p.exp() * (log_p - log_q)).sum() * 2 / 200_000
    assert D.tanh_normal_kl(*p, *q).item() == pytest.approx(integral.item(), abs=1e-6)


# ------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: D.categorical_log_prob(x, torch.tensor([0, 2, 1])),
        lambda x, y: D.categorical_entropy(x),
        D.categorical_kl,
        lambda x, y: D.bernoulli_log_prob(x, y > 0),
        D.bernoulli_kl,
        lambda x, y: D.normal_kl(x, y, y, x),
        lambda x, y: D.tanh_normal_log_prob(x, y, (x - y).tanh()),
        lambda x, y: D.tanh_normal_sample_log_prob(x, y, make_keys([0, 1, 2]))[1],
    ],
)
def test_functions_are_twice_differentiable(function) -> None:
    x, y = randn(3, 3, scale=0.5).requires_grad_(), randn(3, 3, seed=1, scale=0.5).requires_grad_()
    assert torch.autograd.gradgradcheck(function, (x, y))
