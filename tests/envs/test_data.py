"""Worlds of labelled samples: every learner gets all samples of its own task once an epoch, and nobody else's."""

from __future__ import annotations

import pytest
import torch

from rlmeta.envs.data import DataTable, DataTask, DataWorld, Samples
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


def test_what_is_known_of_the_classes():
    hidden, known = world(), world(reveals_classes=True, born=False)
    assert "allowed" not in hidden.next_batch(hidden.reset(make_keys([0, 1, 2])))[1]
    batch = known.next_batch(known.reset(make_keys([0, 1, 2])))[1]
    assert batch["allowed"][1, 0].tolist() == [False, False, True, True]
    assert hidden.born().all() and not known.born().any()
    assert known.classes()[0].tolist() == [True, True, False, False]


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
