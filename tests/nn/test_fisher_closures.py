"""Fisher information and group gradients of arbitrary user functions: correct, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rlmeta.errors import SettingError
from rlmeta.functional import distributions, random
from rlmeta.nn import Block, Context, Linear, lift, sample_gradients
from rlmeta.nn.fisher import categorical_fisher, categorical_roots, gaussian_fisher, score_fisher
from rlmeta.nn.sample_gradients import group_gradients, squared_gradients

DOUBLE = torch.float64
KEY = random.make_keys([0])[0]


def numbers(name: str, *shape: int) -> Tensor:
    return random.normal(KEY, name, 0, shape, DOUBLE)


def loop(forward, p: dict, x: Tensor, target: Tensor | None = None) -> Tensor:
    """Reference: squared derivatives of log p, summed over labels, averaged over samples; no learner axes."""
    leaves = {name: w.clone().requires_grad_() for name, w in p["weights"].items()}
    total = torch.zeros(sum(w.numel() for w in leaves.values()), dtype=x.dtype)
    for row in range(len(x)):
        log_p = forward({**p, "weights": leaves}, x[row : row + 1], Context()).log_softmax(-1)[0]
        for label in range(len(log_p)) if target is None else [int(target[row])]:
            gradient = torch.autograd.grad(
                log_p[label], list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            square = torch.cat([g.flatten() for g in gradient]).square()
            total += square * (log_p[label].exp().detach() if target is None else 1.0)
    return total / len(x)


class Tied(nn.Module):
    """Network with a decoder tied to the encoder, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.code(x))))))
        return self.last(hidden @ self.code.weight)


class Remembers(nn.Module):
    """LSTM over features as time steps, for which torch.func.vmap has no batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.last = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(x.unsqueeze(-1))[0][:, -1])


class OneByOne(nn.Module):
    """Network that reads values, so torch.func cannot transform it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.left(row) if float(row[0]) > 0 else self.right(row) for row in x])


def evaluated(module: nn.Module) -> nn.Module:
    """Module in evaluation mode, with running statistics of some data."""
    with torch.no_grad():
        module(torch.randn(64, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)))
    return module.eval()


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    ),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 3)),
    "batch norm": lambda: evaluated(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 3)).eval(),
    "tied": Tied,
    "lstm": Remembers,
    "one by one": OneByOne,
}


def built(name: str) -> tuple[nn.Module, dict]:
    """Build a float64 module and its parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MODULES[name]().double()
    return module, {"weights": {n: w.detach().clone() for n, w in module.named_parameters()}}


def calling(module: nn.Module):
    return lambda p, batch, ctx: functional_call(module, p["weights"], batch)


def running(block: Block):
    return lambda p, batch, ctx: block.run(p["weights"], batch, ctx)


@pytest.mark.parametrize("name", MODULES)
def test_any_module_under_functional_call(name):
    module, p = built(name)
    x, target = numbers("x", 5, 3), torch.tensor([0, 1, 2, 1, 0])
    fisher = categorical_fisher(calling(module), p, x, 0)
    torch.testing.assert_close(fisher, loop(calling(module), p, x), rtol=1e-9, atol=1e-12)
    fisher = categorical_fisher(calling(module), p, x, 0, "empirical", target=target, chunk=2)
    torch.testing.assert_close(fisher, loop(calling(module), p, x, target), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("one by one", "lstm")])
def test_any_module_lifted_with_learners(name):
    module, p = built(name)
    block = lift(module)
    own = {n: w.detach() for n, w in module.named_buffers()}
    many = {"weights": {n: torch.stack([w, 0.5 * w, -w]) for n, w in p["weights"].items()}}
    x = numbers("x", 3, 3, 3)  # as many samples as learners

    def forward(p, batch, ctx):
        axes = batch.dim() - 2
        buffers = {n: b.expand(*batch.shape[:axes], *b.shape) for n, b in own.items()}
        return block.run({**p["weights"], **buffers}, batch, ctx)

    fisher = categorical_fisher(forward, many, x, 1)
    for learner in range(3):
        alone = {"weights": {n: w[learner] for n, w in many["weights"].items()}}
        expected = loop(calling(module), alone, x[learner])
        torch.testing.assert_close(fisher[learner], expected, rtol=1e-9, atol=1e-12)


def by_hand(p, batch, ctx):
    """Network by hand, with or without learner axes."""
    w = p["weights"]
    hidden = torch.tanh(batch @ w["a"].mT + w["c"].unsqueeze(-2))
    return hidden @ w["b"].mT


BY_HAND = {"a": numbers("a", 3, 4, 3), "c": numbers("c", 3, 4), "b": numbers("b", 3, 3, 4)}


def test_a_closure_of_products_with_learners_and_without():
    x = numbers("x", 3, 3, 3)
    fisher = categorical_fisher(by_hand, {"weights": BY_HAND}, x, 1)
    for learner in range(3):
        alone = {"weights": {n: w[learner] for n, w in BY_HAND.items()}}
        torch.testing.assert_close(fisher[learner], loop(by_hand, alone, x[learner]), rtol=1e-9, atol=1e-12)
        single = categorical_fisher(by_hand, alone, x[learner], 0)
        torch.testing.assert_close(single, fisher[learner], rtol=1e-9, atol=1e-12)


FIRST, LAST = Linear(3, 3), Linear(3, 3)
SHAPES = {"0.weight": (3, 3), "0.bias": (3,), "1.weight": (3, 3), "1.bias": (3,)}
LAYERS = {name: numbers(name, *shape) for name, shape in SHAPES.items()}


def layer(p, x, ctx, place, block=FIRST):
    return block.run(p["weights"], x, ctx, f"{place}.")


def used_outside(p, batch, ctx):
    """A weight that is used by a layer and elsewhere."""
    return layer(p, torch.tanh(layer(p, batch, ctx, 0)), ctx, 1) @ p["weights"]["0.weight"]


def time_first(p, batch, ctx):
    """Network with time first inside, `[T, B, D]`."""
    steps = torch.stack([batch, batch.square(), batch.sin()])
    return layer(p, torch.tanh(layer(p, steps, ctx, 0)).sum(0), ctx, 1)


def time_folded(p, batch, ctx):
    """Network with time folded into the batch inside, `[B T, D]`."""
    steps = torch.stack([batch, batch.square()], -2).reshape(-1, 3)
    return layer(p, torch.tanh(layer(p, steps, ctx, 0)).reshape(-1, 2, 3).sum(-2), ctx, 1)


def turned_round(p, batch, ctx):
    """Network with a layer used twice, once with the samples in another order."""
    first = torch.tanh(layer(p, batch, ctx, 0))
    return layer(p, torch.tanh(layer(p, first.flip(0), ctx, 0)).flip(0) + first, ctx, 1)


def features_without_gradient(p, batch, ctx):
    """Network whose features have no gradient: only the last layer is trained."""
    with torch.no_grad():
        features = layer(p, batch, ctx, 0)
    return layer(p, torch.tanh(features), ctx, 1)


def features_detached(p, batch, ctx):
    return layer(p, torch.tanh(layer(p, batch, ctx, 0)).detach(), ctx, 1)


def without_context(p, batch, ctx):
    return layer(p, torch.tanh(layer(p, batch, Context(), 0)), ctx, 1)


def scaled_by_a_weight(p, batch, ctx):
    return layer(p, batch, ctx, 0) * p["weights"]["1.bias"]


CLOSURES = [
    used_outside,
    time_first,
    time_folded,
    turned_round,
    features_without_gradient,
    features_detached,
    without_context,
    scaled_by_a_weight,
]


@pytest.mark.parametrize("forward", CLOSURES)
@pytest.mark.parametrize("samples", [2, 3, 20])
def test_layers_used_in_other_ways_than_row_by_row(forward, samples):
    p, x = {"weights": LAYERS}, numbers("x", samples, 3)
    fisher = categorical_fisher(forward, p, x, 0, chunk=8)
    torch.testing.assert_close(fisher, loop(forward, p, x), rtol=1e-9, atol=1e-12)


def test_only_what_is_not_a_linear_layers_is_differentiated_sample_by_sample(monkeypatch):
    differentiated = []
    original = sample_gradients._add_single
    monkeypatch.setattr(
        sample_gradients,
        "_add_single",
        lambda *arguments: (differentiated.append(arguments[1]), original(*arguments)),
    )
    for name, left in (("mlp", []), ("group norm", [["1.bias", "1.weight"]])):
        module, p = built(name)
        block = lift(module)
        differentiated.clear()
        squared_gradients(running(block), p, numbers("x", 5, 3), categorical_roots, 0)
        assert differentiated == left


@pytest.mark.parametrize("forward", CLOSURES)
def test_groups_of_any_closure(forward):
    """Functions that reorder rows between layers do not pass the context, as documented."""
    if forward is turned_round:
        check_groups(lambda p, batch, ctx: turned_round(p, batch, Context()), {"weights": LAYERS})
    else:
        check_groups(forward, {"weights": LAYERS})


@pytest.mark.parametrize("name", MODULES)
def test_groups_of_any_module(name):
    module, p = built(name)
    check_groups(calling(module), p)


def check_groups(forward, p: dict) -> None:
    x, y = numbers("groups", 3, 4, 3), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 1]])

    def losses(p, batch, ctx):
        return -distributions.categorical_log_prob(forward(p, batch["x"], ctx), batch["y"])

    gradients = group_gradients(losses, p, {"x": x, "y": y}, 0)
    assert list(gradients) == list(p["weights"])
    for group in range(3):
        leaves = {n: w.clone().requires_grad_() for n, w in p["weights"].items()}
        loss = losses({**p, "weights": leaves}, {"x": x[group], "y": y[group]}, Context()).mean()
        right = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for (name, leaf), gradient in zip(leaves.items(), right):
            assert gradients[name].shape == (3, *leaf.shape)
            torch.testing.assert_close(gradients[name][group], gradient, rtol=1e-9, atol=1e-12)


def test_a_gaussian_and_a_score_of_an_ordinary_module():
    module, p = built("mlp")
    x = numbers("x", 4, 3)

    def both(p, batch, ctx):
        return functional_call(module, p["weights"], batch)[:, :2]

    def log_prob(p, batch, ctx):
        outputs = functional_call(module, p["weights"], batch["x"])
        return distributions.normal_log_prob(outputs[:, :1], outputs[:, 1:2], batch["y"])

    draws = 4000
    fisher = gaussian_fisher(both, p, x, 0)
    mean, log_std = both(p, x, None).chunk(2, -1)
    y = mean + log_std.exp() * numbers("y", draws, 4, 1)
    scores = torch.stack([score_fisher(log_prob, p, {"x": x, "y": drawn}, 0) for drawn in y[:3]])
    many = score_fisher(log_prob, p, {"x": x.repeat(draws, 1), "y": y.reshape(-1, 1)}, 0)
    assert not torch.allclose(scores[0], scores[1])
    used = fisher > 0
    assert ((many - fisher)[used].abs() / fisher[used]).max() < 0.15  # 16,000 scores of a normal's square
    assert torch.equal(many > 0, used)


def test_gradients_are_found_without_gradients_and_in_inference_mode():
    module, p = built("mlp")
    block, x = lift(module), numbers("x", 5, 3)

    def forward(p, batch, ctx):
        return block.run(p["weights"], batch, ctx)

    expected = loop(calling(module), p, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = {"weights": {n: w.clone() for n, w in p["weights"].items()}}
            for closure in (forward, calling(module)):
                fisher = categorical_fisher(closure, inside, x.clone(), 0)
                torch.testing.assert_close(fisher, expected, rtol=1e-9, atol=1e-12)
                assert not fisher.requires_grad


# ---------------------------------------------------------------------- refused


def refused(forward, message: str, name: str = "mlp", x: Tensor | None = None) -> None:
    _, p = built(name)
    with pytest.raises(SettingError, match=message):
        categorical_fisher(forward, p, numbers("x", 5, 3) if x is None else x, 0)


def test_weights_from_elsewhere_and_cut_graphs_are_refused():
    module, p = built("mlp")
    refused(lambda p, batch, ctx: module(batch), "depend on none of the weights")
    refused(lambda p, batch, ctx: calling(module)(p, batch, ctx).detach(), "depend on none of the weights")
    refused(torch.no_grad()(calling(module)), "depend on none of the weights")
    block = lift(module)
    refused(lambda p, batch, ctx: block(batch), "depend on none of the weights")

    def losses(p, batch, ctx):
        return module(batch).square().sum(-1)

    with pytest.raises(SettingError, match="depend on none of the weights"):
        group_gradients(losses, p, numbers("x", 2, 5, 3), 0)


def test_outputs_that_are_no_logits_of_every_sample_are_refused():
    module, p = built("mlp")
    refused(lambda p, batch, ctx: calling(module)(p, batch, ctx).softmax(-1), "are probabilities")
    refused(lambda p, batch, ctx: calling(module)(p, batch, ctx).mean(), "not their mean")
    refused(lambda p, batch, ctx: calling(module)(p, batch, ctx).argmax(-1), "int64")
    refused(lambda p, batch, ctx: calling(module)(p, batch, ctx)[:, 0], "expected logits")
    refused(lambda p, batch, ctx: {"logits": calling(module)(p, batch, ctx)}, "are of type dict")
    log = categorical_fisher(lambda p, b, ctx: calling(module)(p, b, ctx).log_softmax(-1), p, numbers("x", 5, 3), 0)
    torch.testing.assert_close(log, loop(calling(module), p, numbers("x", 5, 3)), rtol=1e-9, atol=1e-12)
    with pytest.raises(SettingError, match="means and log deviations"):
        gaussian_fisher(calling(module), p, numbers("x", 5, 3), 0)
    with pytest.raises(SettingError, match="log-probabilities"):
        score_fisher(calling(module), p, numbers("x", 5, 3), 0)
    with pytest.raises(SettingError, match="not their mean"):
        group_gradients(lambda p, b, ctx: calling(module)(p, b, ctx).mean(), p, numbers("x", 2, 5, 3), 0)


def test_samples_that_meet_in_the_network_are_refused():
    for module in (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double(),
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 3)).double(),
    ):
        p = {"weights": {n: w.detach() for n, w in module.named_parameters()}}
        with pytest.raises(SettingError, match="a sample's output must depend on that sample alone"):
            categorical_fisher(calling(module.train()), p, numbers("x", 5, 3), 0)

    lstm = nn.LSTM(3, 3).double()  # takes [B, 3] for B steps
    p = {"weights": {n: w.detach() for n, w in lstm.named_parameters()}}
    with pytest.raises(SettingError, match="takes the batch axis for time"):
        categorical_fisher(lambda p, b, ctx: functional_call(lstm, p["weights"], b)[0], p, numbers("x", 5, 3), 0)

    def centred(p, batch, ctx):
        return by_hand(p, batch - batch.mean(-2, keepdim=True), ctx)

    with pytest.raises(SettingError, match="without the rest of its batch"):
        categorical_fisher(centred, {"weights": {n: w[0] for n, w in BY_HAND.items()}}, numbers("x", 5, 3), 0)


def test_kinds_labels_keys_and_shapes_that_do_not_fit_are_refused():
    module, p = built("mlp")
    x, y = numbers("x", 5, 3), torch.tensor([0, 1, 2, 1, 0])

    def call(kind, x=x, **given):
        return categorical_fisher(calling(module), p, x, 0, kind, **given)

    for kind in ("Exact", "EXACT", "", None, 0, ["exact"], torch.tensor(0)):
        with pytest.raises(SettingError, match="expected one of 'exact', 'sample', 'empirical'"):
            call(kind)
    for target in (y.double(), y[:4], F.one_hot(y)):
        with pytest.raises(SettingError, match="expected integers"):
            call("empirical", target=target)
    with pytest.raises(SettingError, match="labels outside 0 to 2"):
        call("empirical", target=y + 1)
    with pytest.raises(SettingError, match="target was given"):
        call("exact", target=y)
    with pytest.raises(SettingError, match="pass a key"):
        call("sample", key=random.make_keys([0]))
    with pytest.raises(SettingError, match="one axis of samples in all"):
        call("exact", x[:0])
    with pytest.raises(SettingError, match="expected learner axes"):
        categorical_fisher(calling(module), p, x.expand(2, 5, 3), 1)
    with pytest.raises(SettingError, match="there is no weight head, expected names among"):
        squared_gradients(calling(module), p, x, lambda out, batch: iter([out]), 0, ["head"])
    assert torch.equal(call("empirical", target=y.to(torch.uint8)), call("empirical", target=y))


def test_weights_that_are_not_under_their_name_are_refused():
    with pytest.raises(SettingError, match="the parameters have the keys w, expected"):
        categorical_fisher(lambda p, batch, ctx: batch @ p["w"].mT, {"w": numbers("w", 2, 3)}, numbers("x", 5, 3), 0)
