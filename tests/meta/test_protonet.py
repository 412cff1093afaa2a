"""Prototypical networks: the paper's equations by brute force, all tasks and learners at once as in loops, answers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import rlmeta as rl
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.few_shot import FewShot
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import random, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.settings import hyper_tensors
from rlmeta.meta.protonet import logits, prototypes
from rlmeta.nn import Encoder, running_convolutions

S = K = WAYS = 3
SHOTS, QUERIES = 2, 3


def family(ways: int = WAYS) -> NamedFamily:
    """Pictures of 4 x 4 noise around a picture of their class."""
    key = random.make_keys([0])[0]
    centres, noise = random.normal(key, "classes", 0, (20, 1, 4, 4)), random.normal(key, "images", 0, (20, 6, 4, 4))
    images = (centres + noise).flatten(0, 1)
    classes = {"train": range(10), "validation": range(10, 15), "test": range(15, 20)}
    return NamedFamily("noise", FewShot(images, torch.arange(120) // 6, classes, ways, SHOTS, QUERIES))


def bound(seeds=range(S), double=True, **settings):
    made = rl.ProtoNet(**{"num_envs": K, "hidden_sizes": (5, 4), "activation": "tanh", **settings})
    world = family().world((len(seeds),), K)
    with mock.patch.object(Encoder.__init__, "__defaults__", (torch.float64 if double else torch.float32,)):
        learner = made.bind(world.observation_space, world.action_space)
    learner.capture = None
    state = learner.init(random.make_keys(seeds), hyper_tensors([made], len(seeds)), world)
    if double:
        state["params"] = doubled(state["params"])
    return learner, state, world


def doubled(part):
    return tree.map(lambda x: x.double() if x.is_floating_point() else x, part)


def gradient(learner, p, batch):
    leaves = {n: w.detach().clone().requires_grad_() for n, w in p["weights"].items()}
    loss = learner.losses({**p, "weights": leaves}, batch, StepContext(training=True, report=False))["net"]
    return loss.detach(), torch.autograd.grad(loss.sum(), list(leaves.values()))


def by_hand(weights, support, query):
    """The loss of one task of one learner, sample after sample."""

    def embed(x):
        return torch.tanh(torch.tanh(x.flatten() @ first.T + one) @ second.T + two)

    one, first, two, second = (weights[name] for name in sorted(weights))
    loss = torch.zeros((), dtype=torch.float64)
    for x, y in zip(query["observation"], query["target"]):
        distances = []
        for k in range(WAYS):
            members = [embed(s) for s, t in zip(support["observation"], support["target"]) if int(t) == k]
            distances.append(((embed(x) - sum(members) / len(members)) ** 2).sum())
        loss = loss - torch.log(torch.exp(-distances[int(y)]) / sum(torch.exp(-d) for d in distances))
    return loss / len(query["target"])


def test_the_loss_and_its_gradient_are_those_of_the_papers_algorithm() -> None:
    learner, state, world = bound()
    p, batch = state["params"], doubled(world.tasks(state["key"], 0, K, "train"))
    loss, found = gradient(learner, p, batch)
    for s in range(S):
        leaves = {n: w[s].clone().requires_grad_() for n, w in p["weights"].items()}
        tasks = [tree.map(lambda x: x[s, k], batch) for k in range(K)]  # noqa: B023
        expected = sum(by_hand(leaves, one["support"], one["query"]) for one in tasks) / K
        torch.testing.assert_close(loss[s], expected, rtol=1e-9, atol=0.0)
        for got, wanted in zip(found, torch.autograd.grad(expected, list(leaves.values()))):
            torch.testing.assert_close(got[s], wanted, rtol=1e-7, atol=1e-12)


def test_learners_and_tasks_at_once_are_loops() -> None:
    learner, state, world = bound()
    p, batch = state["params"], doubled(world.tasks(state["key"], 0, K, "train"))
    loss, _ = gradient(learner, p, batch)
    said = learner.answer(p, batch["support"], batch["query"])
    for s in range(S):
        alone = tree.map(lambda x: x[s], {"p": p, "batch": batch})  # noqa: B023
        torch.testing.assert_close(gradient(learner, alone["p"], alone["batch"])[0], loss[s])
        for k in range(K):
            task = tree.map(lambda x: x[k : k + 1], alone["batch"])  # noqa: B023
            torch.testing.assert_close(learner.answer(alone["p"], task["support"], task["query"])[0], said[s, k])


def test_prototypes_do_not_depend_on_the_order_and_are_a_linear_classifier() -> None:
    key = random.make_keys([1])[0]
    support, x = (random.normal(key, name, 0, (9, 4), torch.float64) for name in ("support", "query"))
    target = torch.tensor([0, 1, 2, 2, 1, 0, 2, 2, 0])
    centres, order = prototypes(support, target, 3), random.permutation(key, "order", 0, 9)
    torch.testing.assert_close(prototypes(support[order], target[order], 3), centres)
    linear = 2 * x @ centres.T - centres.square().sum(-1)
    torch.testing.assert_close(logits(x, centres).softmax(-1), linear.softmax(-1))
    nearest = torch.cdist(x, support[:3]).argmin(-1)
    assert torch.equal(logits(x, prototypes(support[:3], torch.arange(3), 3)).argmax(-1), nearest)


def test_statistics_of_training_answer_for_a_picture_whatever_is_beside_it() -> None:
    family_ = rl.family("few-shot-digits")
    run = rl.train(
        rl.ProtoNet(num_envs=2, network=lambda space: running_convolutions(space, 2, 2)),
        family_,
        steps=20,
        final_episodes=9,
    )
    assert bool(run.state["params"]["buffers"]["net.2.running_mean"].any())
    task = run.experiment.world().tasks(run.state["key"], 0, 1, "test")
    support = tuple(task["support"][name][0, 0] for name in ("observation", "target"))
    x = task["query"]["observation"][0, 0]
    torch.testing.assert_close(run.predict(support, x)[:1], run.predict(support, x[:1]), atol=1e-5, rtol=1e-5)


def test_it_learns_and_permuted_labels_leave_chance() -> None:
    run = rl.train(rl.ProtoNet(num_envs=8, hidden_sizes=(32,)), family(), steps=1600, seeds=3, final_episodes=200)
    assert bool((run.scores > 0.7).all()), run.scores
    world = run.experiment.world()
    tasks = world.tasks(run.state["key"], 0, 200, "test")
    right = run.agent.answer(run.agent.effective_params(run.state), tasks["support"], tasks["query"]).argmax(-1)
    wrong = random.integers(run.state["key"], "labels", 0, tuple(right.shape[1:]), WAYS)
    assert abs(float((right == wrong).double().mean()) - 1 / WAYS) < 0.03


def test_a_run_that_was_stopped_and_resumed_is_the_one_that_was_not(tmp_path) -> None:
    settings = rl.ProtoNet(
        num_envs=4, learning_rate_schedule="linear", network=lambda space: running_convolutions(space, 2, 2)
    )
    whole = rl.train(settings, "few-shot-digits", steps=160, seeds=2, threads=1, final_episodes=20)

    def stop(run, line):
        return line["iteration"] >= 23

    rl.train(
        settings,
        "few-shot-digits",
        steps=160,
        seeds=2,
        threads=1,
        final_episodes=20,
        out=tmp_path / "run",
        callbacks=[stop],
    )
    again = rl.resume(tmp_path / "run", network=settings.network)
    for name, value in tree.flatten(whole.state).items():
        assert torch.equal(value, tree.flatten(again.state)[name]), name
    assert torch.equal(whole.scores, again.scores)


def test_a_learners_numbers_are_its_own() -> None:
    runs = [
        rl.train(rl.ProtoNet(num_envs=4, hidden_sizes=(6,)), "few-shot-digits", steps=80, seeds=seeds, final_episodes=4)
        for seeds in ([3, 5], [5])
    ]
    for name, weight in runs[1].state["params"]["weights"].items():
        torch.testing.assert_close(runs[0].state["params"]["weights"][name][1], weight[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "problem", "reason"),
    [
        ({}, "sinusoid", "ProtoNet learns targets in Discrete"),
        ({}, "navigation-short", "ProtoNet learns targets in Discrete"),
        ({}, "quadratics", "ProtoNet learns targets in Discrete|functions to minimise"),
        ({"network": lambda space: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False))},
         "few-shot-digits", "rows"),
        ({"num_envs": 0}, "few-shot-digits", "num_envs is 0"),
        ({"learning_rate": 0.0}, "few-shot-digits", "learning_rate is 0"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(settings, problem, reason) -> None:
    with pytest.raises((SettingError, SpaceError), match=reason):
        rl.train(rl.ProtoNet(**settings), problem, steps=20)
