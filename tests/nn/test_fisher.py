"""Fisher information against closed forms, a loop over samples and labels, and finite differences of the divergence."""

from __future__ import annotations

import itertools

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.functional import distributions, random
from rlmeta.nn import MLP, Block, CategoricalHead, Context, GaussianHead, LayerNorm, Linear, Sequential, stack
from rlmeta.nn.fisher import categorical_fisher, gaussian_fisher, score_fisher
from rlmeta.nn.sample_gradients import group_gradients

DOUBLE = torch.float64


class Repeated(Block):
    """Network with a layer used twice, for several positions: per-sample gradients are sums of outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Linear(3, 3), Linear(3, 3, bias=False)

    def run(self, params, x, ctx, prefix=""):
        positions = torch.stack([x, x.square()], -2)
        once = torch.tanh(self.inner.run(params, positions, ctx, f"{prefix}inner.")).sum(-2)
        twice = torch.tanh(self.inner.run(params, once, ctx, f"{prefix}inner."))
        return self.last.run(params, twice, ctx, f"{prefix}last.")


NETWORKS = {
    "linear": lambda: Linear(3, 3),
    "mlp": lambda: MLP(3, (4, 3), 3, activation="relu"),
    "norm": lambda: Sequential(MLP(3, (3,)), LayerNorm(3), CategoricalHead(3, 3)),
    "lifted": lambda: nn.lift(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.PReLU(3), torch.nn.Linear(3, 3))),
    "repeated": Repeated,
}


def network(name: str, learners: tuple[int, ...], samples: int = 3) -> tuple[Block, dict, Tensor]:
    """A block, its parameters and inputs `[*L, B, 3]`."""
    factory = NETWORKS[name]
    keys = random.make_keys(range(max(1, torch.Size(learners).numel()))).reshape(learners)
    weights = {n: random.normal(keys, n, 0, w.shape[len(learners) :], DOUBLE) for n, w in stack(factory, keys).items()}
    return factory(), {"weights": weights}, random.normal(keys, "x", 0, (samples, 3), DOUBLE)


def logits_of(block: Block):
    def forward(p, batch, ctx):
        out = block.run(p["weights"], batch, ctx)
        return out["logits"] if isinstance(out, dict) else out

    return forward


def loop(block: Block, p: dict, x: Tensor, labels=None) -> Tensor:
    """Σ over samples and labels by one autograd call each; `x` `[B, 3]`, no learner axes."""
    weights = {n: w.clone().requires_grad_() for n, w in p["weights"].items()}
    total = torch.zeros(sum(w.numel() for w in weights.values()), dtype=x.dtype)
    for i, sample in enumerate(x):
        log_p = logits_of(block)({"weights": weights}, sample.unsqueeze(0), Context()).log_softmax(-1)[0]
        for label in range(len(log_p)) if labels is None else [int(labels[i])]:
            gradient = torch.autograd.grad(log_p[label], list(weights.values()), retain_graph=True)
            square = torch.cat([g.flatten() for g in gradient]).square()
            total += square * (log_p[label].exp().detach() if labels is None else 1.0)
    return total / len(x)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("learners", [(), (3,), (3, 3)])
def test_exact_and_empirical_equal_a_loop_over_samples_and_labels(name, learners):
    block, p, x = network(name, learners)
    keys = random.make_keys(range(max(1, torch.Size(learners).numel()))).reshape(learners)
    target = random.integers(keys, "y", 0, (3,), 3)
    exact = categorical_fisher(logits_of(block), p, x, len(learners))
    empirical = categorical_fisher(logits_of(block), p, x, len(learners), "empirical", target=target)
    for at in itertools.product(*map(range, learners)):
        alone = {"weights": {n: w[at] for n, w in p["weights"].items()}}
        torch.testing.assert_close(exact[at], loop(block, alone, x[at]), rtol=1e-10, atol=1e-12)
        expected = loop(block, alone, x[at], target[at])
        torch.testing.assert_close(empirical[at], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_chunk_changes_nothing(name):
    block, p, x = network(name, (2,), samples=7)
    whole = categorical_fisher(logits_of(block), p, x, 1)
    torch.testing.assert_close(categorical_fisher(logits_of(block), p, x, 1, chunk=3), whole, rtol=1e-12, atol=0)
    key = random.make_keys([0, 1])
    sampled = [categorical_fisher(logits_of(block), p, x, 1, "sample", key=key, chunk=c) for c in (2, 7)]
    torch.testing.assert_close(sampled[0], sampled[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_a_chunk_that_is_no_count_of_samples_is_refused(chunk):
    block, p, x = network("mlp", (2,))
    with pytest.raises(SettingError, match=r"fisher: chunk is .*, expected a whole number, at least 1"):
        categorical_fisher(logits_of(block), p, x, 1, chunk=chunk)


def test_softmax_regression_in_closed_form():
    block, p, x = network("linear", (3,), samples=50)
    probability = (x @ p["weights"]["weight"].mT + p["weights"]["bias"].unsqueeze(-2)).softmax(-1)
    variance = probability * (1 - probability)
    expected = (variance.mT @ x.square()) / 50
    fisher = categorical_fisher(logits_of(block), p, x, 1)
    torch.testing.assert_close(fisher[:, :9].reshape(3, 3, 3), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher[:, 9:], variance.mean(-2), rtol=1e-12, atol=0)


def test_sampled_labels_are_unbiased():
    block, p, x = network("mlp", (), samples=4)
    p["weights"] = {n: 0.3 * w for n, w in p["weights"].items()}  # so that no label is too rare for 4,000 draws
    draws = random.make_keys(range(4000))
    many = {"weights": {n: w.expand(4000, *w.shape) for n, w in p["weights"].items()}}
    fisher = categorical_fisher(logits_of(block), many, x.expand(4000, 4, 3), 1, "sample", key=draws)
    exact = categorical_fisher(logits_of(block), p, x, 0)
    error = (fisher.mean(0) - exact) / (fisher.std(0) / 4000**0.5).clamp(min=1e-9)
    assert error.abs().max() < 4.5  # 45 weights: about one chance in 3,000 under the hypothesis
    assert (fisher.std(0) > 0).float().mean() > 0.5


def test_the_squared_gradient_of_the_mean_is_something_else():
    """Most implementations compute it; at a stationary point it is smaller by a factor of the batch size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator, dtype=DOUBLE)
    block = Linear(3, 3)
    weights = {n: w.detach().to(DOUBLE).requires_grad_() for n, w in block.named_parameters()}
    labels = torch.randint(3, (400,), generator=generator)
    optimizer = torch.optim.LBFGS(list(weights.values()), max_iter=200, tolerance_grad=1e-12)

    def loss(rows=slice(None)):
        out = logits_of(block)({"weights": weights}, x[rows], Context())
        return torch.nn.functional.cross_entropy(out, labels[rows])

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    p = {"weights": {n: w.detach() for n, w in weights.items()}}
    empirical = categorical_fisher(logits_of(block), p, x, 0, "empirical", target=labels)
    batched = torch.zeros_like(empirical)
    for start in range(0, 400, 20):
        gradient = torch.autograd.grad(loss(slice(start, start + 20)), list(weights.values()))
        batched += torch.cat([g.flatten() for g in gradient]).square() / 20
    assert (batched / empirical).max() < 0.3
    assert 0.6 < float((20 * batched / empirical).mean()) < 1.4


def test_linear_gaussian_regression_in_closed_form():
    """σ = 1: the information in a weight is the mean square of its input, 1 in a bias; 2 in the logarithm of σ."""
    keys = random.make_keys(range(3))
    head = GaussianHead(3, 2)
    weights = {n: w.to(DOUBLE) for n, w in stack(lambda: GaussianHead(3, 2), keys).items()}
    x = random.normal(keys, "x", 0, (40, 3), DOUBLE)

    def parameters(p, batch, ctx):
        d = head.run(p["weights"], batch, ctx)
        return torch.cat([d["mean"], d["log_std"]], -1)

    fisher = nn_split(gaussian_fisher(parameters, {"weights": weights}, x, 1), weights)
    moment = x.square().mean(-2)
    torch.testing.assert_close(fisher["linear.weight"], moment.unsqueeze(-2).expand(3, 2, 3), rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher["linear.bias"], torch.ones(3, 2, dtype=DOUBLE))
    torch.testing.assert_close(fisher["log_std"], torch.full((3, 2), 2.0, dtype=DOUBLE))


def nn_split(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    from rlmeta.functional.packed import Packed

    return Packed.view(flat, like, 1)


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))])
def test_a_policys_fisher_is_the_curvature_of_the_divergence(space):
    """∂² KL(π_θ* || π_θ) / ∂θ² at θ*, by autodiff, for a categorical and a Gaussian policy."""
    from rlmeta.agents import PPO

    agent = PPO(hidden_sizes=(4,)).bind(gym.spaces.Box(-1, 1, (3,)), space)
    tensors = {n: w.detach() for n, w in agent.networks()["policy"].named_parameters()}
    x = random.normal(random.make_keys([1])[0], "x", 0, (6, 3))
    sizes = [w.numel() for w in tensors.values()]

    def run(flat):
        parts = [part.view(w.shape) for part, w in zip(flat.split(sizes), tensors.values())]
        return agent.policy.run(dict(zip(tensors, parts)), x, Context())

    flat = torch.cat([w.flatten() for w in tensors.values()])
    old = {k: v.detach() for k, v in run(flat).items()}
    hessian = torch.autograd.functional.hessian(lambda f: agent.head.kl(old, run(f)).mean(), flat)

    def forward(p, batch, ctx):
        d = agent.policy.run(p["weights"], batch, ctx)
        return d["logits"] if "logits" in d else torch.cat([d["mean"], d["log_std"]], -1)

    kind = categorical_fisher if isinstance(space, gym.spaces.Discrete) else gaussian_fisher
    fisher = kind(forward, {"weights": tensors}, x, 0)
    torch.testing.assert_close(fisher, hessian.diagonal(), rtol=2e-3, atol=2e-6)


def test_score_fisher_is_that_of_the_given_actions():
    block, p, x = network("mlp", (3,))
    target = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 1, 1]])

    def log_prob(p, batch, ctx):
        return distributions.categorical_log_prob(block.run(p["weights"], batch["x"], ctx), batch["y"])

    fisher = score_fisher(log_prob, p, {"x": x, "y": target}, 1)
    expected = categorical_fisher(logits_of(block), p, x, 1, "empirical", target=target)
    torch.testing.assert_close(fisher, expected, rtol=1e-12, atol=1e-14)


def test_only_the_named_weights_and_nothing_is_touched():
    block, p, x = network("norm", (3,))
    before = {n: w.clone() for n, w in p["weights"].items()}
    state, names = torch.get_rng_state(), ["0.0.weight", "1.weight"]
    part = nn_split(categorical_fisher(logits_of(block), p, x, 1, names=names), p["weights"])
    whole = nn_split(categorical_fisher(logits_of(block), p, x, 1), p["weights"])
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name] if name in names else torch.zeros_like(value))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in p["weights"].items():
        assert torch.equal(value, before[name]) and not value.requires_grad and value.grad is None


def test_labels_and_key_are_asked_for():
    from rlmeta.errors import SettingError

    block, p, x = network("linear", ())
    with pytest.raises(SettingError, match="key"):
        categorical_fisher(logits_of(block), p, x, 0, "sample")
    with pytest.raises(SettingError, match="target"):
        categorical_fisher(logits_of(block), p, x, 0, "empirical")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("learners", [(), (3,)])
def test_gradients_of_groups_equal_a_loop(name, learners):
    block, p, _ = network(name, learners)
    keys = random.make_keys(range(max(1, torch.Size(learners).numel()))).reshape(learners)
    x = random.normal(keys, "groups", 0, (3, 3, 3), DOUBLE)  # K = M = S
    y = random.integers(keys, "labels", 0, (3, 3), 3)

    def losses(p, batch, ctx):
        return -distributions.categorical_log_prob(logits_of(block)(p, batch["x"], ctx), batch["y"])

    gradients = group_gradients(losses, p, {"x": x, "y": y}, len(learners))
    axes = len(learners)
    for k in range(3):
        leaves = {n: w.clone().requires_grad_() for n, w in p["weights"].items()}
        loss = losses({"weights": leaves}, {"x": x.select(axes, k), "y": y.select(axes, k)}, Context()).mean(-1).sum()
        for n, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()))):
            torch.testing.assert_close(gradients[n].select(axes, k), gradient, rtol=1e-10, atol=1e-12)


def test_a_frozen_weight_beside_a_trained_bias_of_a_layer_that_is_passed_several_times():
    layer = Linear(2, 3)
    tensors = {n: torch.randn(2, *w.shape, dtype=torch.float64) for n, w in layer.named_parameters()}
    x = {"x": torch.randn(2, 5, 4, 2, dtype=torch.float64)}

    def logits(p, batch, ctx):
        return layer.run({**p["weights"], **p.get("buffers", {})}, batch["x"], ctx).sum(-2)

    frozen = {"weights": {"bias": tensors["bias"]}, "buffers": {"weight": tensors["weight"]}}
    fisher = categorical_fisher(logits, frozen, x, 1)
    whole = categorical_fisher(logits, {"weights": {"bias": tensors["bias"], "weight": tensors["weight"]}}, x, 1)
    torch.testing.assert_close(fisher, whole[:, :3], rtol=1e-10, atol=1e-12)
    assert fisher.min() > 0
