from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rlmeta.functional import losses
from rlmeta.functional.losses import (
    approx_kl,
    clipped_value_loss,
    double_q_target,
    entropy_loss,
    explained_variance,
    huber_error,
    huber_loss,
    normalise_advantage,
    policy_gradient_loss,
    ppo_clip_loss,
    ppo_kl_loss,
    q_target,
    soft_value,
    td_target,
    twice_differentiable_policy_gradient_loss,
    value_loss,
)

# name -> (function, how many tensors [*L, B] it takes first, whether a setting follows, whether it takes `valid`)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], int, bool, bool]] = {
    "policy_gradient_loss": (policy_gradient_loss, 2, False, True),
    "twice_differentiable_policy_gradient_loss": (twice_differentiable_policy_gradient_loss, 2, False, True),
    "ppo_clip_loss": (ppo_clip_loss, 3, True, True),
    "ppo_kl_loss": (ppo_kl_loss, 4, True, True),
    "entropy_loss": (entropy_loss, 1, False, True),
    "normalise_advantage": (normalise_advantage, 1, False, True),
    "approx_kl": (approx_kl, 2, False, True),
    "value_loss": (value_loss, 2, False, True),
    "clipped_value_loss": (clipped_value_loss, 3, True, True),
    "huber_loss": (huber_loss, 2, True, True),
    "huber_error": (huber_error, 2, True, False),
    "explained_variance": (explained_variance, 2, False, True),
    "td_target": (td_target, 3, False, False),
    "soft_value": (soft_value, 2, True, False),
}
MASKED = [name for name, (_, _, _, masked) in FUNCTIONS.items() if masked]


def data(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


def test_every_function_of_samples_is_in_the_table() -> None:
    own = {name for name, f in vars(losses).items() if getattr(f, "__module__", "") == losses.__name__}
    others = {"q_target", "double_q_target", "expected_soft_value", "cross_entropy_loss", "squared_loss"}
    assert {name for name in own if not name.startswith("_")} == FUNCTIONS.keys() | others


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("learners", [(4,), (2, 4), (4, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_batched_learners_equal_a_loop(name: str, learners: tuple[int, ...], masked: bool) -> None:
    """At S = B, where a misplaced axis would broadcast; values and gradients."""
    function, count, has_setting, takes_valid = FUNCTIONS[name]
    if masked and not takes_valid:
        return
    inputs = [x.requires_grad_() for x in data(count, *learners, 4)]
    size = torch.Size(learners).numel()
    setting = torch.linspace(0.1, 1.5, size, dtype=torch.float64).reshape(learners)
    valid = (torch.arange(4) < torch.arange(size).reshape(*learners, 1) % 5) if masked else None
    extra = {"valid": valid} if takes_valid else {}
    result = function(*inputs, *([setting] if has_setting else []), **extra)
    gradients = torch.autograd.grad(result.nan_to_num().sum(), inputs)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in learners)).reshape(-1, len(learners)).tolist():
        at = tuple(index)
        alone = [x.detach()[at].requires_grad_() for x in inputs]
        extra = {"valid": None if valid is None else valid[at]} if takes_valid else {}
        expected = function(*alone, *([setting[at].item()] if has_setting else []), **extra)
        torch.testing.assert_close(result[at], expected, equal_nan=True)
        if not expected.isnan().any():
            for batched, single in zip(gradients, torch.autograd.grad(expected.sum(), alone)):
                torch.testing.assert_close(batched[at], single)


@pytest.mark.parametrize("name", MASKED)
def test_rows_that_are_not_valid_count_for_nothing(name: str) -> None:
    """Equal to the loss of the valid rows alone, even if others are NaN; with bool and integer flags."""
    function, count, has_setting, _ = FUNCTIONS[name]
    inputs, setting = data(count, 6), [0.2] if has_setting else []
    valid = torch.tensor([True, False, True, True, False, True])
    garbage = [torch.where(valid, x, torch.nan) for x in inputs]
    expected = function(*(x[valid] for x in inputs), *setting)
    for mask in (valid, valid.long()):
        result = function(*garbage, *setting, valid=mask)
        if result.dim():
            assert result[~valid].eq(0).all()
            result = result[valid]
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    function, count, has_setting, takes_valid = FUNCTIONS[name]
    setting = [0.2] if has_setting else []
    for wrong in range(count):
        inputs = data(count, 3, 3)
        inputs[wrong] = inputs[wrong][:, :1]
        if count > 1:
            with pytest.raises(ValueError, match=r"\[3, 1\]"):
                function(*inputs, *setting)
    if takes_valid:
        with pytest.raises(ValueError, match="valid"):
            function(*data(count, 3, 3), *setting, valid=torch.ones(3, 1))
    if has_setting:
        with pytest.raises(ValueError, match="not a prefix"):
            function(*data(count, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="at least 1 axes"):
        function(*data(count), *setting)


# --- policies ---


def test_policy_gradient_literal() -> None:
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = policy_gradient_loss(log_prob, torch.tensor([3.0, -1.0]))
    assert loss.item() == -(-3 + 2) / 2
    assert torch.autograd.grad(loss, log_prob)[0].tolist() == [-1.5, 0.5]


def test_policy_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """Over a whole distribution: ∇ -Σ π log π A with π fixed = -∇ Σ π A."""
    logits, reward = data(2, 5)
    logits.requires_grad_()
    log_prob = logits.log_softmax(-1)
    weights = log_prob.exp().detach() * 5
    loss = policy_gradient_loss(log_prob, reward * weights)
    expected = -torch.autograd.grad((logits.softmax(-1) * reward).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_ppo_clip_literal() -> None:
    """ε = 0.2. A > 0 gains nothing above 1.2, A < 0 nothing below 0.8; in the other direction nothing is clipped."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0], dtype=torch.float64)
    log_prob = ratio.log().requires_grad_()
    loss = ppo_clip_loss(log_prob, torch.zeros_like(ratio), advantage, 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5)
    gradient = torch.autograd.grad(loss, log_prob)[0]
    assert gradient.tolist() == pytest.approx([0, -0.1, 0.3, 0, -0.44])


def test_ppo_at_the_old_policy_has_the_policy_gradient() -> None:
    log_prob, advantage, kl = data(3, 7)
    log_prob.requires_grad_()
    expected = torch.autograd.grad(policy_gradient_loss(log_prob, advantage), log_prob)[0]
    old = log_prob.detach()
    for loss in (ppo_clip_loss(log_prob, old, advantage, 0.2), ppo_kl_loss(log_prob, old, advantage, kl, 0.0)):
        assert loss.item() == pytest.approx(-advantage.mean().item())
        torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], expected)


def test_ppo_kl_literal() -> None:
    log_prob = torch.tensor([2.0, 0.5]).log()
    loss = ppo_kl_loss(log_prob, torch.zeros(2), torch.tensor([1.0, 4.0]), torch.tensor([0.5, 1.5]), 3.0)
    assert loss.item() == pytest.approx(-(2 - 1.5 + 2 - 4.5) / 2)


def test_entropy_loss_rewards_entropy() -> None:
    assert entropy_loss(torch.tensor([[1.0, 3.0], [0.0, 1.0]])).tolist() == [-2.0, -0.5]


def test_approx_kl_is_unbiased_and_never_negative() -> None:
    """Over a whole distribution the estimator's mean is the exact KL(π_old, π)."""
    old, new = (logits.log_softmax(-1) for logits in data(2, 6))
    exact = (old.exp() * (old - new)).sum()
    estimates = torch.stack([approx_kl(n, o) for n, o in zip(new.unsqueeze(-1), old.unsqueeze(-1))])
    torch.testing.assert_close((old.exp() * estimates).sum(), exact)
    assert (estimates > 0).all()
    assert approx_kl(old, old).item() == 0
    tiny = approx_kl(torch.full((3,), 1e-4), torch.zeros(3)).item()  # exp(x) - 1 - x would lose it all in float32
    assert tiny == pytest.approx(5e-9, rel=0.02)


def test_normalise_advantage() -> None:
    advantage = torch.tensor([[1.0, 2, 3, 6], [5, 5, 5, 5]])
    result = normalise_advantage(advantage)
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert result[0].tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0, 3 / deviation])
    assert result[1].tolist() == [0, 0, 0, 0]
    assert normalise_advantage(torch.tensor([0.0, 2.0]), eps=1.0).tolist() == pytest.approx(
        [-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)]
    )
    assert normalise_advantage(torch.tensor([[3.0], [4.0]])).tolist() == [[3.0], [4.0]]


def test_normalise_advantage_leaves_fewer_than_two_valid_rows_alone() -> None:
    valid = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    result = normalise_advantage(torch.tensor([[1.0, 3.0, 9.0]] * 3), valid)
    assert result[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0])
    assert result[1].tolist() == [0, 3, 0]
    assert result[2].tolist() == [0, 0, 0]


# --- values ---


def test_value_loss_is_torchs_mean_squared_error() -> None:
    value, target = data(2, 5)
    torch.testing.assert_close(value_loss(value, target), torch.nn.functional.mse_loss(value, target))


def test_clipped_value_loss_literal() -> None:
    """ε = 1, G = 0: values moved from 4 by a small step, by one too large, and by one too large away from G."""
    value = torch.tensor([3.5, 1.0, 6.0], requires_grad=True)
    loss = clipped_value_loss(value, torch.zeros(3), torch.full((3,), 4.0), 1.0)
    assert loss.item() == pytest.approx((3.5**2 + 3.0**2 + 6.0**2) / 3)
    assert torch.autograd.grad(loss, value)[0].tolist() == pytest.approx([7 / 3, 0, 12 / 3])


@pytest.mark.parametrize("delta", [0.3, 1.0, 2.5])
def test_huber_loss_is_torchs(delta: float) -> None:
    prediction, target = data(2, 50)
    prediction.requires_grad_()
    ours = huber_loss(prediction, target, delta)
    theirs = torch.nn.functional.huber_loss(prediction, target, delta=delta)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, prediction)[0] for loss in (ours, theirs)))
    at_corners = torch.tensor([0.0, delta, -delta], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(huber_loss(at_corners, torch.zeros_like(at_corners), delta), at_corners)[0]
    assert gradient.tolist() == pytest.approx([0, delta / 3, -delta / 3])


def test_targets_literal() -> None:
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    assert td_target(reward, discount, torch.tensor([4.0, 4.0])).tolist() == [3, 2]
    next_q = torch.tensor([[1.0, 8.0, 6.0], [9.0, 9.0, 9.0]])
    online = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    assert q_target(reward, discount, next_q).tolist() == [5, 2]
    assert double_q_target(reward, discount, next_q, online).tolist() == [4, 2]
    assert double_q_target(reward, discount, next_q, next_q).tolist() == [5, 2]


def test_nothing_follows_a_terminal_state_where_no_action_is_allowed() -> None:
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5])
    next_q = torch.tensor([[-torch.inf, -torch.inf], [-torch.inf, 4.0]])
    assert q_target(reward, discount, next_q).tolist() == [1, 4]
    assert double_q_target(reward, discount, next_q, next_q).tolist() == [1, 4]


def test_q_targets_with_learners_equal_a_loop() -> None:
    reward, discount, *_ = data(2, 3, 3)
    next_q, online = data(2, 3, 3, 3, seed=1)
    for function, arguments in ((q_target, (next_q,)), (double_q_target, (next_q, online))):
        result = function(reward, discount, *arguments)
        for s in range(3):
            expected = function(reward[s], discount[s], *(q[s] for q in arguments))
            assert torch.equal(result[s], expected)


def test_q_targets_refuse_shapes_that_would_broadcast() -> None:
    reward, discount = torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match="next_value"):
        q_target(reward, discount, torch.zeros(3, 1, 5))
    with pytest.raises(ValueError, match="next_q_online"):
        double_q_target(reward, discount, torch.zeros(3, 3, 5), torch.zeros(3, 3, 4))


def test_explained_variance() -> None:
    value, target = data(2, 40)
    expected = 1 - np.var((target - value).numpy()) / np.var(target.numpy())
    assert explained_variance(value, target).item() == pytest.approx(expected)
    assert explained_variance(target, target).item() == 1
    assert explained_variance(target + 7, target).item() == pytest.approx(1)
    assert explained_variance(torch.zeros(40).double(), target).item() == pytest.approx(0)
    assert math.isnan(explained_variance(value, torch.ones(40).double()).item())


def test_the_expected_soft_value_is_the_mean_over_actions() -> None:
    generator = torch.Generator().manual_seed(0)
    q, logits = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    found = losses.expected_soft_value(q, logits, temperature)
    for learner in range(3):
        for row in range(4):
            policy = torch.distributions.Categorical(logits=logits[learner, row])
            mean = (policy.probs * q[learner, row]).sum() + temperature[learner] * policy.entropy()
            torch.testing.assert_close(found[learner, row], mean)


def test_masked_actions_have_no_part_in_the_expected_soft_value() -> None:
    q = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    logits = torch.tensor([[0.3, torch.finfo(torch.float32).min, -0.2]], requires_grad=True)
    found = losses.expected_soft_value(q, logits, 50.0)
    two = losses.expected_soft_value(q[:, ::2], logits[:, ::2], 50.0)
    torch.testing.assert_close(found, two)
    for gradient in torch.autograd.grad(found.sum(), [q, logits]):
        assert gradient.isfinite().all() and gradient[0, 1] == 0
