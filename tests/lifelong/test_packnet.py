"""PackNet: what a finished task answers never changes again, bit for bit, and the weights are shared out exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.method import StepInfo, seen
from rlmeta.learning.state import Packed
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
    p = seen(run.agent.methods, run.state, task)
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


def test_tasks_share_the_weights_out_exactly():
    run = trained(PackNet())
    weights = run.state["params"]["weights"]
    owners = Packed.view(run.state["methods"]["packnet"]["owner"], weights, 1)
    for name, owner in owners.items():
        if weights[name].dim() == 2:
            assert (owner == NOBODYS).all(), name
            continue
        size = owner[0].numel()
        first = -(-size // 3)
        second = -(-(size - first) // 2)
        for learner_owner in owner:
            counts = [int((learner_owner == k).sum()) for k in (FREE, 1, 2, 3)]
            assert counts == [0, first, second, size - first - second], name


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


def test_weights_that_a_task_never_moved_are_not_its_own():
    """An input that is always 0 teaches its weights nothing: they are given back before small ones that were moved."""
    import dataclasses

    from rlmeta.envs.streams import stream

    still = []
    for task in tasks(2):
        masked = [
            part._replace(observation=part.observation * torch.tensor([1.0, 1.0, 1.0, 0.0]))
            for part in (task.train, task.test)
        ]
        still.append(dataclasses.replace(task, train=masked[0], test=masked[1]))
    run = rl.train(learner(), stream(still, "still", scenario="task"), steps=80, lifelong=[PackNet()], progress=False)
    owner = Packed.view(run.state["methods"]["packnet"]["owner"], run.state["params"]["weights"], 1)
    assert (owner["net.0.1.0.weight"][..., 3] != 1).all()


def test_what_is_moved_is_noted_from_step_to_step_until_the_pruning():
    run = trained(PackNet(), count=2)
    method, p, task = run.agent.methods[0], run.state["params"], run.state["task"]
    m = method.init(run.agent, run.state)
    delta = torch.zeros_like(m["moved"], dtype=torch.float32)
    for entry, size in ((0, 0.5), (1, -0.5), (2, 0.0)):
        move = delta.index_fill(-1, torch.tensor([entry]), size)
        m = method.after_step(run.agent, StepInfo(move, move, {}), p, m, task, run.state["key"])
    assert m["moved"].sum(-1).tolist() == [2, 2, 2] and m["moved"][..., :2].all()
    pruned, everything = {**m, "pruned": torch.ones_like(m["pruned"])}, torch.ones_like(delta)
    after = method.after_step(run.agent, StepInfo(everything, everything, {}), p, pruned, task, run.state["key"])
    assert torch.equal(after["moved"], m["moved"])
    assert not method.task_start(run.agent, p, pruned, task)[1]["pruned"].any()


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
                p = seen(run.agent.methods, run.state, task)
                found.append(run.agent.forward(run.agent.policy, "policy", p, observed)["logits"].detach())

        run = rl.train(
            settings, twice, budget=budget, lifelong=[PackNet(critic=critic)], callbacks=[watch], progress=False
        )
        owner = Packed.view(run.state["methods"]["packnet"]["owner"], run.state["params"]["weights"], 1)
        assert bool((owner["value.body.1.0.weight"] == NOBODYS).all()) != critic
        assert len(found) > 1 and all(torch.equal(one, found[0]) for one in found)  # with its own normaliser
