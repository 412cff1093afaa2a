"""Families: moments, disjoint splits, labels without meaning, draws that depend on the key alone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.data.sets import data_folder
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.few_shot import FewShot, split_classes
from rlmeta.envs.minimisation import DigitMLPs, Quadratics
from rlmeta.envs.regression import Sinusoid
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional import random, tree

KEY = random.make_keys([0, 1, 2])


def labelled(classes=12, each=6, size=2):
    """Images whose pixels all equal their own index."""
    n = classes * each
    images = torch.arange(n, dtype=torch.float32).reshape(n, 1, 1).expand(n, size, size).clone()
    return images, torch.arange(n) // each


def few_shot(**settings):
    images, labels = labelled()
    classes = {"train": range(6), "validation": range(6, 9), "test": range(9, 12)}
    return FewShot(images, labels, classes, **{"ways": 3, "shots": 2, "queries": 3, **settings})


def test_sinusoid_has_the_moments_of_the_paper():
    tasks = Sinusoid(shots=10, queries=10).tasks(random.make_keys([0]), 0, 40_000, "train")
    x, y = (torch.cat([tasks[part][name] for part in tasks], 2) for name in ("observation", "target"))
    assert float(y.square().mean()) == pytest.approx(4.25, abs=0.06)
    assert float((y + 1.62 * x.cos()).square().mean()) == pytest.approx(3.01, abs=0.06)
    assert float(x.min()) > -5 and float(x.max()) < 5 and float(y.abs().max()) <= 5
    basis = torch.stack([x[0].sin(), x[0].cos()], -1).squeeze(2)  # every task's points lie on one sine wave
    solution = torch.linalg.lstsq(basis[:50], y[0, :50]).solution
    torch.testing.assert_close(basis[:50] @ solution, y[0, :50], atol=1e-3, rtol=1e-3)
    amplitude = solution.squeeze(-1).norm(dim=-1)
    assert amplitude.min() >= 0.1 - 1e-3 and amplitude.max() <= 5.0 + 1e-3
    assert (solution[:, 1, 0] <= 1e-3).all()  # −A sin(phase), phase in [0, π]


def test_a_sinusoid_is_asked_about_other_points():
    tasks = Sinusoid(shots=3, queries=4).tasks(KEY, 0, 5, "train")
    support, query = (tasks[part]["observation"] for part in ("support", "query"))
    assert (support.shape[2], query.shape[2]) == (3, 4)
    assert not torch.isin(query, support).any()


@pytest.mark.parametrize("family", [Sinusoid(), few_shot(), Quadratics(), DigitMLPs()])
def test_a_learners_tasks_depend_on_its_key_the_counter_and_the_split(family):
    tasks = tree.flatten(family.tasks(KEY, 5, 4, "train"))
    alone = tree.flatten(family.tasks(KEY[1:2], torch.tensor([5]), 2, "train"))
    for name, value in tasks.items():
        assert value.shape[:2] == (3, 4)
        assert torch.equal(value[1, :2], alone[name][0])
    for other in (family.tasks(KEY, 6, 4, "train"), family.tasks(KEY, 5, 4, "test")):
        changed = [not torch.equal(value, tasks[name]) for name, value in tree.flatten(other).items()]
        assert any(changed)
    distinct = {tuple(value.flatten().tolist()) for value in next(iter(tasks.values())).flatten(0, 1)}
    assert len(distinct) == 12
    with pytest.raises(SettingError, match="split is 'held-out'"):
        family.tasks(KEY, 0, 1, "held-out")


def test_support_and_query_are_disjoint_and_of_the_same_classes():
    family = few_shot()
    tasks = family.tasks(KEY, 0, 50, "train")
    for s in range(3):
        for k in range(50):
            pixels, target = ({p: tasks[p][n][s, k] for p in tasks} for n in ("observation", "target"))
            numbers = {part: pixels[part][:, 0, 0].long() for part in pixels}
            together = torch.cat([numbers["support"], numbers["query"]])
            assert len(set(together.tolist())) == 15
            for part, each in (("support", 2), ("query", 3)):
                assert target[part].bincount(minlength=3).tolist() == [each] * 3
                assert (numbers[part] // 6 < 6).all()
            classes = [{int(n) // 6 for n in together[torch.cat(list(target.values())) == i]} for i in range(3)]
            assert all(len(members) == 1 for members in classes) and len(set.union(*classes)) == 3


def test_every_class_gives_samples_of_its_own_draw():
    number = few_shot().tasks(KEY, 0, 50, "train")["support"]["observation"][..., 0, 0].long() % 6
    places = number.reshape(3, 50, 3, 2)
    assert (places != places[:, :, :1]).any((-2, -1)).float().mean() > 0.8


def test_turned_characters_count_as_classes():
    images, labels = labelled()
    family = FewShot(images, labels, {"train": range(2)}, ways=8, shots=1, queries=1, rotations=True)
    assert family.tasks(KEY, 0, 2, "train")["support"]["target"].shape == (3, 2, 8)


def test_labels_say_nothing_about_classes():
    """Every class gets every label about as often."""
    tasks = few_shot().tasks(random.make_keys([0]), 0, 3000, "train")
    number = tasks["support"]["observation"][..., 0, 0].long() // 6
    table = torch.zeros(6, 3)
    for label in range(3):
        table[:, label] = number[tasks["support"]["target"] == label].bincount(minlength=6).float()
    assert (table / table.sum() * 18 - 1).abs().max() < 0.1


def test_splits_never_overlap_and_are_equal_for_every_seed():
    family, seen = few_shot(), {}
    for split in ("train", "validation", "test"):
        tasks = family.tasks(KEY, 0, 60, split)
        seen[split] = {int(n) // 6 for part in tasks.values() for n in part["observation"][..., 0, 0].flatten()}
    assert seen == {"train": set(range(6)), "validation": {6, 7, 8}, "test": {9, 10, 11}}


def test_rotations_are_new_classes_of_the_training_side_alone():
    images = torch.arange(4.0).reshape(1, 2, 2) + 10 * torch.arange(12.0).reshape(12, 1, 1)
    both = torch.cat([images, images + 0.25], 1).reshape(24, 2, 2)  # two drawings of each
    family = FewShot(
        both, torch.arange(24) // 2, {"train": range(6), "test": range(6, 12)},
        ways=5, shots=1, queries=1, rotations=True,
    )  # fmt: skip
    turned = {tuple(torch.rot90(torch.arange(4.0).reshape(2, 2), i).flatten().tolist()) for i in range(4)}
    for split, count in (("train", 4), ("test", 1)):
        tasks = family.tasks(KEY, 0, 60, split)
        support = tasks["support"]["observation"].flatten(0, 2).floor()
        assert len({tuple((image % 10).flatten().tolist()) for image in support} & turned) == count
        query = tasks["query"]["observation"].flatten(0, 2).floor()
        assert torch.equal(support, query)  # a class is one turn of one character


def test_equal_images_are_taken_once_and_never_in_two_classes():
    """No query image is in the support set, and no image is in two splits."""
    images, labels = labelled(each=8)
    images[3], images[5] = images[2], images[4]  # copies within class 0
    images[60] = images[1]  # of class 0, trained on, and of class 7, tested: which is it?
    images[95] = 0.0  # of class 11, which no split has
    images[0] = -0.0
    classes = {"train": range(3), "test": range(6, 9)}
    with pytest.warns(RuntimeWarning, match="of 96 images 2 equal others of their class .* and 2 equal ones of other"):
        family = FewShot(images, labels, classes, ways=3, shots=2, queries=2)
    assert family.dropped == 4 and len(family.images) == 92
    for split, gone in (("train", {1.0, 3.0, 5.0}), ("test", {1.0, 60.0})):
        tasks = family.tasks(KEY, 0, 200, split)
        support, query = (tasks[part]["observation"][..., 0, 0] for part in ("support", "query"))
        assert not (query.unsqueeze(-1) == support.unsqueeze(-2)).any()
        assert not {*support.flatten().tolist(), *query.flatten().tolist()} & gone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert few_shot().dropped == 0 and rl.family("few-shot-digits").source.dropped == 0


def test_alphabets_are_held_out_whole():
    groups = ["greek"] * 3 + ["latin"] * 2 + ["tengwar"] * 2
    assert split_classes(groups, ["latin"], ["tengwar"]) == {"train": [0, 1, 2], "validation": [5, 6], "test": [3, 4]}
    with pytest.raises(SettingError, match="no group 'klingon'"):
        split_classes(groups, ["klingon"])
    with pytest.raises(SettingError, match="no group 'klingon'"):
        split_classes(groups, ["latin"], ["klingon"])
    with pytest.raises(SettingError, match="both"):
        split_classes(groups, ["latin"], ["latin"])


def test_few_shot_takes_arrays():
    images, labels = (part.numpy() for part in labelled())
    classes = {"train": np.arange(6), "validation": torch.arange(6, 9), "test": range(9, 12)}
    of_arrays = FewShot(images.astype(np.float64), labels.astype(np.int16), classes, 3, 2, 3)
    for split in ("train", "validation", "test"):
        for part in ("support", "query"):
            for name in ("observation", "target"):
                ours, theirs = (f.tasks(KEY, 0, 4, split)[part][name] for f in (of_arrays, few_shot()))
                assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def broken(part, change):
    """Images or labels with a fault."""
    return {part: change(labelled()[part == "labels"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("labels", lambda x: x[:-1]), r"labels are torch.int64 \[71\] for images \[72, 2, 2\]"),
        (
            broken("labels", lambda x: x[:, None]),
            r"\[72, 1\] for images \[72, 2, 2\], expected one whole number for each",
        ),
        (broken("labels", lambda x: x.float()), "labels are torch.float32"),
        (broken("labels", lambda x: [str(int(i)) for i in x]), "tensors or arrays of numbers"),
        (broken("images", lambda x: x.to(torch.uint8)), "images are torch.uint8, expected floats: divide .* by 255"),
        (broken("images", lambda x: x.index_fill(0, torch.tensor([7]), torch.nan)), "image 7 is not finite"),
        ({"rotations": True, **broken("images", lambda x: x.flatten(1))}, r"square images .* images are \[72, 4\]"),
        ({"rotations": True, **broken("images", lambda x: x[:, :1])}, r"square images .* images are \[72, 1, 2\]"),
        (
            {"classes": {"train": torch.arange(7), "test": torch.arange(6, 12)}},
            "class 6 is in split 'train' and in 'test'",
        ),
        ({"classes": {"train": [0, 1, 2, 1]}}, "class 1 stands twice in split 'train'"),
        ({"classes": {"train": [0, 1, 99]}}, "class 99 of split 'train' has 0 samples"),
        ({"ways": 2.0}, "ways is 2.0, expected a whole number"),
        ({"ways": -2}, "ways is -2, expected at least 1"),
        ({"shots": 1.5}, "shots is 1.5, expected a whole number"),
    ],
)
def test_few_shot_refuses_data_that_are_none(change, message):
    images, labels = labelled()
    arguments = {
        "images": images,
        "labels": labels,
        "classes": {"train": range(6)},
        "ways": 3,
        "shots": 2,
        "queries": 3,
    }
    with pytest.raises(SettingError, match=message):
        FewShot(**{**arguments, **change})


@pytest.mark.parametrize("count", [0, -1])
def test_no_tasks_are_refused(count):
    with pytest.raises(SettingError, match=f"{count} tasks, expected at least 1"):
        Sinusoid().tasks(KEY, 0, count, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 4}, "4 ways, but split 'validation' has 3 classes"),
        ({"shots": 4}, "class 0 of split 'train' has 6 samples, 4 shots and 3 queries need 7"),
        ({"shots": 0}, "shots is 0"),
        ({"ways": 1}, "ways is 1, expected at least 2"),
        ({"classes": {"train": range(6), "test": range(5, 9)}}, "class 5 is in split 'train' and in 'test'"),
        ({"classes": {"training": range(6)}}, "split 'training' is unknown"),
    ],
)
def test_few_shot_refuses_what_it_cannot_draw(change, message):
    images, labels = labelled()
    classes = {"train": range(6), "validation": range(6, 9), "test": range(9, 12)}
    with pytest.raises(SettingError, match=message):
        FewShot(images, labels, **{"classes": classes, "ways": 3, "shots": 2, "queries": 3, **change})


def test_classes_of_different_sizes_give_only_what_they_have():
    labels = torch.tensor([0] * 3 + [1] * 9 + [2] * 5)
    images = (torch.arange(17) + 1.0).reshape(-1, 1, 1)
    tasks = FewShot(images, labels, {"train": [0, 1, 2]}, ways=3, shots=1, queries=2).tasks(KEY, 0, 40, "train")
    for part in tasks.values():
        assert (part["observation"] > 0).all()


def test_quadratics_and_digit_mlps_are_functions_to_minimise():
    for family, high in ((Quadratics(4), 40.0), (DigitMLPs(hidden=5, batch_size=16), 3.5)):
        problem = family.tasks(KEY, 0, 3, "train")
        weights = {n: w.requires_grad_() for n, w in family.start(problem).items()}
        step = torch.zeros(3, 3, dtype=torch.int64)
        loss = family.loss(weights, problem, step)
        assert loss.shape == (3, 3) and (loss > 0).all() and (loss.mean() < high)
        grads = torch.autograd.grad(loss.sum(), list(weights.values()))
        lower = family.loss({n: w - 1e-3 * g for (n, w), g in zip(weights.items(), grads)}, problem, step)
        assert (lower < loss).all()
    assert float(Quadratics().tasks(KEY, 0, 500, "train")["matrix"].std()) == pytest.approx(1.0, abs=0.01)
    again = family.loss(weights, problem, step + 1)
    assert not torch.equal(again, loss)  # another minibatch


def test_quadratics_are_the_squared_norm_of_a_random_residual():
    problem = Quadratics(3).tasks(KEY, 0, 2000, "train")
    start = Quadratics(3).start(problem)["x"]
    assert float(start.std()) == pytest.approx(0.01, rel=0.05)
    assert float(problem["target"].std()) == pytest.approx(1.0, rel=0.05)
    assert abs(float((problem["target"] * problem["matrix"][..., 0]).mean())) < 0.05, "one says nothing of the other"
    x = random.normal(KEY, "x", 0, (2000, 3))
    residual = torch.einsum("skij,skj->ski", problem["matrix"], x) - problem["target"]
    loss = Quadratics(3).loss({"x": x}, problem, torch.zeros(3, 2000, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.linalg.vector_norm(residual, dim=-1) ** 2)


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_the_loss_of_a_digit_mlp_is_torchs_cross_entropy(activation):
    """On equal images, so that the minibatch does not matter."""
    family, image = DigitMLPs(hidden=5, batch_size=7, activation=activation), torch.linspace(-1, 1, 64)
    family.__dict__["_digits"] = image.expand(10, 64), torch.full((10,), 3)
    problem = family.tasks(KEY, 0, 2, "train")
    weights = {n: w + 0.1 * random.normal(KEY, n, 0, w.shape[1:]) for n, w in family.start(problem).items()}
    loss = family.loss(weights, problem, torch.zeros(3, 2, dtype=torch.int64))
    for s in range(3):
        for k in range(2):
            w = {n: value[s, k] for n, value in weights.items()}
            hidden = getattr(torch, activation)(torch.nn.functional.linear(image, w["0.weight"], w["0.bias"]))
            logits = torch.nn.functional.linear(hidden, w["1.weight"], w["1.bias"])
            torch.testing.assert_close(loss[s, k], torch.nn.functional.cross_entropy(logits, torch.tensor(3)))


def test_digit_mlps_start_with_deviations_of_one_over_the_root_of_their_inputs():
    family = DigitMLPs(hidden=25)
    weights = family.start(family.tasks(KEY, 0, 40, "train"))
    assert float(weights["0.weight"].std()) == pytest.approx(1 / 8, rel=0.02)
    assert float(weights["1.weight"].std()) == pytest.approx(1 / 5, rel=0.02)
    assert not weights["0.bias"].any() and not weights["1.bias"].any()


def test_digit_mlps_hold_images_out():
    family = DigitMLPs(hidden=3, batch_size=8)
    quarters = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])  # a half to train on, a quarter each to validate and to test
    family.__dict__["_digits"] = torch.zeros(8, 64), quarters
    for digit, split in enumerate(("train", "validation", "test")):
        problem = family.tasks(KEY, 0, 2, split)
        weights = {n: torch.zeros_like(w) for n, w in family.start(problem).items()}
        weights["1.bias"][..., digit] = 50.0
        assert family.loss(weights, problem, torch.zeros(3, 2, dtype=torch.int64)).max() < 1e-6, split
    parts = [family.tasks(KEY, 0, 2, split)["part"].unique().tolist() for split in ("train", "validation", "test")]
    assert parts == [[0], [1], [2]]
    family.__dict__["_digits"] = torch.zeros(8, 64), torch.arange(8)
    seen = set()
    for split in ("train", "validation", "test"):
        problem = family.tasks(KEY, 0, 40, split)
        weights = {n: torch.zeros_like(w).requires_grad_() for n, w in family.start(problem).items()}
        loss = family.loss(weights, problem, torch.zeros(3, 40, dtype=torch.int64)).sum()
        (g,) = torch.autograd.grad(loss, weights["1.bias"])  # below the average only where the digit was met
        met = {int(digit) for digit in (g.sum((0, 1)) < 0).nonzero()}
        assert not met & seen and len(met) == (4 if split == "train" else 2)
        seen |= met


def test_a_world_hands_out_the_familys_tasks():
    world = NamedFamily("sinusoid", Sinusoid()).world((3,), 5)
    assert world.num_envs == 5 and world.learner_shape == (3,) and world.observation_space.shape == (1,)
    ours = world.tasks(KEY, 0, 5, "test")["query"]["target"]
    assert torch.equal(ours, Sinusoid().tasks(KEY, 0, 5, "test")["query"]["target"])
    assert math.prod(ours.shape) == 3 * 5 * 10


def test_named_families_are_made_with_settings():
    assert rl.family("sinusoid", {"shots": 5}).source == Sinusoid(shots=5)
    digits = rl.family("few-shot-digits").source
    assert digits.tasks(KEY, 0, 2, "test")["support"]["observation"].shape == (3, 2, 3, 8, 8)
    assert len(digits._pools["train"][0]) == 16 and len(digits._pools["test"][0]) == 3
    assert rl.family("quadratics").source == Quadratics() and rl.family("digit-mlps").source == DigitMLPs()
    with pytest.raises(SettingError, match=r"family is Sinusoid.*expected a name; pass a family of your own to train"):
        rl.family(Sinusoid())
    with pytest.raises(UnknownNameError, match="unknown setting of sinusoid 'shot': did you mean shots"):
        rl.family("sinusoid", {"shot": 5})
    with pytest.raises(SettingError, match="Quadratics: dimensions is 0, expected at least 1"):
        rl.family("quadratics", {"dimensions": 0})
    with pytest.raises(SettingError, match="activation is 'swish', expected sigmoid, relu or tanh"):
        rl.family("digit-mlps", {"activation": "swish"})
    with pytest.raises(SettingError, match="shots is '5', expected as 10"):
        rl.family("sinusoid", {"shots": "5"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"fold": -1}, "fold is -1"), ({"size": 13}, "size is 13, expected a divisor of 28"), ({"size": 0}, "size is 0")],
)
def test_omniglots_settings_are_looked_at_before_its_data(settings, message, monkeypatch):
    monkeypatch.setenv("RLMETA_DATA", "/no/such/folder")
    with pytest.raises(SettingError, match=message):
        rl.family("few-shot-omniglot", settings)


@pytest.mark.skipif(data_folder() is None, reason="RLMETA_DATA names no folder with Omniglot")
def test_omniglots_folds_hold_every_alphabet_out_once():
    tested = []
    for fold in range(4):
        family = rl.family("few-shot-omniglot", {"fold": fold, "size": 14}).source
        sizes = {split: len(pool) for split, (pool, _) in family._pools.items()}
        assert sizes["train"] == 4 * len(family.classes["train"])
        members = [set(family.classes[split]) for split in ("train", "validation", "test")]
        assert sum(map(len, members)) == len(set.union(*members)) == len(set(family.labels.tolist()))
        tested += members[2]
        assert family.observation_space.shape == (14, 14) and family.observation_space.high.max() <= 1
        pictures = family.images.flatten(1)
        assert family.dropped == 0 and len(pictures.unique(dim=0)) == len(pictures) == 4840  # of 5,840 in two files
    assert len(tested) == len(set(tested)) == len(set.union(*members))
    with pytest.raises(SettingError, match="fold is 4, with 8 alphabets expected at most 3"):
        rl.family("few-shot-omniglot", {"fold": 4, "size": 14})
