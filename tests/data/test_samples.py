"""Worlds of labelled samples: every learner gets all samples of its own task once an epoch, and nobody else's."""

from __future__ import annotations

import pytest
import torch

from rlmeta.data.samples import HIDDEN, DataTable, DataTask, DataWorld, Samples, shared_classes
from rlmeta.errors import SettingError
from rlmeta.functional.random import make_keys

S = 3


def numbered(name: str, first: int, count: int, classes: tuple[int, ...], num_classes: int = 4) -> DataTask:
    """Samples that are told apart by their input: first, first + 1, ..."""
    inputs = torch.arange(first, first + count, dtype=torch.float32).unsqueeze(-1)
    target = torch.tensor(classes)[torch.arange(count) % len(classes)]
    return DataTask(
        name, Samples(inputs, target), Samples(-inputs[: count // 2], target[: count // 2]), classes, num_classes
    )


TASKS = [numbered("a", 0, 10, (0, 1)), numbered("b", 100, 7, (2, 3))]


def world(batch: int = 3, **options) -> DataWorld:
    made = DataWorld(DataTable(TASKS), (S,), batch, **options)
    made.select(torch.tensor([0, 1, 0]))
    return made


def test_an_epoch_gives_every_sample_of_the_own_task_at_most_once_and_the_next_another_order():
    data = world()
    state = data.reset(make_keys([0, 1, 2]))
    first = []
    for _ in range(6):
        state, batch = data.next_batch(state)
        assert batch["identity"].tolist() == [[0] * 3, [1] * 3, [0] * 3]
        first.append(batch["observation"].squeeze(-1))
    seen = torch.stack(first, 1)  # [S, 6, 3]
    assert ((seen[0] >= 0) & (seen[0] < 10)).all() and ((seen[1] >= 100) & (seen[1] < 107)).all()
    assert len(set(seen[0, :3].flatten().tolist())) == 9, "three minibatches of ten samples: no sample twice"
    assert len(set(seen[1, :2].flatten().tolist())) == 6
    assert not torch.equal(seen[0, :3], seen[0, 3:]), "the second epoch has another order"
    assert not torch.equal(seen[0], seen[2]), "each learner has its own"
    assert state["epoch"].tolist() == [1, 2, 1]


def test_a_learners_samples_depend_on_its_own_key_alone():
    alone = DataWorld(DataTable(TASKS), (1,), 3)
    alone.select(torch.tensor([1]))
    ours, theirs = alone.reset(make_keys([1])), world().reset(make_keys([0, 1, 2]))
    data = world()
    for _ in range(5):
        ours, batch = alone.next_batch(ours)
        theirs, together = data.next_batch(theirs)
        assert torch.equal(batch["observation"][0], together["observation"][1])


def test_test_batches_hold_every_test_sample_once_and_mark_the_padding():
    counted = torch.zeros(S, dtype=torch.int64)
    total = torch.zeros(S)
    for batch in world().test_batches(2):
        counted += batch["valid"].sum(-1)
        total += (batch["observation"].squeeze(-1) * batch["valid"]).sum(-1)
    assert counted.tolist() == [5, 3, 5]
    assert total.tolist() == [-10.0, -303.0, -10.0]


def batches(**options) -> list[dict[str, torch.Tensor]]:
    """One for training, one for methods, one for testing."""
    data, keys = world(**options), make_keys([0, 1, 2])
    return [data.next_batch(data.reset(keys))[1], data.sample(keys, 2), next(data.test_batches(2))]


@pytest.mark.parametrize("told", [(), ("train_id",), ("test_id",), ("train_id", "test_id"), ("boundaries",)])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_minibatches_tell_no_more_than_the_stream_reveals(scenario, told):
    train, drawn, test = batches(scenario=scenario, reveals=frozenset(told))
    for batch, name in ((train, "train_id"), (drawn, "train_id"), (test, "test_id")):
        identity = [[0], [1], [0]] if name in told else [[HIDDEN]] * 3
        assert (batch["identity"] == torch.tensor(identity)).all()
        assert ("allowed" in batch) == (scenario == "task" and name in told)
        if "allowed" in batch:
            assert batch["allowed"][1, 0].tolist() == [False, False, True, True]
    hidden = world(scenario=scenario, reveals=frozenset(told))
    assert hidden.initial_classes().all() == (scenario != "class")
    assert hidden.announces == ("boundaries" in told)
    assert hidden.classes()[0].tolist() == [True, True, False, False]


def test_samples_for_methods_are_drawn_without_replacement():
    batch = world().sample(make_keys([0, 1, 2]), 100)
    assert batch["observation"].shape == (S, 7, 1), "as many as the smallest task has"
    assert len(set(batch["observation"][1].flatten().tolist())) == 7


def test_bad_data_are_refused_by_name():
    with pytest.raises(SettingError, match="a minibatch of 8 is more than the 7 training samples of b"):
        world(8)
    with pytest.raises(SettingError, match="c is of 5 classes, a of 4"):
        DataTable([*TASKS, numbered("c", 0, 4, (0,), 5)])
    other = DataTask("d", *[Samples(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))] * 2, (0,), 4)
    with pytest.raises(SettingError, match=r"d has samples torch.float32 \(2,\), a has"):
        DataTable([*TASKS, other])
    with pytest.raises(SettingError, match="no classes are named"):
        DataTask("e", *[Samples(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))] * 2)
    with pytest.raises(SettingError, match="e: 0 training inputs and 0 targets"):
        DataTask("e", *[Samples(torch.zeros(0, 2), torch.zeros(0))] * 2)
    pair = [Samples(torch.zeros(4, 2), torch.tensor([0, 1, 1, 3]))] * 2
    with pytest.raises(SettingError, match=r"f: target 3 is none of its classes \(0, 1\)"):
        DataTask("f", *pair, (0, 1), 4)
    with pytest.raises(SettingError, match="f: class 3, expected 0 to 2"):
        DataTask("f", *pair, (0, 1, 3), 3)
    with pytest.raises(SettingError, match=r"f: targets \(4,\), expected \[n, D\]"):
        DataTask("f", *[Samples(torch.zeros(4, 2), torch.zeros(4))] * 2)
    with pytest.raises(SettingError, match="f: training samples are no tensors"):
        DataTask("f", *[Samples([[0.0]], [0])] * 2, (0,), 1)


X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("train", "classes", "count", "words"),
    [
        ((X, Y.float()), (0, 1, 2), 3, "training targets are torch.float32, expected whole numbers of classes"),
        ((X, Y - 1), (0, 1, 2), 3, "target -1 is none of its classes"),
        ((X, torch.eye(3)[Y]), (0, 1, 2), 3, r"training targets \(6, 3\), expected classes \[n\]: one-hot"),
        ((X, torch.eye(3)[Y].long()), (0, 1, 2), 3, r"training targets \(6, 3\), expected classes \[n\]: one-hot"),
        ((X, Y.unsqueeze(-1)), (0, 1, 2), 3, r"training targets \(6, 1\), expected classes"),
        ((X / 0.0, Y), (0, 1, 2), 3, "6 of 6 training inputs are not finite"),
        ((X, X.log()), (), 0, "1 of 6 training targets are not finite"),
        ((X * 1j, Y), (0, 1, 2), 3, "training inputs are torch.complex64, expected bytes or real numbers"),
        ((X[0, 0], Y), (0, 1, 2), 3, "no row of training inputs and 6 targets"),
        ((X, Y[:5]), (0, 1, 2), 3, "6 training inputs and 5 targets"),
        ((X,), (0, 1, 2), 3, r"training samples are tuple, expected Samples\(x, y\)"),
        (X, (0, 1, 2), 3, r"training samples are Tensor, expected Samples\(x, y\)"),
        ((X.numpy(), Y.numpy()), (0, 1, 2), 3, "training samples are no tensors"),
        ((X, Y), ("0", "1", "2"), 3, r"classes are \('0', '1', '2'\), expected whole numbers"),
        ((X, Y), 3, 3, "classes are 3, expected whole numbers"),
        ((X, Y), (0, 1, 1, 2), 3, "classes repeat"),
        ((X, Y), (0, 1, 2), 2.5, "num_classes is 2.5, expected a whole number"),
        ((X[:, :1], Y), (0, 1, 2), 3, "test samples have another shape than training samples"),
    ],
)
def test_samples_that_are_none_are_refused_by_a_sentence(train, classes, count, words):
    with pytest.raises(SettingError, match=f"g: {words}"):
        DataTask("g", train, (X, Y if classes else X), classes, count)


def test_samples_become_what_learners_expect():
    """Plain pairs, any whole numbers and any precision: the same task."""
    plain = DataTask("h", Samples(X, Y), Samples(X, Y), (0, 1, 2), 3)
    for dtype in (torch.float64, torch.float16, torch.int64):
        for labels in (torch.int32, torch.uint8):
            made = DataTask("h", (X.to(dtype), Y.to(labels)), [X.to(dtype), Y.to(labels)], range(3), 3)
            assert made.classes == (0, 1, 2)
            for part, expected in ((made.train, plain.train), (made.test, plain.test)):
                assert isinstance(part, Samples)
                assert part.observation.dtype == torch.float32 and part.target.dtype == torch.int64
                assert all(torch.equal(a, b) for a, b in zip(part, expected))
    assert DataTask("h", (X.byte(), Y), (X.byte(), Y), (0, 1, 2), 3).train.observation.dtype == torch.uint8


def test_tasks_share_their_classes_by_place_or_as_they_are():
    first, second = shared_classes([numbered("a", 0, 6, (1, 0)), numbered("b", 0, 6, (3, 2))])
    assert torch.equal(first.train.target, second.train.target) and first.num_classes == second.num_classes == 2
    assert first.train.target.tolist() == [0, 1] * 3, "the first of `classes` is class 0"
    same = [numbered("a", 0, 6, (2, 3)), numbered("b", 0, 6, (3, 2))]
    assert shared_classes(same) == same, "the same classes mean the same"
    with pytest.raises(SettingError, match="the same classes, or each of its own: these share some"):
        shared_classes([numbered("a", 0, 6, (0, 1)), numbered("b", 0, 6, (1, 2))])
    with pytest.raises(SettingError, match="groups of one size, these have 1 to 2"):
        shared_classes([numbered("a", 0, 6, (0, 1)), numbered("b", 0, 6, (2,))])
