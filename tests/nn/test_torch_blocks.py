"""Blocks of torch's own modules: lifted, every learner gets what torch gives it alone, and recorded the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from rlmeta import nn
from rlmeta.engine.capture import Capture
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from tests.nn.learners import as_torch, assert_close, assert_equals_loop, data, indices, keys, scattered, take

Build = Callable[[], torch.nn.Module]

CONVOLUTIONS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "Conv1d": (lambda: torch.nn.Conv1d(3, 3, 3), (3, 7)),
    "Conv1d, strides, padding, dilation": (
        lambda: torch.nn.Conv1d(3, 6, 3, stride=2, padding=2, dilation=2, groups=3, bias=False),
        (3, 7),
    ),
    "Conv2d": (lambda: torch.nn.Conv2d(3, 3, 3), (3, 3, 5)),
    "Conv2d, strides, padding, dilation": (
        lambda: torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=2),
        (4, 6, 5),
    ),
    "Conv2d, same": (lambda: torch.nn.Conv2d(3, 3, 3, padding="same", bias=False), (3, 4, 5)),
    "Conv2d, reflect": (lambda: torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), (3, 4, 5)),
    "ConvTranspose1d": (lambda: torch.nn.ConvTranspose1d(3, 3, 3), (3, 4)),
    "ConvTranspose1d, strides, padding": (
        lambda: torch.nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (4, 4),
    ),
    "ConvTranspose2d": (lambda: torch.nn.ConvTranspose2d(3, 3, 3), (3, 3, 4)),
    "ConvTranspose2d, strides, padding": (
        lambda: torch.nn.ConvTranspose2d(4, 2, (3, 2), stride=2, padding=1, output_padding=1, groups=2, bias=False),
        (4, 3, 4),
    ),
}
POOLINGS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "MaxPool1d": (lambda: torch.nn.MaxPool1d(3, 2, 1), (3, 7)),
    "MaxPool2d": (lambda: torch.nn.MaxPool2d(3, 2, 1), (3, 5, 7)),
    "MaxPool2d, dilation, ceil": (lambda: torch.nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True), (3, 6, 7)),
    "AvgPool1d": (lambda: torch.nn.AvgPool1d(3, 2, 1), (3, 7)),
    "AvgPool2d": (lambda: torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 5, 7)),
    "AdaptiveAvgPool1d": (lambda: torch.nn.AdaptiveAvgPool1d(3), (3, 7)),
    "AdaptiveAvgPool2d": (lambda: torch.nn.AdaptiveAvgPool2d((2, 3)), (3, 5, 7)),
    "AdaptiveMaxPool1d": (lambda: torch.nn.AdaptiveMaxPool1d(3), (3, 7)),
    "AdaptiveMaxPool2d": (lambda: torch.nn.AdaptiveMaxPool2d((2, 3)), (3, 5, 7)),
}
NORMS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: torch.nn.BatchNorm1d(3), (3,)),
    "BatchNorm2d": (lambda: torch.nn.BatchNorm2d(3), (3, 3, 4)),
    "LayerNorm": (lambda: torch.nn.LayerNorm((3, 4)), (3, 4)),
    "RMSNorm": (lambda: torch.nn.RMSNorm(3), (3,)),
    "RMSNorm of two axes": (lambda: torch.nn.RMSNorm((3, 4), eps=0.1), (3, 4)),
    "InstanceNorm1d": (lambda: torch.nn.InstanceNorm1d(3), (3, 5)),
    "InstanceNorm2d": (lambda: torch.nn.InstanceNorm2d(3, affine=True), (3, 3, 4)),
    "InstanceNorm2d, running": (lambda: torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 3, 4)),
    "GroupNorm": (lambda: torch.nn.GroupNorm(2, 4), (4, 3)),
    "GroupNorm of vectors": (lambda: torch.nn.GroupNorm(3, 6, affine=False), (6,)),
}
WEIGHT_NORMS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "weight norm": (lambda: weight_norm(torch.nn.Linear(3, 4)), (3,)),
    "weight norm of all": (lambda: weight_norm(torch.nn.Linear(3, 4, bias=False), dim=-1), (3,)),
    "weight norm, convolution": (lambda: weight_norm(torch.nn.Conv2d(4, 4, 3, stride=2, groups=2)), (4, 4, 4)),
    "weight norm, other axis": (lambda: weight_norm(torch.nn.ConvTranspose1d(3, 4, 3), dim=1), (3, 5)),
    "spectral norm": (lambda: spectral_norm(torch.nn.Linear(3, 4)), (3,)),
    "spectral norm, two steps": (lambda: spectral_norm(torch.nn.Linear(3, 4, bias=False), n_power_iterations=2), (3,)),
    "spectral norm, convolution": (lambda: spectral_norm(torch.nn.Conv1d(4, 6, 3, groups=2)), (4, 5)),
    "spectral norm, transposed": (lambda: spectral_norm(torch.nn.ConvTranspose2d(3, 4, 2)), (3, 3, 4)),
}
EVERY = CONVOLUTIONS | POOLINGS | NORMS | WEIGHT_NORMS
SHAPES = [(), (1,), (3,), (3, 2)]


def made(name: str, learner_shape: tuple[int, ...]) -> tuple[Build, nn.Params, Tensor]:
    """How to build a module in float64, stacked parameters, and a batch of as many samples as there are learners."""
    build, shape = EVERY[name]
    params = scattered(nn.stack(lambda: build().double(), keys(*learner_shape)))
    return lambda: build().double(), params, data(*learner_shape, 3, *shape)


def context(training: bool, learner_shape: tuple[int, ...]) -> nn.Context:
    return nn.Context(training=training, learner_axes=len(learner_shape))


@pytest.mark.parametrize("learner_shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_lifted_module_is_torchs_learner_by_learner(name: str, learner_shape: tuple[int, ...]) -> None:
    build, params, x = made(name, learner_shape)
    block, reference = nn.lift(build()), build()
    assert block.state_dict().keys() == reference.state_dict().keys()
    for training in (False, True):
        reference.train(training)

        def run(p: nn.Params, x: Tensor, training: bool = training) -> Tensor:
            return nn.apply(block, p, x, context(training, learner_shape))

        assert_equals_loop(run, as_torch(reference), params, x, learner_shape)


WRONG_IN_TORCH = ("weight norm", "weight norm, convolution")
"""Its fused operation takes the norms for constants where it is differentiated twice."""


@pytest.mark.parametrize("name", [name for name in EVERY if name not in WRONG_IN_TORCH])
def test_second_derivatives_are_torchs(name: str) -> None:
    """Of x and of all parameters, in a random direction: those that mix learners would be 0 in the loop."""
    build, params, x = made(name, (3,))
    block, reference = nn.lift(build()), build()

    def twice(run: Callable[[nn.Params, Tensor], Tensor], p: nn.Params, x: Tensor) -> list[Tensor]:
        own = {name: v.clone().requires_grad_(v.is_floating_point() and "running" not in name) for name, v in p.items()}
        leaves = [x.clone().requires_grad_(), *(v for n, v in own.items() if v.requires_grad and "._" not in n)]
        loss = run(own, leaves[0]).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum((g.sin() * g).sum() for g in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, second)]

    second = twice(lambda p, x: nn.apply(block, p, x, context(True, (3,))), params, x)
    assert any(bool((value != 0).any()) for value in second)
    for i in range(3):
        alone = twice(lambda p, x: torch.func.functional_call(reference, p, (x,)), take(params, (i,)), x[i])
        for together, single in zip(second, alone, strict=True):
            assert_close(together[i], single, rtol=1e-8, atol=1e-10)


BUFFERED = [name for name in EVERY if next(EVERY[name][0]().buffers(), None) is not None]


@pytest.mark.parametrize("learner_shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BUFFERED)
def test_new_buffers_are_torchs_and_the_old_ones_stay(name: str, learner_shape: tuple[int, ...]) -> None:
    build, params, x = made(name, learner_shape)
    kept = {name: value.clone() for name, value in params.items()}
    block, ctx = nn.lift(build()), context(True, learner_shape)
    nn.apply(block, params, x, ctx)
    assert_close(params, kept, rtol=0, atol=0)
    assert set(ctx.new_buffers) == {name for name, _ in build().named_buffers()}
    for index in indices(learner_shape):
        own = {name: value.clone() for name, value in take(params, index).items()}
        torch.func.functional_call(build(), own, (x[index],))
        for name, value in ctx.new_buffers.items():
            assert not value.requires_grad
            assert_close(take(value, index), own[name])
    evaluated = context(False, learner_shape)
    nn.apply(block, params, x, evaluated)
    assert evaluated.new_buffers == {}


@pytest.mark.parametrize("name", [name for name, (_, shape) in EVERY.items() if len(shape) > 1])
def test_any_batch_axes(name: str) -> None:
    build, params, _ = made(name, (3,))
    block = nn.lift(build(), feature_axes=len(EVERY[name][1]))
    many = data(3, 3, 3, *EVERY[name][1])
    out = nn.apply(block, params, many, context(False, (3,)))
    folded = nn.apply(nn.lift(build()), params, many.flatten(1, 2), context(False, (3,)))
    assert_close(out, folded.unflatten(1, (3, 3)))


@pytest.mark.filterwarnings("error:.*not recorded")
@pytest.mark.parametrize(("learners", "backend"), [(1, ""), (3, "python")])
@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_step_is_recorded(name: str, learners: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLMETA_BACKEND", backend)
    build, shape = EVERY[name]
    block, start = nn.lift(build()), nn.stack(build, keys(learners))
    assert nn.lifted.recordable(build())
    trained = {name for name, _ in build().named_parameters()}

    def step(given: tree.Tree) -> tree.Tree:
        own = {name: v.detach().requires_grad_(name in trained) for name, v in given["params"].items()}
        ctx, leaves = context(True, (learners,)), [own[name] for name in sorted(trained)]
        with torch.enable_grad():
            x = given["x"].detach().requires_grad_()
            loss = nn.apply(block, own, x, ctx).square().mean()
        first, *gradients = torch.autograd.grad(loss, [x, *leaves])
        moved = {name: own[name].detach() - 0.1 * g for name, g in zip(sorted(trained), gradients)}
        return {"params": {**given["params"], **ctx.new_buffers, **moved}, "x": first}

    capture, params = Capture(warm_up=2), start
    for seed in range(6):
        given = {"params": params, "x": data(learners, 4, *shape, seed=seed).float()}
        done, expected = capture("step", step, given), step(given)
        assert all(tree.flatten(tree.map(torch.equal, done, expected)).values())
        params = done["params"]
    assert capture._programs and None not in capture._programs.values()


@pytest.mark.parametrize("name", [*WEIGHT_NORMS])
def test_a_normalised_weight_is_computed_for_all_learners_at_once(name: str) -> None:
    module: Any = EVERY[name][0]()
    block = nn.lift(torch.nn.Sequential(module, torch.nn.ReLU()))
    assert type(block.get_submodule("0")).__name__ == "NormedWeight"
    assert all(a is b for a, b in zip(block.parameters(), module.parameters()))
    x = torch.randn(2, *EVERY[name][1])
    block.eval()  # in training either call would move the shared vectors of the power method
    assert_close(block(x), module(x).relu(), rtol=1e-5, atol=1e-5)
    module.register_forward_hook(lambda *_: None)
    assert type(nn.lift(module)).__name__ == "Lifted"


class Normed(torch.nn.Module):
    """A user's own, with normalised weights inside."""

    recordable = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = spectral_norm(torch.nn.Conv1d(3, 4, 3)), weight_norm(torch.nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh().mean(-1))


@pytest.mark.parametrize("learner_shape", SHAPES, ids=str)
def test_normalised_weights_inside_a_users_module(learner_shape: tuple[int, ...]) -> None:
    params = scattered(nn.stack(lambda: Normed().double(), keys(*learner_shape)))
    block, x = nn.lift(Normed().double()), data(*learner_shape, 3, 3, 5)
    for training in (False, True):
        reference, ctx = Normed().double().train(training), context(training, learner_shape)
        assert_equals_loop(
            lambda p, x, ctx=ctx: nn.apply(block, p, x, ctx), as_torch(reference), params, x, learner_shape
        )
    for index in indices(learner_shape):
        own = {name: value.clone() for name, value in take(params, index).items()}
        torch.func.functional_call(Normed().double(), own, (x[index],))
        for name, value in ctx.new_buffers.items():
            assert_close(take(value, index), own[name])
    assert not block._looped_modes and nn.lifted.recordable(Normed())  # type: ignore[attr-defined]


def test_fisher_information_of_a_normalised_weight() -> None:
    """Sample by sample, since its weight is no parameter; that of the layer behind it from its inputs."""

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(weight_norm(torch.nn.Linear(3, 4)), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()

    params, block = nn.stack(build, keys(2)), nn.lift(build())
    x = data(2, 5, 3)
    ours = nn.categorical_fisher(
        lambda p, x, ctx: nn.apply(block, p["weights"], x, ctx), {"weights": params}, x, learner_axes=1
    )
    for i in range(2):
        total = {name: torch.zeros_like(value[i]) for name, value in params.items()}
        leaves = {name: value[i].clone().requires_grad_() for name, value in params.items()}
        for row in x[i]:
            log_probs = torch.func.functional_call(build(), leaves, (row,)).log_softmax(-1)
            for log_prob in log_probs:
                gradients = torch.autograd.grad(log_prob, list(leaves.values()), retain_graph=True)
                for name, gradient in zip(leaves, gradients):
                    total[name] += log_prob.exp().detach() * gradient.square() / len(x[i])
        assert_close(ours[i], torch.cat([value.flatten() for value in total.values()]), rtol=1e-8)


@pytest.mark.parametrize("name", WRONG_IN_TORCH)
def test_second_derivatives_of_weight_norm_are_right(name: str) -> None:
    build, params, x = made(name, (2,))
    block, leaves = nn.lift(build()), [value.requires_grad_() for value in params.values()]
    run = lambda x, *values: nn.apply(block, dict(zip(params, values)), x)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, [x.requires_grad_(), *leaves], fast_mode=True)


def test_the_largest_singular_value_is_found() -> None:
    module = spectral_norm(torch.nn.Linear(5, 4).double(), n_power_iterations=50)
    params = scattered(nn.stack(lambda: module, keys(3)))
    ctx = nn.Context(training=True)
    nn.apply(nn.lift(module), params, data(3, 2, 5), ctx)
    u, v = (ctx.new_buffers[f"parametrizations.weight.0.{name}"] for name in ("_u", "_v"))
    weight = params["parametrizations.weight.original"]
    found = torch.einsum("li,lij,lj->l", u, weight, v)
    assert_close(found, torch.linalg.svdvals(weight)[:, 0], rtol=1e-6)


# ---------------------------------------------------------------------- embedding


@pytest.mark.parametrize("learner_shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_is_torchs(learner_shape: tuple[int, ...], padding: int | None) -> None:
    module = torch.nn.Embedding(3, 3, padding_idx=padding).double()
    params = scattered(nn.stack(lambda: module, keys(*learner_shape)))
    x = torch.randint(0, 3, (*learner_shape, 3, 3), generator=torch.Generator().manual_seed(1))
    block = nn.lift(module)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(module), params, x, learner_shape)
    leaf = params["weight"].clone().requires_grad_()
    nn.apply(block, {"weight": leaf}, x).sin().sum().backward()
    assert padding is None or not leaf.grad[..., padding, :].any()


def test_an_embedding_is_one_hot_and_linear() -> None:
    """So the default network of a Discrete space needs none."""
    table = data(2, 5, 3)
    x = torch.tensor([[0, 4, 2], [1, 1, 3]])
    ours = nn.apply(nn.lift(torch.nn.Embedding(5, 3)), {"weight": table}, x)
    hot = torch.nn.functional.one_hot(x, 5).double()
    assert_close(ours, nn.apply(nn.Linear(5, 3, bias=False), {"weight": table.mT}, hot))


def test_an_embedding_inside_a_users_module_keeps_its_padding() -> None:
    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.nn.Embedding(5, 3, padding_idx=-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(x).sum(-2)

    module = Bag().double()
    params = scattered(nn.stack(lambda: module, keys(3)))
    x = torch.tensor([[[0, 4, 4], [1, 1, 4]]] * 3)
    assert_equals_loop(lambda p, x: nn.apply(nn.lift(module), p, x), as_torch(module), params, x, (3,))


def test_a_table_of_ones_own() -> None:
    block = nn.Embedding(5, 3, padding=-1)
    assert block.weight.dtype == torch.float32 and not block.weight[4].any() and block.weight[:4].all()
    assert block(torch.tensor([[4, 0]], dtype=torch.uint8)).shape == (1, 2, 3)
    for count, features, padding in ((0, 3, None), (3, 0, None), (3, 3, 3), (3, 3, -4)):
        with pytest.raises(SettingError, match="an embedding of"):
            nn.Embedding(count, features, padding)
    params = nn.stack(lambda: block, keys(3))
    for x in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"expected whole numbers with the learner axes \(3,\) in front"):
            nn.apply(block, params, x)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embedding_that_learners_cannot_share_is_refused(options: Any) -> None:
    with pytest.raises(SettingError, match="leave these options out"):
        nn.lift(torch.nn.Sequential(torch.nn.Embedding(3, 3, **options)))
