"""learn2learn's interface: its own loop runs with only the import changed, and gives its meta-gradients.

The golden numbers are the original's (0.2.0, torch 2.13). With RLMETA_LEARN2LEARN naming its unpacked source (its three
.pyx rebuilt in place) the two are compared directly.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlmeta.compat.learn2learn import MAML, clone_module
from rlmeta.errors import SettingError

SOURCE = os.environ.get("RLMETA_LEARN2LEARN", "")

GOLDEN = {
    (1, False): [
        -0.4715834321, -1.1683962508, 0.1296450546, 0.3037596876, -0.2196790367, -0.0110834928,
        -0.8594776027, 0.0153645598, 0.2522611520, -0.1506526740, 0.6215504351, -0.1562531260,
        -0.1116679998, 0.1512900673, 0.5739229325, 0.7097843473, 0.3314416928, -0.1229008447,
        -0.5237882207, 0.3608724384, 1.9369322634,
    ],
    (3, False): [
        -0.2653693921, -0.7190797243, 0.0934597280, 0.1694098197, -0.0850534708, -0.1860083141,
        -0.8971045877, -0.2947859282, 0.4514467100, -1.2973449392, 0.4541719359, -0.1060924255,
        -0.1638640307, 0.3978943950, 0.3498417122, 0.6832236004, 0.1409284327, -0.5903457154,
        -0.6670801969, -0.1950536236, 1.3536884359,
    ],
    (1, True): [
        -0.5645342770, -1.3407455230, 0.1300419258, 0.2748065478, -0.2490015247, 0.0171830904,
        -0.2127202645, 0.1552890634, -0.0244423672, -0.4709859179, 0.5791724653, -0.0941171770,
        -0.0886310641, 0.0311028651, 0.4782973697, -0.2107224538, 1.2421408285, 0.5038429137,
        -0.9814695344, 0.8727064717, 1.7944615409,
    ],
    (3, True): [
        -0.4476162966, -0.9937481229, 0.0950693625, 0.1319162747, -0.1060538360, -0.1642740278,
        0.0227240237, -0.2001615799, -0.3254466278, 0.0375226859, 0.4145644475, 0.0206453444,
        -0.0620026323, 0.2832751344, 0.5285206329, -0.6608020871, 1.3747338865, -0.2549061645,
        -0.7132173051, 0.9522732152, 1.2019447713,
    ],
}  # fmt: skip


def original():
    """Their MAML; their package's own __init__ would import gym and lightning."""
    if not SOURCE:
        pytest.skip("RLMETA_LEARN2LEARN names no build of learn2learn 0.2.0")
    package = types.ModuleType("learn2learn")
    package.__path__ = [str(Path(SOURCE) / "learn2learn")]
    sys.path.insert(0, SOURCE)
    sys.modules["learn2learn"] = package
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def numbers(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def perceptron():
    module = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    for i, p in enumerate(module.parameters()):
        p.data = numbers(*p.shape, seed=i)
    return module


def meta_gradients(maml_class, steps, first_order, module=None):
    """The loop of learn2learn's `maml_sine.py`."""
    module = perceptron() if module is None else module
    maml = maml_class(module, lr=0.1, first_order=first_order)
    total = 0.0
    for task in range(3):
        x, y = numbers(8, 2, seed=20 + task), numbers(8, 1, seed=30 + task)
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.mse_loss(learner(x[:4]), y[:4]))
        total = total + F.mse_loss(learner(x[4:]), y[4:])
    total.backward()
    return torch.cat([p.grad.flatten() for p in maml.parameters()])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_the_originals_golden_numbers(steps, first_order):
    found = meta_gradients(MAML, steps, first_order)
    torch.testing.assert_close(found, torch.tensor(GOLDEN[steps, first_order], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_the_originals(steps, first_order):
    theirs = meta_gradients(original(), steps, first_order)
    torch.testing.assert_close(meta_gradients(MAML, steps, first_order), theirs, rtol=0, atol=1e-12)
    assert theirs.abs().max() > 0.1


class Tied(nn.Module):
    """One layer used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) @ self.weight


def test_tied_parameters_stay_tied():
    maml = MAML(Tied(), lr=0.1)
    learner = maml.clone()
    learner.adapt(learner(torch.ones(3, 2)).square().mean())
    assert learner.first is learner.second and learner.weight is learner.first.weight
    assert not torch.equal(learner.weight, maml.weight)
    learner(torch.ones(3, 2)).sum().backward()
    assert maml.first.weight.grad is not None


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_weights_are_really_used(kind):
    """Recurrent modules keep a second list of their parameters, which follows those that were put in their place."""
    module, x, y = Recurrent(kind).double(), numbers(4, 5, 2, seed=0), numbers(4, 1, seed=1)
    learner = MAML(module, lr=0.5).clone()
    before = learner(x).detach()
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    grads = torch.autograd.grad(F.mse_loss(module(x), y), list(module.parameters()))
    learner.adapt(F.mse_loss(learner(x), y))
    expected = torch.func.functional_call(module, {n: w - 0.5 * g for (n, w), g in zip(weights.items(), grads)}, x)
    torch.testing.assert_close(learner(x), expected)
    torch.testing.assert_close(module(x), before)
    learner(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_a_clone_has_its_own_batch_statistics():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    statistics = {n: b.clone() for n, b in module.named_buffers()}
    maml = MAML(module, lr=0.1)
    first, second = maml.clone(), maml.clone()
    first.adapt(first(torch.randn(8, 2)).square().mean())
    assert all(torch.equal(b, statistics[n]) for n, b in module.named_buffers())
    assert torch.equal(second.module[1].running_mean, statistics["1.running_mean"])
    assert not torch.equal(first.module[1].running_mean, statistics["1.running_mean"])


def test_clones_are_equal_and_the_model_is_left_alone():
    module = perceptron()
    before, drawn = [p.detach().clone() for p in module.parameters()], torch.get_rng_state()
    maml, x = MAML(module, lr=0.1), numbers(4, 2, seed=0)
    outputs = []
    for _ in range(2):
        learner = maml.clone()
        learner.adapt(learner(x).square().mean())
        outputs.append(learner(x))
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())


def test_clones_of_clones_adapt_further():
    maml, x = MAML(perceptron(), lr=0.1), numbers(4, 2, seed=0)
    once = maml.clone()
    once.adapt(once(x).square().mean())
    twice = once.clone()
    twice.adapt(twice(x).square().mean())
    longer = maml.clone()
    for _ in range(2):
        longer.adapt(longer(x).square().mean())
    torch.testing.assert_close(twice(x), longer(x))


def test_frozen_and_unused_parameters():
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    loss = lambda learner: learner.module["used"](torch.ones(1, 2)).square().mean()  # noqa: E731
    learner = MAML(module, lr=0.1).clone()
    with pytest.raises(SettingError, match=r"does not depend on unused\.weight"):
        learner.adapt(loss(learner))
    learner.adapt(loss(learner), allow_unused=True)
    module["unused"].requires_grad_(False)
    frozen = MAML(module, lr=0.1).clone(allow_unused=True)
    assert not frozen.module["unused"].weight.requires_grad
    with pytest.raises(SettingError, match=r"unused\.weight, unused\.bias require no gradient"):
        frozen.adapt(loss(frozen))
    frozen.adapt(loss(frozen), allow_nograd=True)
    assert torch.equal(frozen.module["unused"].weight, module["unused"].weight)


@pytest.mark.parametrize("setting", ["first_order", "allow_unused", "allow_nograd"])
def test_a_clone_takes_its_originals_settings_unless_told_otherwise(setting):
    for original in (False, True):
        maml = MAML(perceptron(), 0.1, **{setting: original})
        assert getattr(maml.clone(), setting) is original
        assert getattr(maml.clone(**{setting: not original}), setting) is not original


@pytest.mark.parametrize("own", [False, True])
def test_a_single_step_may_be_of_the_other_order(own):
    gradients = {}
    for first_order, asked in ((own, not own), (not own, None)):
        maml, x = MAML(perceptron(), 0.1, first_order=first_order), numbers(4, 2, seed=0)
        learner = maml.clone()
        learner.adapt(learner(x).square().mean(), first_order=asked)
        learner(x).sum().backward()
        gradients[asked] = torch.cat([p.grad.flatten() for p in maml.parameters()])
    torch.testing.assert_close(gradients[not own], gradients[None])


def test_a_loss_that_cannot_adapt_this_clone_is_refused():
    maml, x = MAML(perceptron(), 0.1), numbers(4, 2, seed=0)
    learner, other = maml.clone(), maml.clone()
    loss = learner(x).square().mean()
    for strange, message in (
        (learner(x), r"the loss is of shape \[4, 1\], expected a tensor of one number"),
        (0.5, "the loss is 0.5, expected a tensor of one number"),
        (loss.detach(), "the loss has no gradient"),
        (other(x).square().mean(), "does not depend on this clone's parameters as they are now"),
    ):
        with pytest.raises(SettingError, match=message):
            learner.adapt(strange)
    before = [p.clone() for p in learner.parameters()]
    learner.adapt(loss)
    assert not torch.equal(before[0], next(iter(learner.parameters())))
    with pytest.raises(SettingError, match="again after each adapt"):
        learner.adapt(loss)


class Nested(nn.Module):
    """Parameters in every kind of place."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 4), nn.Tanh()), "list": nn.ModuleList()})
        self.parts["list"].append(nn.Linear(4, 3))
        self.more = nn.ParameterList([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 1))])
        self.scale = nn.Parameter(torch.ones(1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x):
        hidden = torch.tanh(self.normed(self.parts["list"][0](self.parts["body"](x))))
        return self.scale * (hidden @ self.more[0] @ self.more[1])


@pytest.mark.parametrize("first_order", [False, True])
def test_nested_modules_are_adapted_whole(first_order):
    """As functions of dictionaries of weights have it."""
    torch.manual_seed(0)
    module, x, y = Nested().double(), numbers(4, 2, seed=0), numbers(4, 1, seed=1)
    learner = MAML(module, 0.1, first_order=first_order).clone()
    for _ in range(2):
        learner.adapt(F.mse_loss(learner(x), y))
    F.mse_loss(learner(x), y).backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}

    def loss(weights):
        return F.mse_loss(torch.func.functional_call(module, weights, x), y)

    at = weights
    for _ in range(2):
        grads = torch.autograd.grad(loss(at), list(at.values()), create_graph=not first_order)
        at = {n: w - 0.1 * g for (n, w), g in zip(at.items(), grads)}
    expected = torch.autograd.grad(loss(at), list(weights.values()))
    for (name, p), g in zip(module.named_parameters(), expected):
        torch.testing.assert_close(p.grad, g, msg=name)
        assert g.abs().max() > 0, name


def test_unused_parameters_are_accepted_with_those_without_gradient_unless_told_otherwise():
    assert not MAML(perceptron(), 0.1).allow_unused
    assert MAML(perceptron(), 0.1, allow_nograd=True).allow_unused
    assert not MAML(perceptron(), 0.1, allow_unused=False, allow_nograd=True).allow_unused


def test_attributes_of_the_module_are_reached():
    module = perceptron()
    module.answer = 42
    assert MAML(module, lr=0.1).clone().answer == 42
    with pytest.raises(AttributeError):
        MAML(module, lr=0.1).nothing  # noqa: B018
    assert clone_module(module)[0].weight.grad_fn is not None


def test_a_frozen_body_stays_while_the_head_adapts():
    module = perceptron()
    module[0].requires_grad_(False)
    maml, x = MAML(module, lr=0.1, allow_nograd=True), numbers(4, 2, seed=0)
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(learner(x).square().mean())
    learner(x).square().mean().backward()
    for name, value in module[0].named_parameters():
        assert torch.equal(dict(learner.module[0].named_parameters())[name], value) and value.grad is None
    assert not torch.equal(learner.module[2].weight, module[2].weight) and module[2].weight.grad.abs().max() > 0
