"""Lifelong methods on an agent with a memory: what they keep and differentiate is whole sequences."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.native import CartPole
from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.method import Gradients, Method, effective_params
from rlmeta.lifelong import AGEM, EWC, GEM, PackNet, Replay
from rlmeta.lifelong.ewc import information
from rlmeta.lifelong.recall import recall_loss
from rlmeta.nn import Context, Encoder
from rlmeta.nn.sample_gradients import group_gradients
from tests.lifelong.test_hooks import Watched
from tests.lifelong.toy import flat

S = B = T = N = 3
A = 2
SETTINGS = rl.PPO(
    num_envs=N, num_steps=T, batch_size=T, num_epochs=1, hidden_sizes=(5,), memory="gru", memory_size=4,
    sees=("action", "reward", "start"),
)  # fmt: skip
MEMORIES = {
    "gru": SETTINGS,
    "lstm": dataclasses.replace(SETTINGS, memory="lstm", memory_layers=2),
    "attention": dataclasses.replace(SETTINGS, memory="attention", attention_heads=2, context=2),
}
each_memory = pytest.mark.parametrize("memory", MEMORIES)
METHODS = [EWC(strength=100.0, samples=4), GEM(memory=4), AGEM(memory=4, batch_size=4), Replay(size=8), PackNet()]
BUDGET = rl.Budget(steps=2 * N * T, eval_episodes=1, final_episodes=1, log_points=100)
"""Two iterations a task, of three gradient steps each."""


@functools.cache
def hidden() -> Any:
    """Two CartPoles without velocities that contradict each other; episodes end within every rollout."""
    pushes = [CartPole(observe_velocities=False, max_episode_steps=2, force_mag=force) for force in (10.0, -10.0)]
    return rl.stream([rl.task(push, name=f"push {push.force_mag:g}") for push in pushes], "hidden")


def train(*methods: Method, seeds: Any = S, memory: str = "gru", **arguments: Any) -> Any:
    return rl.train(MEMORIES[memory], hidden(), budget=BUDGET, seeds=seeds, lifelong=methods, **arguments)


trained = functools.cache(train)


def doubled(value: Any) -> Any:
    return tree.map(lambda x: x.double() if x.is_floating_point() else x, value)


def in_float64(run: Any) -> tuple[Any, Any]:
    """The agent of a run, and its parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlmeta.agents.networks.Encoder", functools.partial(Encoder, dtype=torch.float64))
        agent = run.agent.settings.bind(run.world.observation_space, run.world.action_space, run.agent.methods)
    parts = ("weights", "buffers", "normalisers", "hyper")
    return agent, {name: doubled(dict(run.state["params"][name])) for name in parts}


def drawn(memory: str = "gru") -> tuple[Any, Any, Any]:
    """An agent, its parameters and sequences of its own `[S, B, T, ...]`, within which episodes end, in float64."""
    run = trained(memory=memory)
    return *in_float64(run), doubled(run.agent.draw(run.state, run.world, B))


def differentiated(total: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found)}


def with_leaves(p: Any) -> Any:
    return {**p, "weights": {name: w.detach().clone().requires_grad_() for name, w in p["weights"].items()}}


def test_samples_are_as_many_whole_sequences_as_are_asked_for() -> None:
    agent, p, batch = drawn()
    assert batch["action"].shape == (S, B, T) and batch["observation"]["hidden"]["policy"]["hidden_l0"].shape == (
        S,
        B,
        4,
    )
    assert batch["observation"]["begins"].any() and not batch["observation"]["begins"].all()
    blank = tree.flatten(agent.blank((S,), torch.device("cpu"))["observation"])
    assert {n: x.shape for n, x in blank.items()} == {
        n: (S, 1, *x.shape[2:]) for n, x in tree.flatten(batch["observation"]).items()
    }
    draw = functools.partial(trained().agent.draw, trained().state, trained().world)
    assert draw(N + 1)["action"].shape == (S, N + 1, T)
    longer = doubled(draw(2 * N))
    tree.map(lambda a, b: torch.testing.assert_close(a[:, :N], b, atol=1e-5, rtol=1e-5), longer, batch)
    at_end = longer["observation"]["hidden"]["policy"]["hidden_l0"][
        :, N:
    ]  # the second of a row goes on where its first ended
    ended = (longer["terminated"] | longer["truncated"])[:, :N, -1]
    features = agent.features(p, batch, Context())[:, :, -1]
    torch.testing.assert_close(at_end, features.masked_fill(ended.unsqueeze(-1), 0.0), atol=1e-5, rtol=1e-5)


@each_memory
def test_a_sequence_is_answered_step_by_step_with_the_memory_of_its_first_step(memory: str) -> None:
    agent, p, batch = drawn(memory)
    inputs, found = batch["observation"], agent.distribution(p, batch, Context())["logits"]
    features, log_prob = agent.features(p, batch, Context()), agent.log_prob(p, batch)
    assert found.shape == (S, B, T, A) and features.shape == (S, B, T, 4) and log_prob.shape == (S, B)
    state, total = inputs["hidden"]["policy"], torch.zeros(S, B, dtype=torch.float64)
    for t in range(T):
        fresh = inputs["begins"][:, :, t]
        state = {n: x.masked_fill(fresh.reshape(S, B, *(1,) * (x.dim() - 2)), 0) for n, x in state.items()}
        now = {"observation": inputs["observation"][:, :, t], "last": inputs["last"][:, :, t], "hidden": state}
        logits = agent.forward(agent.policy, "policy", p, {**now, "hidden": {"policy": state}})["logits"]
        feature, state = agent.policy.body.step(p["weights"], now, Context(), "policy.body.")
        torch.testing.assert_close(found[:, :, t], logits)
        torch.testing.assert_close(features[:, :, t], feature)
        total = total + agent.head.log_prob({"logits": logits}, batch["action"][:, :, t])
    torch.testing.assert_close(log_prob, total)


@each_memory
def test_the_information_of_a_sequence_is_its_gradient_squared_over_its_steps(memory: str) -> None:
    """By a loop over learners and sequences; of the policy alone."""
    agent, p, batch = drawn(memory)
    found = Packed.view(information(agent, p, batch, 1, "exact", random.make_keys(range(S))), p["weights"], 1)
    for i in range(S):
        sums: dict[str, Tensor] = {name: torch.zeros_like(w[i]) for name, w in p["weights"].items()}
        for b in range(B):
            alone = with_leaves(tree.map(lambda x: x[i], p))  # noqa: B023
            sequence = tree.map(lambda x: x[i, b : b + 1], batch)  # noqa: B023
            gradient = differentiated(agent.log_prob(alone, sequence).sum(), alone["weights"])
            sums = {name: total + gradient[name].square() / (B * T) for name, total in sums.items()}
        for name, expected in sums.items():
            torch.testing.assert_close(found[name][i], expected, msg=name)
            assert (expected.sum() > 0) == name.startswith("policy.") or memory == "attention", name


def test_squares_of_a_sequences_gradient_are_in_expectation_the_sums_of_its_steps() -> None:
    """Over all actions that could have been drawn: the scores of two steps are uncorrelated."""
    settings = rl.PPO(num_envs=N, num_steps=T, batch_size=T, hidden_sizes=(3,), memory="gru", memory_size=2)
    run = rl.train(settings, hidden(), budget=BUDGET, seeds=1)
    agent, p = in_float64(run)
    p, batch = with_leaves(p), doubled(run.agent.draw(run.state, run.world, 1))
    logits = agent.distribution(p, batch, Context())["logits"].log_softmax(-1)[0, 0]
    names = [name for name in p["weights"] if name.startswith("policy.")]
    weights = {name: p["weights"][name] for name in names}
    steps = dict.fromkeys(names, 0.0)
    for t, action in itertools.product(range(T), range(A)):
        gradient = differentiated(logits[t, action], weights)
        steps = {n: steps[n] + logits[t, action].exp().detach() * gradient[n].square() for n in names}
    whole = dict.fromkeys(names, 0.0)
    for actions in itertools.product(range(A), repeat=T):
        total = torch.stack([logits[t, action] for t, action in enumerate(actions)]).sum()
        gradient = differentiated(total, weights)
        whole = {n: whole[n] + total.exp().detach() * gradient[n].square() for n in names}
    for name in names:
        torch.testing.assert_close(whole[name], steps[name], msg=name)


def test_what_is_kept_are_the_policys_answers_at_every_step() -> None:
    kept: list[Any] = []

    def watch(run: Any, metrics: Any) -> None:
        first = tree.map(lambda x: x[:, 0].clone(), run.state["methods"]["replay"]["samples"])
        if metrics["iteration"] == 2:
            kept.append(first)
            assert first["taught"]["logits"].shape == (S, 4, T, A)
            # at the end of the task the policy still says what is remembered: no loss
            assert recall_loss(run.agent, run.state["params"], first, Context()).abs().max() < 1e-6

    run = train(Replay(size=8), callbacks=[watch])
    first = tree.map(lambda x: x[:, 0], run.state["methods"]["replay"]["samples"])
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), first, kept[0])  # never written again
    loss = recall_loss(run.agent, run.state["params"], first, Context())
    assert loss.shape == (S, 4) and (loss > 0).all()


def test_what_is_replayed_is_drawn_by_the_key_of_the_step() -> None:
    """As many sequences as the minibatch has, of tasks that are over; `gradients` gives another key in every step."""
    run = trained(Replay(size=8))
    state, keys = run.state, []

    class Keys(Method):
        name = "keys"

        def loss(self, learner: Any, p: Any, m: Any, batch: Any, task: Any, key: Tensor) -> None:
            keys.append(key)

    batch = {"action": torch.zeros(S, 5)}
    ask = functools.partial(run.agent.methods[0].loss, run.agent, state["params"], state["methods"]["replay"], batch)
    first, again, other = (ask(state["task"], random.make_keys(range(i, i + S))) for i in (0, 0, 7))
    assert first.shape == (S,) and torch.equal(first, again) and not torch.equal(first, other)
    assert ask({**state["task"], "index": torch.zeros_like(state["task"]["index"])}, state["key"]) is None
    rl.train(SETTINGS, hidden(), budget=BUDGET, lifelong=[Keys()])
    assert len(keys) > 6 and len({int(key) for key in keys}) == len(keys)


def test_the_loss_of_what_is_remembered_is_the_mean_divergence_of_its_steps() -> None:
    """Batched as looped, with its gradient."""
    agent, p, batch = drawn()
    other = {**p, "weights": {name: w + 0.1 for name, w in p["weights"].items()}}
    remembered = {"observation": batch["observation"], "taught": agent.distribution(other, batch, Context())}
    together = with_leaves(p)
    loss = recall_loss(agent, together, remembered, Context())
    gradients = differentiated(loss.sum(), together["weights"])
    for i in range(S):
        alone = with_leaves(tree.map(lambda x: x[i], p))  # noqa: B023
        sequences = tree.map(lambda x: x[i], remembered)  # noqa: B023
        then, now = (x.log_softmax(-1) for x in (sequences["taught"]["logits"],
                     agent.distribution(alone, sequences, Context())["logits"]))  # fmt: skip
        expected = (then.exp() * (then - now)).sum(-1).mean(-1)
        torch.testing.assert_close(loss[i], expected)
        for name, gradient in differentiated(expected.sum(), alone["weights"]).items():
            torch.testing.assert_close(gradients[name][i], gradient, msg=name)


def test_reference_gradients_of_tasks_are_those_of_their_sequences() -> None:
    run = trained(GEM(memory=4))
    (agent, p), samples = in_float64(run), doubled(run.state["methods"]["gem"]["samples"])
    names = [name for name in p["weights"] if name.startswith("policy.")]
    found = group_gradients(lambda p, b, ctx: recall_loss(agent, p, b, ctx), p, samples, 1, names)
    for k in range(2):
        leaves = with_leaves(p)
        task = tree.map(lambda x: x[:, k], samples)  # noqa: B023
        expected = differentiated(recall_loss(agent, leaves, task, Context()).mean(-1).sum(), leaves["weights"])
        for name in names:
            torch.testing.assert_close(found[name][:, k], expected[name], msg=name)
    gradient = torch.cat([-found[n][:, 0].flatten(1) if n in found else torch.zeros(S, w[0].numel())
                          for n, w in p["weights"].items()], -1)  # fmt: skip
    task = {**run.state["task"], "index": torch.full_like(run.state["task"]["index"], 1)}
    m = doubled(run.state["methods"]["gem"])
    moved = agent.methods[0].grads(agent, Gradients(gradient, gradient), p, m, task)
    references = torch.cat([found[n][:, 0].flatten(1) if n in found else torch.zeros(S, w[0].numel())
                            for n, w in p["weights"].items()], -1)  # fmt: skip
    assert ((moved * references).sum(-1) >= -1e-9).all() and ((gradient * references).sum(-1) <= 0).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_works_on_the_policy_and_its_memory(method: Method) -> None:
    run, plain = trained(method), trained()
    assert torch.isfinite(flat(run.state)).all() and torch.isfinite(run.matrix[:, 1:]).all()
    name = "policy.body.memory.weight_hh_l0"
    assert (run.state["params"]["weights"][name] != plain.state["params"]["weights"][name]).any()


@each_memory
def test_a_run_stopped_and_resumed_ends_as_the_one_that_was_not(tmp_path: Any, memory: str) -> None:
    whole = trained(*METHODS, memory=memory)
    stopped = train(
        *METHODS, memory=memory, out=tmp_path / "part", callbacks=[lambda run, metrics: metrics["iteration"] >= 4]
    )
    assert stopped.stopped
    shutil.move(tmp_path / "part", tmp_path / "moved")
    again = rl.resume(tmp_path / "moved", env=hidden())
    ours, theirs = tree.flatten(again.state), tree.flatten(whole.state)
    assert set(ours) == set(theirs)
    assert [n for n, x in theirs.items() if not torch.equal(ours[n].nan_to_num(7.0), x.nan_to_num(7.0))] == []
    assert torch.isfinite(flat(whole.state)).all() and torch.isfinite(whole.matrix[:, 1:]).all()


def test_a_learner_that_is_not_active_stays_bit_for_bit() -> None:
    run, name = trained(*METHODS), "policy.body.memory.weight_hh_l0"
    state = tree.map(torch.clone, run.state)
    state["active"][1] = False
    before = tree.map(torch.clone, {part: state[part] for part in ("params", "optimizer", "methods")})
    state, _ = run.agent.iterate(state, run.world)
    new = tree.flatten(state)
    assert [leaf for leaf, value in tree.flatten(before).items() if not torch.equal(new[leaf][1], value[1])] == []
    moved = before["params"]["weights"][name] != state["params"]["weights"][name]
    assert moved[0].any() and not moved[1].any()


@pytest.mark.parametrize("methods", [(METHODS[0], METHODS[3]), (METHODS[1],), (METHODS[2],)], ids=str)
@pytest.mark.filterwarnings("error:.*not recorded")
def test_recorded_steps_are_the_bits_of_others(monkeypatch: pytest.MonkeyPatch, methods: tuple[Method, ...]) -> None:
    plain_run = trained(*methods)  # too short to be recorded
    assert not plain_run.agent.capture.operations()
    monkeypatch.setattr("rlmeta.engine.capture.WARM_UP", 1)
    monkeypatch.setenv("RLMETA_BACKEND", "python")
    recorded = train(*methods)
    assert any("gradient step" in name for name in recorded.agent.capture.operations())
    pairs = zip(tree.flatten(recorded.state).items(), tree.leaves(plain_run.state), strict=True)
    assert [n for (n, x), y in pairs if not torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))] == []


def test_hooks_write_nothing_in_place() -> None:
    watched = [Watched(method) for method in METHODS]
    train(*watched)
    assert all(each.calls > 15 for each in watched)


def test_packnet_keeps_the_answers_of_a_finished_task_bit_for_bit() -> None:
    answers: list[Tensor] = []

    def watch(run: Any, metrics: Any) -> None:
        if run.state["methods"]["packnet"]["done"].max() < 1:
            return
        task = tree.map(torch.zeros_like, run.state["task"])
        p = effective_params(run.agent, run.state, task)
        batch = trained().agent.draw(trained().state, trained().world, B)
        answers.append(run.agent.distribution(p, batch, Context())["logits"])

    train(PackNet(), callbacks=[watch])
    assert len(answers) > 3 and all(torch.equal(answers[0], later) for later in answers[1:])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("methods", "settings", "least", "most"),
    [
        ((), {}, (0, 300), (100, 500)),
        ((Replay(size=128),), {}, (300, 300), (500, 500)),
        ((EWC(strength=300.0, samples=64),), {"task_heads": 2}, (240, 240), (500, 500)),
    ],
    ids=["fine-tuning", "replay", "ewc"],
)
def test_what_was_learned_without_velocities_is_forgotten_less(
    methods: tuple[Method, ...], settings: dict[str, Any], least: tuple[int, int], most: tuple[int, int]
) -> None:
    """Bars on the first and second task that fine-tuning can't reach: it keeps 13 on the first, and 176 with a last
    layer for each task."""
    name = "cartpole-positions-conflicts"
    agent = dataclasses.replace(rl.preset("ppo", name), **settings)
    run = rl.train(agent, name, steps=40_000, seeds=(100, 101, 102, 103), lifelong=methods)
    scores = run.matrix[:, -1].mean(0).tolist()
    assert all(low <= score <= high for low, score, high in zip(least, scores, most, strict=True)), scores
