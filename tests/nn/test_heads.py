from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch import distributions as td

from rlmeta import nn
from rlmeta.errors import SettingError, SpaceError
from tests.nn.learners import LEARNER_SHAPES, assert_close, assert_equals_loop, data, indices, keys, scattered, take

FEATURES = 3
BUILDERS: dict[str, Callable[[], Any]] = {
    "categorical": lambda: nn.CategoricalHead(FEATURES, 3),
    "multi-discrete": lambda: nn.MultiDiscreteHead(FEATURES, [2, 3]),
    "multi-discrete in a matrix": lambda: nn.MultiDiscreteHead(FEATURES, [2, 3], shape=(2, 1)),
    "bernoulli": lambda: nn.BernoulliHead(FEATURES, 3),
    "gaussian": lambda: nn.GaussianHead(FEATURES, 3),
    "gaussian matrix": lambda: nn.GaussianHead(FEATURES, 4, shape=(2, 2)),
    "tanh gaussian": lambda: nn.TanhGaussianHead(FEATURES, 3, low=[-2, 0, -1], high=[2, 1, 3]),
    "state-dependent noise": lambda: nn.StateDependentNoiseHead(FEATURES, 3),
    "squashed noise": lambda: nn.TanhStateDependentNoiseHead(FEATURES, 3, low=[-2, 0, -1], high=[2, 1, 3]),
    "gaussian in bounds": lambda: nn.GaussianHead(FEATURES, 3, low=[-2, 0, -math.inf], high=[2, 1e3, 5]),
    "noise in bounds": lambda: nn.StateDependentNoiseHead(FEATURES, 3, low=[-2, 0, 0], high=[2, 1e3, math.inf]),
}
ALL = pytest.mark.parametrize("name", BUILDERS)


def ready(name: str, *shape: int) -> tuple[Any, nn.Params]:
    head = BUILDERS[name]()
    return head, scattered(nn.stack(lambda: head, keys(*shape)), seed=3)


def reference(name: str, d: dict[str, Tensor]) -> td.Distribution:
    """Torch's distribution of the flat action, counted from 0."""
    if name == "categorical":
        return td.Categorical(logits=d["logits"])
    if name == "bernoulli":
        return td.Independent(td.Bernoulli(logits=d["logits"]), 1)
    normal = td.Normal(d["mean"], d["log_std"].exp())
    if name in ("tanh gaussian", "squashed noise"):
        low, high = torch.tensor([-2.0, 0, -1]).double(), torch.tensor([2.0, 1, 3]).double()
        scale = td.AffineTransform((low + high) / 2, (high - low) / 2)
        return td.Independent(td.TransformedDistribution(normal, [td.TanhTransform(), scale]), 1)
    return td.Independent(normal, 1)


@ALL
@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("batch_shape", [(3,), (3, 3), ()])
def test_equals_a_loop_over_learners(name: str, learner_shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> None:
    head, params = ready(name, *learner_shape)
    key = keys(*learner_shape)
    x = data(*learner_shape, *batch_shape, FEATURES)
    action = head.sample(nn.apply(head, params, x), key)

    def everything(params: nn.Params, x: Tensor, index: tuple[int, ...] = ()) -> Any:
        d = nn.apply(head, params, x)
        other = {name: value + 0.1 if value.is_floating_point() else value for name, value in d.items()}
        measured = (head.log_prob(d, action[index]), head.entropy(d, key[index]), head.kl(d, other))
        assert all(value.shape == x.shape[:-1] for value in measured)
        sampled = head.sample(d, key[index])
        assert torch.equal(sampled, action[index]) or sampled.is_floating_point()
        return *measured, *((sampled, head.mode(d)) if sampled.is_floating_point() else ()), d

    assert_equals_loop(everything, everything, params, x, learner_shape)


@ALL
def test_densities_are_torchs(name: str) -> None:
    head, params = ready(name, 3)
    x = data(3, 3, FEATURES)
    d = nn.apply(head, params, x)
    action = head.sample(d, keys(3))
    if name.startswith("multi-discrete"):
        flat = action.reshape(3, 3, 2)
        parts = [td.Categorical(logits=part) for part in d["logits"].split([2, 3], -1)]
        assert_close(head.log_prob(d, action), parts[0].log_prob(flat[..., 0]) + parts[1].log_prob(flat[..., 1]))
        assert_close(head.entropy(d), parts[0].entropy() + parts[1].entropy())
        modes = torch.stack([part.probs.argmax(-1) for part in parts], -1)
        assert torch.equal(head.mode(d).reshape(3, 3, 2), modes)
        return
    torchs = reference(name, d)
    flat = action if name == "categorical" else action.double()
    flat = flat.reshape(3, 3, -1) if name == "gaussian matrix" else flat
    if name.endswith("in bounds"):  # densities are those in the policy's units
        flat = (flat - head.units.centre.double()) / head.units.unit.double()
    assert_close(head.log_prob(d, action), torchs.log_prob(flat), rtol=1e-8)
    if name not in ("tanh gaussian", "squashed noise"):
        assert_close(head.entropy(d), torchs.entropy())


@ALL
def test_samples_follow_the_density(name: str) -> None:
    """Importance weighting: E_p[q(a) / p(a)] = 1, and E_p[-log p] is the entropy, for samples of p."""
    head, params = ready(name)
    rows = 20_000
    d = nn.apply(head, params, data(1, FEATURES).expand(rows, -1))
    other = nn.apply(head, params, data(1, FEATURES, seed=2).mul(0.5).expand(rows, -1))
    if name not in ("categorical", "multi-discrete", "multi-discrete in a matrix", "bernoulli"):
        other = d | {"log_std": d["log_std"] - 0.4}  # narrower, so that the weights are bounded
    action = head.sample(d, keys())
    weights = (head.log_prob(other, action) - head.log_prob(d, action)).exp()
    assert abs(weights.mean() - 1) < 5 * weights.std() / math.sqrt(rows)
    surprise = -head.log_prob(d, action)
    assert abs(surprise.mean() - head.entropy(d, keys(seed=5)).mean()) < 8 * surprise.std() / math.sqrt(rows) + 1e-9
    divergence = head.log_prob(d, action) - head.log_prob(other, action)
    assert abs(divergence.mean() - head.kl(d, other)[0]) < 5 * divergence.std() / math.sqrt(rows) + 1e-9


@ALL
def test_a_learners_actions_are_its_own(name: str) -> None:
    head, params = ready(name, 3)
    x = data(1, 3, FEATURES).expand(3, 3, FEATURES)
    same = {key: value[:1].expand_as(value) for key, value in params.items()}
    key = keys(3)
    action = head.sample(nn.apply(head, same, x.repeat(1, 10, 1)), key)
    assert not torch.equal(action[0], action[1])
    order = torch.tensor([2, 0])
    again = head.sample(nn.apply(head, take(same, order), x.repeat(1, 10, 1)[order]), key[order])  # type: ignore[arg-type]
    assert_close(again, action[order])


@ALL
def test_starts_near_uniform(name: str) -> None:
    head = BUILDERS[name]()
    d = head(torch.randn(50, FEATURES))
    for key in ("logits", "mean"):
        assert d.get(key, torch.zeros(1)).abs().max() < 0.1


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_masked_actions_are_never_taken(learner_shape: tuple[int, ...]) -> None:
    head, params = ready("categorical", *learner_shape)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]]).expand(*learner_shape, 4, 3).to(torch.int8)
    d = head.run(params, data(*learner_shape, 4, FEATURES), nn.Context(), mask=mask)
    drawn = torch.stack([head.sample(d, keys(*learner_shape, seed=seed)) for seed in range(50)])
    allowed = torch.arange(3) == drawn.unsqueeze(-1)
    assert (mask.bool() | ~allowed)[..., :3, :].all()
    assert {0, 2} == set(drawn[..., 0].unique().tolist())
    assert torch.equal(head.mode(d)[..., 1], torch.full(learner_shape, 1))
    assert_close(head.entropy(d)[..., 1], torch.zeros(learner_shape, dtype=torch.float64))
    assert all(value.isfinite().all() for value in (head.entropy(d), head.kl(d, d), head.log_prob(d, drawn[0])))
    free = head.run(params, data(*learner_shape, 4, FEATURES), nn.Context())["logits"]
    assert torch.equal(d["logits"][..., 3, :], free[..., 3, :])  # nothing allowed is everything allowed
    assert {0, 1, 2} == set(drawn[..., 3].unique().tolist())


def test_multi_discrete_masks() -> None:
    head, params = ready("multi-discrete")
    mask = torch.tensor([0, 1, 1, 0, 0]).expand(30, 5)
    d = head.run(params, data(30, FEATURES), nn.Context(), mask=mask)
    assert torch.equal(head.sample(d, keys()), torch.tensor([1, 0]).expand(30, 2))
    nothing_second = torch.tensor([0, 1, 0, 0, 0]).expand(300, 5)
    d = head.run(params, data(300, FEATURES), nn.Context(), mask=nothing_second)
    drawn = head.sample(d, keys())
    assert (drawn[:, 0] == 1).all() and {0, 1, 2} == set(drawn[:, 1].tolist())


# ---------------------------------------------------------------------------------------------------------- gaussians


def test_log_std_belongs_to_the_learner() -> None:
    # Three learners, three actions, three rows: log_std [3, 3] would broadcast from the right without a word.
    head, params = ready("gaussian", 3)
    d = nn.apply(head, params, data(3, 3, FEATURES))
    for learner in range(3):
        for row in range(3):
            assert torch.equal(d["log_std"][learner, row], params["log_std"][learner])
    assert nn.GaussianHead(2, 3, initial_log_std=-1.5).log_std.tolist() == [-1.5] * 3


def test_tanh_gaussian() -> None:
    head, params = ready("tanh gaussian", 3)
    d = nn.apply(head, params, 5 * data(3, 100, FEATURES))
    low, high = torch.tensor([-2.0, 0, -1]), torch.tensor([2.0, 1, 3])
    action, log_prob = head.sample_log_prob(d, keys(3))
    assert torch.equal(action, head.sample(d, keys(3)))
    assert (action >= low).all() and (action <= high).all()
    inside = ((action - low).minimum(high - action) > 1e-3).all(-1)
    assert inside.sum() > 50
    assert_close(log_prob[inside], head.log_prob(d, action)[inside], rtol=1e-6)
    assert_close(head.log_half_width, math.log(2) + math.log(0.5) + math.log(2))
    assert head.log_prob(d, high.double().expand(3, 100, 3)).isfinite().all()
    assert d["log_std"].max() <= 2.0
    wide = nn.apply(head, {**params, "linear.bias": params["linear.bias"] + 100}, data(3, 2, FEATURES))
    assert (wide["log_std"] == 2.0).all()
    assert_close(nn.TanhGaussianHead(2, 2, initial_log_std=-3.0).linear.bias, torch.tensor([0.0, 0, -3, -3]))


@pytest.mark.parametrize(("low", "high"), [([1.0, 0], [0.0, 1]), ([0.0], [1.0]), ([-math.inf, 0], [1.0, 1])])
def test_tanh_gaussian_refuses_bounds(low: list[float], high: list[float]) -> None:
    with pytest.raises(SettingError, match="bounds"):
        nn.TanhGaussianHead(3, 2, low=low, high=high)


@pytest.mark.parametrize("log_std", [-3.0, -0.5, 0.5, 2.0])
def test_the_entropy_of_a_squashed_gaussian_needs_no_key(log_std: float) -> None:
    head = nn.TanhGaussianHead(2, 2, low=[-2, 0], high=[2, 1])
    d = {name: torch.empty(1, 2, dtype=torch.float64) for name in ("mean", "log_std")}
    d["mean"][0], d["log_std"][0] = torch.tensor([0.3, -1.5]), log_std
    rows = {name: value.expand(100_000, 2) for name, value in d.items()}
    estimates = head.entropy(rows, keys())
    assert abs(estimates.mean() - head.entropy(d)) < 5 * estimates.std() / math.sqrt(len(estimates)) + 0.02


# --------------------------------------------------------------------------------------- generalised state-dependent


def test_noise_head_equals_stable_baselines() -> None:
    sb3 = pytest.importorskip("stable_baselines3.common.distributions")
    head, params = ready("state-dependent noise")
    x = data(5, FEATURES)
    d = nn.apply(head, params, x)
    theirs = sb3.StateDependentNoiseDistribution(3, full_std=True, use_expln=False, squash_output=False)
    theirs.proba_distribution_net(FEATURES)
    theirs.proba_distribution(d["mean"], params["log_std"], x)
    action = head.sample(d, keys())
    assert_close(head.log_prob(d, action), theirs.log_prob(action))
    assert_close(head.entropy(d), theirs.entropy())
    assert torch.equal(head.mode(d), theirs.mode())


def test_noise_is_held_as_long_as_the_key() -> None:
    """The noise is one linear function of the features, row by row, until the key changes."""
    head, params = ready("state-dependent noise", 3)
    x, y = data(3, 4, FEATURES), data(3, 4, FEATURES, seed=2)

    def noise(features: Tensor, key: Tensor) -> Tensor:
        d = nn.apply(head, params, features)
        return head.sample(d, key) - d["mean"]

    key = keys(3)
    assert_close(noise(2 * x + y, key), 2 * noise(x, key) + noise(y, key))
    assert (noise(x, key) - noise(x, keys(3, seed=9))).abs().min() > 1e-6
    same = noise(x[:, :1].expand_as(x), key)
    assert (same[:, 0] - same[:, 1]).abs().min() > 1e-6


def test_noise_has_the_variance_it_declares() -> None:
    head, params = ready("state-dependent noise", 3)
    d = nn.apply(head, params, data(3, 1, FEATURES).expand(3, 20_000, FEATURES))
    noise = head.sample(d, keys(3)) - d["mean"]
    declared = d["log_std"][:, 0].exp().square()
    assert_close(noise.var(1) / declared, torch.ones(3, 3, dtype=torch.float64), atol=0.05)
    by_hand = torch.einsum("ld,lda->la", d["features"][:, 0].square(), params["log_std"].exp().square())
    assert_close(declared, by_hand + 1e-6)


def test_noise_does_not_shape_the_features() -> None:
    head, params = ready("state-dependent noise")
    x, log_std = data(4, FEATURES).requires_grad_(), params["log_std"].requires_grad_()
    d = nn.apply(head, params, x)
    action = data(4, 3)
    through_mean = nn.GaussianHead(FEATURES, 3).log_prob({"mean": d["mean"], "log_std": d["log_std"].detach()}, action)
    expected = torch.autograd.grad(through_mean.sum(), x, retain_graph=True)[0]
    actual, spread = torch.autograd.grad(head.log_prob(d, action).sum(), [x, log_std])
    assert_close(actual, expected)
    assert spread.abs().min() > 0
    assert not d["features"].requires_grad
    assert nn.StateDependentNoiseHead(2, 3, initial_log_std=-2.0).log_std.tolist() == [[-2.0] * 3] * 2


def test_squashed_noise_is_held_within_bounds_and_shapes_the_features() -> None:
    head, params = ready("squashed noise", 3)
    x, y, key = data(3, 4, FEATURES), data(3, 4, FEATURES, seed=2), keys(3)

    def noise(features: Tensor) -> Tensor:
        d = nn.apply(head, params, features)
        return head.units.to_policy(head.sample(d, key)).double().atanh() - d["mean"]

    assert_close(noise(0.2 * x + 0.1 * y), 0.2 * noise(x) + 0.1 * noise(y), rtol=1e-4, atol=1e-6)
    far = {**params, "linear.bias": params["linear.bias"] + 100}
    assert (nn.apply(head, far, x)["mean"] == 2.0).all()
    x = x.requires_grad_()
    d = nn.apply(head, params, x)
    action, log_prob = head.sample_log_prob(d, key)
    assert_close(log_prob, head.log_prob(d, action), rtol=1e-5)
    squashed = nn.TanhGaussianHead(FEATURES, 3, low=[-2, 0, -1], high=[2, 1, 3])
    assert_close(log_prob, squashed.sample_log_prob(d, key)[1])
    (slope,) = torch.autograd.grad(d["log_std"].sum(), x)
    assert slope.abs().min() > 0
    with pytest.raises(SettingError, match="infinite"):
        nn.TanhStateDependentNoiseHead(3, 1, low=[0.0], high=[math.inf])


def test_noise_head_refuses_a_key_of_other_learners() -> None:
    head, params = ready("state-dependent noise", 3)
    d = nn.apply(head, params, data(3, 2, FEATURES))
    with pytest.raises(ValueError, match="learner axes"):
        head.sample(d, keys(2))


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_value_heads(learner_shape: tuple[int, ...]) -> None:
    value, q = nn.ValueHead(FEATURES), nn.QHead(FEATURES, 3)
    x = data(*learner_shape, 3, 3, FEATURES)
    for head, shape, name in ((value, (), "linear."), (q, (3,), "streams.linear.")):
        params = scattered(nn.stack(lambda head=head: head, keys(*learner_shape)))
        out = nn.apply(head, params, x)
        assert out.shape == (*learner_shape, 3, 3, *shape)
        for i in indices(learner_shape):
            weight, bias = params[f"{name}weight"][i], params[f"{name}bias"][i]
            expected = torch.nn.functional.linear(x[i], weight, bias)
            assert_close(out[i], expected.reshape(3, 3, *shape))
    best = q.mode(out)
    assert torch.equal(best, out.argmax(-1))
    assert torch.equal(q.take(out, best), out.max(-1).values)
    assert torch.equal(q.take(out, torch.full_like(best, 1)), out[..., 1])


# ------------------------------------------------------------------------------------------------------------- spaces


@pytest.mark.parametrize(
    ("space", "options", "kind"),
    [
        (spaces.Discrete(3), {}, nn.CategoricalHead),
        (spaces.Discrete(3, start=-4), {}, nn.CategoricalHead),
        (spaces.MultiDiscrete([2, 3]), {}, nn.MultiDiscreteHead),
        (spaces.MultiDiscrete([[2, 3], [2, 2]], start=[[1, 2], [3, 4]]), {}, nn.MultiDiscreteHead),
        (spaces.MultiBinary(3), {}, nn.BernoulliHead),
        (spaces.MultiBinary((2, 2)), {}, nn.BernoulliHead),
        (spaces.Box(-10, 10, (2,)), {}, nn.GaussianHead),
        (spaces.Box(-10, 10, (2, 2)), {}, nn.GaussianHead),
        (spaces.Box(-10, 10, ()), {}, nn.GaussianHead),
        (spaces.Box(-2, 1, (2,)), {"action_bounds": "squash"}, nn.TanhGaussianHead),
        (spaces.Box(-20, 10, (2, 2)), {"state_dependent_noise": True}, nn.StateDependentNoiseHead),
        (
            spaces.Box(-20, 10, (2, 2)),
            {"state_dependent_noise": True, "action_bounds": "squash"},
            nn.TanhStateDependentNoiseHead,
        ),
        (spaces.Box(-np.inf, np.inf, (2,)), {}, nn.GaussianHead),
        (spaces.Box(-20, 20, (2,)), {"action_bounds": "clip"}, nn.GaussianHead),
    ],
)
def test_head_for_gives_actions_of_the_space(space: gym.Space, options: dict[str, bool], kind: type) -> None:
    head = nn.head_for(space, FEATURES, **options)
    assert type(head) is kind
    d = head(torch.randn(40, FEATURES))
    sampled, best = head.sample(d, keys()), head.mode(d)
    start = space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0
    for action in [*sampled, *best]:
        if kind in (nn.GaussianHead, nn.StateDependentNoiseHead):  # which the environment clips
            action = action.clamp(*(torch.from_numpy(bound) for bound in (space.low, space.high)))
        assert space.contains(np.asarray(action.detach().numpy() + start, space.dtype))
    assert head.log_prob(d, sampled).shape == (40,)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        assert (sampled.amin(0).numpy() == 0).all()


def test_head_for_passes_its_options() -> None:
    head = nn.head_for(spaces.Box(-1, 1, (2,)), 4, initial_scale=0.5, initial_log_std=-2.0)
    weight = head.linear.weight
    assert_close(weight @ weight.T, 0.25 * torch.eye(2), rtol=1e-5, atol=1e-6)
    assert (head.log_std == -2.0).all()  # type: ignore[union-attr]
    noisy = nn.head_for(spaces.Box(-1, 1, (2,)), 4, initial_log_std=-3.0, state_dependent_noise=True)
    assert (noisy.log_std == -3.0).all() and noisy.log_std.shape == (4, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict(a=spaces.Discrete(2)),
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Text(3),
        spaces.Box(0, 5, (2,), dtype=np.int64),
        spaces.Box(0, 1, (0,)),
    ],
)
def test_head_for_refuses_spaces(space: gym.Space) -> None:
    with pytest.raises(SpaceError, match=r"has no policy head: expected Discrete.*wrap the environment"):
        nn.head_for(space, 3)


def test_head_for_refuses_combinations() -> None:
    with pytest.raises(SettingError, match="options for a Box"):
        nn.head_for(spaces.Discrete(2), 3, action_bounds="squash")
    with pytest.raises(SettingError, match="expected one of scale, squash, clip"):
        nn.head_for(spaces.Box(-1, 1, (2,)), 3, action_bounds="tanh")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r'equal, so nothing can be squashed.*action_bounds="scale"'):
        nn.head_for(spaces.Box(1, 1, (2,)), 3, action_bounds="squash")
    with pytest.raises(SettingError, match="infinite"):
        nn.head_for(spaces.Box(-np.inf, np.inf, (2,)), 3, action_bounds="squash")
