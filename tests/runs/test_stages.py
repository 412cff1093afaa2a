"""Training along a stream: every hook at its time, the matrix of scores, orders as learners, phases, exact resume."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import rlmeta as rl
from rlmeta.data import splits
from rlmeta.data.sets import labelled
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.method import Method
from rlmeta.lifelong import metrics
from rlmeta.report import curves, matrices
from rlmeta.runs.loop import Loop
from rlmeta.runs.metric_log import read_metric_log

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
    record = Loop._log

    def stopping(loop, line):
        record(loop, line)
        if next(calls) == stop:
            raise Interrupted

    monkeypatch.setattr(Loop, "_log", stopping)
    with pytest.raises(Interrupted):
        rl.train(SMALL, stream, budget=budget, seeds=1, out=tmp_path / "cut", lifelong=[Counting()])
    monkeypatch.setattr(Loop, "_log", record)
    resumed = rl.resume(tmp_path / "cut", lifelong=[Counting()])
    ours, theirs = tree.flatten(resumed.state), tree.flatten(whole.state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(7.0), theirs[name].nan_to_num(7.0)) for name in ours)
    assert read_metric_log(tmp_path / "cut" / "metrics.jsonl") == read_metric_log(tmp_path / "whole" / "metrics.jsonl")


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


def test_a_folder_of_a_stream_has_its_matrix_as_a_picture(tmp_path, pictures):
    from matplotlib import image

    settings = rl.Classifier(hidden_sizes=(8,), batch_size=16, num_steps=5, learning_rate=[1e-3, 1e-2])
    rl.train(settings, rl.stream("split-digits", order=2), budget=BUDGET, seeds=2, out=tmp_path / "run")
    pixels = image.imread(tmp_path / "run" / "matrix.png")
    assert pixels.shape[0] > 800, "two settings, two rows of panels"
    assert pixels[..., :3].std() > 0.1


def test_the_pictures_of_a_stream_say_what_they_show(tmp_path, pictures):
    """Labels that hold for the figures, colours that mean the same in all panels, names that do not touch."""
    settings = rl.Classifier(hidden_sizes=(8,), batch_size=16, num_steps=5, learning_rate=[1e-3, 1e-2])
    run = rl.train(settings, rl.stream("split-digits"), budget=BUDGET, seeds=4, out=tmp_path / "run")
    figure = matrices._figure(run)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 and panels[0].images[0].get_clim() == panels[1].images[0].get_clim()
    assert "accuracy, mean" in {axes.get_ylabel() for axes in figure.axes}
    assert "accuracy, interquartile mean and 95 % interval" in {axes.get_ylabel() for axes in figure.axes}
    mean = run.matrix[:4].mean(0)
    assert [text.get_text() for text in panels[0].texts] == [f"{value:.3f}" for value in mean.flatten()]
    left, _ = curves._figure(run, *curves.curves(run)).axes
    assert left.get_ylabel() == "accuracy, mean of the tasks so far"
    assert left.get_xlabel() == "samples of each learner"


def test_tasks_without_names_of_their_own_are_counted_and_long_names_are_turned(pictures):
    small = rl.PPO(num_steps=32, batch_size=64, num_epochs=2, hidden_sizes=(16,))
    budget = rl.Budget(steps=64, eval_episodes=1, final_episodes=1)
    run = rl.train(small, "cartpole-conflicts", budget=budget, seeds=1)
    axes = matrices._figure(run).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["task 1", "task 2", "task 3", "task 4"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0.0}
    assert matrices._turned(["a rather long name of a task"] * 4)["rotation"] == 45
    assert [matrices._digits(ends) for ends in ((0.0, 1.0), (-16.0, 0.0), (9.0, 1500.0))] == [".3f", ".1f", ",.0f"]


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


class Spy(Method):
    """Needs nothing, and writes down everything a stream could give away, in every hook."""

    name = "spy"

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.told: dict[str, list[tuple[int, int]]] = {}
        self.samples: dict[str, set[int]] = {}
        self.progress: list[float] = []
        self.tasks = 0

    def note(self, hook, task, batch=None):
        self.called.add(hook)
        pair = (task["index"].tolist()[0], task["identity"].tolist()[0])
        if pair not in self.told.setdefault(hook, []):
            self.told[hook].append(pair)
        if batch is not None and "identity" in batch:
            self.samples.setdefault(hook, set()).update(batch["identity"].flatten().tolist())

    def init(self, learner, state):
        self.tasks = learner.num_tasks
        return {"weight": torch.zeros(state["key"].shape)}

    def phases(self, iterations):
        self.called.add("phases")
        return [("more", 1)]

    def task_start(self, learner, p, m, task):
        self.note("task_start", task)
        return p, m

    def phase_start(self, learner, p, m, task, phase):
        self.note("phase_start", task)
        return p, m

    def task_end(self, learner, p, m, task, draw):
        self.note("task_end", task, draw(4))
        return p, m

    def params(self, learner, p, m, task):
        self.note("params", task)
        return p

    def batches(self, learner, p, m, batch, task, key):
        self.note("batches", task, batch)
        return ()

    def grads(self, learner, gradients, p, m, task):
        self.note("grads", task)
        return gradients.total

    def after_step(self, learner, info, p, m, task, key):
        self.note("after_step", task, info.batch)
        self.progress.append(float(task["progress"][0]))
        return m

    def predict(self, learner, p, m, batch, task):
        self.note("predict", task, batch)
        return None


def spied(**how):
    spy = Spy()
    run = rl.train(SMALL, rl.stream("split-digits", **how), budget=BUDGET, seeds=1, lifelong=[spy])
    return run, spy


STEPS = ("batches", "grads", "after_step")
"""Hooks of training alone; `params` is of evaluation, too."""


def test_a_stream_that_reveals_everything_says_where_it_is():
    _, spy = spied(scenario="task")
    assert spy.called == {"phases", "task_start", "phase_start", "task_end", "params", "predict", *STEPS}
    assert spy.tasks == 5
    for hook in (*STEPS, "predict", "task_end"):
        assert sorted(spy.told[hook]) == [(i, i) for i in range(5)], hook
    assert spy.samples["after_step"] == spy.samples["predict"] == spy.samples["task_end"] == set(range(5))


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_what_a_stream_hides_reaches_nobody(scenario):
    run, spy = spied(scenario=scenario, reveals=[])
    assert spy.called == {"params", "predict", *STEPS}, "one endless problem: nothing begins and nothing ends"
    assert spy.tasks == 1
    assert all(pairs == [(-1, -1)] for pairs in spy.told.values()), spy.told
    assert all(found == {-1} for found in spy.samples.values()), spy.samples
    assert spy.progress == sorted(spy.progress) and spy.progress[-1] == 0.9, "of the whole run, ten iterations"
    assert not run.matrix[:, -1].isnan().any()


@pytest.mark.parametrize(
    ("scenario", "reveals", "training", "testing"),
    [
        ("task", ["test_id"], {(-1, -1)}, {(i, i) for i in range(5)}),
        ("task", ["boundaries", "test_id"], {(i, -1) for i in range(5)}, {(i, i) for i in range(5)}),
        ("class", ["train_id"], {(-1, i) for i in range(5)}, {(-1, -1)}),
        ("domain", ["boundaries"], {(i, -1) for i in range(5)}, {(-1, -1)}),
    ],
)
def test_what_is_revealed_reaches_its_hooks_and_no_others(scenario, reveals, training, testing):
    _, spy = spied(scenario=scenario, reveals=reveals)
    for hook in STEPS:
        assert set(spy.told[hook]) == training, hook
    assert set(spy.told["predict"]) == testing
    assert ("task_end" in spy.called) == ("boundaries" in reveals)
    assert spy.samples["after_step"] == {identity for _, identity in training}
    assert spy.samples["predict"] == {identity for _, identity in testing}


def optimizer_counts(stream, *methods, seeds=1) -> list[float]:
    """Steps that the optimizer remembers, iteration by iteration."""
    found = []

    def watch(run, line):
        found.append(float(run.state["optimizer"]["all"]["count"].max()))

    budget = rl.Budget(steps=160, final_episodes=1, log_points=1000)
    rl.train(SMALL, stream, budget=budget, seeds=seeds, lifelong=methods, callbacks=[watch])
    return found


def test_moments_restart_where_a_boundary_is_revealed_and_nowhere_else():
    restarted, on = [5.0, 10.0] * 5, [5.0 * i for i in range(1, 11)]
    assert optimizer_counts(rl.stream("split-digits")) == restarted
    assert optimizer_counts(rl.stream("split-digits", restart_optimizer=False)) == on
    assert optimizer_counts(rl.stream("split-digits", scenario="domain", reveals=["train_id"])) == on
    with_phase = rl.stream("split-digits", restart_optimizer=False)
    assert optimizer_counts(with_phase, Diary(), seeds=2) == [5.0 * i for i in range(1, 16)]


def test_a_schedule_does_not_show_a_hidden_boundary():
    """The learning rate falls once over the whole run."""
    rates = []

    def watch(run, line):
        rates.append(float(run.agent.optimizer(run.state).recipe.settings["lr"][0]))

    linear = dataclasses.replace(SMALL, learning_rate_schedule="linear", learning_rate=1.0)
    budget = rl.Budget(steps=160, final_episodes=1, log_points=1000)
    rl.train(linear, rl.stream("split-digits", scenario="domain", reveals=[]), budget=budget, callbacks=[watch])
    assert rates == pytest.approx([1 - i / 10 for i in range(10)])
    rates.clear()
    rl.train(linear, rl.stream("split-digits", scenario="domain"), budget=budget, callbacks=[watch])
    assert rates == pytest.approx([1.0, 0.5] * 5)


def test_classes_are_born_when_they_are_met_where_nobody_announces_them():
    few = dataclasses.replace(SMALL, batch_size=1, num_steps=1)
    for reveals, first in ((["boundaries"], 2), ([], 1)):
        known = []

        def watch(run, line, known=known):
            known.append(int(run.state["params"]["buffers"]["known_classes"].sum()))

        stream = rl.stream("split-digits", scenario="class", reveals=reveals)
        budget = rl.Budget(steps=8, final_episodes=1, log_points=1000)
        run = rl.train(few, stream, budget=budget, callbacks=[watch])
        assert known[0] == first and known == sorted(known) and known[-1] == 10
        has_unknown = torch.triu(torch.ones(6, 5, dtype=torch.bool))
        has_unknown[0, 0] = not reveals  # the first task's are announced before the untrained learner is scored
        assert torch.equal(run.matrix[0].isnan(), has_unknown), "no score before all classes of a task are known"
        assert math.isnan(run.summary()[0]["FWT"]) and not math.isnan(run.summary()[0]["BWT"])


def test_a_hidden_task_at_training_opens_every_class():
    """Of the scenario "task", where only evaluation is told: no logit is closed for the sake of the trained task."""
    grown = {}
    for reveals in (["boundaries", "test_id"], ["boundaries", "train_id", "test_id"]):
        run = rl.train(SMALL, rl.stream("split-digits", scenario="task", reveals=reveals), budget=BUDGET)
        fresh = run.agent.init(run.experiment.keys(), run.experiment.hyper(), run.world)
        head = list(run.state["params"]["weights"])[-1]
        moved = run.state["params"]["weights"][head] != fresh["params"]["weights"][head]
        grown[len(reveals)] = run.agent, moved
        assert moved.all(), "every task has been trained"
    first = rl.stream("split-digits", scenario="task", reveals=["boundaries", "test_id"])
    world = first.world((1,), 16)
    state = world.reset(run.state["key"])
    assert "allowed" not in world.next_batch(state)[1] and "allowed" in next(world.test_batches(8))


def test_an_agent_is_not_told_of_a_hidden_boundary_either():
    """DQN's replay memory, exploration and schedules go on; the world's episodes end there, so no return crosses it."""
    dqn = rl.DQN(
        num_envs=2,
        num_steps=8,
        batch_size=8,
        learning_starts=32,
        capacity=400,
        hidden_sizes=(8,),
        n_steps=3,
    )
    budget = rl.Budget(steps=64, eval_episodes=1, final_episodes=1, log_points=1000)
    for reveals, expected in (([], [8, 16, 24, 32, 40, 48, 56, 64]), (["boundaries"], [8, 16, 24, 32] * 2)):
        steps, ends = [], []

        def watch(run, line, steps=steps, ends=ends):
            steps.append(int(run.state["count"]["task_steps"].max()))
            ends.append(bool(run.state["replay"]["truncated"].any()))

        run = rl.train(dqn, rl.stream(["CartPole-v1"] * 2, reveals=reveals), budget=budget, callbacks=[watch])
        assert steps == expected
        kept = run.state["replay"]["valid"].sum()
        assert kept == (2 * 64 if not reveals else 2 * 32)
        assert ends[-1] == (not reveals), "the last step before the boundary"
        assert run.state["progress"].item() == (7 / 8 if not reveals else 3 / 4)


def test_replay_for_an_agent_needs_to_know_when_a_task_ends():
    small, hidden = rl.PPO(num_steps=16, batch_size=32), rl.stream(["CartPole-v1"] * 2, reveals=["train_id"])
    with pytest.raises(SettingError, match="replay needs to know when a task ends, which the stream hides"):
        rl.train(small, hidden, steps=64, lifelong=[rl.Replay(size=16)])
    rl.train(SMALL, rl.stream("split-digits", scenario="domain", reveals=[]), budget=BUDGET, lifelong=[rl.Replay()])


@pytest.mark.parametrize("reveals", [[], ["train_id"]])
def test_a_run_on_a_hidden_stream_is_resumed_exactly(tmp_path, reveals):
    stream = rl.stream("split-digits", scenario="class", reveals=reveals)
    budget = rl.Budget(steps=160, final_episodes=1, log_points=1000)
    given = {"budget": budget, "seeds": 2, "lifelong": [rl.Replay(size=20)]}
    whole = rl.train(SMALL, stream, out=tmp_path / "whole", **given)
    rl.train(SMALL, stream, out=tmp_path / "cut", callbacks=[lambda run, line: line["iteration"] >= 5], **given)
    resumed = rl.resume(tmp_path / "cut")
    for (name, ours), theirs in zip(tree.flatten(resumed.state).items(), tree.leaves(whole.state)):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), name
    assert rl.load(tmp_path / "cut").stream.reveals == frozenset(reveals)


def test_a_stream_that_is_given_again_has_to_be_the_same(tmp_path):
    tasks = rl.stream("split-digits").tasks
    rl.train(SMALL, rl.stream(tasks, scenario="class"), budget=BUDGET, out=tmp_path / "run")
    assert rl.load(tmp_path / "run", env=rl.stream(tasks, scenario="class")).stream.scenario == "class"
    for other, words in (
        ({"scenario": "task"}, "scenario='class', this one has 'task'"),
        ({"scenario": "class", "reveals": []}, r"reveals=\['boundaries', 'train_id'\], this one has \[\]"),
        ({"scenario": "class", "restart_optimizer": False}, "restart_optimizer=None, this one has False"),
    ):
        with pytest.raises(SettingError, match=words):
            rl.load(tmp_path / "run", env=rl.stream(tasks, **other))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([rl.EWC], r"lifelong has the class EWC, expected a method of it: EWC\(\)"),
        (rl.EWC, r"lifelong is EWC, expected a list of methods: \[EWC\(\)\]"),
        (rl.EWC(), r"lifelong is EWC, expected a list of methods: \[EWC\(\)\]"),
        ("ewc", "lifelong is 'ewc', expected a list of methods"),
        ([7], "lifelong has 7, expected methods such as"),
        (None, "lifelong is None, expected a list of methods"),
    ],
)
def test_what_are_no_methods_is_said(given, words):
    with pytest.raises(SettingError, match=words):
        rl.train(SMALL, rl.stream("split-digits"), budget=BUDGET, lifelong=given)


def test_scores_of_tasks_count_the_same_and_samples_may():
    stream = rl.stream(splits.split(labelled("digits"), [[0, 1, 2, 3, 4, 5], [6, 7]]), scenario="class")
    run = rl.train(SMALL, stream, steps=800)
    final, counts = run.matrix[:, -1], run.evaluation.lengths
    assert torch.equal(run.scores, final.mean(-1))
    by_sample = (final * counts).sum(-1) / counts.sum(-1)
    assert counts[0].tolist() == [len(task.test.target) for task in stream.tasks]
    assert metrics.accuracy(run.matrix, counts) == pytest.approx(by_sample.numpy())
    assert abs(float(by_sample - run.scores)) > 0.05, "here they differ"


def test_an_agent_that_keeps_its_answers_forgets_exactly_nothing():
    """Every row of the matrix plays the same episodes, so that a policy that did not change has the same score."""
    small = rl.PPO(num_steps=32, batch_size=64, num_epochs=2, hidden_sizes=(16,))
    run = rl.train(small, "cartpole-conflicts", steps=512, seeds=2, lifelong=[rl.PackNet()])
    for j in range(4):
        later = run.matrix[:, j + 1 :, j]
        assert torch.equal(later, later[:, :1].expand_as(later))
    assert run.summary()[0]["forgetting"] == 0.0
