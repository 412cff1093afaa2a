"""Recurrent cells against torch's own."""

from __future__ import annotations

import torch

from rlmeta.nn import Context
from rlmeta.nn.product import plain_graph
from rlmeta.nn.recurrent import GRUCell, LSTMCell


def test_lstm_cell_is_torchs_and_batched_is_looped():
    s = b = h = 3
    torch.manual_seed(0)
    theirs = [torch.nn.LSTMCell(2, h).double() for _ in range(s)]
    params = {
        n: torch.stack([dict(t.named_parameters())[n].detach() for t in theirs]) for n in LSTMCell(2, h)._parameters
    }
    x, hidden, cell = (torch.randn(s, b, n, dtype=torch.float64) for n in (2, h, h))
    state = LSTMCell(2, h).run(params, {"input": x, "hidden": hidden, "cell": cell}, Context())
    for i, their in enumerate(theirs):
        expected = their(x[i], (hidden[i], cell[i]))
        torch.testing.assert_close(state["hidden"][i], expected[0])
        torch.testing.assert_close(state["cell"][i], expected[1])


def test_as_an_ordinary_module_it_has_torchs_state_dict():
    ours, theirs = LSTMCell(2, 3), torch.nn.LSTMCell(2, 3)
    ours.load_state_dict(theirs.state_dict())
    x, hidden, cell = torch.randn(4, 2), torch.randn(4, 3), torch.randn(4, 3)
    expected = theirs(x, (hidden, cell))
    state = ours({"input": x, "hidden": hidden, "cell": cell})
    torch.testing.assert_close(state["hidden"], expected[0])
    torch.testing.assert_close(state["cell"], expected[1])


def test_initial_weights_are_torchs():
    """Uniform in ±1 / √H, for any number of inputs."""
    for name, weight in LSTMCell(3, 100).named_parameters():
        assert weight.shape == getattr(torch.nn.LSTMCell(3, 100), name).shape
        assert 0.095 < weight.abs().max() <= 0.1 and weight.min() < -0.09, name


def torchs(learners, inputs, hidden):
    """torch's cells in float64, and their weights stacked as those of learners."""
    torch.manual_seed(0)
    cells = [torch.nn.GRUCell(inputs, hidden).double() for _ in range(learners)]
    names = [name for name, _ in cells[0].named_parameters()]
    return cells, {n: torch.stack([dict(c.named_parameters())[n].detach() for c in cells]) for n in names}


def test_gru_cell_is_torchs_its_gradients_too_and_batched_is_looped():
    s = b = h = 3
    theirs, params = torchs(s, 2, h)
    params = {name: value.requires_grad_() for name, value in params.items()}
    x = torch.randn(s, b, 2, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(s, b, h, dtype=torch.float64, requires_grad=True)
    states = GRUCell(2, h).run(params, {"input": x, "hidden": hidden}, Context())
    gradients = torch.autograd.grad(states.square().sum(), [*params.values(), x, hidden])
    for i, their in enumerate(theirs):
        expected = their(x[i], hidden[i])
        torch.testing.assert_close(states[i], expected)
        own = torch.autograd.grad(expected.square().sum(), [*their.parameters(), x, hidden])
        torch.testing.assert_close([g[i] for g in gradients[:4]], list(own[:4]))
        torch.testing.assert_close([g[i] for g in gradients[4:]], [g[i] for g in own[4:]])


def test_gru_as_an_ordinary_module_has_torchs_state_dict():
    ours, theirs = GRUCell(2, 3), torch.nn.GRUCell(2, 3)
    ours.load_state_dict(theirs.state_dict())
    x, hidden = torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(ours({"input": x, "hidden": hidden}), theirs(x, hidden))


def test_unrolled_is_step_by_step_and_forgets_where_an_episode_begins():
    s = t = b = 3
    theirs, params = torchs(s, 2, 4)
    x, first = torch.randn(s, t, b, 2, dtype=torch.float64), torch.randn(s, b, 4, dtype=torch.float64)
    begins = torch.zeros(s, t, b, dtype=torch.bool)
    begins[0, 1, 2] = begins[1, 2, 0] = begins[2, 0, 1] = True
    unrolled = GRUCell(2, 4).unroll(params, x, first, begins)
    for i, their in enumerate(theirs):
        for row in range(b):
            hidden = first[i, row]
            for step in range(t):
                hidden = their(x[i, step, row], torch.zeros_like(hidden) if begins[i, step, row] else hidden)
                torch.testing.assert_close(unrolled[i, step, row], hidden)
    for learner in range(s):
        alone = {name: value[learner] for name, value in params.items()}
        torch.testing.assert_close(
            GRUCell(2, 4).unroll(alone, x[learner], first[learner], begins[learner]), unrolled[learner]
        )
    zero = torch.zeros_like(begins)
    torch.testing.assert_close(
        GRUCell(2, 4).unroll(params, x, first, None), GRUCell(2, 4).unroll(params, x, first, zero)
    )


def test_gradients_of_the_unrolled_are_those_of_autograd_and_of_finite_differences():
    """First order by the fused node, second order through it, and in a plain graph."""
    s = t = b = 2
    _, weights = torchs(s, 2, 3)
    names = list(weights)
    x, hidden = torch.randn(s, t, b, 2, dtype=torch.float64), torch.randn(s, b, 3, dtype=torch.float64)
    begins = torch.zeros(s, t, b, dtype=torch.bool)
    begins[0, 1, 0] = True
    tensors = [value.requires_grad_() for value in (*weights.values(), x, hidden)]

    def states(*tensors):
        *values, x, hidden = tensors
        return GRUCell(2, 3).unroll(dict(zip(names, values)), x, hidden, begins)

    assert torch.autograd.gradcheck(states, tensors)
    assert torch.autograd.gradgradcheck(states, tensors)
    gradients = torch.autograd.grad(states(*tensors).square().sum(), tensors)
    with plain_graph():
        expected = torch.autograd.grad(states(*tensors).square().sum(), tensors)
    torch.testing.assert_close(gradients, expected)
