"""HAT: gates as scaled columns, the embeddings' gradient without a backward pass, masks that hold, old answers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.method import Gradients, StepInfo, effective_params
from rlmeta.learning.phases import EVALUATED
from rlmeta.lifelong import HAT
from rlmeta.lifelong.hat import chain_of, steepness
from rlmeta.nn import Encoder
from tests.lifelong.test_methods import SHORT, agent, conflicts
from tests.lifelong.toy import learner, points, tasks, trained

HIDDEN = (6, 5)
FIRST, SECOND, OUTPUT = "net.0.1.0", "net.0.1.2", "net.1"


def double(part: Any) -> Any:
    return tree.map(lambda x: x.double() if x.is_floating_point() else x, part)


def begun(index: int = 1, progress: float = 0.3, **settings: Any) -> tuple[Any, HAT, Any, Any, Any, Any]:
    """A run of two hidden layers in float64 in a task: learner, method, params, memory, task, minibatch."""
    run = trained(HAT(), **{"hidden_sizes": HIDDEN, **settings})
    method, state, world = run.agent.methods[0], double(run.state), run.world
    with mock.patch.object(Encoder.__init__, "__defaults__", (torch.float64,)):
        agent = run.agent.settings.bind(world.observation_space, world.action_space)
    state["params"]["weights"] = Packed.of(dict(state["params"]["weights"]), 1)
    task = {name: torch.zeros_like(value) for name, value in state["task"].items()}
    task |= {"index": task["index"] + index, "progress": task["progress"] + progress}
    batch = double(run.world.next_batch(run.state["world"])[1])
    m = {**state["methods"]["hat"], "attention": torch.rand(3, 11, dtype=torch.float64)}
    return agent, method, state["params"], m, task, batch


def gated(p: Any, x: Tensor, gates: Tensor) -> Tensor:
    """The network with its activations multiplied by gates `[S, H]`, by hand."""
    first, second = (gate.unsqueeze(-2) for gate in gates.split(HIDDEN, -1))
    w = p["weights"]
    h = torch.tanh(x @ w[f"{FIRST}.weight"].mT + w[f"{FIRST}.bias"].unsqueeze(-2)) * first
    h = torch.tanh(h @ w[f"{SECOND}.weight"].mT + w[f"{SECOND}.bias"].unsqueeze(-2)) * second
    return h @ w[f"{OUTPUT}.weight"].mT + w[f"{OUTPUT}.bias"].unsqueeze(-2)


def gates_of(m: Any, index: int, s: float) -> Tensor:
    gates: Tensor = (s * m["embeddings"][:, index]).sigmoid()
    return gates


def flat(tensors: Any) -> Tensor:
    return torch.cat([value.flatten(1) for value in tensors.values()], -1)


# ---------------------------------------------------------------------- gates


def test_gates_on_units_are_scaled_columns_of_the_next_layer() -> None:
    agent, method, p, m, task, batch = begun(progress=0.01, activation="tanh")
    s = 1 / 400 + (400 - 1 / 400) * 0.01
    x = batch["observation"]
    found = agent.output(method.params(agent, p, m, task), batch)
    torch.testing.assert_close(found, gated(p, x, gates_of(m, 1, s)), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found, agent.output(p, batch))
    tested = {**task, "phase": torch.full_like(task["phase"], EVALUATED), "index": torch.zeros_like(task["index"])}
    found = agent.output(method.params(agent, p, m, tested), batch)
    torch.testing.assert_close(found, gated(p, x, gates_of(m, 0, 400.0)), rtol=1e-12, atol=1e-14)


def test_gates_grow_steep_over_a_task() -> None:
    progress = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert steepness(progress, 50.0).tolist() == pytest.approx([0.02, 25.01, 50.0])


# ---------------------------------------------------------------------- embeddings


def one_step(progress: float, **settings: Any) -> tuple[Any, StepInfo, Tensor]:
    """A step of plain gradient descent, with the gradient of the loss and the cost by autograd for the embeddings."""
    agent, method, p, m, task, batch = begun(progress=progress, activation="tanh", **settings)
    weights = {name: value.clone().requires_grad_() for name, value in p["weights"].items()}
    embeddings = m["embeddings"].clone().requires_grad_()
    shown = method.params(agent, {**p, "weights": weights}, {**m, "embeddings": embeddings}, task)
    loss = agent.losses(shown, batch, StepContext(training=True, report=False))["net"]
    *slopes, slope = torch.autograd.grad(loss.sum(), [*weights.values(), embeddings], retain_graph=True)
    gradient = flat(dict(zip(weights, slopes)))
    delta = -0.1 * gradient
    moved = {**p, "weights": Packed.view(p["weights"].flat + delta, p["weights"], 1)}
    info = StepInfo(gradient, delta, batch, {})
    return (agent, method, moved, m, task), info, slope[:, 1]


@pytest.mark.parametrize("progress", [0.0, 0.004, 0.02])
def test_the_gradient_of_an_embedding_needs_no_backward_pass(progress: float) -> None:
    """s (1 - a) Σ W ∇W, and the cost's, against autograd; compensated as the paper says."""
    (agent, method, p, m, task), info, slope = one_step(progress)
    m = {**m, "optimizer": tree.map(torch.zeros_like, m["optimizer"])}
    after = method.after_step(agent, info, p, m, task, task["index"])
    gates = method.gates(m, task)
    e, s = gates.embedding.clone().requires_grad_(), gates.s
    new = 1 - m["attention"]
    cost = 0.75 * ((s * e).sigmoid() * new).sum(-1) / new.sum(-1)
    (of_cost,) = torch.autograd.grad(cost.sum(), e)
    factor = 400 / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.cosh() + 1)
    found = after["optimizer"]["mean"]["embedding"] / 0.1  # Adam's, after one step
    torch.testing.assert_close(found, (factor * (slope + of_cost)).detach(), rtol=1e-8, atol=1e-12)
    assert slope.abs().max() > 1e-6


def test_a_step_moves_the_embedding_of_its_task_alone_by_adam() -> None:
    (agent, method, p, m, task), info, _ = one_step(0.01)
    m = {**m, "optimizer": tree.map(torch.zeros_like, m["optimizer"])}
    after = method.after_step(agent, info, p, m, task, task["index"])
    moved = after["embeddings"] - m["embeddings"]
    assert torch.equal(moved[:, [0, 2]], torch.zeros_like(moved[:, [0, 2]]))
    free = m["embeddings"][:, 1].abs() < 5.9
    torch.testing.assert_close(moved[:, 1].abs()[free], torch.full_like(moved[:, 1][free], 1e-2), rtol=1e-3, atol=0.0)
    _, started = method.task_start(agent, p, after, task)
    assert not any(bool(value.any()) for value in tree.leaves(started["optimizer"]))
    assert torch.equal(started["embeddings"], after["embeddings"])
    far = {**m, "embeddings": m["embeddings"] * 100}
    assert method.after_step(agent, info, p, far, task, task["index"])["embeddings"][:, 1].abs().max() <= 6.0


def test_no_clip_of_the_learners_reaches_the_embeddings() -> None:
    """One step from the same place: weights that are clipped to nothing, embeddings as without."""
    ends = []
    for bound in (math.inf, 1e-6):
        settings = learner(num_steps=1, optimizer="sgd", max_grad_norm=bound)
        run = rl.train(settings, points(1), steps=8, seeds=2, lifelong=[HAT()], progress=False)
        ends.append(run.state)
    one, two = (state["methods"]["hat"]["embeddings"] for state in ends)
    torch.testing.assert_close(one, two, rtol=0.0, atol=1e-5)
    assert not torch.equal(flat(ends[0]["params"]["weights"]), flat(ends[1]["params"]["weights"]))


@pytest.mark.parametrize(("name", "values"), [("strength", (0.0, 5.0)), ("learning_rate", (0.01, 0.1))])
def test_every_learner_may_have_a_setting_of_its_own(name: str, values: tuple[float, float]) -> None:
    runs = [trained(HAT(**{name: given}), count=1, seeds=1, steps=40) for given in (values, *values)]
    both, *alone = (run.state["methods"]["hat"]["embeddings"] for run in runs)
    assert len(both) == 2 and not torch.equal(both[0], both[1])
    for i, one in enumerate(alone):
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- masks


def test_weights_are_held_by_the_smaller_of_their_two_units() -> None:
    """Entry by entry in a loop; outputs count as used where an earlier task had a gradient there."""
    agent, method, p, m, task, _ = begun()
    answered = torch.tensor([[True, False], [False, False], [False, True]])
    answered = torch.stack([answered[:, [0, 1, 1]], answered[:, [1, 1, 0]]], 1)
    _, after = method.task_end(agent, p, {**m, "answered": answered}, task, None)
    attention = torch.maximum(m["attention"], gates_of(m, 1, 400.0))
    assert torch.equal(after["attention"], attention)
    used = answered.any(1)
    assert torch.equal(after["answered"], torch.stack([used, torch.zeros_like(used)], 1))
    free = Packed.view(after["free"], p["weights"], 1)
    for s in range(3):
        c = [[1.0] * 4, attention[s, :6].tolist(), attention[s, 6:].tolist(), used[s].double().tolist()]
        for name, own, below in ((FIRST, c[1], c[0]), (SECOND, c[2], c[1]), (OUTPUT, c[3], c[2])):
            for i, mine in enumerate(own):
                assert float(free[f"{name}.bias"][s, i]) == pytest.approx(1 - mine)
                for j, other in enumerate(below):
                    assert float(free[f"{name}.weight"][s, i, j]) == pytest.approx(1 - min(mine, other))
    gradient = torch.rand_like(after["free"])
    total = method.grads(None, Gradients(gradient, gradient), p, after, task)
    torch.testing.assert_close(total, gradient * after["free"])
    assert torch.equal(method.frozen(p, after, task), after["free"] < 0.5)


def test_outputs_of_a_task_are_those_with_a_gradient() -> None:
    """A head for every task: each of three tasks has two of six classes."""
    run = rl.train(
        learner(), rl.stream("split-digits", scenario="task"), steps=80, seeds=2, lifelong=[HAT()], final_episodes=1
    )
    m = run.state["methods"]["hat"]
    assert m["answered"][:, 0].all()
    free = Packed.view(m["free"], run.state["params"]["weights"], 1)[f"{OUTPUT}.weight"]
    torch.testing.assert_close(free, (1 - m["attention"]).unsqueeze(-2).expand_as(free))


class Recorder:
    """Answers for the first task, whenever it is over, as the run goes on."""

    def __init__(self) -> None:
        self.answers: list[Tensor] = []

    def __call__(self, run: Any, line: Any) -> None:
        if int(run.state["task"]["index"].max()) > 0:
            self.answers.append(self.now(run))

    def now(self, run: Any) -> Tensor:
        task = tree.map(torch.zeros_like, run.state["task"])
        task["phase"] = torch.full_like(task["phase"], EVALUATED)
        x = torch.linspace(-2, 2, 80).reshape(1, 20, 4).expand(len(run.state["key"]), -1, -1)
        answers: Tensor = run.agent.output(effective_params(run.agent, run.state, task), {"observation": x}).detach()
        return answers


def hard(state: Any) -> None:
    """Embeddings that are far from 0: every gate is open or closed, to the last bit."""
    m = state["methods"]["hat"]
    state["methods"]["hat"] = {**m, "embeddings": m["embeddings"].sign() * (m["embeddings"].abs() + 0.5)}


OPTIMIZERS = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "rmsprop", "max_grad_norm": 0.5},
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda given: given["optimizer"])
def test_with_hard_gates_old_answers_never_change(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the middle of later tasks, too, whatever the optimizer does to a weight without a gradient."""
    first = HAT.init

    def init(self: HAT, learner: Any, state: Any) -> Any:
        state = {**state, "methods": {"hat": first(self, learner, state)}}
        hard(state)
        return state["methods"]["hat"]

    monkeypatch.setattr(HAT, "init", init)
    watch = Recorder()
    run = rl.train(
        learner(hidden_sizes=(12, 12), **settings),
        points(),
        budget=rl.Budget(steps=160, log_points=1000),
        seeds=3,
        lifelong=[HAT(learning_rate=0.0)],
        callbacks=[watch],
    )
    assert len(watch.answers) > 5
    for answers in watch.answers:
        assert torch.equal(answers, watch.answers[0])
    assert run.summary()[0]["forgetting"] == 0.0


def test_old_answers_change_within_the_limit_of_the_masks() -> None:
    """Learned gates are not all hard: what is left of a weight's freedom bounds what its task loses."""
    watch = Recorder()
    run = rl.train(
        learner(hidden_sizes=(24, 24)),
        points(),
        budget=rl.Budget(steps=400, log_points=1000),
        seeds=3,
        lifelong=[HAT(learning_rate=0.05)],
        callbacks=[watch],
    )
    m = run.state["methods"]["hat"]
    soft = ((gates_of(m, 0, 400.0) - 0.5).abs() < 0.5 - 1e-7).any(-1)
    change = (watch.now(run) - watch.answers[0]).abs().amax((-2, -1))
    assert bool((change[~soft] <= 1e-5).all()), change
    assert run.summary()[0]["forgetting"] < 0.02


def test_a_later_task_learns_with_what_is_left() -> None:
    run = rl.train(
        rl.Classifier(batch_size=32, learning_rate=3e-3, hidden_sizes=(64, 64)),
        "split-digits",
        steps=3200,
        seeds=2,
        lifelong=[HAT()],
    )
    assert (run.matrix[:, -1].mean(0) > 0.9).all(), run.matrix[:, -1].mean(0)


def test_what_new_units_cost_leaves_more_of_the_network() -> None:
    used = []
    for strength in (0.0, 20.0):
        run = trained(HAT(strength=strength, learning_rate=0.05), count=1, steps=400, hidden_sizes=(24,))
        used.append(float(run.state["methods"]["hat"]["attention"].mean()))
    assert used[1] < 0.6 * used[0], used


# ---------------------------------------------------------------------- agents, and what is refused


def test_a_policy_keeps_its_old_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    observed = torch.randn(2, 5, conflicts().world((2,), 1).observation_space.shape[0])

    def watch(run: Any, line: Any) -> None:
        if int(run.state["task"]["index"].max()) > 0:
            task = {**tree.map(torch.zeros_like, run.state["task"])}
            task["phase"] = torch.full_like(task["phase"], EVALUATED)
            p = effective_params(run.agent, run.state, task)
            found.append(run.agent.forward(run.agent.policy, "policy", p, observed)["logits"].detach())

    run = rl.train(agent(), conflicts(), budget=SHORT, seeds=2, lifelong=[HAT()], callbacks=[watch])
    assert len(found) > 1
    for logits in found:
        torch.testing.assert_close(logits, found[0], rtol=0.0, atol=1e-2)
    held = Packed.view(run.state["methods"]["hat"]["free"], run.state["params"]["weights"], 1)
    for name, free in held.items():
        assert bool((free < 1).any()) == name.startswith("policy.")


def test_what_it_cannot_gate_is_refused() -> None:
    refused: list[tuple[Any, Any, str]] = [
        (rl.Classifier(network=lambda space: torch.nn.Linear(4, 5)), points(), "in a row, at least one of them hidden"),
        (rl.Classifier(hidden_sizes=()), points(), "at least one of them hidden"),
        (rl.PPO(normalise_observation=True), conflicts(), "set normalise_observation to false"),
        (rl.PPO(share_network=True), conflicts(), "leave network, share_network, memory and task_heads at their"),
        (rl.PPO(task_heads=4), rl.stream("cartpole-conflicts"), "memory and task_heads at their defaults"),
        (rl.DQN(), conflicts(), "DQNAgent has some"),
        (rl.PPO(), rl.stream([rl.task("Pendulum-v1")] * 2, "pendulums"), "let actions be discrete"),
        (learner(), rl.stream("split-digits", scenario="class"), "hat needs to know which task it is tested on"),
    ]
    for settings, problem, message in refused:
        with pytest.raises(SettingError, match=message):
            rl.train(settings, problem, steps=64, lifelong=[HAT()])
    for wrong in ({"s_max": 0.5}, {"s_max": math.inf}, {"strength": -1.0}, {"learning_rate": math.nan}):
        with pytest.raises(SettingError):
            HAT(**wrong)
    assert dataclasses.fields(HAT)[0].default == 400.0 and len(tasks(2)) == 2


def test_chains_are_known_by_their_shapes() -> None:
    chain = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (4, 3), "b.bias": (4,)}
    assert [layer[0] for layer in chain_of(chain)] == ["a.weight", "b.weight"]
    broken: list[dict[str, Any]] = [
        {"a.weight": (3, 2), "a.bias": (3,)},
        {**chain, "b.weight": (4, 5)},
        {**chain, "log_std": (4,)},
        {name: shape for name, shape in chain.items() if name != "a.bias"},
    ]
    assert [chain_of(shapes) for shapes in broken] == [[]] * 4
