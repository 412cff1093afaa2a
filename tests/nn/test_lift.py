from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.nn.lift import Folded
from tests.nn.learners import (
    LEARNER_SHAPES,
    as_torch,
    assert_close,
    assert_equals_loop,
    data,
    indices,
    keys,
    scattered,
    take,
)

# ------------------------------------------------------------------------------------------------- modules of "users"


class Residual(torch.nn.Module):
    """Residual network that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.tanh(self.first(x)) * self.scale


class Convolutions(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2)
        self.norm = torch.nn.BatchNorm2d(3)
        self.drop = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.drop(self.out(self.drop(h)))


class Branching(Residual):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) if x.sum() > 0 else self.scale * x


class Recurrent(torch.nn.Module):
    """(features, memory) from (x `[T, N, D]`, memory)."""

    def __init__(self, kind: type[torch.nn.RNNBase] = torch.nn.LSTM) -> None:
        super().__init__()
        self.body = kind(3, 3)
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        h, memory = self.body(x, memory)
        return self.head(h), memory


class Counting(torch.nn.Module):
    """Network with statistics of its own: a buffer written in place and a replaced one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.detach().sum(0))
        self.steps = self.steps + 1
        return x * self.steps


class FunctionalDropout(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Noise(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Sensors(torch.nn.Module):
    """Network from a dictionary to a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.Flatten())
        self.state = torch.nn.Linear(3, 3)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"image": self.image(x["image"]), "state": self.state(x["state"])}


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def stacked(build: Callable[[], torch.nn.Module], learner_shape: tuple[int, ...]) -> nn.Params:
    return scattered(nn.stack(build, keys(*learner_shape)))


def lifted(build: Callable[[], torch.nn.Module], **options: Any) -> Any:
    return nn.lift(build(), **options)


# ------------------------------------------------------------------------------------------------------------- native


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: torch.nn.Linear(3, 3), nn.Linear),
        (lambda: torch.nn.Linear(3, 3, bias=False), nn.Linear),
        (lambda: torch.nn.LayerNorm(3, eps=0.1), nn.LayerNorm),
        (lambda: torch.nn.LayerNorm((3, 3), bias=False), nn.LayerNorm),
        (lambda: torch.nn.LayerNorm(3, elementwise_affine=False), nn.LayerNorm),
        (lambda: torch.nn.LeakyReLU(0.3), nn.Activation),
        (lambda: torch.nn.Identity(), nn.Activation),
        (lambda: torch.nn.Softplus(2.0), nn.Activation),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)), nn.Sequential),
        (
            lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3), torch.nn.BatchNorm1d(3)),
            nn.Sequential,
        ),
        (lambda: torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU())), nn.Sequential),
    ],
)
def test_known_modules_run_natively(build: Callable, kind: type, learner_shape: tuple[int, ...]) -> None:
    module = build()
    block = nn.lift(module)
    assert type(block) is kind
    assert not any(isinstance(part, nn.Lifted) for part in block.modules())
    own, theirs = dict(block.state_dict(keep_vars=True)), dict(module.state_dict(keep_vars=True))
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own)
    params = stacked(build, learner_shape)
    x = data(*learner_shape, 3, 3, 3)
    module.eval()
    ctx = nn.Context(learner_axes=len(learner_shape))
    assert_equals_loop(lambda p, x: nn.apply(block, p, x, ctx), as_torch(module), params, x, learner_shape)


def test_blocks_stay_as_they_are_and_hooks_are_kept() -> None:
    block = nn.MLP(3, [3], 2)
    assert nn.lift(block) is block
    hooked = torch.nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, inputs, out: out + 100)
    assert nn.lift(hooked)(torch.zeros(1, 3)).min() > 50
    params = nn.stack(lambda: torch.nn.Linear(3, 3), keys(3))
    assert nn.apply(nn.lift(hooked), params, torch.zeros(3, 1, 3)).min() > 50


def test_subclasses_keep_their_own_forward() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = Doubled(3, 3)
    x = torch.randn(2, 3)
    assert torch.equal(nn.lift(module)(x), module(x))
    assert isinstance(nn.lift(torch.nn.Sequential(module)), nn.Sequential)


# ----------------------------------------------------------------------------------------------------- any other module


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (Residual, (3, 3)),
        (Residual, (3, 3, 3)),
        (Convolutions, (3, 2, 3, 3)),
        (Tied, (3, 3)),
        (lambda: torch.nn.PReLU(3), (3, 3)),
        (lambda: torch.nn.Sequential(torch.nn.Conv1d(3, 3, 2), torch.nn.ReLU(), torch.nn.Flatten()), (3, 3, 3)),
        (lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3)), (3, 3)),
        (lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 3, 4)),
        (lambda: torch.nn.Sequential(Residual(), torch.nn.Linear(3, 2)), (3, 3)),
    ],
)
def test_equals_a_loop_over_learners(build: Callable, shape: tuple[int, ...], learner_shape: tuple[int, ...]) -> None:
    params = stacked(build, learner_shape)
    x = data(*learner_shape, *shape)
    run = lifted(build)
    assert_equals_loop(
        lambda p, x: nn.apply(run, p, x, nn.Context()), as_torch(build().eval()), params, x, learner_shape
    )


def test_learners_run_at_once_where_they_can() -> None:
    block = lifted(Residual)
    params, x = stacked(Residual, (3,)), data(3, 3, 3)
    nn.apply(block, params, x)
    nn.apply(block, params, x)
    assert block._template[0].calls == 2


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_a_loop_where_they_cannot_and_only_one_attempt(learner_shape: tuple[int, ...]) -> None:
    params = stacked(Branching, learner_shape)
    x = data(*learner_shape, 3, 3)
    block = lifted(Branching)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(Branching()), params, x, learner_shape)
    learners = len(indices(learner_shape))
    before = block._template[0].calls
    nn.apply(block, params, x)
    assert block._template[0].calls == before + learners


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_modules_with_memory(kind: type[torch.nn.RNNBase], learner_shape: tuple[int, ...]) -> None:
    def build() -> torch.nn.Module:
        return Recurrent(kind)

    block, module = lifted(build), build()
    params = stacked(build, learner_shape)
    x = data(*learner_shape, 3, 3, 3)
    h = data(*learner_shape, 1, 3, 3, seed=4)
    memory = (h, 2 * h) if kind is torch.nn.LSTM else h

    def run(p: nn.Params, inputs: Any) -> Any:
        return block.run(p, inputs[0], nn.Context(), memory=inputs[1])

    def reference(p: nn.Params, inputs: Any, index: tuple[int, ...]) -> Any:
        return torch.func.functional_call(module, p, inputs)

    assert_equals_loop(run, reference, params, (x, memory), learner_shape)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(module), params, x, learner_shape)


@pytest.mark.parametrize("build", [Recurrent, Tied, Convolutions, lambda: torch.nn.TransformerEncoderLayer(3, 1, 4)])
def test_each_learner_equals_the_module_that_loaded_its_weights(build: Callable) -> None:
    params, module = stacked(build, (3,)), build().double().eval()
    x = data(3, 3, 2, 3, 3) if build is Convolutions else data(3, 3, 3, 3)
    out = nn.apply(lifted(build), params, x)
    for i in range(3):
        module.load_state_dict(take(params, (i,)), strict=False)
        assert_close(take(out, (i,)), module(x[i]))


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_dictionaries_pass_through(learner_shape: tuple[int, ...]) -> None:
    params = stacked(Sensors, learner_shape)
    x = {"image": data(*learner_shape, 3, 1, 3, 3), "state": data(*learner_shape, 3, 3)}
    block = lifted(Sensors)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(Sensors()), params, x, learner_shape)


@pytest.mark.parametrize("learner_shape", [(), (3,)])
def test_outputs_that_are_no_tensors(learner_shape: tuple[int, ...]) -> None:
    class Partial(Residual):
        def forward(self, x: Tensor) -> Any:
            return {"features": super().forward(x), "memory": None}

    out = nn.apply(lifted(Partial), stacked(Partial, learner_shape), data(*learner_shape, 3, 3))
    assert out["memory"] is None
    assert out["features"].shape == (*learner_shape, 3, 3)


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_batch_axes_are_folded_where_the_features_are_known(learner_shape: tuple[int, ...]) -> None:
    params = stacked(Sensors, learner_shape)
    image, state = data(*learner_shape, 3, 3, 1, 3, 3), data(*learner_shape, 3, 3, 3)
    space = gym.spaces.Dict(image=gym.spaces.Box(0, 1, (1, 3, 3)), state=gym.spaces.Box(0, 1, (3,)))
    block = lifted(Sensors, feature_axes=nn.feature_axes(space))
    assert isinstance(block, Folded)
    assert set(block.state_dict()) == set(params)
    out = nn.apply(block, params, {"image": image, "state": state})
    axes = len(learner_shape)
    flat = {"image": image.flatten(axes, axes + 1), "state": state.flatten(axes, axes + 1)}
    expected = nn.apply(lifted(Sensors), params, flat)
    for name in ("image", "state"):
        assert_close(out[name], expected[name].reshape(*learner_shape, 3, 3, -1))
    single = nn.apply(block, params, {"image": image[..., 0, 0, :, :, :], "state": state[..., 0, 0, :]})
    assert_close(single["state"], out["state"][..., 0, 0, :])
    with pytest.raises(ValueError, match="batch axes"):
        nn.apply(block, params, {"image": image, "state": state[..., :2, :]})
    with pytest.raises(ValueError, match="has the entries"):
        nn.apply(block, params, image)
    with pytest.raises(ValueError, match=r"\['state'\] has shape"):
        nn.apply(block, stacked(Sensors, (3, 3)), {"image": data(3, 3, 3, 1, 3, 3), "state": data(3, 3)})


def test_folding_reaches_native_blocks() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2), torch.nn.BatchNorm1d(2)).double()
    block = nn.lift(module, feature_axes=2)
    params = scattered(nn.stack(lambda: module, keys(3)))
    x = data(3, 3, 3, 3, 3)
    ctx, plain = nn.Context(training=True), nn.Context(training=True)
    out = nn.apply(block, params, x, ctx)
    assert_close(out, nn.apply(nn.lift(module), params, x.flatten(1, 2), plain).reshape(3, 3, 3, 2))
    assert_close(ctx.new_buffers, plain.new_buffers)
    assert len(ctx.new_buffers) == 3
    assert block(data(2, 5, 3, 3)).shape == (2, 5, 2)


# ------------------------------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("build", "shape"), [(Convolutions, (3, 2, 3, 3)), (Counting, (3, 3))])
def test_new_buffers_are_returned_and_nothing_is_written(
    build: Callable, shape: tuple[int, ...], wrapped: bool, learner_shape: tuple[int, ...]
) -> None:
    make = (lambda: torch.nn.Sequential(build())) if wrapped else build
    block, module = nn.lift(make()), make().double()
    params = stacked(make, learner_shape)
    kept = copy.deepcopy(params)
    own = {name: value.clone() for name, value in block.state_dict().items()}
    ctx = nn.Context(training=True, key=keys(*learner_shape))
    x = data(*learner_shape, *shape)
    out = nn.apply(block, params, x, ctx)
    assert_close(params, kept, rtol=0, atol=0)
    assert_close(dict(block.state_dict()), own, rtol=0, atol=0)
    buffers = {name for name, _ in module.named_buffers()}
    assert set(ctx.new_buffers) == buffers
    for index in indices(learner_shape):
        state = {name: value.clone() for name, value in take(params, index).items()}
        expected = torch.func.functional_call(module, state, (x[index],))
        assert_close(out[index], expected)
        for name in buffers:
            assert_close(ctx.new_buffers[name][index], state[name])
    evaluation = nn.Context()
    nn.apply(block, params, x, evaluation)
    assert evaluation.new_buffers == {}
    assert_close(params, kept, rtol=0, atol=0)


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_gradients_in_training_mode(learner_shape: tuple[int, ...]) -> None:
    block, params = lifted(Convolutions), stacked(Convolutions, learner_shape)
    x = data(*learner_shape, 3, 2, 3, 3)

    def run(params: nn.Params, x: Tensor) -> Tensor:
        return nn.apply(block, params, x, nn.Context(training=True, key=keys(*learner_shape)))

    assert_equals_loop(run, as_torch(Convolutions()), params, x, learner_shape)


def test_an_ordinary_call_trains_its_own_buffers() -> None:
    torch.manual_seed(0)
    module = Convolutions()
    block = nn.lift(copy.deepcopy(module))
    x = torch.randn(5, 2, 3, 3)
    assert_close(block(x), module(x), rtol=1e-5, atol=1e-6)
    assert_close(dict(block.state_dict()), dict(module.state_dict()), rtol=1e-5, atol=1e-6)
    assert block.get_buffer("norm.num_batches_tracked") == 1
    block.eval(), module.eval()
    assert_close(block(x), module(x), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- randomness


def draw(block: Any, params: nn.Params, x: Tensor, key: Tensor | None, training: bool = True) -> Tensor:
    return nn.apply(block, params, x, nn.Context(training=training, key=key))


@pytest.mark.parametrize("build", [FunctionalDropout, Noise, lambda: Convolutions(0.5)])
def test_draws_are_the_learners_own(build: Callable) -> None:
    params = stacked(build, (3,))
    x = data(1, 3, 2, 3, 3).expand(3, 3, 2, 3, 3)
    params = {name: value[:1].expand_as(value) for name, value in params.items()}
    key = keys(3)
    fresh, fewer, alone, block = (lifted(build) for _ in range(4))
    before = torch.get_rng_state()
    out = draw(fresh, params, x, key)
    assert_close(out, draw(block, params, x, key))
    assert_close(out, draw(block, params, x, key))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out, draw(block, params, x, keys(3, seed=7)))
    order = torch.tensor([2, 0])
    assert_close(out[order], draw(fewer, take(params, order), x[order], key[order]))  # type: ignore[arg-type]
    assert_close(out[1], draw(alone, take(params, (1,)), x[1], key[1]))
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_inside_runs_at_once_and_every_call_has_its_own_mask() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.other = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)
            self.again = self.drop
            self.calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            return self.drop(x), self.again(x), self.other(x)

    block = nn.lift(Twice())
    ctx = nn.Context(training=True, key=keys(3), learner_axes=1)
    out = torch.stack(nn.apply(block, {}, torch.ones(3, 1000), ctx))
    assert block._template[0].calls == 1  # type: ignore[attr-defined]
    masks = (out > 0).flatten(0, 1)
    for i in range(9):
        for j in range(i):
            assert 400 < (masks[i] == masks[j]).sum() < 600
    assert torch.equal(out, torch.stack(nn.apply(block, {}, torch.ones(3, 1000), ctx)))
    assert torch.equal(nn.apply(block, {}, torch.ones(3, 5), nn.Context(key=keys(3)))[0], torch.ones(3, 5))


def test_two_blocks_with_one_key_draw_different_numbers() -> None:
    for build in (FunctionalDropout, lambda: torch.nn.ModuleList([torch.nn.Dropout(0.5)])[0], Noise):
        block, ctx = nn.lift(build()), nn.Context(training=True, key=keys(3))
        x = torch.ones(3, 100)
        assert not torch.equal(block.run({}, x, ctx, "actor."), block.run({}, x, ctx, "critic."))
        assert torch.equal(block.run({}, x, ctx, "actor."), block.run({}, x, ctx, "actor."))


@pytest.mark.parametrize("learner_shape", [(), (3,)])
@pytest.mark.parametrize("build", [FunctionalDropout, Noise, lambda: Convolutions(0.5)])
def test_draws_need_a_key(build: Callable, learner_shape: tuple[int, ...]) -> None:
    params, x = stacked(build, learner_shape), data(*learner_shape, 3, 2, 3, 3)
    block = lifted(build)
    ctx = nn.Context(training=True, learner_axes=len(learner_shape))
    for _ in range(2):
        with pytest.raises(SettingError, match="draws random numbers: pass a key"):
            nn.apply(block, params, x, ctx)
    draw(block, params, x, keys(*learner_shape))
    if build is not Noise:
        evaluation = nn.Context(learner_axes=len(learner_shape))
        assert nn.apply(block, params, x, evaluation).shape[: x.dim() - 4] == learner_shape


def test_an_ordinary_call_of_a_drawing_module() -> None:
    for build in (FunctionalDropout, Noise, lambda: torch.nn.Sequential(torch.nn.Dropout(0.5))):
        block = nn.lift(build())
        torch.manual_seed(1)
        first, second = block(torch.ones(50)), block(torch.ones(50))
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(block(torch.ones(50)), first)


# ------------------------------------------------------------------------------------------- the user's own module


def test_the_users_module_is_left_alone() -> None:
    module = Convolutions(0.5)
    module.drop.eval()
    parts = dict(module.named_modules())
    modes = {name: part.training for name, part in parts.items()}
    block = nn.lift(module)
    nn.apply(block, nn.stack(lambda: Convolutions(0.5), keys(3)), torch.randn(3, 3, 2, 3, 3))
    assert dict(module.named_modules()) == parts
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert type(module.drop) is torch.nn.Dropout


def test_tensors_are_shared_and_names_are_the_users() -> None:
    module = Convolutions()
    block = nn.lift(module)
    assert block.state_dict().keys() == module.state_dict().keys()
    assert all(a is b for a, b in zip(block.parameters(), module.parameters()))
    block.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
    assert module.conv.weight.abs().sum() == 0
    assert block.double().get_parameter("conv.weight").dtype == torch.float64
    copied = copy.deepcopy(block)
    copied.get_parameter("conv.weight").data.fill_(1.0)
    assert module.conv.weight.abs().sum() == 0
    copied.get_parameter("out.weight").data.fill_(1.0)
    x = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(block.eval()(x), torch.zeros(1, 3, dtype=torch.float64))
    copied.get_parameter("out.bias").data.fill_(7.0)
    assert torch.equal(copied.eval()(x), torch.full((1, 3), 7.0, dtype=torch.float64))


def test_blocks_inside_a_users_module() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.MLP(3, [3]), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    block, native = nn.lift(Mixed()), nn.Sequential(*Mixed().body.children())
    params = stacked(Mixed, (3,))
    inner = {name.removeprefix("body."): value for name, value in params.items()}
    x = data(3, 3, 3)
    assert_close(nn.apply(block, params, x), nn.apply(native, inner, x))
    ctx = nn.Context(training=True, key=keys(3))
    first = nn.apply(block, params, x, ctx)
    assert set(ctx.new_buffers) == {name for name in params if "running" in name or "tracked" in name}
    assert_close(first, nn.apply(nn.lift(Mixed()), params, x, nn.Context(training=True, key=keys(3))))
    assert_close(first[1], nn.apply(block, take(params, (1,)), x[1], nn.Context(training=True, key=keys(3)[1])))


def test_the_users_mistakes_are_shown_as_they_are() -> None:
    class Broken(Residual):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("my own mistake")

    with pytest.raises(KeyError, match="my own mistake"):
        nn.apply(lifted(Broken), stacked(Broken, (3,)), data(3, 3, 3))
    block = lifted(Residual)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nn.apply(block, stacked(Residual, (3,)), data(3, 3, 4))
    nn.apply(block, stacked(Residual, (3,)), data(3, 3, 3))
    assert not block._looped_modes


@pytest.mark.parametrize("shape", [(2, 3, 3), (3,), ()])
def test_refuses_inputs_of_other_learners(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected the learner axes \(3, 2\)"):
        nn.apply(lifted(Residual), stacked(Residual, (3, 2)), data(*shape))
    with pytest.raises(ValueError, match=r"expected the learner axes \(3,\)"):
        nn.apply(lifted(Residual), stacked(Residual, (3,)), data(3, 3, 3), nn.Context(key=keys(2)))


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(SettingError, match=r"cannot lift type: expected a torch\.nn\.Module, built"):
        nn.lift(torch.nn.Linear)  # type: ignore[arg-type]

    class Stuck(Residual):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("holds a socket")

    with pytest.raises(SettingError, match="Stuck, which can't be copied: holds a socket"):
        nn.lift(Stuck())


def test_meta_gradients_pass_through() -> None:
    block = lifted(Residual)
    params = {name: value.requires_grad_() for name, value in stacked(Residual, (2,)).items()}
    assert torch.autograd.gradgradcheck(
        lambda x, *values: nn.apply(block, dict(zip(params, values)), x),
        [data(2, 2, 3).requires_grad_(), *params.values()],
    )
