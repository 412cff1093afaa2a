"""Layers as one autograd node: equal to a loop over learners, also for narrow layers, to second order."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlmeta.nn import product as product_module
from rlmeta.nn.product import affine, layers, learner_product, product

FUNCTIONS = (torch.tanh, torch.relu, torch.sigmoid, torch.nn.functional.softplus, None)


def make(sizes: list[int], learners: int, batch: int) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(sum(sizes))
    x = torch.randn(learners, batch, sizes[0], dtype=torch.float64, requires_grad=True)
    tensors = []
    for size, next_size in itertools.pairwise(sizes):
        tensors.append(torch.randn(learners, next_size, size, dtype=torch.float64, requires_grad=True))
        tensors.append(torch.randn(learners, 1, next_size, dtype=torch.float64, requires_grad=True))
    return x, tensors


def looped(x: Tensor, tensors: list[Tensor], functions: list[object]) -> Tensor:
    outs = []
    for learner in range(x.shape[0]):
        h = x[learner]
        for weight, bias, function in zip(tensors[::2], tensors[1::2], functions):
            h = h @ weight[learner].T + bias[learner]
            h = function(h) if callable(function) else h
        outs.append(h)
    return torch.stack(outs)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 3, 8, 9, 12]), min_size=2, max_size=4),
    function=st.sampled_from(FUNCTIONS),
    learners=st.integers(1, 3),
    batch=st.sampled_from([1, 3, 8, 10]),
)
def test_layers_equal_a_loop_in_value_and_gradient(
    sizes: list[int], function: object, learners: int, batch: int
) -> None:
    x, tensors = make(sizes, learners, batch)
    functions = [function] * (len(sizes) - 2) + [None]
    out, expected = layers(x, tensors, functions), looped(x, tensors, functions)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(layers(x, tensors, functions), expected)  # type: ignore[arg-type]
    seed = torch.randn_like(out)
    gradients = torch.autograd.grad(out, [x, *tensors], seed)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, [x, *tensors], seed)):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("sizes", [[2, 9, 3], [9, 2, 9]])
def test_second_derivatives_match_finite_differences(sizes: list[int]) -> None:
    x, tensors = make(sizes, 2, 3)
    assert torch.autograd.gradgradcheck(lambda x, *t: layers(x, t, [torch.tanh, None]), (x, *tensors))


def test_a_part_that_needs_no_gradient_gets_none_and_inputs_stay_as_they_were() -> None:
    x, tensors = make([4, 9, 2], 2, 5)
    data, kept = x.detach(), [t.detach().clone() for t in tensors]
    before = data.clone()
    (gradient,) = torch.autograd.grad(layers(data, tensors, [torch.tanh, None]).sum(), tensors[2])
    assert gradient.shape == tensors[2].shape
    with torch.no_grad():
        layers(data, tensors, [torch.relu, torch.relu])
    assert torch.equal(data, before) and all(torch.equal(t, k) for t, k in zip(tensors, kept))


def test_under_vmap_and_grad_of_torch_func() -> None:
    x, tensors = make([3, 9, 2], 2, 4)

    def loss(weight: Tensor) -> Tensor:
        return layers(x.detach(), [weight, *(t.detach() for t in tensors[1:])], [torch.tanh, None]).square().sum()

    wanted = torch.autograd.grad(loss(tensors[0]), tensors[0])[0]
    torch.testing.assert_close(torch.func.grad(loss)(tensors[0].detach()), wanted)
    several = torch.stack([tensors[0].detach()] * 2)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(several), torch.stack([wanted] * 2))


@pytest.mark.parametrize("out", [1, 8, 9])
def test_a_product_without_bias(out: int) -> None:
    x, (weight, _) = make([5, out], 3, 4)
    torch.testing.assert_close(learner_product(x, weight, None), x @ weight.mT)


# ---------------------------------------------------------------------- large products, which are another library's


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixture in which every product counts as large and uses oneDNN, if this build of torch has it."""
    monkeypatch.setattr(product_module, "_LARGE", 1)
    monkeypatch.setattr(product_module, "_ONEDNN", torch._C._has_mkldnn)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of learners in each call of oneDNN."""
    calls: list[int] = []
    original = product_module._onednn

    def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(len(x))
        return original(x, weight, bias)

    monkeypatch.setattr(product_module, "_onednn", onednn)
    return calls


@pytest.mark.parametrize("learners", [1, 3])
def test_large_products_equal_small_ones_in_value_and_gradient(
    learners: int, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    x, tensors = make([12, 9, 16, 3], learners, 20)
    functions = [torch.relu, torch.tanh, None]
    single = [t.detach().float().requires_grad_() for t in (x, *tensors)]
    out, expected = layers(single[0], single[1:], functions), looped(x, tensors, functions)
    seed = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, single, seed.float())
    assert len(calls) == 9 and set(calls) == {learners}  # three layers, their weights' and inputs' gradients
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, [x, *tensors], seed)):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-3)


def test_a_large_product_without_learners_keeps_its_gradient(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(4, 6, 12, requires_grad=True)
    weight, bias = torch.randn(9, 12, requires_grad=True), torch.randn(9, requires_grad=True)
    out, expected = affine(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(
        torch.autograd.grad(out.square().sum(), (x, weight, bias)),
        torch.autograd.grad(expected.square().sum(), (x, weight, bias)),
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    assert calls == [1, 1, 1]
    assert affine(x[0, 0], weight, bias).shape == (9,)


def test_products_keep_the_axes_before_their_matrices(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    a, b = torch.randn(2, 3, 7, 5).mT, torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(product(a, b), a @ b)
    assert calls == [6]


def test_a_transposed_factor_with_gaps_is_copied_for_onednn(large: None) -> None:
    """As the gradient of a layer behind convolutions has it, whose inputs lie between those of other learners."""
    between = torch.randn(7, 2, 5).movedim(1, 0)
    grad = torch.randn(2, 7, 4)
    torch.testing.assert_close(product(grad.mT, between), grad.mT @ between)
    gaps = between.mT[0]
    copied = product_module._dense(gaps)
    assert copied.is_contiguous() and torch.equal(copied, gaps)
    for dense in (torch.randn(4, 5), torch.randn(4, 5).mT):
        assert product_module._dense(dense) is dense


def test_what_is_differentiated_mapped_or_double_stays_with_torch(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    a, b = torch.randn(2, 4, 5), torch.randn(2, 5, 3)
    torch.testing.assert_close(product(a.double(), b.double()), a.double() @ b.double())
    torch.testing.assert_close(product(a, b[:1]), a @ b[:1])
    torch.testing.assert_close(torch.func.vmap(product)(a, b), a @ b)
    (gradient,) = torch.autograd.grad(product(a, b.requires_grad_()).sum(), b)
    torch.testing.assert_close(gradient, a.sum(1).unsqueeze(-1).expand_as(b))
    assert not calls


def test_gradients_nobody_asked_for_are_not_made(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x = torch.randn(1, 20, 12, requires_grad=True)
    layers(x, (torch.randn(1, 9, 12), torch.randn(1, 1, 9)), (torch.relu,)).sum().backward()
    assert len(calls) == 2  # the layer, and its input's gradient


@pytest.mark.parametrize("transposed", list(itertools.product([False, True], repeat=2)))
def test_products_of_transposed_matrices_to_the_third_derivative(transposed: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    a, b = (x.mT.contiguous().mT if turned else x for x, turned in zip((a, b), transposed))
    torch.testing.assert_close(product_module._bmm(a, b), a @ b)
    a, b = a.requires_grad_(), b.requires_grad_()
    multiply = product_module._Product.apply

    def slope(a: Tensor, b: Tensor) -> Tensor:
        out = multiply(a, b)
        return torch.autograd.grad(out.pow(3).sum(), a, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (a, b))


class Layer(torch.nn.Module):
    """A product of one learner, without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(1, 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return learner_product(x.unsqueeze(0), self.weight, None)


def test_an_exported_product_takes_a_batch_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_module, "_ONEDNN", True)
    monkeypatch.setattr(product_module, "_LARGE", 4 * 16 * 100)
    layer, free = Layer(), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (torch.randn(5, 4),), dynamic_shapes=free).module()
    for rows in (1, 5, 2000):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program(x), x @ layer.weight.mT)
