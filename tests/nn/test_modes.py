"""Training and evaluation modes of submodules: `Context.training` does not affect those in `eval()`, as in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.functional import random
from tests.nn.learners import assert_close, data, keys


class Own(torch.nn.Module):
    """Network without an equivalent block, with every kind of layer that has modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)
        self.drop, self.last = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def plain() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)
    )


def frozen(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Network with its first normalisation and its dropout in evaluation mode."""
    module = build().double()
    for part in list(module.children())[1:3]:
        part.eval()
    return module


BUILDS = [plain, Own]


def moved(ctx: nn.Context, params: nn.Params) -> set[str]:
    """Submodules whose buffers a forward pass changes."""
    changed = [name for name, value in ctx.new_buffers.items() if not torch.equal(value, params[name])]
    return {name.split(".")[0] for name in changed}


@pytest.mark.parametrize("build", BUILDS)
def test_what_was_put_in_eval_stays_so_while_the_rest_trains(build: Callable) -> None:
    module = frozen(build)
    block = nn.lift(module)
    params = {name: torch.stack([value, value + 1]) for name, value in module.state_dict().items()}
    ctx = nn.Context(training=True)  # without a key: the dropout is off
    x = data(2, 5, 3)
    out = nn.apply(block, params, x, ctx)
    last = list(dict(module.named_children()))[3]
    assert moved(ctx, params) == {last}
    for i in range(2):
        own = {name: value[i].clone() for name, value in params.items()}
        assert_close(out[i], torch.func.functional_call(module, own, (x[i],)))
        assert_close(ctx.new_buffers[f"{last}.running_mean"][i], own[f"{last}.running_mean"])


@pytest.mark.parametrize("build", BUILDS)
def test_an_ordinary_call_obeys_the_modes_of_the_parts_as_torch_does(build: Callable) -> None:
    def modes(module: torch.nn.Module) -> torch.nn.Module:
        module.eval()
        list(module.children())[1].train()  # a part that trains under a root that does not
        return module

    torch.manual_seed(0)
    reference = build().double()
    block = nn.lift(build().double())
    block.load_state_dict(reference.state_dict())
    modes(reference), modes(block)
    x = data(5, 3)
    assert_close(block(x), reference(x))
    assert_close(dict(block.state_dict()), dict(reference.state_dict()))
    block.eval(), reference.eval()
    assert_close(block(x), reference(x))
    assert block.get_buffer("1.num_batches_tracked" if build is plain else "norm.num_batches_tracked") == 1


@pytest.mark.parametrize("build", BUILDS)
def test_no_call_changes_what_the_next_one_does(build: Callable) -> None:
    block, params = nn.lift(build()), nn.stack(build, keys(2))
    x = torch.randn(2, 5, 3)
    evaluated = nn.apply(block, params, x)
    first, again = nn.Context(training=True, key=keys(2)), nn.Context(training=True, key=keys(2))
    trained = nn.apply(block, params, x, first)
    assert torch.equal(nn.apply(block, params, x), evaluated)
    assert torch.equal(nn.apply(block, params, x, again), trained)
    assert_close(first.new_buffers, again.new_buffers, rtol=0, atol=0)
    fresh = nn.Context(training=True, key=keys(2))
    assert torch.equal(nn.apply(nn.lift(build()), params, x, fresh), trained)  # a block that was never called


def test_a_module_that_freezes_its_own_parts_has_its_way() -> None:
    class Freezing(Own):
        def train(self, mode: bool = True) -> torch.nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

    ctx, params = nn.Context(training=True, key=keys(2)), nn.stack(Freezing, keys(2))
    module = Freezing()
    nn.apply(nn.lift(module), params, torch.randn(2, 5, 3), ctx)
    assert moved(ctx, params) == {"last"}
    module.last.eval()
    ctx = nn.Context(training=True, key=keys(2))
    nn.apply(nn.lift(module), params, torch.randn(2, 5, 3), ctx)
    assert moved(ctx, params) == set()
    assert module.norm.training  # the user's own module is left alone


class Attending(torch.nn.Module):
    """A layer of torch's whose dropout is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)),
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)),
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout1d(0.5)),
        Attending,
    ],
)
def test_gradients_of_an_evaluation_that_nobody_asked_for_are_refused(build: Callable, folded: bool) -> None:
    key = random.make_keys([0, 1])
    x, params = torch.randn(2, 5, 4), nn.stack(build, key)
    if build is Attending:
        x = x.unsqueeze(2)
    block = nn.lift(build(), x.dim() - 2 if folded else None)
    leaves = {n: p.requires_grad_() if p.is_floating_point() else p for n, p in params.items()}
    with pytest.raises(SettingError, match=r"is in training mode .* no ctx: pass Context\(training=True, key=...\)"):
        nn.apply(block, leaves, x)
    evaluated = nn.apply(block, leaves, x, nn.Context())
    assert evaluated.requires_grad
    with torch.no_grad():
        assert torch.allclose(nn.apply(block, leaves, x), evaluated), "nothing is trained here"
    assert torch.allclose(nn.apply(nn.lift(build().eval()), leaves, x), evaluated)
    if not folded:
        nn.apply(block, leaves, x, nn.Context(training=True, key=key))


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.0), torch.nn.LayerNorm(4)),
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, track_running_stats=False)),
    ],
)
def test_what_trains_as_it_is_evaluated_needs_no_context(build: Callable) -> None:
    params = {n: p.requires_grad_() for n, p in nn.stack(build, random.make_keys([0, 1])).items()}
    assert nn.apply(nn.lift(build()), params, torch.randn(2, 5, 4)).requires_grad
