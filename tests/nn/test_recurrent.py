"""Recurrent cells against torch's own."""

from __future__ import annotations

import torch

from rlmeta.nn import Context
from rlmeta.nn.recurrent import LSTMCell


def test_lstm_cell_is_torchs_and_batched_is_looped():
    s = b = h = 3
    torch.manual_seed(0)
    theirs = [torch.nn.LSTMCell(2, h).double() for _ in range(s)]
    params = {
        n: torch.stack([dict(t.named_parameters())[n].detach() for t in theirs]) for n in LSTMCell(2, h)._parameters
    }
    x, hidden, cell = (torch.randn(s, b, n, dtype=torch.float64) for n in (2, h, h))
    found = LSTMCell(2, h).run(params, {"input": x, "hidden": hidden, "cell": cell}, Context())
    for i, their in enumerate(theirs):
        expected = their(x[i], (hidden[i], cell[i]))
        torch.testing.assert_close(found["hidden"][i], expected[0])
        torch.testing.assert_close(found["cell"][i], expected[1])


def test_as_an_ordinary_module_it_has_torchs_state_dict():
    ours, theirs = LSTMCell(2, 3), torch.nn.LSTMCell(2, 3)
    ours.load_state_dict(theirs.state_dict())
    x, hidden, cell = torch.randn(4, 2), torch.randn(4, 3), torch.randn(4, 3)
    expected = theirs(x, (hidden, cell))
    found = ours({"input": x, "hidden": hidden, "cell": cell})
    torch.testing.assert_close(found["hidden"], expected[0])
    torch.testing.assert_close(found["cell"], expected[1])


def test_initial_weights_are_torchs():
    """Uniform in ±1 / √H, whatever the inputs."""
    for name, weight in LSTMCell(3, 100).named_parameters():
        assert weight.shape == getattr(torch.nn.LSTMCell(3, 100), name).shape
        assert 0.095 < weight.abs().max() <= 0.1 and weight.min() < -0.09, name
