"""PackNet: what a finished task answers never changes again, bit for bit, and the weights are shared out exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import rlmeta as rl
from rlmeta.data.samples import DataTask
from rlmeta.envs.streams import stream
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.method import StepInfo, effective_params
from rlmeta.lifelong import PackNet
from rlmeta.lifelong.packnet import FREE, NOBODYS
from tests.lifelong.toy import FEATURES, flat, learner, points, tasks, trained


class Normed(torch.nn.Module):
    """A body with biases and a norm."""

    def __init__(self, norm: type[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 8), norm(8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.ReLU()
        )

    def forward(self, x):
        return self.layers(x)


NORMS = {
    "none": None,
    "layer": lambda space: Normed(torch.nn.LayerNorm),
    "batch": lambda space: Normed(torch.nn.BatchNorm1d),
}


def answers(run, position: int) -> torch.Tensor:
    """The logits of the task at this position for its test samples."""
    task = tree.map(lambda x: torch.full_like(x, position), run.state["task"])
    p = effective_params(run.agent, run.state, task)
    x = tasks()[position].test.observation
    return run.agent.logits(p, {"observation": x.expand(*run.state["key"].shape, *x.shape)}).detach().clone()


def watched(settings, stream, method, out: Path | None = None) -> tuple[object, dict[int, list[torch.Tensor]]]:
    """A run, and the answers of every finished task at every iteration since."""
    found: dict[int, list[torch.Tensor]] = {}

    def watch(run, metrics):
        done = int(run.state["methods"]["packnet"]["done"].max())
        for position in range(done):
            found.setdefault(position, []).append(answers(run, position))

    budget = rl.Budget(steps=120, log_points=1000)
    run = rl.train(
        settings, stream, budget=budget, seeds=2, lifelong=[method], callbacks=[watch], out=out, progress=False
    )
    return run, found


OPTIMIZERS = [
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.05},
    {"optimizer": "adam", "weight_decay": 0.01},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "rmsprop", "momentum": 0.5, "weight_decay": 0.01},
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["optimizer"])
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
def test_old_answers_are_equal_bit_for_bit_while_new_tasks_are_trained(norm, optimizer, clip):
    settings = learner(network=NORMS[norm], **optimizer, **({"max_grad_norm": 0.1} if clip else {}))
    run, found = watched(settings, points(), PackNet())
    assert [len(found[k]) for k in range(3)] == [11, 6, 1]  # 3 + 2 iterations a task: also within a later task
    for position, seen_answers in found.items():
        for later in seen_answers[1:]:
            assert torch.equal(later, seen_answers[0]), position
    # and the test sees a change where there is one: the newest task's answers are not the first's
    assert not torch.equal(answers(run, 0), run.agent.logits(run.state["params"], first_inputs(run)))


def first_inputs(run):
    x = tasks()[0].test.observation
    return {"observation": x.expand(*run.state["key"].shape, *x.shape)}


def test_old_answers_survive_saving_and_loading_in_the_middle_of_retraining(tmp_path):
    def stopper(run, metrics):
        return metrics["iteration"] >= 9  # the second task's retraining

    budget = rl.Budget(steps=120, log_points=1000)
    arguments = {"budget": budget, "seeds": 2, "lifelong": [PackNet()], "progress": False}
    part = rl.train(learner(), points(), out=tmp_path / "run", callbacks=[stopper], **arguments)
    assert part.state["methods"]["packnet"]["pruned"].all()
    before = answers(part, 0)
    again = rl.resume(tmp_path / "run", env=points(), progress=False)
    assert torch.equal(answers(again, 0), before)
    whole = rl.train(learner(), points(), **arguments)
    assert torch.equal(flat(again.state), flat(whole.state))
    for position in range(3):
        assert torch.equal(answers(again, position), answers(whole, position))


def owned(run) -> dict[str, torch.Tensor]:
    return Packed.view(run.state["methods"]["packnet"]["owner"], run.state["params"]["weights"], 1)


def test_tasks_share_the_weights_out_exactly():
    """Where nothing is given back, without a second training; every layer of every learner."""
    run = trained(PackNet(retrain=0.0))
    for name, owner in owned(run).items():
        if owner.dim() == 2:
            assert (owner == NOBODYS).all(), name
            continue
        size = owner[0].numel()
        first = -(-size // 3)
        second = -(-(size - first) // 2)
        for learner_owner in owner:
            counts = [int((learner_owner == k).sum()) for k in (FREE, 1, 2, 3)]
            assert counts == [0, first, second, size - first - second], name


def test_what_a_task_has_no_use_for_goes_to_the_others():
    """Of rectified units some are out of use: no task has more than its share, and all weights are somebody's."""
    run = trained(PackNet())
    fewer = 0
    for owner in owned(run).values():
        if owner.dim() == 2:
            continue
        for learner_owner in owner:
            free = learner_owner.numel()
            for k in (1, 2, 3):
                count, share = int((learner_owner == k).sum()), -(-free // (4 - k))
                assert count <= share
                fewer += count < share
                free -= count
    assert fewer > 0


def test_a_later_task_learns_in_a_network_of_rectified_units():
    """Most units are out of use for the tasks before: the last has .85 where they stay so, .97 by plain training."""
    run = rl.train(
        rl.Classifier(batch_size=32, learning_rate=3e-3, hidden_sizes=(32, 32)),
        "split-digits",
        steps=3200,
        seeds=2,
        lifelong=[PackNet()],
    )
    assert (run.matrix[:, -1].mean(0) > 0.94).all(), run.matrix[:, -1].mean(0)
    assert run.summary()[0]["forgetting"] == 0.0


def test_a_fixed_part_leaves_weights_free_that_are_zero():
    run = trained(PackNet(keep=0.25), count=2)
    weights = run.state["params"]["weights"]
    packed = Packed.of(weights, 1).flat
    owner = run.state["methods"]["packnet"]["owner"]
    assert (packed[owner == FREE] == 0).all()
    one = trained(PackNet(keep=0.25, retrain=0.0), count=2)  # pruned at the end of the task
    assert (one.state["methods"]["packnet"]["owner"] == 1).sum() == (owner == 1).sum()
    first = Packed.view(owner, weights, 1)["net.0.1.0.weight"]
    assert (first == 1).sum((-2, -1)).tolist() == [6, 6, 6]  # a quarter of 24


def test_weights_without_a_gradient_are_not_its_own():
    """An input that is always 0 teaches its weights nothing: they are given back before small ones that learned."""
    still = []
    for task in tasks(2):
        masked = [
            part._replace(observation=part.observation * torch.tensor([1.0, 1.0, 1.0, 0.0]))
            for part in (task.train, task.test)
        ]
        still.append(dataclasses.replace(task, train=masked[0], test=masked[1]))
    for method in (PackNet(), PackNet(retrain=0.0), PackNet(keep=0.9)):
        run = rl.train(learner(), stream(still, "still", scenario="task"), steps=80, lifelong=[method], progress=False)
        column = owned(run)["net.0.1.0.weight"][..., 3]
        if method.keep == 0.9:  # more than have a gradient: taken at the pruning, given back at the end
            assert (column == FREE).all()
        assert (column != 1).all()


def begun(count: int = 2, **settings):
    """A run's method, parameters, memory and task where its second task is about to begin."""
    run = trained(PackNet(), count=count, **settings)
    method, task = run.agent.methods[0], {**run.state["task"], "index": torch.ones_like(run.state["task"]["index"])}
    p, m = run.state["params"], run.state["methods"]["packnet"]
    m = {**m, "owner": m["owner"].masked_fill(m["owner"] == 2, FREE)}
    return run, method, p, m, task


def test_what_is_free_is_drawn_anew_when_a_later_task_begins():
    run, method, p, m, task = begun()
    new, memory = method.task_start(run.agent, p, m, task)
    free = m["owner"] == FREE
    before, after = Packed.of(p["weights"], 1).flat, Packed.of(new["weights"], 1).flat
    assert torch.equal(before[~free], after[~free]) and (before[free] != after[free]).all()
    assert not memory["useful"].any() and not memory["pruned"].any()
    # as at the start of a run, from the learner's own key and the task's place alone
    first = Packed.of(run.agent.init(run.experiment.keys(), run.experiment.hyper(), run.world)["params"]["weights"], 1)
    assert float(after[free].std()) == pytest.approx(float(first.flat[m["owner"] != NOBODYS].std()), rel=0.25)
    again = Packed.of(method.task_start(run.agent, p, m, task)[0]["weights"], 1).flat
    assert torch.equal(again, after)
    later = {**task, "index": task["index"] + 1}
    assert not torch.equal(Packed.of(method.task_start(run.agent, p, m, later)[0]["weights"], 1).flat, after)
    one = tree.map(lambda x: x[1:2], {"p": p, "m": m, "task": task})
    alone, _ = method.task_start(run.agent, one["p"], one["m"], one["task"])
    assert torch.equal(Packed.of(alone["weights"], 1).flat, after[1:2])
    zeroth = {**task, "index": torch.zeros_like(task["index"])}
    assert method.task_start(run.agent, p, m, zeroth)[0] is p, "the first task begins with the run's own weights"


def test_what_has_a_gradient_is_noted_from_step_to_step():
    run, method, p, m, task = begun()
    m = method.init(run.agent, run.state)
    nothing = torch.zeros_like(m["useful"], dtype=torch.float32)
    for entry, size in ((0, 0.5), (1, -0.5), (2, 0.0)):
        gradient = nothing.index_fill(-1, torch.tensor([entry]), size)
        m = method.after_step(run.agent, StepInfo(gradient, nothing + 1.0, {}, p), p, m, task, run.state["key"])
    assert m["useful"].sum(-1).tolist() == [2, 2, 2] and m["useful"][..., :2].all()
    assert not method.task_start(run.agent, p, m, task)[1]["useful"].any()
    assert not method.phase_start(run.agent, p, m, task, "retrain")[1]["useful"].any(), "anew after the pruning"


def test_convolutions_are_packed_too():
    """Two tasks of pictures: every filter's weights have an owner, old answers stay, the second task learns."""
    bars = []
    for i in range(2):  # bars in rows or columns of 8 x 8, told apart by their place
        x = torch.zeros(80, 1, 8, 8)
        y = torch.arange(80) % 2
        for row, label in enumerate(y.tolist()):
            line = (row // 2) % 4 + 4 * label
            (x[row, 0, line] if i == 0 else x[row, 0, :, line]).fill_(1.0)
        bars.append(DataTask(f"bars-{i}", (x[:60], y[:60]), (x[60:], y[60:]), (0, 1), 2))

    def network(space):
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 6, 3),
            torch.nn.GroupNorm(2, 6),
            torch.nn.ReLU(),
            torch.nn.Conv2d(6, 6, 3),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
        )

    settings = rl.Classifier(batch_size=20, num_steps=10, learning_rate=0.01, network=network)
    run = rl.train(settings, stream(bars, "bars", scenario="task"), steps=1200, seeds=2, lifelong=[PackNet()])
    assert (run.matrix[:, -1] > 0.9).all() and run.summary()[0]["forgetting"] == 0.0
    convolutions = [owner for owner in owned(run).values() if owner.dim() == 5]
    assert len(convolutions) == 2
    for owner in convolutions:
        assert {1, 2} <= set(owner.flatten().tolist()) <= {FREE, 1, 2}


def test_q_networks_are_packed_too():
    dqn = rl.DQN(num_envs=4, num_steps=16, batch_size=16, learning_starts=16, hidden_sizes=(8,), target_every=4)
    twice = rl.stream(["CartPole-v1", rl.task("CartPole-v1", settings={"force_mag": -10.0})], "conflict")
    observed = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []

    def watch(run, metrics):
        if int(run.state["methods"]["packnet"]["done"].max()) > 0:
            p = effective_params(run.agent, run.state, tree.map(torch.zeros_like, run.state["task"]))
            found.append(run.agent.forward(run.agent.q, "q", p, observed).detach())

    budget = rl.Budget(steps=256, eval_episodes=1, final_episodes=1, log_points=1000)
    run = rl.train(dqn, twice, budget=budget, seeds=2, lifelong=[PackNet()], callbacks=[watch])
    assert len(found) > 3 and all(torch.equal(one, found[0]) for one in found)
    packed = [owner for owner in owned(run).values() if owner.dim() == 3]
    assert packed and all((owner > FREE).any() for owner in packed)
    assert torch.isfinite(flat(run.state)).all()


def test_evaluating_a_task_changes_nothing():
    run = trained(PackNet())
    before = tree.map(torch.clone, run.state)
    for position in (2, 0, 1, 0):
        answers(run, position)
    for (name, old), new in zip(tree.flatten(before).items(), tree.flatten(run.state).values()):
        assert torch.equal(old.nan_to_num(), new.nan_to_num()), name


def test_nothing_is_forgotten():
    run = trained(PackNet())
    for position in range(3):
        column = run.matrix[:, position + 1 :, position]
        assert (column == column[:, :1]).all()


@pytest.mark.parametrize(("method", "count"), [(PackNet(keep=1.0), 2), (PackNet(), 20)])
def test_a_network_that_is_full_too_early_is_refused_before_training(method, count):
    with pytest.raises(SettingError, match=r"weights, all kept before the last of"):
        trained(method, count=count)


def test_an_agents_critic_is_packed_only_if_wanted():
    budget = rl.Budget(steps=64, eval_episodes=1, final_episodes=1)
    twice = rl.stream(["CartPole-v1", rl.task("CartPole-v1", settings={"force_mag": -10.0})], "conflict")
    for critic in (False, True):
        settings = rl.PPO(num_envs=4, num_steps=16, batch_size=64, hidden_sizes=(8,), normalise_observation=True)
        observed = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
        found: list[torch.Tensor] = []

        def watch(run, metrics, found=found, observed=observed):
            m = run.state["methods"]["packnet"]
            if int(m["done"].max()) > 0:
                task = tree.map(torch.zeros_like, run.state["task"])
                p = effective_params(run.agent, run.state, task)
                found.append(run.agent.forward(run.agent.policy, "policy", p, observed)["logits"].detach())

        run = rl.train(
            settings, twice, budget=budget, lifelong=[PackNet(critic=critic)], callbacks=[watch], progress=False
        )
        owner = Packed.view(run.state["methods"]["packnet"]["owner"], run.state["params"]["weights"], 1)
        assert bool((owner["value.body.1.0.weight"] == NOBODYS).all()) != critic
        first = effective_params(run.agent, run.state, tree.map(torch.zeros_like, run.state["task"]))["weights"]
        hidden = first["value.body.1.0.weight"] != run.state["params"]["weights"]["value.body.1.0.weight"]
        assert bool(hidden.any()) == critic, "the critic is seen as it is unless it is packed"
        assert len(found) > 1 and all(torch.equal(one, found[0]) for one in found)  # with its own normaliser
