"""LwF, DER and ER-ACE: losses by closed forms and loops, and what teachers and stored outputs are of."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.method import StepInfo
from rlmeta.lifelong import DER, ERACE, LwF
from rlmeta.lifelong.lwf import head_divergence
from rlmeta.lifelong.replay import draw_from_reservoir
from rlmeta.nn import Context
from tests.lifelong.toy import pictures, trained


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_divergence_of_heads_by_a_loop():
    teacher, student = numbers(2, 5, 6), numbers(2, 5, 6).flip(0)
    heads = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    divergence = head_divergence(teacher, student, heads.expand(2, 3, 6), 2.0)
    for row in range(5):
        total = 0.0
        for head in heads[:2]:
            p, q = (x[1, row, head].div(2.0).softmax(0) for x in (teacher, student))
            total += float((p * (p.log() - q.log())).sum())
        assert float(divergence[1, row]) == pytest.approx(4.0 * total / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 50.0])
def test_a_student_equal_to_its_teacher_has_no_gradient_and_temperature_keeps_its_size(temperature):
    heads, teacher = torch.ones(1, 1, 4, dtype=torch.bool), numbers(1, 3, 4)
    student = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head_divergence(teacher, student, heads, temperature).sum(), student)
    assert gradient.abs().max() < 1e-12
    other = (teacher + 0.1 * numbers(1, 3, 4).flip(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(head_divergence(teacher, other, heads, temperature).sum(), other)
    assert gradient.abs().max() > 1e-3
    if temperature == 50.0:  # the limit of large T (Hinton et al., 2015): the difference of the centred logits, over C
        difference = (other - teacher).detach()
        torch.testing.assert_close(gradient, (difference - difference.mean(-1, keepdim=True)) / 4, rtol=0.1, atol=2e-3)


def test_masked_logits_of_other_heads_make_no_nan():
    teacher = numbers(1, 3, 4).masked_fill(torch.tensor([False, False, True, True]), -torch.inf)
    student = teacher.clone().requires_grad_()
    heads = torch.tensor([[[True, True, False, False]]])
    (gradient,) = torch.autograd.grad(head_divergence(teacher, student, heads, 2.0).sum(), student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
def test_lwfs_heads_are_what_the_scenario_says(scenario):
    run = rl.train(rl.Classifier(hidden_sizes=(6,)), pictures(scenario), steps=320, lifelong=[LwF()], progress=False)
    heads = run.state["methods"]["lwf"]["heads"][0].int().tolist()
    one, two, three = [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]
    nothing, everything = [0] * len(heads[0]), [1] * len(heads[0])
    assert heads == ([one, two, three] if scenario == "task" else [everything, nothing, nothing])


def test_lwf_pulls_towards_the_network_of_the_last_tasks_end():
    """The loss is 0 with the teacher's weights and more with others, whatever the present task's labels."""
    run = trained(LwF(), count=1)
    agent, state, method = run.agent, run.state, LwF()
    p, m, task = state["params"], state["methods"]["lwf"], {"index": torch.ones_like(state["key"])}
    batch = agent.draw(state, run.world, 8)
    assert method.loss(agent, p, m, batch, task, state["key"]).abs().max() < 1e-6
    moved = {**p, "weights": {name: w * 1.5 for name, w in p["weights"].items()}}
    loss = method.loss(agent, moved, m, batch | {"target": 2 - batch["target"]}, task, state["key"])
    assert torch.equal(loss, method.loss(agent, moved, m, batch, task, state["key"]))
    assert (loss > 1e-4).all()


def test_old_heads_are_kept_on_samples_of_a_task_that_allows_them_not():
    method = LwF()
    run = rl.train(rl.Classifier(hidden_sizes=(6,)), pictures("task"), steps=320, lifelong=[method], progress=False)
    p, m, task = run.state["params"], run.state["methods"]["lwf"], {"index": torch.full_like(run.state["key"], 2)}
    batch = run.agent.draw(run.state, run.world, 8)
    assert batch["allowed"][0, 0].tolist() == [False] * 4 + [True] * 2
    turned = {**p["weights"], "net.1.bias": p["weights"]["net.1.bias"] + torch.tensor([2.0, 0, 0, 0, 0, 0])}
    assert (method.loss(run.agent, {**p, "weights": turned}, m, batch, task, run.state["key"]) > 1e-3).all()


def test_an_agent_keeps_its_policy_where_it_is_now():
    """KL divergence between the policies after one task and after two."""
    settings = rl.PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=4, hidden_sizes=(8,), learning_rate=1e-2)
    stream = rl.stream("cartpole-conflicts")
    moved = []
    for strength in (0.0, 100.0):
        policies = []
        for steps, tasks in ((256, 1), (256, 2)):
            part = rl.stream(stream.tasks[:tasks], "conflicts")
            run = rl.train(settings, part, steps=steps, seeds=2, lifelong=[LwF(strength=strength)], progress=False)
            probe = {"observation": numbers(2, 64, *run.agent.observation_space.shape).float()}
            policies.append(run.agent.distribution(run.state["params"], probe, Context()))
        moved.append(float(run.agent.divergence(*policies).mean()))
    assert moved[1] < 0.3 * moved[0]


# ---------------------------------------------------------------------- DER


def test_stored_outputs_are_those_of_before_the_step_in_which_a_sample_came():
    method = DER(size=8)
    run = trained(method, count=1, steps=40)
    agent, state = run.agent, run.state
    batch, zero = agent.draw(state, run.world, 4), torch.zeros_like(state["key"])
    earlier = {**state["params"], "weights": {n: w - 0.5 for n, w in state["params"]["weights"].items()}}
    m = {**state["methods"]["der"], "met": torch.zeros_like(state["methods"]["der"]["met"])}
    info = StepInfo(zero, zero, batch, earlier)
    after = method.after_step(agent, info, state["params"], m, {"index": zero}, random.make_keys([0, 1, 2]))
    assert torch.equal(after["outputs"][:, :4], agent.output(earlier, batch))
    assert torch.equal(after["samples"]["observation"][:, :4], batch["observation"])
    assert (after["met"] == 4).all()


def test_ders_losses_by_hand():
    method = DER(size=3, distillation=0.5, strength=2.0, batch_size=2)
    run = trained(method, count=1, steps=40)
    agent, state = run.agent, run.state
    m, task, key, p = state["methods"]["der"], {"index": torch.zeros_like(state["key"])}, state["key"], state["params"]
    kept = {**m["samples"], "outputs": m["outputs"]}
    drawn = draw_from_reservoir(kept, m["met"], 2, random.fold(key, "outputs"))
    error = (agent.output(p, drawn) - drawn["outputs"]).square().mean((-2, -1))
    torch.testing.assert_close(method.loss(agent, p, m, {}, task, key), 0.5 * error)
    ((batch, weight),) = method.batches(agent, p, m, {}, task, key)
    assert (weight == 2.0).all() and batch["target"].shape == (3, 2)
    assert not torch.equal(drawn["observation"], batch["observation"])  # outputs and labels are of other draws


def test_der_refuses_agents_and_er_ace_what_has_no_classes():
    with pytest.raises(SettingError, match="DER keeps outputs of labelled samples: with an agent use Replay"):
        rl.train(rl.PPO(), "cartpole-conflicts", steps=64, lifelong=[DER()])
    with pytest.raises(SettingError, match="ER-ACE changes the classes of a cross-entropy: use it with a Classifier"):
        rl.train(rl.PPO(), "cartpole-conflicts", steps=64, lifelong=[ERACE()])


# ---------------------------------------------------------------------- ER-ACE


def test_new_samples_are_told_from_the_classes_of_their_minibatch_alone():
    run = trained(ERACE(size=6), count=1)
    agent, state = run.agent, run.state
    batch = agent.draw(state, run.world, 6)
    batch["target"] = torch.tensor([[0, 1, 0, 1, 1, 0], [2, 2, 2, 2, 2, 2], [0, 1, 2, 0, 1, 2]])
    own = ERACE(size=6).batch(agent, state["params"], {}, batch, {})
    weights = {n: w.detach().requires_grad_() for n, w in state["params"]["weights"].items()}
    loss = agent.losses({**state["params"], "weights": weights}, own, StepContext())["net"].sum()
    (gradient,) = torch.autograd.grad(loss, [weights["net.1.bias"]])
    assert gradient[0, 2] == 0 and (gradient[0, :2] != 0).all()
    assert (gradient[1] == 0).all() and (gradient[2] != 0).all()


def test_what_the_task_allows_stays_a_bound():
    agent = trained(ERACE(size=6), count=1).agent
    allowed = torch.tensor([True, True, False]).expand(1, 2, 3)
    own = ERACE().batch(agent, {}, {}, {"target": torch.tensor([[0, 2]]), "allowed": allowed}, {})
    assert own["allowed"][0, 0].tolist() == [True, False, False]
