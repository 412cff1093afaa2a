"""Recurrent cells and networks against torch's own."""

from __future__ import annotations

import pytest
import torch

from rlmeta.errors import SettingError
from rlmeta.nn import Context
from rlmeta.nn.product import plain_graph
from rlmeta.nn.recurrent import CELLS, LSTMCell, Recurrent

TORCHS = {"elman": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
TORCHS_CELLS = {"elman": torch.nn.RNNCell, "gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}


def test_initial_weights_are_torchs():
    """Uniform in ±1 / √H, for any number of inputs."""
    for name, weight in LSTMCell(3, 100).named_parameters():
        assert weight.shape == getattr(torch.nn.LSTMCell(3, 100), name).shape
        assert 0.095 < weight.abs().max() <= 0.1 and weight.min() < -0.09, name


def stacked(modules):
    """The weights of torch's modules as those of learners."""
    named = [dict(module.named_parameters()) for module in modules]
    return {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}


def torchs(kind, learners, inputs, hidden, **options):
    """torch's networks in float64, and their weights stacked as those of learners."""
    torch.manual_seed(0)
    modules = [TORCHS[kind](inputs, hidden, **options).double() for _ in range(learners)]
    return modules, stacked(modules)


def state_of(kind, *shape):
    """A random state of a cell."""
    return {part: torch.randn(*shape, dtype=torch.float64) for part in CELLS[kind].parts}


def asked(state):
    """A state as torch's modules take it."""
    return (state["hidden"], state["cell"]) if "cell" in state else state["hidden"]


def told(state):
    """A state as torch's modules give it."""
    return {"hidden": state[0], "cell": state[1]} if isinstance(state, tuple) else {"hidden": state}


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_torchs_its_gradients_too_and_batched_is_looped(kind):
    s = b = h = 3
    torch.manual_seed(0)
    theirs = [TORCHS_CELLS[kind](2, h).double() for _ in range(s)]
    params = {name: value.requires_grad_() for name, value in stacked(theirs).items()}
    x = torch.randn(s, b, 2, dtype=torch.float64, requires_grad=True)
    state = {part: value.requires_grad_() for part, value in state_of(kind, s, b, h).items()}
    after = CELLS[kind](2, h).run(params, {"input": x, **state}, Context())
    total = torch.stack([value.square().sum() for value in after.values()]).sum()
    gradients = torch.autograd.grad(total, [*params.values(), x, *state.values()])
    for i, their in enumerate(theirs):
        expected = told(their(x[i], asked({part: value[i] for part, value in state.items()})))
        torch.testing.assert_close({part: value[i] for part, value in after.items()}, expected)
        total = torch.stack([value.square().sum() for value in expected.values()]).sum()
        own = torch.autograd.grad(total, [*their.parameters(), x, *state.values()])
        torch.testing.assert_close([g[i] for g in gradients[:4]], list(own[:4]))
        torch.testing.assert_close([g[i] for g in gradients[4:]], [g[i] for g in own[4:]])


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_as_an_ordinary_module_has_torchs_state_dict(kind):
    ours, theirs = CELLS[kind](2, 3), TORCHS_CELLS[kind](2, 3)
    ours.load_state_dict(theirs.state_dict())
    x, state = torch.randn(4, 2), {part: torch.randn(4, 3) for part in ours.parts}
    torch.testing.assert_close(ours({"input": x, **state}), told(theirs(x, asked(state))))


@pytest.mark.parametrize("kind", CELLS)
def test_unrolled_is_step_by_step_and_forgets_where_an_episode_begins(kind):
    s = t = b = 3
    torch.manual_seed(0)
    theirs = [TORCHS_CELLS[kind](2, 4).double() for _ in range(s)]
    params, cell = stacked(theirs), CELLS[kind](2, 4)
    x, first = torch.randn(s, t, b, 2, dtype=torch.float64), state_of(kind, s, b, 4)
    begins = torch.zeros(s, t, b, dtype=torch.bool)
    begins[0, 1, 2] = begins[1, 2, 0] = begins[2, 0, 1] = True
    unrolled = cell.unroll(params, {"input": x, **first}, begins)
    for i, their in enumerate(theirs):
        for row in range(b):
            state = {part: value[i, row] for part, value in first.items()}
            for step in range(t):
                if begins[i, step, row]:
                    state = {part: torch.zeros_like(value) for part, value in state.items()}
                state = told(their(x[i, step, row], asked(state)))
                torch.testing.assert_close({part: v[i, step, row] for part, v in unrolled.items()}, state)
    for learner in range(s):
        alone = {name: value[learner] for name, value in params.items()}
        own = {"input": x[learner], **{part: value[learner] for part, value in first.items()}}
        torch.testing.assert_close(
            cell.unroll(alone, own, begins[learner]), {part: value[learner] for part, value in unrolled.items()}
        )
    never = torch.zeros_like(begins)
    given = {"input": x, **first}
    torch.testing.assert_close(cell.unroll(params, given, None), cell.unroll(params, given, never))


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_the_unrolled_are_those_of_autograd_and_of_finite_differences(kind):
    """First order by the fused node, second order through it, and in a plain graph; of every part of the state."""
    s = t = b = 2
    torch.manual_seed(0)
    weights = stacked([TORCHS_CELLS[kind](2, 3).double() for _ in range(s)])
    names, cell, first = list(weights), CELLS[kind](2, 3), state_of(kind, s, b, 3)
    x = torch.randn(s, t, b, 2, dtype=torch.float64)
    begins = torch.zeros(s, t, b, dtype=torch.bool)
    begins[0, 1, 0] = True
    tensors = [value.requires_grad_() for value in (*weights.values(), x, *first.values())]

    def states(*tensors):
        x, state = tensors[len(names)], dict(zip(first, tensors[len(names) + 1 :]))
        return tuple(cell.unroll(dict(zip(names, tensors)), {"input": x, **state}, begins).values())

    assert torch.autograd.gradcheck(states, tensors)
    assert torch.autograd.gradgradcheck(states, tensors)
    for part in range(len(first)):  # of one part alone, as where the cell is no output
        gradients = torch.autograd.grad(states(*tensors)[part].square().sum(), tensors)
        with plain_graph():
            expected = torch.autograd.grad(states(*tensors)[part].square().sum(), tensors)
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", CELLS)
def test_a_network_is_torchs_its_gradients_too_first_and_second(kind, layers, bidirectional):
    s = t = b = 3
    theirs, params = torchs(kind, s, 2, 3, num_layers=layers, bidirectional=bidirectional)
    ours = Recurrent(kind, 2, 3, layers, bidirectional)
    assert ours.state_dict().keys() == theirs[0].state_dict().keys()
    params = {name: value.requires_grad_() for name, value in params.items()}
    x = torch.randn(s, t, b, 2, dtype=torch.float64, requires_grad=True)
    out = ours.run(params, x, Context())
    assert out.shape == (s, t, b, ours.features)
    names = list(params)
    gradients = torch.autograd.grad(out.square().sum(), [params[n] for n in names], create_graph=True)
    seconds = torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), x)[0]
    for i, their in enumerate(theirs):
        expected = their(x[i])[0]
        torch.testing.assert_close(out[i], expected)
        own = dict(their.named_parameters())
        first = torch.autograd.grad(expected.square().sum(), [own[n] for n in names], create_graph=True)
        torch.testing.assert_close([g[i] for g in gradients], list(first))
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), x)[0]
        torch.testing.assert_close(seconds[i], second[i])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_episodes_in_one_row_stay_apart_in_both_directions(kind, bidirectional):
    """What a network says of each of two episodes in one row is what it says of them alone."""
    theirs, params = torchs(kind, 2, 2, 3, num_layers=2, bidirectional=bidirectional)
    del theirs
    ours, cut = Recurrent(kind, 2, 3, 2, bidirectional), 2
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64)
    begins = torch.zeros(2, 5, 2, dtype=torch.bool)
    begins[:, cut] = True
    state = {name: value.double() for name, value in ours.initial((2, 2), torch.device("cpu")).items()}
    together = ours.unroll(params, x, state, begins, Context())
    apart = [ours.run(params, part, Context()) for part in (x[:, :cut], x[:, cut:])]
    torch.testing.assert_close(together, torch.cat(apart, 1))
    assert not torch.allclose(together, ours.run(params, x, Context()))


@pytest.mark.parametrize("kind", CELLS)
def test_a_network_step_by_step_is_the_whole_sequence_and_sees_what_follows(kind):
    s = t = b = 3
    _, params = torchs(kind, s, 2, 3, num_layers=2)
    ours = Recurrent(kind, 2, 3, 2)
    x, following = (torch.randn(s, t, b, 2, dtype=torch.float64) for _ in range(2))
    state = {name: torch.randn(s, b, 3, dtype=torch.float64) for name in ours.initial((), torch.device("cpu"))}
    begins = torch.rand(s, t, b) < 0.3
    whole, states = ours.trace(params, x, state, begins, Context())
    ahead = ours.peek(params, x, following, state, begins, Context())
    assert set(states) == {f"{part}_l{k}" for k in range(2) for part in CELLS[kind].parts}
    for step in range(t):
        fresh = begins[:, step].unsqueeze(-1)
        state = {name: value.masked_fill(fresh, 0.0) for name, value in state.items()}
        out, state = ours.step(params, x[:, step], state, Context())
        torch.testing.assert_close(out, whole[:, step])
        torch.testing.assert_close(state, {name: value[:, step] for name, value in states.items()})
        torch.testing.assert_close(ours.step(params, following[:, step], state, Context())[0], ahead[:, step])


def test_a_network_that_reads_backwards_cannot_act():
    ours = Recurrent("gru", 2, 3, bidirectional=True)
    with pytest.raises(SettingError, match="can't act step by step"):
        ours.step(dict(ours.named_parameters()), torch.zeros(1, 2), ours.initial((1,), torch.device("cpu")), Context())


@pytest.mark.parametrize("sizes", [(0, 3, 1), (2, 0, 1), (2, 3, 0)])
def test_sizes_are_checked(sizes):
    with pytest.raises(SettingError, match="at least 1"):
        Recurrent("gru", *sizes)
