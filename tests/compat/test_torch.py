"""Lifelong methods in a plain torch loop: the package's numbers, any module, and sentences where something is wrong."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rlmeta as rl
from rlmeta.compat import torch as plain
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.functional.projection import project
from rlmeta.functional.quadratics import add_quadratic, replace_quadratic, zero_quadratic
from rlmeta.learning.method import Gradients
from rlmeta.lifelong.ewc import information
from tests.lifelong.toy import trained

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(*further: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *further, nn.Linear(6, 3)).double()


def move(module: nn.Module, size: float = 0.1) -> None:
    """Somewhere else, as training would."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- Fisher information


class Convolutional(nn.Module):
    """Convolution, batch normalisation and dropout, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.dropout, self.out = nn.Dropout(0.5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.norm(self.convolution(x.view(-1, 1, 4, 4))).relu()).flatten(1))


class Tied(nn.Module):
    """One layer used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(16, 16), nn.Linear(16, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


class TwoInputs(nn.Module):
    """Halves of the input, one by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
        return self.one(x) * self.other(context).tanh()


def tied_sequence() -> nn.Module:
    module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    module[2].weight = module[0].weight
    return module


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    module[0].weight.requires_grad_(False)
    return module.eval()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "convolutional": Convolutional,
    "tied module": Tied,
    "tied weights in a sequence": tied_sequence,
    "frozen, in eval": frozen,
    "a block": lambda: rl.nn.MLP(16, (5,), 3),
}


def looped_information(module: nn.Module, logits: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Over samples and labels, one backward pass each, in evaluation."""
    module = module.eval()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in x.split(1):
        for label in range(3):
            log_prob = logits(row).log_softmax(-1)[0, label]
            gradients = torch.autograd.grad(log_prob, list(parameters.values()))
            for total, gradient in zip(found.values(), gradients):
                total += log_prob.exp().detach() * gradient.square() / len(x)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_fisher_information_is_that_of_a_loop_and_leaves_the_module_alone(name: str) -> None:
    module, x = MODULES[name]().double(), torch.randn(7, 16, dtype=DOUBLE)
    for value in module.buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    before, modes = bits(module), [part.training for part in module.modules()]
    with torch.no_grad():
        found = plain.fisher_information(module, x)
    assert same(bits(module), before) and modes == [part.training for part in module.modules()]
    assert all(p.grad is None for p in module.parameters())
    expected = looped_information(module, module, x)
    assert list(found) == list(expected)
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, msg=weight)
        assert value.sum() > 0, weight


def test_a_module_of_several_inputs_is_called_as_its_user_does() -> None:
    module, x = TwoInputs().double(), torch.randn(7, 16, dtype=DOUBLE)
    found = plain.fisher_information(
        module, (x[:, :8], {"context": x[:, 8:]}), logits=lambda model, batch: model(batch[0], **batch[1])
    )
    expected = looped_information(module, lambda row: module(row[:, :8], context=row[:, 8:]), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_gaussian_and_any_other_distribution_and_the_labels_of_the_data() -> None:
    module, x = small(), torch.randn(50, 4, dtype=DOUBLE)
    found = plain.fisher_information(module, x, mean=lambda model, x: model(x))
    one_output = plain.fisher_information(module, x, mean=lambda model, x: model(x)[:, 0])
    jacobians = torch.func.vmap(torch.func.jacrev(torch.func.functional_call, 1), (None, None, 0))(
        module, dict(module.named_parameters()), x
    )
    for name, value in found.items():
        torch.testing.assert_close(value, jacobians[name].square().sum(1).mean(0))
        torch.testing.assert_close(one_output[name], jacobians[name][:, 0].square().mean(0))
    target = torch.randint(3, (50,))

    def log_prob(model: Any, batch: Any) -> Tensor:
        return model(batch["x"]).log_softmax(-1).gather(-1, batch["y"].unsqueeze(-1)).squeeze(-1)

    scores = plain.fisher_information(module, {"x": x, "y": target}, log_prob=log_prob)
    labelled = plain.fisher_information(module, x, kind="empirical", target=target)
    for name, value in labelled.items():
        torch.testing.assert_close(scores[name], value)
    drawn = [plain.fisher_information(module, x, kind="sample", seed=seed)["0.weight"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# ---------------------------------------------------------------------- EWC


def features(space: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh())


@pytest.mark.parametrize("online", [False, True])
def test_penalty_and_gradient_are_the_packages(online: bool) -> None:
    """Two tasks of a classifier that the package trained, in float64, and weights that moved between."""
    run = trained(rl.EWC(strength=3.0), network=features)
    p = tree.map(lambda x: x[0].double() if x.is_floating_point() else x[0], run.state["params"])
    batch = tree.map(lambda x: x[0], run.agent.draw(run.state, run.world, 40))
    batch["observation"] = batch["observation"].double()
    first, bias, out, shift = p["weights"].values()
    module = small()
    module.load_state_dict({"0.weight": first, "0.bias": bias, "2.weight": out, "2.bias": shift})
    torch.testing.assert_close(module(batch["observation"]), run.agent.logits(p, batch))
    ewc = plain.EWC(module, strength=3.0, online=online, decay=0.7 if online else 1.0)
    quadratic = zero_quadratic(Packed.of(p["weights"], 0).flat)
    for _ in range(2):
        ewc.consolidate(batch["observation"])
        weights = dict(zip(p["weights"], (w.detach().clone() for w in module.parameters())))
        p, theta = {**p, "weights": weights}, Packed.of(weights, 0).flat
        fisher = information(run.agent, p, batch, 0, "exact", random.make_keys([0])[0])
        if online:
            quadratic = replace_quadratic(quadratic, fisher, theta, torch.tensor(0.7, dtype=DOUBLE))
        else:
            quadratic = add_quadratic(quadratic, fisher, theta)
        move(module)
    p = {**p, "weights": dict(zip(p["weights"], (w.detach().clone() for w in module.parameters())))}
    memory = {"quadratic": quadratic, "strength": torch.tensor(3.0, dtype=DOUBLE)}
    zero = torch.zeros_like(quadratic["centre"])
    task = {"index": torch.ones((), dtype=torch.int64)}
    expected = rl.EWC(strength=3.0).grads(run.agent, Gradients(zero, zero), p, memory, task)
    penalty = ewc.penalty()
    penalty.backward()
    found = torch.cat([w.grad.flatten() for w in module.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert penalty > 0 and found.abs().max() > 1e-4


def test_the_penalty_is_the_sum_of_the_tasks() -> None:
    module, expected = small(), []
    ewc = plain.EWC(module, strength=5.0)
    assert float(ewc.penalty()) == 0
    for _ in range(3):
        x = torch.randn(20, 4, dtype=DOUBLE)
        expected.append((plain.fisher_information(module, x), bits(module)))
        ewc.consolidate(x)
        move(module)
    now = dict(module.named_parameters())
    total = sum((f[n] * (now[n] - anchor[n]).square()).sum() for f, anchor in expected for n in f)
    torch.testing.assert_close(ewc.penalty(), 2.5 * total)


def test_ewc_holds_what_is_trained_when_it_consolidates_and_a_module_may_grow() -> None:
    module = small()
    module[0].requires_grad_(False)
    ewc, x = plain.EWC(module, strength=1.0), torch.randn(20, 4, dtype=DOUBLE)
    ewc.consolidate(x)
    module[0].requires_grad_(True)
    move(module)
    ewc.penalty().backward()
    assert module[0].weight.grad is None and module[2].weight.grad.abs().sum() > 0
    module.add_module("3", nn.Linear(3, 3).double())
    ewc.consolidate(x)
    move(module)
    module.zero_grad()
    ewc.penalty().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    again = plain.EWC(module, strength=1.0)
    again.load_state_dict(ewc.state_dict())
    assert torch.equal(again.penalty(), ewc.penalty())
    module[2] = nn.Linear(6, 4).double()
    with pytest.raises(SettingError, match=r"holds 18 numbers of 2.weight, which now has the shape \[4, 6\]"):
        ewc.penalty()
    with pytest.raises(SettingError, match=r"parameter 2\.weight, which the module no longer has"):
        plain.EWC(nn.Linear(4, 3)).load_state_dict(
            {"quadratics": {"2.weight": ewc.state_dict()["quadratics"]["2.weight"]}}
        )


def test_half_precision_is_held_in_single() -> None:
    module = nn.Linear(4, 3).to(torch.bfloat16)
    ewc = plain.EWC(module, strength=1e6)
    ewc.consolidate(torch.randn(20, 4, dtype=torch.bfloat16))
    move(module)
    assert ewc.penalty().dtype is torch.float32 and ewc.penalty() > 0


# ---------------------------------------------------------------------- GEM and A-GEM


def nearest_by_brute_force(gradient: Tensor, references: Tensor) -> Tensor:
    """Over all sets of constraints that may be active: the feasible point that is nearest."""
    best, distance = gradient, torch.inf
    for count in range(len(references) + 1):
        for chosen in itertools.combinations(range(len(references)), count):
            g = references[list(chosen)]
            v = torch.linalg.lstsq(g @ g.mT, -(g @ gradient).unsqueeze(-1)).solution.squeeze(-1) if chosen else None
            point = gradient if v is None else gradient + v @ g
            if (references @ point >= -1e-9).all() and (point - gradient).norm() < distance:
                best, distance = point, (point - gradient).norm()
    return best


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def opposed(tasks: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """A module, tasks that contradict each other, and their loss."""
    module = small()
    data = [(torch.randn(12, 4, dtype=DOUBLE), torch.randint(3, (12,))) for _ in range(tasks)]
    return module, data, lambda x, y: cross_entropy(module(x), y)


def test_gem_projects_onto_the_nearest_gradient_that_no_task_minds() -> None:
    changed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        module, data, loss = opposed(4)
        gem = plain.GEM(module, margin=0.0)
        for x, y in data:
            gem.remember(x, y)
        references = []
        for x, y in data:
            module.zero_grad()
            loss(x, y).backward()
            references.append(flat_gradient(module))
        module.zero_grad()
        (-loss(*data[seed % 4]) + loss(torch.randn(5, 4, dtype=DOUBLE), torch.randint(3, (5,)))).backward()
        gradient = flat_gradient(module)
        expected = nearest_by_brute_force(gradient, torch.stack(references))
        changed += gem.project(loss)
        torch.testing.assert_close(flat_gradient(module), expected, rtol=1e-7, atol=1e-9)
    assert changed == 8


def test_the_margin_leans_towards_old_tasks_as_in_the_package() -> None:
    module, data, loss = opposed(2)
    gem = plain.GEM(module, margin=0.5)
    references = []
    for x, y in data:
        gem.remember(x, y)
        references.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(x, y), list(module.parameters()))]))
    (-loss(*data[0])).backward()
    gradient = flat_gradient(module)
    assert gem.project(loss)
    torch.testing.assert_close(flat_gradient(module), project(gradient, torch.stack(references), 0.5))


def test_agem_takes_the_average_out() -> None:
    module, data, loss = opposed(3)
    agem = plain.AGEM(module, batch_size=36)
    for x, y in data:
        agem.remember(x, y)
    drawn: list[Tensor] = []

    def watched(x: Tensor, y: Tensor) -> Tensor:
        drawn.append(x)
        return loss(x, y)

    (-loss(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))).backward()
    gradient = flat_gradient(module)
    assert agem.project(watched) and agem.project(watched) in (True, False)
    assert drawn[0].shape == (36, 4) and not torch.equal(drawn[0], drawn[1])
    everything = {tuple(row) for x, _ in data for row in x.tolist()}
    assert {tuple(row) for row in drawn[0].tolist()} <= everything
    assert len({tuple(row) for row in drawn[0].tolist()} & {tuple(row) for row in data[2][0].tolist()}) > 0
    rows = [list(map(tuple, torch.cat([x for x, _ in data]).tolist())).index(tuple(row)) for row in drawn[0].tolist()]
    y = torch.cat([y for _, y in data])[rows]
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss(drawn[0], y), list(module.parameters()))])
    once = gradient - (gradient @ reference) / (reference @ reference) * reference
    module.zero_grad()
    (-loss(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))).backward()
    again = plain.AGEM(module, batch_size=36)
    again.load_state_dict({**agem.state_dict(), "steps": 0})
    assert again.project(loss)
    torch.testing.assert_close(flat_gradient(module), once)


def test_memories_are_a_random_part_of_what_is_given_and_come_back_in_its_form() -> None:
    x, y = torch.arange(100.0).unsqueeze(-1), {"label": torch.arange(100), "weight": torch.ones(100)}
    module = nn.Linear(1, 2)
    gem = plain.GEM(module, memory=10)
    gem.remember(x, y)
    gem.remember(x[:3], tree.map(lambda leaf: leaf[:3], y))
    assert len(gem) == 2
    seen = []

    def loss(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        seen.append(x.flatten().long())
        assert torch.equal(y["label"], seen[-1])
        return module(x).square().mean()

    module(x).sum().backward()
    gem.project(loss)
    assert [len(rows) for rows in seen] == [10, 3] and len(set(seen[0].tolist())) == 10
    assert not torch.equal(seen[0], torch.arange(10))


def test_a_gradient_that_agrees_stays_bit_for_bit_and_one_that_old_tasks_alone_need_is_made() -> None:
    body, heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
    module = nn.ModuleDict({"body": body, "heads": heads})

    def loss(head: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(heads[int(head[0])](body(x).tanh()), y)

    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    gem = plain.GEM(module)
    gem.remember(torch.zeros(12, dtype=torch.int64), x, y)
    loss(torch.zeros(12), x, y).backward()
    gradient = [p.grad.clone() for p in body.parameters()]
    assert not gem.project(loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(body.parameters(), gradient))
    changed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        module.zero_grad(set_to_none=True)
        loss(torch.ones(12), -x, torch.randint(3, (12,))).backward()
        assert heads[0].weight.grad is None
        before, memory = flat_gradient(module), loss(torch.zeros(12), x, y)
        found = torch.autograd.grad(memory, list(module.parameters()), allow_unused=True)
        reference = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(module.parameters(), found)]
        )
        if gem.project(loss):
            changed += 1
            assert heads[0].weight.grad.abs().sum() > 0
            torch.testing.assert_close(flat_gradient(module), project(before, reference.unsqueeze(0), gem.margin))
        else:
            assert heads[0].weight.grad is None
    assert 0 < changed < 10


class Normalised(nn.Module):
    """Batch normalisation, dropout, a frozen layer and one whose mode is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.out, self.still = nn.Linear(6, 3), nn.BatchNorm1d(3)
        self.first.weight.requires_grad_(False)
        self.still.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.still(self.out(self.dropout(self.norm(self.first(x)).relu())))


@pytest.mark.parametrize("method", [plain.GEM, plain.AGEM])
def test_running_statistics_modes_and_frozen_weights_are_left_alone(method: Any) -> None:
    module = Normalised()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    episodic = method(module)
    episodic.remember(x, y)
    (-cross_entropy(module(x), y)).backward()
    before, modes = bits(module), [part.training for part in module.modules()]
    states = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        states.append([part.training for part in module.modules()])
        return cross_entropy(module(x), y)

    random_state = torch.get_rng_state()
    with torch.no_grad():
        assert episodic.project(loss)
    assert torch.equal(random_state, torch.get_rng_state()) and not any(states[0])
    assert same(bits(module), before) and modes == [part.training for part in module.modules()]
    assert module.first.weight.grad is None and module.first.bias.grad is not None


# ---------------------------------------------------------------------- PackNet


class Network(nn.Module):
    """A convolution, batch normalisation, tied layers and an embedding of which some rows are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)
        self.hidden, self.out = nn.Linear(24, 24), nn.Linear(24, 3)
        self.again = self.hidden
        self.embedding = nn.Embedding(5, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.convolution(x.unsqueeze(1))).relu().flatten(1)
        h = self.again(self.hidden(h).relu() + self.embedding(torch.zeros(len(x), dtype=torch.int64))).relu()
        return self.out(h)


def learn(module: nn.Module, packnet: plain.PackNet, optimizer: Any, steps: int = 12) -> None:
    module.train()
    for _ in range(steps):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        cross_entropy(module(x), (x @ torch.randn(8, 3)).argmax(-1)).backward()
        packnet.step(optimizer)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam with weight decay": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_task_owns_stays_bit_for_bit(name: str) -> None:
    module = Network()
    packnet, optimizer = plain.PackNet(module, share=0.5), OPTIMIZERS[name](module.parameters())
    x, answers, networks = torch.randn(9, 8), [], []
    for task in range(3):
        assert packnet.begin() == task
        learn(module, packnet, optimizer)
        for old, network in enumerate(networks):  # while what is free is in training
            with packnet.use(old):
                assert same(bits(module), network)
        packnet.prune()
        zeros = (module.hidden.weight == 0).float().mean()
        assert 0.5 ** (task + 1) - 0.01 < zeros <= 0.5
        learn(module, packnet, optimizer)
        assert (module.hidden.weight == 0).float().mean() == zeros  # what was pruned stays away
        module.eval()
        answers.append(module(x))
        networks.append(bits(module))
    working = bits(module)
    for task in (1, 0, 2, 0):
        with packnet.use(task) as shown:
            assert shown is module and torch.equal(module(x), answers[task])
            assert same(bits(module), networks[task])
        assert same(bits(module), working)
    packnet.use(0)
    packnet.use(1)
    assert torch.equal(module(x), answers[1])
    with packnet.use(0):
        assert torch.equal(module(x), answers[0])
    assert torch.equal(module(x), answers[1])
    packnet.use(None)
    assert same(bits(module), working)
    owned = packnet.state_dict()["owner"]["embedding.weight"]
    assert (owned[1:] == 0).all() and (owned[0] == 1).any()  # no task keeps what it never used


def test_the_gradient_of_what_must_not_move_is_0_and_no_other_is_touched() -> None:
    module = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    packnet, optimizer = plain.PackNet(module), torch.optim.SGD(module.parameters(), 0.1)
    packnet.begin()
    learn(module, packnet, optimizer)
    packnet.prune()
    packnet.begin()
    for pruned in (False, True):
        optimizer.zero_grad()
        module(torch.randn(16, 8)).square().sum().backward()
        before = [p.grad.clone() for p in module.parameters()]
        packnet.mask_gradients()
        for gradient, (name, p) in zip(before, module.named_parameters()):
            owner = packnet.state_dict()["owner"].get(name, torch.tensor(2))
            moves = owner == 2 if pruned or p.dim() == 1 else owner == 0
            assert torch.equal(p.grad, torch.where(moves, gradient, 0.0)) and bool((p.grad != 0).any())
        if not pruned:
            packnet.prune()


def test_an_optimizer_step_without_its_end_does_no_harm() -> None:
    module = Network()
    packnet, optimizer = plain.PackNet(module), OPTIMIZERS["adamw"](module.parameters())
    packnet.begin()
    learn(module, packnet, optimizer)
    packnet.prune()
    learn(module, packnet, optimizer)
    packnet.begin()
    x = torch.randn(9, 8)
    with packnet.use(0):
        expected = module.eval()(x)
    learn(module, packnet, optimizer)
    optimizer.step()  # forgot restore()
    with packnet.use(0):
        assert torch.equal(module.eval()(x), expected)


def test_later_tasks_start_from_numbers_the_layer_began_with() -> None:
    module = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    first = module[0].weight.detach().clone()
    packnet = plain.PackNet(module, share=0.25, seed=1)
    packnet.begin()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for phase in range(2):
        for _ in range(5):
            x = torch.randn(16, 30)
            optimizer.zero_grad()
            cross_entropy(module(x), x[:, :3].argmax(-1)).backward()
            packnet.step(optimizer)
        if phase == 0:
            packnet.prune()
    packnet.begin()
    free = packnet.state_dict()["owner"]["0.weight"] == 0
    drawn = module[0].weight.detach()[free]
    assert set(drawn.tolist()) <= set(first.flatten().tolist()) and (drawn != first[free]).float().mean() > 0.9
    assert abs(float(free.float().mean()) - 0.75) < 0.01


@pytest.mark.parametrize("give_back", [False, True])
def test_units_that_training_pushed_out_of_use_are_given_back_where_that_is_asked_for(give_back: bool) -> None:
    module = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    packnet, optimizer = plain.PackNet(module, give_back=give_back), torch.optim.SGD(module.parameters(), 0.1)
    packnet.begin()
    learn(module, packnet, optimizer)
    packnet.prune()
    with torch.no_grad():
        module[0].bias[:4] = -100.0  # these units say nothing any more
    learn(module, packnet, optimizer)
    x = torch.randn(9, 8)
    answers = module(x)
    packnet.begin()
    owner = packnet.state_dict()["owner"]
    assert bool((owner["0.weight"][:4] == 1).any()) != give_back and (owner["0.weight"][4:] == 1).any()
    with packnet.use(0):
        assert torch.equal(module(x), answers)


def test_a_network_that_was_trained_before_is_pruned_by_size() -> None:
    module = nn.Linear(10, 10)
    size = module.weight.detach().abs()
    packnet = plain.PackNet(module, share=0.3)
    packnet.begin()
    packnet.prune()
    assert (module.weight != 0).sum() == 30 and torch.equal(module.weight != 0, size >= size.flatten().sort()[0][70])


def test_packnet_goes_on_from_its_state() -> None:
    module = Network()
    packnet, optimizer = plain.PackNet(module), torch.optim.SGD(module.parameters(), 0.1)
    packnet.begin()
    learn(module, packnet, optimizer)
    packnet.prune()
    learn(module, packnet, optimizer)
    packnet.begin()
    learn(module, packnet, optimizer)
    packnet.prune()
    other = Network()
    other.load_state_dict(module.state_dict())
    loaded = plain.PackNet(other)
    loaded.load_state_dict(copy.deepcopy(packnet.state_dict()))
    for one, its, rule in ((packnet, module, optimizer), (loaded, other, torch.optim.SGD(other.parameters(), 0.1))):
        torch.manual_seed(5)
        learn(its, one, rule)
        one.begin()
        learn(its, one, rule)
    assert same(bits(module), bits(other))
    with packnet.use(0), loaded.use(0):
        assert same(bits(module), bits(other))


def test_a_growing_module_and_heads_of_other_tasks() -> None:
    body, heads = nn.Linear(8, 12), nn.ModuleList([nn.Linear(12, 2)])
    module = nn.ModuleDict({"body": body, "heads": heads})
    packnet = plain.PackNet(module)
    x, answers = torch.randn(20, 8), []
    for task in range(3):
        if task:
            heads.append(nn.Linear(12, 2))
        packnet.begin()
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        for phase in range(2):
            for _ in range(10):
                optimizer.zero_grad()
                cross_entropy(heads[task](body(x).relu()), (x[:, task] > 0).long()).backward()
                packnet.step(optimizer)
            if phase == 0:
                packnet.prune()
        answers.append(heads[task](body(x).relu()))
    for task in range(3):
        with packnet.use(task):
            assert torch.equal(heads[task](body(x).relu()), answers[task])


def test_a_task_that_has_no_weight_is_refused_before_it_is_counted() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    packnet, optimizer = plain.PackNet(module, share=1.0), torch.optim.SGD(module.parameters(), 0.1)
    packnet.begin()
    learn(module, packnet, optimizer, 2)
    packnet.prune()
    learn(module, packnet, optimizer, 2)
    before = copy.deepcopy(packnet.state_dict())
    for _ in range(2):
        with pytest.raises(SettingError, match="PackNet: 1 tasks own every weight"):
            packnet.begin()
    torch.testing.assert_close(packnet.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(SettingError, match=r"use\(1\), expected None or one of the 1 tasks begun"):
        packnet.use(1)


def test_an_optimizer_that_needs_a_closure_takes_it_and_frozen_weights_stay() -> None:
    module, x, y = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(64, 8), torch.arange(64) % 3
    packnet, optimizer = plain.PackNet(module, share=0.5), torch.optim.LBFGS(module.parameters(), max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(module(x), y)
        loss.backward()
        return loss

    packnet.begin()
    closure()
    with pytest.raises(SettingError, match=r"LBFGS computes .* no closure: call step\(optimizer, closure\)"):
        packnet.step(optimizer)
    first = packnet.step(optimizer, closure)
    assert first is not None and closure().detach() < first.detach(), "it learns"
    packnet.prune()
    packnet.step(optimizer, closure)
    packnet.begin()
    kept = {n: p.detach().clone() for n, p in module.named_parameters()}
    packnet.step(torch.optim.LBFGS(module.parameters(), max_iter=5), closure)
    for name, owner in packnet.state_dict()["owner"].items():
        now = dict(module.named_parameters())[name].detach()
        assert torch.equal(now[owner == 1], kept[name][owner == 1])
        assert bool((now[owner == 0] != kept[name][owner == 0]).any())


# ---------------------------------------------------------------------- replay


def test_every_sample_of_a_stream_is_kept_with_the_same_chance() -> None:
    counts = torch.zeros(60)
    for seed in range(600):
        memory = plain.Reservoir(10, torch.Generator().manual_seed(seed))
        for rows in torch.arange(60).split(7):
            memory.add(rows)
        held = memory.state_dict()["samples"][0]
        assert len(memory) == 10 and len(set(held.tolist())) == 10
        counts[held] += 1
    expected = 600 * 10 / 60
    statistic = ((counts - expected).square() / (expected * (1 - 1 / 6))).sum()
    assert statistic < 100  # chi-squared of 59 degrees: above it once in 1,500


def test_samples_come_back_in_the_form_they_were_given() -> None:
    memory = plain.Reservoir(50, torch.Generator().manual_seed(0))
    x = torch.randn(20, 3, requires_grad=True)
    memory.add({"x": x}, torch.arange(20))
    assert len(memory) == 20 and memory.added == 20
    batch, rows = memory.sample(100)
    assert torch.equal(batch["x"], x[rows]) and not batch["x"].requires_grad and set(rows.tolist()) == set(range(20))
    before, x = x.detach().clone(), x.detach()
    x.zero_()
    assert torch.equal(memory.sample(5)[0]["x"], before[0:0]) or memory.sample(5)[0]["x"].abs().sum() > 0
    other = plain.Reservoir(50, torch.Generator())
    other.load_state_dict(memory.state_dict())
    for buffer in (memory, other):
        buffer.add({"x": before[:15] + 1}, torch.arange(15))
    assert all(torch.equal(a, b) for a, b in zip(memory.sample(9)[0].values(), other.sample(9)[0].values()))
    alone = plain.Reservoir(3, torch.Generator().manual_seed(0))
    alone.add(torch.arange(9))
    assert isinstance(alone.sample(4), Tensor)


# ---------------------------------------------------------------------- torch's default device


def test_nothing_is_made_on_the_default_device() -> None:
    def numbers() -> list[Tensor]:
        with torch.device("cpu"):
            torch.manual_seed(0)
            module, x, y = Network(), torch.randn(20, 8), torch.randint(3, (20,))
            generator = torch.Generator().manual_seed(0)
        ewc, gem, agem = plain.EWC(module, 10.0), plain.GEM(module, 8), plain.AGEM(module, 8)
        packnet, memory = plain.PackNet(module), plain.Reservoir(5, generator)
        out = [ewc.penalty()]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            h = module.norm(module.convolution(x.unsqueeze(1))).relu().flatten(1)
            return cross_entropy(module.out(module.hidden(h)), y)

        def log_prob(model: Any, x: Tensor) -> Tensor:
            return model(x).log_softmax(-1)[:, 0]

        memory.add(x, y)
        packnet.begin()
        with torch.device("cpu"):
            found = plain.fisher_information(module, x)
        out += found.values()
        (-loss(x, y)).backward()
        for episodic in (gem, agem):
            episodic.remember(x, y)
            assert episodic.project(loss)
            out += [p.grad.clone() for p in module.parameters() if p.grad is not None]
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        packnet.step(optimizer)
        packnet.prune()
        packnet.step(optimizer)
        packnet.begin()
        with packnet.use(0):
            out += bits(module).values()
        return [*out, *bits(module).values(), *memory.sample(4)]

    expected = numbers()
    with torch.device("meta"):
        found = numbers()
    assert all(torch.equal(one, other) for one, other in zip(found, expected)) and len(found) == len(expected)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_whatever_a_task_ends_in_the_next_one_trains(off: Callable[[], Any]) -> None:
    module, y = small(), torch.randint(3, (20,))
    with off():
        x = torch.randn(20, 4, dtype=DOUBLE)
        ewc, gem, packnet = plain.EWC(module), plain.GEM(module, margin=0.0), plain.PackNet(module)
        memory = plain.Reservoir(5, torch.Generator().manual_seed(0))
        ewc.consolidate(x)
        gem.remember(x, y)
        memory.add(x, y)
        memory.sample(3)
        packnet.begin()
        packnet.prune()
        packnet.begin()
        packnet.use(0)
        packnet.use(None)
    move(module)
    memory.add(x, y)
    old_x, old_y = memory.sample(3)
    (ewc.penalty() - cross_entropy(module(x.clone()), y) + cross_entropy(module(old_x), old_y)).backward()
    with off():
        gem.project(lambda x, y: cross_entropy(module(x), y))
    packnet.step(torch.optim.SGD(module.parameters(), 0.1))
    assert all(p.grad is not None and not p.grad.is_inference() for p in module.parameters())


# ---------------------------------------------------------------------- a sentence for what is wrong


def without_gradients() -> nn.Module:
    return nn.Linear(4, 3).requires_grad_(False)


def remembered(module: nn.Module | None = None, method: Any = plain.GEM) -> Any:
    module = nn.Linear(4, 3) if module is None else module
    episodic = method(module)
    episodic.remember(torch.randn(5, 4), torch.randint(3, (5,)))
    module(torch.randn(2, 4)).sum().backward()
    return episodic


def begun() -> plain.PackNet:
    packnet = plain.PackNet(nn.Linear(4, 3))
    packnet.begin()
    return packnet


def shown() -> plain.PackNet:
    packnet = begun()
    packnet.begin()
    packnet.use(0)
    return packnet


def sparse() -> plain.GEM:
    module = nn.Embedding(4, 3, sparse=True)
    gem = plain.GEM(module)
    module(torch.arange(2)).sum().backward()
    gem.project(lambda: None)
    return gem


def filled() -> plain.Reservoir:
    memory = plain.Reservoir(3, torch.Generator())
    memory.add(torch.zeros(2, 4))
    return memory


X = torch.zeros(5, 4)
WRONG: dict[str, Callable[[], Any]] = {
    "EWC was given <class 'torch.nn.modules.linear.Linear'>, expected a torch.nn.Module, built": lambda: plain.EWC(
        nn.Linear  # type: ignore[arg-type]
    ),
    "EWC: strength is -1.0, expected a number, at least 0": lambda: plain.EWC(nn.Linear(4, 3), -1.0),
    "EWC: strength is inf, expected a number, at least 0": lambda: plain.EWC(nn.Linear(4, 3), float("inf")),
    "EWC: strength is nan, expected": lambda: plain.EWC(nn.Linear(4, 3), float("nan")),
    "EWC: decay is 1.5, expected a number, at least 0 and at most 1": lambda: plain.EWC(nn.Linear(4, 3), decay=1.5),
    "no parameter of this Linear requires a gradient": lambda: plain.EWC(without_gradients()).consolidate(X),
    "a lazy module has no parameters before its first call": lambda: plain.EWC(nn.LazyLinear(3)).consolidate(X),
    'the module is on the device "meta"': lambda: plain.EWC(nn.Linear(4, 3, device="meta")).consolidate(X),
    "was given str, expected tensors": lambda: plain.EWC(nn.Linear(4, 3)).consolidate("x"),
    "was given nothing, expected tensors": lambda: plain.EWC(nn.Linear(4, 3)).consolidate(()),
    r"was given tensors \[\[0, 4\]\], expected as many samples, one or more": lambda: plain.EWC(
        nn.Linear(4, 3)
    ).consolidate(X[:0]),
    r"was given tensors \[\[5, 4\], \[3, 4\]\], expected as many samples": lambda: plain.EWC(
        nn.Linear(4, 3)
    ).consolidate((X, X[:3])),
    "fisher_information was given mean and log_prob, expected one": lambda: plain.fisher_information(
        nn.Linear(4, 3), X, mean=lambda m, x: m(x), log_prob=lambda m, x: m(x)
    ),
    "kind and target are for logits, but mean was given": lambda: plain.fisher_information(
        nn.Linear(4, 3), X, mean=lambda m, x: m(x), kind="sample"
    ),
    "the outputs depend on none of the weights": lambda: plain.fisher_information(
        nn.Linear(4, 3), X, logits=lambda m, x: m(x).detach()
    ),
    "a sample's output changes without the rest of its batch": lambda: plain.fisher_information(
        nn.Linear(4, 3), torch.randn(5, 4), logits=lambda m, x: m(x) - m(x).mean(0)
    ),
    "the outputs are of type tuple, expected|the outputs are torch.float32 of shape": lambda: plain.fisher_information(
        nn.Linear(4, 3),
        X,
        logits=lambda m, x: (m(x),),  # type: ignore[arg-type, return-value]
    ),
    "GEM: memory is 0, expected a whole number": lambda: plain.GEM(nn.Linear(4, 3), 0),
    "GEM: margin is -0.5, expected a number, at least 0": lambda: plain.GEM(nn.Linear(4, 3), margin=-0.5),
    "AGEM: batch_size is 0.5, expected a whole number": lambda: plain.AGEM(nn.Linear(4, 3), batch_size=0.5),  # type: ignore[arg-type]
    r"GEM: project\(\): no parameter has a gradient: call it after loss.backward": lambda: plain.GEM(
        nn.Linear(4, 3)
    ).project(lambda: X),
    "the gradient of weight is sparse": sparse,
    r"the loss of the memories is of shape \[5\], expected one number": lambda: remembered().project(
        lambda x, y: x.sum(-1)
    ),
    "the loss of the memories is 1.0, expected one number": lambda: remembered().project(lambda x, y: 1.0),
    "does not depend on the module's parameters": lambda: remembered().project(lambda x, y: x.sum()),
    "AGEM: the loss of the memories does not depend on": lambda: remembered(method=plain.AGEM).project(
        lambda x, y: nn.Linear(4, 3)(x).sum()
    ),
    r"AGEM remembers samples of shapes \[\[4\], \[\]\], and was given \[\[2\], \[\]\]": lambda: remembered(
        method=plain.AGEM
    ).remember(torch.zeros(3, 2), torch.zeros(3)),
    "GEM was given tensors": lambda: remembered().remember(X, X[:2]),
    "PackNet: share is 0, expected more": lambda: plain.PackNet(nn.Linear(4, 3), 0),
    "PackNet: share is 1.5, expected a number, at least 0 and at most 1": lambda: plain.PackNet(nn.Linear(4, 3), 1.5),
    "no parameter of this module has two axes": lambda: plain.PackNet(nn.LayerNorm(4)),
    r"prune\(\) before the first task: call begin": lambda: plain.PackNet(nn.Linear(4, 3)).prune(),
    r"mask_gradients\(\) before the first task": lambda: plain.PackNet(nn.Linear(4, 3)).mask_gradients(),
    r"mask_gradients\(\): no parameter has a gradient": lambda: begun().mask_gradients(),
    r"task 0 is pruned already: begin\(\) starts the next one": lambda: [p := begun(), p.prune(), p.prune()],
    r"use\(1\), expected None or one of the 1 tasks begun": lambda: begun().use(1),
    r"use\(-1\), expected None": lambda: begun().use(-1),
    r"prune\(\) while the module is the network of task 0: call use\(None\) first": lambda: shown().prune(),
    r"mask_gradients\(\) while the module is": lambda: shown().mask_gradients(),
    r"begin\(\) while the module is": lambda: shown().begin(),
    r"state_dict\(\) while the module is": lambda: shown().state_dict(),
    "1 tasks own every weight, so a further one has none": lambda: [p := begun(), p.prune(1.0), p.begin()],
    "the state has x, expected what its state_dict": lambda: begun().load_state_dict({"x": 1}),
    r"of another module, whose weight is \[3, 4\]": lambda: plain.PackNet(nn.Linear(4, 2)).load_state_dict(
        begun().state_dict()
    ),
    r"parameter 0.weight was \[3, 4\] and is gone, or frozen": lambda: [
        m := nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)),
        p := plain.PackNet(m),
        m[0].requires_grad_(False),
        p.begin(),
    ],
    "Reservoir: capacity is 0, expected a whole number": lambda: plain.Reservoir(0, torch.Generator()),
    "generator is None, expected a torch.Generator": lambda: plain.Reservoir(5, None),  # type: ignore[arg-type]
    r"sample\(\) of an empty buffer": lambda: plain.Reservoir(5, torch.Generator()).sample(2),
    "Reservoir: count is 0, expected": lambda: filled().sample(0),
    r"was given float32 \[n, 3\], expected samples like those before, float32 \[n, 4\]": lambda: filled().add(
        torch.zeros(2, 3)
    ),
    r"was given float64 \[n, 4\], expected samples like": lambda: filled().add(torch.zeros(2, 4, dtype=DOUBLE)),
    "the state is of capacity 3, this one's is 4": lambda: plain.Reservoir(4, torch.Generator()).load_state_dict(
        filled().state_dict()
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_one_sentence(message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        WRONG[message]()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- what they are for


def tasks() -> tuple[Tensor, Tensor]:
    """Three tasks of points on either side of a plane of each task's own; which task it is stands in the input."""
    x = torch.randn(3, 600, 4)
    y = (x @ torch.randn(3, 4, 1)).squeeze(-1).gt(0).long()
    return torch.cat((x, torch.eye(3).unsqueeze(1).expand(3, 600, 3)), -1), y


def old_accuracy(method: str, seed: int) -> float:
    """The mean accuracy on the first two tasks after the third."""
    torch.manual_seed(seed)
    x, y = tasks()
    module = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    ewc, packnet = plain.EWC(module, 1000.0), plain.PackNet(module)
    episodic = (plain.AGEM if method == "agem" else plain.GEM)(module, 100)
    memory = plain.Reservoir(300, torch.Generator().manual_seed(seed))
    optimizer = (
        torch.optim.SGD(module.parameters(), 0.1) if "gem" in method else torch.optim.Adam(module.parameters(), 3e-3)
    )

    def loss_on(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(module(x), y)

    def minibatch(task: int, rows: Tensor) -> None:
        loss = loss_on(x[task, rows], y[task, rows])
        if method == "ewc":
            loss = loss + ewc.penalty()
        if method == "replay":
            loss = loss + loss_on(*memory.sample(50)) if len(memory) else loss
            memory.add(x[task, rows], y[task, rows])
        optimizer.zero_grad()
        loss.backward()
        if "gem" in method:
            episodic.project(loss_on)
        if method == "packnet":
            packnet.step(optimizer)
        else:
            optimizer.step()

    def accuracy(task: int) -> float:
        return float((module(x[task, 500:]).argmax(-1) == y[task, 500:]).float().mean())

    for task in range(3):
        if method == "packnet":
            packnet.begin()
        for phase in range(2 if method == "packnet" else 1):
            if phase:
                packnet.prune()
            for rows in torch.cat([torch.randperm(500) for _ in range(8)]).split(50):
                minibatch(task, rows)
        if method == "ewc":
            ewc.consolidate(x[task, :500])
        if "gem" in method:
            episodic.remember(x[task, :500], y[task, :500])
    if method != "packnet":
        return (accuracy(0) + accuracy(1)) / 2
    scores = []
    for task in range(2):
        with packnet.use(task):
            scores.append(accuracy(task))
    return sum(scores) / 2


@pytest.mark.parametrize(
    ("method", "bar"), [("ewc", 0.7), ("gem", 0.85), ("agem", 0.66), ("packnet", 0.93), ("replay", 0.85)]
)
def test_old_tasks_are_kept_where_plain_training_forgets_them(method: str, bar: float) -> None:
    assert sum(old_accuracy(method, seed) for seed in range(3)) / 3 > bar


def test_plain_training_forgets() -> None:
    assert sum(old_accuracy("plain", seed) for seed in range(3)) / 3 < 0.62


def test_a_bias_that_is_frozen_during_a_task_is_that_tasks_own_later() -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    packnet, x = plain.PackNet(module, 0.3), torch.randn(16, 3)
    answers = []
    for task in range(3):
        packnet.begin()
        module[0].bias.requires_grad_(task != 1)
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.05)
        for _ in range(10):
            optimizer.zero_grad()
            cross_entropy(module(x), (x[:, task] > 0).long()).backward()
            packnet.step(optimizer)
        packnet.prune()
        with packnet.use(task), torch.no_grad():
            answers.append(module(x))
    for task, answer in enumerate(answers):
        with packnet.use(task), torch.no_grad():
            assert torch.equal(module(x), answer), task


def test_ewc_goes_on_when_a_held_layer_is_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    ewc, x = plain.EWC(module), torch.randn(20, 4)
    ewc.consolidate(x)
    module[0].requires_grad_(False)
    ewc.consolidate(x)
    assert float(ewc.penalty()) == 0.0


def test_a_reservoirs_state_is_a_snapshot() -> None:
    reservoir = plain.Reservoir(4, torch.Generator().manual_seed(0))
    reservoir.add(torch.zeros(4))
    state = reservoir.state_dict()
    before = state["samples"][0].clone()
    reservoir.add(torch.ones(400))
    assert torch.equal(state["samples"][0], before)
