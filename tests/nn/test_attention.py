"""Attention, positions, Transformer layers and the memory of the last steps, against torch and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.nn import Context
from rlmeta.nn.attention import Gate
from tests.nn.learners import as_torch, assert_close, assert_equals_loop, data, keys, scattered

S = T = N = B = 3


def parameters(block, *learners):
    return scattered(nn.stack(lambda: block, keys(*learners)))


def seconds(out, variables):
    """Second derivatives: the gradient of the squared gradients."""
    first = torch.autograd.grad(out.pow(3).sum(), variables, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), variables, allow_unused=True)


def test_attention_is_torchs_where_something_may_be_seen_and_0_where_nothing_may():
    q, k, v = data(2, 4, 6), data(2, 5, 6, seed=2), data(2, 5, 3, seed=3)
    mask = torch.rand(2, 4, 5) < 0.5
    mask[..., 0] = True
    for given in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, given)
        assert_close(nn.attention(q, k, v, given), expected)
    mask[0, 2] = False
    q.requires_grad_()
    out = nn.attention(q, k, v, mask)
    assert out[0, 2].eq(0).all() and out.isfinite().all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_masks_by_hand():
    assert nn.causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert nn.causal_mask(3, 1).tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    begins = torch.tensor([False, False, True, False])
    pairs = [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert nn.episode_mask(begins).tolist() == pairs


@pytest.mark.parametrize("learners", [(), (S,), (2, 2)])
def test_multi_head_attention_is_torchs_its_gradients_too_first_and_second(learners):
    theirs = torch.nn.MultiheadAttention(4, 2, batch_first=True).double()
    ours = nn.MultiHeadAttention(4, 2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    params, x, mask = parameters(ours, *learners), data(*learners, B, T, 4), nn.causal_mask(T)

    def reference(own, x, index):
        given = {"need_weights": False, "attn_mask": ~mask}
        return torch.func.functional_call(theirs, own, (x, x, x), given)[0]

    def run(own, x):
        return ours.run(own, {"query": x, "mask": mask}, Context())

    assert_equals_loop(run, reference, params, x, learners)
    if not learners:
        leaves = [value.requires_grad_() for value in params.values()]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = seconds(reference(params, x, ()), leaves)
        assert_close(seconds(run(params, x), leaves), expected, atol=1e-9)


def test_queries_keys_and_values_may_come_from_elsewhere():
    theirs = torch.nn.MultiheadAttention(4, 2, batch_first=True).double()
    ours = nn.MultiHeadAttention(4, 2)
    params = dict(theirs.named_parameters())
    q, k, v = data(B, T, 4), data(B, 5, 4, seed=2), data(B, 5, 4, seed=3)
    for value in (k, v):
        given = {"query": q, "key": k} | ({"value": v} if value is v else {})
        assert_close(ours.run(params, given, Context()), theirs(q, k, value, need_weights=False)[0])


def test_a_node_of_a_graph_sees_its_neighbours_alone():
    ours = nn.MultiHeadAttention(4, 2)
    params, x = parameters(ours, S), data(S, B, 4, 4)
    edges = torch.eye(4, dtype=torch.bool)
    edges[0, 1] = True
    out = ours.run(params, {"query": x, "mask": edges}, Context())
    moved = x.clone()
    moved[..., 2, :] += 1.0
    other = ours.run(params, {"query": moved, "mask": edges}, Context())
    assert_close(out[..., [0, 1, 3], :], other[..., [0, 1, 3], :])
    assert not torch.allclose(out[..., 2, :], other[..., 2, :])


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("learners", [(), (S,)])
def test_a_transformer_layer_is_torchs_its_gradients_too_first_and_second(norm, learners):
    theirs = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=norm == "pre").double()
    ours = nn.TransformerLayer(4, 2, 6, norm)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    params, x = parameters(ours, *learners), data(*learners, B, T, 4)

    def run(own, x):
        return ours.run(own, x, Context())

    assert_equals_loop(run, as_torch(theirs), params, x, learners)
    if not learners:
        leaves = [value.requires_grad_() for value in params.values()]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = seconds(as_torch(theirs)(params, x, ()), leaves)
        assert_close(seconds(run(params, x), leaves), expected, atol=1e-8, rtol=1e-8)


def test_sinusoidal_positions_by_hand():
    encoded = nn.sinusoidal_positions(torch.arange(3), 4)
    expected = [[f(p / 10_000 ** (i / 4)) for i in (0, 2) for f in (math.sin, math.cos)] for p in range(3)]
    torch.testing.assert_close(encoded, torch.tensor(expected))


def test_the_product_of_rotated_features_depends_on_their_distance_alone():
    q, k, places = data(1, 6), data(1, 6, seed=2), torch.arange(5)
    products = nn.rotate(q.expand(5, 6), places) @ nn.rotate(k.expand(5, 6), places).mT
    for i in range(5):
        for j in range(5):
            expected = nn.rotate(q, torch.tensor([i - j + 10])) @ nn.rotate(k, torch.tensor([10])).mT
            torch.testing.assert_close(products[i, j], expected[0, 0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(nn.rotate(q, torch.tensor([0])), q)
    turned = nn.rotate(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([2]))
    torch.testing.assert_close(turned, torch.tensor([[math.cos(2), 0.0, math.sin(2), 0.0]]))


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned", "rotary"])
def test_an_encoder_knows_the_order_of_steps_if_it_has_positions_and_batched_is_looped(positions):
    ours = nn.Transformer(2, 4, layers=2, heads=2, positions=positions, length=T)
    params, x = parameters(ours, S), data(S, B, T, 2)

    def reference(own, x, index):
        return ours.run(own, x, Context())

    out = assert_equals_loop(lambda own, x: ours.run(own, x, Context()), reference, params, x, (S,))
    turned = ours.run(params, x.flip(-2), Context()).flip(-2)
    assert torch.allclose(out, turned) == (positions == "none")
    masked = ours.run(params, {"input": x, "mask": nn.causal_mask(T)}, Context())
    later = x.clone()
    later[..., -1, :] += 1.0
    again = ours.run(params, {"input": later, "mask": nn.causal_mask(T)}, Context())
    assert_close(masked[..., :-1, :], again[..., :-1, :])


def test_more_steps_than_learned_positions_are_refused():
    ours = nn.Transformer(2, 4, positions="learned", length=2)
    with pytest.raises(SettingError, match="more than the 2 learned positions"):
        ours(torch.zeros(1, 3, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiHeadAttention(4, 3),
        lambda: nn.MultiHeadAttention(6, 2, rotary=True),
        lambda: nn.MultiHeadAttention(4, 0),
        lambda: nn.Transformer(2, 3),
        lambda: nn.Transformer(2, 4, layers=0),
        lambda: nn.AttentionMemory(2, 4, context=0, heads=2),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make):
    with pytest.raises(SettingError, match=r"expected|need|at least 1"):
        make()


def test_a_gate_by_its_equation_and_near_the_identity_at_first():
    gate = Gate(3)
    params, x, y = parameters(gate, S), data(S, B, 3), data(S, B, 3, seed=2)
    out = gate.run(params, {"old": x, "new": y}, Context())
    for i in range(S):
        w, u, b = (params[name][i] for name in ("weight_new", "weight_old", "bias"))
        reset = torch.sigmoid(y[i] @ w[:3].T + x[i] @ u[:3].T)
        update = torch.sigmoid(y[i] @ w[3:6].T + x[i] @ u[3:6].T - b)
        candidate = torch.tanh(y[i] @ w[6:].T + (reset * x[i]) @ u[6:].T)
        assert_close(out[i], (1 - update) * x[i] + update * candidate)
    x, y = torch.randn(100, 3), torch.randn(100, 3)
    away = (gate({"old": x, "new": y}) - x).abs().mean()
    assert 0 < away < 0.25 * x.abs().mean()


# ---------------------------------------------------------------------- memory


def remembering(layers=2, context=2, learners=(S,), seed=0):
    """A memory, its parameters, sequences with episodes, and a state that holds some steps."""
    ours = nn.AttentionMemory(2, 4, layers, context, heads=2)
    params = parameters(ours, *learners)
    x, following = data(*learners, T + 2, N, 2, seed=seed + 3), data(*learners, T + 2, N, 2, seed=seed + 4)
    state = {
        name: data(*value.shape, seed=5) if name != "seen" else torch.randint(0, context + 1, value.shape)
        for name, value in ours.initial((*learners, N), torch.device("cpu")).items()
    }
    begins = torch.rand(*learners, T + 2, N, generator=torch.Generator().manual_seed(seed)) < 0.3
    return ours, params, x, following, state, begins


def reset(state, begins):
    """A state that is empty where an episode begins, `[*L, N]`."""
    return {
        name: value.masked_fill(begins.reshape(begins.shape + (1,) * (value.dim() - begins.dim())), 0)
        for name, value in state.items()
    }


@pytest.mark.parametrize("context", [1, 2, 9])
@pytest.mark.parametrize("layers", [1, 2])
def test_step_by_step_is_the_whole_sequence_and_sees_what_follows(layers, context):
    ours, params, x, following, state, begins = remembering(layers, context)
    whole = ours.unroll(params, x, state, begins, Context())
    ahead = ours.peek(params, x, following, state, begins, Context())
    shapes = {name: value.shape for name, value in state.items()}
    for step in range(T + 2):
        out, state = ours.step(params, x[:, step], reset(state, begins[:, step]), Context())
        assert {name: value.shape for name, value in state.items()} == shapes
        assert state["seen"].max() <= context
        assert_close(out, whole[:, step], atol=1e-9)
        assert_close(ours.step(params, following[:, step], state, Context())[0], ahead[:, step], atol=1e-9)


def test_no_attention_over_the_beginning_of_an_episode_nor_beyond_the_context():
    """The gradient of a step's features is in the steps of its own episode, `layers * context` back at most."""
    ours, params, _, _, _, _ = remembering()
    x = data(S, 8, N, 2).requires_grad_()
    begins = torch.zeros(S, 8, N, dtype=torch.bool)
    begins[:, 1, 0] = True
    state = {n: v.double() if n != "seen" else v for n, v in ours.initial((S, N), torch.device("cpu")).items()}
    out = ours.unroll(params, x, state, begins, Context())
    (early,) = torch.autograd.grad(out[:, 2].sum(), x, retain_graph=True)
    assert early[:, 0, 0].eq(0).all() and early[:, 1, 0].ne(0).any()
    assert early[:, 0, 1].ne(0).any() and early[:, 3:].eq(0).all()
    (late,) = torch.autograd.grad(out[:, 7].sum(), x)
    reach = late.abs().sum((0, 2, 3)) > 0
    assert reach.tolist() == [False] * 3 + [True] * 5  # two layers of two steps, and itself


def test_a_memory_of_learners_is_that_of_each_alone_its_gradients_too_and_second_ones():
    ours, params, x, _, state, begins = remembering()

    def run(own, given):
        windows = {n: v for n, v in given.items() if n != "input"}
        return ours.unroll(own, given["input"], {**windows, "seen": state["seen"]}, begins, Context())

    def reference(own, given, index):
        windows = {n: v for n, v in given.items() if n != "input"}
        seen = state["seen"][index]
        return ours.unroll(own, given["input"], {**windows, "seen": seen}, begins[index], Context())

    windows = {name: value for name, value in state.items() if name != "seen"}
    assert_equals_loop(run, reference, params, {"input": x, **windows}, (S,))
    small, own, _, _, _, _ = remembering(1, 1, ())
    inputs = data(2, 1, 2).requires_grad_()
    names = ["embedding.weight", "0.self_attn.in_proj_weight", "0.gate1.bias"]
    leaves = [own[name].requires_grad_() for name in names]

    def unrolled(x, *weights):
        return small.run({**own, **dict(zip(names, weights))}, x, Context())

    assert torch.autograd.gradcheck(unrolled, (inputs, *leaves))
    assert torch.autograd.gradgradcheck(unrolled, (inputs, *leaves))
