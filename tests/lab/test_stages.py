"""Training along a stream: every hook at its time, the matrix of scores, orders as learners, phases, exact resume."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.lab import matrix_plot, plots
from rlmeta.lab.loop import Loop
from rlmeta.lab.records import read_records
from rlmeta.learning.method import Method
from rlmeta.lifelong import metrics

SMALL = rl.Classifier(hidden_sizes=(32,), batch_size=16, num_steps=5)
BUDGET = rl.Budget(steps=160, final_episodes=1)


class Diary(Method):
    """Writes down which hooks were called when, and has a phase of its own."""

    name = "diary"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def init(self, learner, state):
        assert learner.num_tasks == 5
        return {"steps": torch.zeros(state["key"].shape[0], dtype=torch.int64)}

    def phases(self, iterations):
        return [("rehearse", 1)]

    def task_start(self, learner, p, m, task):
        self.lines.append(f"start {int(task['index'][0])}")
        return p, m

    def phase_start(self, learner, p, m, task, phase):
        self.lines.append(phase)
        return p, m

    def task_end(self, learner, p, m, task, draw):
        batch = draw(12)
        assert batch["observation"].shape[:2] == (2, 12)
        assert (batch["identity"] == task["identity"].unsqueeze(-1)).all()
        self.lines.append(f"end {int(task['index'][0])}")
        return p, m

    def after_step(self, learner, info, p, m, task, key):
        return {"steps": m["steps"] + 1}


def test_hooks_are_called_in_their_order_and_memories_are_kept():
    diary = Diary()
    run = rl.train(SMALL, rl.stream("split-digits"), budget=BUDGET, seeds=2, lifelong=[diary])
    expected = [line for i in range(5) for line in (f"start {i}", "train", "rehearse", f"end {i}")]
    assert diary.lines == expected
    assert run.state["methods"]["diary"]["steps"].tolist() == [5 * (2 + 1) * 5] * 2
    assert run.matrix.shape == (2, 6, 5) and not run.matrix.isnan().any()
    assert torch.equal(run.scores, run.matrix[:, 5].mean(-1))


def test_a_classifier_learns_every_task_and_forgets_without_help():
    run = rl.train(SMALL, rl.stream("split-digits", scenario="class"), steps=1600, seeds=4)
    matrix = run.matrix
    assert (matrix.diagonal(offset=-1, dim1=-2, dim2=-1) > 0.9).all(), "each task right after it was trained"
    assert (matrix[:, 5, :4] < 0.2).all(), "and not much of it at the end"


def test_every_order_is_a_learner_with_the_numbers_it_has_alone():
    stream = rl.stream("split-digits")
    few = dataclasses.replace(stream, tasks=stream.tasks[:3], table={})
    together = rl.train(SMALL, dataclasses.replace(few, order="all"), budget=BUDGET, seeds=2)
    assert together.matrix.shape == (12, 4, 3)
    orders = together.experiment.orders
    assert orders[::2].tolist() == [list(order) for order in dataclasses.replace(few, order="all").orders()]
    swapped = dataclasses.replace(few, tasks=tuple(few.tasks[i] for i in orders[6].tolist()))
    alone = rl.train(SMALL, swapped, budget=BUDGET, seeds=2)
    torch.testing.assert_close(alone.matrix, together.matrix[6:8])
    (row,) = together.summary()
    assert (row["seeds"], row["orders"], len(row["scores"])) == (2, 6, 12)
    estimate = metrics.estimates(together.matrix.numpy())["backward_transfer"]
    assert (row["BWT"], row["BWT_low"], row["BWT_high"]) == estimate
    assert row["BWT_low"] < row["BWT"] < row["BWT_high"]


def test_one_task_as_a_stream_is_the_task():
    task = rl.task("CartPole-v1")
    small = rl.PPO(num_steps=16, batch_size=32, num_epochs=2)
    budget = rl.Budget(steps=512, eval_every=10_000, final_episodes=2)
    plain = rl.train(small, task, budget=budget, seeds=2)
    stream = rl.train(small, rl.stream([task]), budget=budget, seeds=2)
    for a, b in zip(tree.leaves(plain.state["params"]), tree.leaves(stream.state["params"])):
        assert torch.equal(a, b)


class Counting(Diary):
    """The same with a memory that depends on everything before."""

    def task_end(self, learner, p, m, task, draw):
        return p, {"steps": m["steps"] * 3 + draw(4)["target"].sum(-1)}


class Interrupted(Exception):
    """What stops a run in the middle here; a real kill is in test_resume."""


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 8, 14])
def test_a_run_stopped_after_any_step_of_the_loop_ends_as_the_one_that_was_not(tmp_path, monkeypatch, stop):
    stream = rl.stream("split-digits", scenario="class", order=2)
    budget = rl.Budget(steps=160, final_episodes=1, checkpoint_seconds=0.0)
    whole = rl.train(SMALL, stream, budget=budget, seeds=1, out=tmp_path / "whole", lifelong=[Counting()])
    calls = iter(range(100))
    record = Loop._record

    def stopping(loop, line):
        record(loop, line)
        if next(calls) == stop:
            raise Interrupted

    monkeypatch.setattr(Loop, "_record", stopping)
    with pytest.raises(Interrupted):
        rl.train(SMALL, stream, budget=budget, seeds=1, out=tmp_path / "cut", lifelong=[Counting()])
    monkeypatch.setattr(Loop, "_record", record)
    resumed = rl.resume(tmp_path / "cut", lifelong=[Counting()])
    ours, theirs = tree.flatten(resumed.state), tree.flatten(whole.state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(7.0), theirs[name].nan_to_num(7.0)) for name in ours)
    assert read_records(tmp_path / "cut" / "metrics.jsonl") == read_records(tmp_path / "whole" / "metrics.jsonl")


def test_scores_that_fall_are_better_for_a_loss():
    run = rl.train(rl.Classifier(hidden_sizes=(8,)), rl.stream("split-digits"), budget=BUDGET)
    assert run.agent.score.maximise
    assert math.isfinite(run.summary()[0]["iqm"])
    with pytest.raises(SettingError, match="does not act"):
        run.act([0.0])


def test_what_a_stream_hides_is_refused_before_training():
    class Nosy(Method):
        name, needs = "nosy", frozenset({"test_id"})

    with pytest.raises(SettingError, match="nosy needs to know which task it is tested on"):
        rl.train(SMALL, rl.stream("split-digits", scenario="class"), lifelong=[Nosy()])
    with pytest.raises(SettingError, match="lifelong methods repeat: nosy, nosy"):
        rl.train(SMALL, rl.stream("split-digits"), lifelong=[Nosy(), Nosy()])


def test_a_folder_of_a_stream_has_its_matrix_as_a_picture(tmp_path):
    from matplotlib import image

    settings = rl.Classifier(hidden_sizes=(8,), batch_size=16, num_steps=5, learning_rate=[1e-3, 1e-2])
    rl.train(settings, rl.stream("split-digits", order=2), budget=BUDGET, seeds=2, out=tmp_path / "run")
    pixels = image.imread(tmp_path / "run" / "matrix.png")
    assert pixels.shape[0] > 800, "two settings, two rows of panels"
    assert pixels[..., :3].std() > 0.1


def test_the_pictures_of_a_stream_say_what_they_show(tmp_path):
    """Labels that hold for the figures, colours that mean the same in all panels, names that do not touch."""
    settings = rl.Classifier(hidden_sizes=(8,), batch_size=16, num_steps=5, learning_rate=[1e-3, 1e-2])
    run = rl.train(settings, rl.stream("split-digits"), budget=BUDGET, seeds=4, out=tmp_path / "run")
    figure = matrix_plot._figure(run)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 and panels[0].images[0].get_clim() == panels[1].images[0].get_clim()
    assert "accuracy, mean" in {axes.get_ylabel() for axes in figure.axes}
    assert "accuracy, interquartile mean and 95 % interval" in {axes.get_ylabel() for axes in figure.axes}
    mean = run.matrix[:4].mean(0)
    assert [text.get_text() for text in panels[0].texts] == [f"{value:.3f}" for value in mean.flatten()]
    left, _ = plots._figure(run, *plots.curves(run)).axes
    assert left.get_ylabel() == "accuracy, mean of the tasks so far"
    assert left.get_xlabel() == "samples of each learner"


def test_tasks_without_names_of_their_own_are_counted_and_long_names_are_turned():
    small = rl.PPO(num_steps=32, batch_size=64, num_epochs=2, hidden_sizes=(16,))
    budget = rl.Budget(steps=64, eval_episodes=1, final_episodes=1)
    run = rl.train(small, "cartpole-conflicts", budget=budget, seeds=1)
    axes = matrix_plot._figure(run).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["task 1", "task 2", "task 3", "task 4"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0.0}
    assert matrix_plot._turned(["a rather long name of a task"] * 4)["rotation"] == 45
    assert [matrix_plot._digits(ends) for ends in ((0.0, 1.0), (-16.0, 0.0), (9.0, 1500.0))] == [".3f", ".1f", ",.0f"]


def test_a_list_in_a_method_compares_as_one_in_the_settings_does(tmp_path):
    """Every seed with every combination, a row each, and each learner as it is alone."""
    stream = rl.stream("split-digits")
    settings = dataclasses.replace(SMALL, learning_rate=[1e-3, 1e-2])
    method = rl.EWC(strength=[0.0, 100.0], samples=16)
    run = rl.train(settings, stream, budget=BUDGET, seeds=2, lifelong=[method], out=tmp_path / "run")
    assert run.experiment.labels == [
        f"learning_rate={rate}, ewc.strength={strength}" for rate in (0.001, 0.01) for strength in (0, 100)
    ]
    assert [seed for _, seed in run.experiment.learners] == [0, 1] * 4
    assert [row["setting"] for row in run.summary()] == run.experiment.labels
    four = rl.train(settings, stream, budget=BUDGET, seeds=2, lifelong=[rl.EWC(strength=[0.0, 7.0], samples=16)])
    assert torch.equal(four.matrix[:2], run.matrix[:2]), "strength 0 does not hear of its neighbours"
    assert not torch.equal(four.matrix[2:4], run.matrix[2:4])
    again = rl.load(tmp_path / "run")
    assert again.experiment.labels == run.experiment.labels
    assert again.experiment.methods == run.experiment.methods


def test_an_agent_that_keeps_its_answers_forgets_exactly_nothing():
    """Every row of the matrix plays the same episodes, so that a policy that did not change has the same score."""
    small = rl.PPO(num_steps=32, batch_size=64, num_epochs=2, hidden_sizes=(16,))
    run = rl.train(small, "cartpole-conflicts", steps=512, seeds=2, lifelong=[rl.PackNet()])
    for j in range(4):
        later = run.matrix[:, j + 1 :, j]
        assert torch.equal(later, later[:, :1].expand_as(later))
    assert run.summary()[0]["forgetting"] == 0.0
