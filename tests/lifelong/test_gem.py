"""GEM and A-GEM: memories, reference gradients, and that no remembered loss rises."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional import tree
from rlmeta.functional.projection import project, project_average
from rlmeta.learning.method import Gradients
from rlmeta.lifelong import AGEM, GEM
from rlmeta.lifelong.recall import recall_loss
from rlmeta.nn import Context
from rlmeta.nn.sample_gradients import group_gradients
from tests.lifelong.toy import tasks, trained


def loss_on(run, weights, samples):
    p = {**run.state["params"], "weights": weights}
    return recall_loss(run.agent, p, samples, Context()).mean(-1)


def at(run, position: int) -> dict:
    return {**run.state["task"], "index": torch.full_like(run.state["task"]["index"], position)}


def test_every_task_leaves_its_own_samples():
    run = trained(GEM(memory=8))
    samples = run.state["methods"]["gem"]["samples"]
    for k, task in enumerate(tasks()):
        assert (samples["identity"][:, k] == k).all()
        rows = {tuple(x): int(y) for x, y in zip(task.train.observation.tolist(), task.train.target)}
        for x, y in zip(samples["observation"][:, k].flatten(0, 1).tolist(), samples["target"][:, k].flatten()):
            assert rows[tuple(x)] == int(y)
        assert len({tuple(x) for x in samples["observation"][0, k].tolist()}) == 8


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_projected_gradient_is_that_of_the_packed_references(margin):
    run = trained(GEM(memory=8, margin=margin))
    p, m, method = run.state["params"], run.state["methods"]["gem"], run.agent.methods[0]
    references = []
    for k in range(2):
        leaves = {n: w.detach().clone().requires_grad_() for n, w in p["weights"].items()}
        loss = loss_on(run, leaves, tree.map(lambda x, k=k: x[:, k], m["samples"])).sum()
        references.append(torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, list(leaves.values()))], -1))
    references = torch.stack(references, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(references[:, 0].shape, generator=generator)
        found = method.grads(run.agent, Gradients(gradient, gradient), p, m, at(run, 2))
        torch.testing.assert_close(found, project(gradient, references, margin), rtol=1e-4, atol=1e-5)
        if margin == 0:
            cosine = (
                (references * found.unsqueeze(1)).sum(-1) / references.norm(dim=-1) / found.norm(dim=-1, keepdim=True)
            )
            assert cosine.min() > -1e-5


def test_a_small_step_of_plain_descent_raises_no_remembered_loss():
    run = trained(GEM(memory=8, margin=0.0), optimizer="sgd")
    p, m, method = run.state["params"], run.state["methods"]["gem"], run.agent.methods[0]
    against = group_gradients(
        lambda p, batch, ctx: recall_loss(run.agent, p, batch, ctx),
        p,
        tree.map(lambda x: x[:, :1], m["samples"]),
        1,
    )
    gradient = -torch.cat([g.flatten(1) for g in against.values()], -1)  # straight against the first task
    weights = p["weights"]

    def moved(direction):
        sizes = [w[0].numel() for w in weights.values()]
        parts = zip(weights.items(), direction.split(sizes, -1))
        return {n: w - 1e-4 * d.reshape(w.shape) for (n, w), d in parts}

    projected = method.grads(run.agent, Gradients(gradient, gradient), p, m, at(run, 2))
    for k in range(2):
        samples = tree.map(lambda x, k=k: x[:, k], m["samples"])
        before = loss_on(run, weights, samples)
        assert (loss_on(run, moved(projected), samples) <= before + 1e-7).all()
    first = tree.map(lambda x: x[:, 0], m["samples"])
    assert (loss_on(run, moved(gradient), first) > loss_on(run, weights, first)).all()


def test_a_gem_with_every_memory_in_the_batch_is_the_closed_form():
    run = trained(AGEM(memory=8, batch_size=16))
    p, m, method = run.state["params"], run.state["methods"]["agem"], run.agent.methods[0]
    generator = torch.Generator().manual_seed(0)
    size = sum(w[0].numel() for w in p["weights"].values())
    gradient = torch.randn(3, size, generator=generator)
    from rlmeta.functional import random

    rows = random.integers(m["key"], "rows", m["steps"], (16,), 16)
    leaves = {n: w.detach().clone().requires_grad_() for n, w in p["weights"].items()}
    samples = tree.map(
        lambda x: torch.stack([x[s].flatten(0, 1)[rows[s]] for s in range(3)]),
        tree.map(lambda x: x[:, :2], m["samples"]),
    )
    loss = loss_on(run, leaves, samples).sum()
    reference = torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, list(leaves.values()))], -1)
    found = method.grads(run.agent, Gradients(gradient, gradient), p, m, at(run, 2))
    torch.testing.assert_close(found, project_average(gradient, reference), rtol=1e-4, atol=1e-5)
    assert (rows != random.integers(m["key"], "rows", m["steps"] + 1, (16,), 16)).any()


def test_it_keeps_the_first_of_tasks_that_contradict_each_other():
    plain, gem = trained(steps=800), trained(GEM(memory=32), steps=800)
    assert (gem.matrix[:, -1, 0] > plain.matrix[:, -1, 0] + 0.1).all()
