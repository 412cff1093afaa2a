"""Streams: scenarios, orders of tasks, and worlds in which every learner has its own task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.data import splits
from rlmeta.data.samples import EVERYTHING, DataTask, DataWorld, Samples, shared_classes
from rlmeta.data.sets import Labelled, labelled
from rlmeta.envs import streams
from rlmeta.envs.names import names, read_toml
from rlmeta.errors import RlmetaError, SettingError
from rlmeta.functional.random import make_keys


def test_split_digits_in_the_three_scenarios():
    task, domain, klass = (rl.stream("split-digits", scenario=scenario) for scenario in ("task", "domain", "class"))
    assert task.reveals == {"boundaries", "train_id", "test_id"}
    assert domain.reveals == klass.reveals == {"boundaries", "train_id"}
    whole = labelled("digits")
    assert sum(len(part.train.target) for part in task.tasks) == len(whole.train.target)
    assert sum(len(part.test.target) for part in task.tasks) == len(whole.test.target)
    assert domain.world((2,), 4).action_space.n == 2 and klass.world((2,), 4).action_space.n == 10
    assert task.world((2,), 4).action_space.n == 10
    for i, (own, shared) in enumerate(zip(task.tasks, shared_classes(domain.tasks))):
        assert set(own.train.target.tolist()) == {2 * i, 2 * i + 1}
        assert set(shared.train.target.tolist()) == {0, 1} and shared.num_classes == 2
        assert torch.equal(own.train.target - 2 * i, shared.train.target)
    assert isinstance(klass.world((2,), 4), DataWorld)
    assert task.world((2,), 4).next_batch(task.world((2,), 4).reset(make_keys([0, 1])))[1]["allowed"].sum(-1).max() == 2
    assert not klass.world((2,), 4).initial_classes().any()


def test_permutations_keep_the_pixels_and_the_first_task_as_it_is():
    first, second = rl.stream("permuted-digits").tasks[:2]
    plain = labelled("digits").train.observation
    assert torch.equal(first.train.observation, plain)
    assert not torch.equal(second.train.observation, plain)
    assert torch.equal(second.train.observation.sort(-1).values, plain.sort(-1).values)


def test_rotations_turn_pictures_by_their_angle():
    data = labelled("digits")
    quarter = splits.rotate(data, 2, 180.0)[1]
    picture = data.test.observation[0].reshape(8, 8).numpy()
    turned = quarter.test.observation[0].reshape(8, 8).numpy().astype(int)
    gap = min(np.abs(turned - np.rot90(picture, k).astype(int)).max() for k in (1, 3))
    assert gap <= 1, "a quarter turn needs no interpolation"
    assert torch.equal(splits.rotate(data, 3)[0].test.observation, data.test.observation)


def test_a_task_can_have_samples_of_its_own():
    data = labelled("digits")
    first, second = (task.train.observation for task in splits.permute(data, 2, samples=100))
    assert first.shape == (100, 64)
    assert not torch.equal(first.sort(-1).values, second.sort(-1).values), "other samples, not only other pixels"


def test_orders():
    three = [rl.task("CartPole-v1", name=str(i), settings={"length": 0.5 + i}) for i in range(3)]
    assert streams.TaskStream("s", tuple(three)).orders() == ((0, 1, 2),)
    assert len(set(rl.stream(three, order="all").orders())) == 6
    drawn = rl.stream(three, order=4).orders()
    assert len(set(drawn)) == 4 and all(sorted(order) == [0, 1, 2] for order in drawn)
    assert drawn == rl.stream(three, order=4).orders()
    with pytest.raises(SettingError, match="3 tasks have only 6 orders"):
        rl.stream(three, order=7)
    with pytest.raises(SettingError, match="3,628,800 orders, more than 720"):
        rl.stream("permuted-digits", order="all")
    for order in (True, False, 0, 2.0, "given "):
        with pytest.raises(SettingError, match=f"order is {order!r}, expected given, all, or how many"):
            rl.stream(three, order=order)


def test_a_list_of_tasks_reveals_what_it_is_told():
    two = ["CartPole-v1", "cartpole-long-pole"]
    assert rl.stream(two).reveals == {"boundaries", "train_id", "test_id"}
    assert rl.stream(two, reveals=["train_id"]).reveals == {"train_id"}
    assert rl.stream(two, reveals=[]).reveals == set()
    named = rl.stream("split-digits", reveals=["boundaries"], scenario="class")
    assert named.reveals == {"boundaries"}
    with pytest.raises(SettingError, match="reveals is \\[1\\], expected a list of boundaries, test_id, train_id"):
        rl.stream(two, reveals=[1])
    with pytest.raises(RlmetaError, match="unknown thing to reveal 'boundary': did you mean boundaries"):
        rl.stream(two, reveals=["boundary"])
    with pytest.raises(SettingError, match=r"reveals is 'boundaries', expected a list such as \['boundaries'\]"):
        rl.stream(two, reveals="boundaries")


GROUPS = [[0, 1], [2, 3], [4, 5]]


def test_one_place_says_the_scenario():
    """The scenario of `split` need not be repeated for the stream, which cannot have another."""
    data, scenarios = labelled("digits"), ("task", "domain", "class")
    for declared in (None, *scenarios):
        tasks = splits.split(data, GROUPS, declared)
        assert rl.stream(tasks).scenario == (declared or "task")
        for other in scenarios:
            if declared in (None, other):
                stream, plain = rl.stream(tasks, scenario=other), rl.stream(splits.split(data, GROUPS), scenario=other)
                assert stream.reveals == plain.reveals == (EVERYTHING if other == "task" else EVERYTHING - {"test_id"})
                worlds = [problem.world((1,), 4) for problem in (stream, plain)]
                assert worlds[0].action_space == worlds[1].action_space
                assert torch.equal(worlds[0].table.train.target, worlds[1].table.train.target)
            else:
                with pytest.raises(
                    SettingError, match=f"split for the scenario '{declared}', but its stream's is '{other}'"
                ):
                    rl.stream(tasks, scenario=other)


@pytest.mark.parametrize(
    ("scenario", "reveals", "words"),
    [
        ("task", ["boundaries", "train_id"], "the scenario 'task' tells at test which task it is, but reveals leaves"),
        ("class", ["boundaries", "test_id"], "the scenario 'class' hides at test which task it is, but reveals has"),
        ("domain", ["test_id"], "the scenario 'domain' hides at test which task it is, but reveals has 'test_id'"),
    ],
)
def test_a_scenario_and_what_is_revealed_may_not_contradict(scenario, reveals, words):
    tasks = splits.split(labelled("digits"), GROUPS)
    for source in ("split-digits", tasks):
        with pytest.raises(SettingError, match=words):
            rl.stream(source, scenario=scenario, reveals=reveals)
    with pytest.raises(SettingError, match=words):
        streams.TaskStream("s", tuple(tasks), frozenset(reveals), scenario=scenario)


def test_what_can_be_no_stream_is_refused_by_a_sentence():
    data, x = labelled("digits"), torch.zeros(4, 2)
    numbers = DataTask("numbers", (x, x), (x, x))
    for source, options, words in (
        (data, {}, "a data set is no stream of tasks"),
        (list(data), {}, "stream 'stream' has a task of type Samples, expected DataTask"),
        (5, {}, "a stream of int, expected a name"),
        (numbers, {}, "a stream of DataTask, expected a name"),
        ([numbers], {"scenario": "class"}, "the scenario 'class' needs tasks with classes"),
        (["CartPole-v1"], {"scenario": "class"}, "scenario is for streams of samples"),
        (
            ["CartPole-v1"],
            {"reveals": [], "restart_optimizer": True},
            "restart_optimizer would show what reveals hides",
        ),
    ):
        with pytest.raises(SettingError, match=words):
            rl.stream(source, **options)
    for groups, words in (
        ([0, 1, 2], "expected groups of classes such as"),
        ("01", "expected groups of classes such as"),
        (["01"], "expected groups of classes such as"),
        ([[0, 1], []], "a group has no classes"),
        ([["0", "1"]], "expected groups of different classes of 0 to 9"),
        ([[True, False]], "expected groups of different classes of 0 to 9"),
    ):
        with pytest.raises(SettingError, match=words):
            splits.split(data, groups)
    with pytest.raises(SettingError, match="scenario is 'klass', expected one of task, domain, class"):
        splits.split(data, GROUPS, "klass")
    with pytest.raises(SettingError, match="groups of one size, these have 1 to 2"):
        splits.split(data, [[0, 1], [2]], "domain")
    oblong = Samples(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    for make, words in (
        (lambda: splits.permute(data, 0), "permute is 0, expected how many tasks"),
        (lambda: splits.permute(data, "3"), "permute is '3', expected how many tasks"),
        (lambda: splits.rotate(data, -1), "rotate is -1, expected how many tasks"),
        (lambda: splits.rotate(data, 2, float("nan")), "degrees is nan, expected a number"),
        (lambda: splits.permute(data, 2, samples=2.5), "samples is 2.5, expected 1 to the 1438"),
        (lambda: splits.split(tuple(data), GROUPS), r"data is a tuple, expected labelled\(NAME\)"),
        (lambda: splits.split(data._replace(num_classes=0), GROUPS), "num_classes is 0, expected how many"),
        (lambda: splits.split(data._replace(num_classes=9), [[0, 1]]), "target 9 is none of its classes"),
        (lambda: splits.rotate(Labelled(oblong, oblong, 10), 2), "are no pictures"),
    ):
        with pytest.raises(SettingError, match=words):
            make()


def test_pictures_of_any_shape_are_permuted_and_rotated_as_flat_ones_are():
    flat = labelled("digits")
    flat = Labelled(*(Samples(part.observation[:20], part.target[:20]) for part in flat[:2]), 10)
    for make in (splits.permute, splits.rotate):
        expected = make(flat, 3)[2].train.observation
        for shape in ((8, 8), (1, 8, 8)):
            shaped = Labelled(*(Samples(x.reshape(-1, *shape), y) for x, y in flat[:2]), 10)
            images = make(shaped, 3)[2].train.observation
            assert images.shape == (20, *shape) and torch.equal(images.flatten(1), expected)
    small = Labelled(*(Samples(x.float() / 255, y) for x, y in flat[:2]), 10)
    turned = splits.rotate(small, 3)[2].train.observation
    assert turned.dtype == torch.float32 and ((turned > 0.01) & (turned < 0.99)).any(), "floats are not rounded"


@pytest.mark.parametrize(
    ("reveals", "method", "words"),
    [
        (["train_id", "test_id"], rl.EWC(), "ewc needs to know when a task ends"),
        (["boundaries", "test_id"], rl.PackNet(), "packnet needs to know which task it trains on"),
        (["boundaries", "train_id"], rl.PackNet(), "packnet needs to know which task it is tested on"),
    ],
)
def test_a_method_that_needs_what_a_stream_hides_is_refused(reveals, method, words):
    for stream in (rl.stream(["CartPole-v1"] * 2, reveals=reveals), rl.stream("cartpole-conflicts", reveals=reveals)):
        with pytest.raises(SettingError, match=f"{words}, which the stream '{stream.name}' hides"):
            rl.train(rl.PPO(), stream, steps=32, lifelong=[method])


def test_lifelong_methods_are_refused_on_a_plain_task():
    for settings, problem in ((rl.PPO(), "CartPole-v1"), (rl.MAML(), "sinusoid")):
        with pytest.raises(SettingError, match=f"lifelong methods are for streams of tasks, '{problem}' is none"):
            rl.train(settings, problem, steps=32, lifelong=[rl.EWC()])


def test_native_tasks_may_differ_from_learner_to_learner():
    stream = rl.stream("cartpole-conflicts")
    world, keys = stream.world((4,), 2), make_keys([5, 6, 7, 8])
    world.select(torch.tensor([0, 1, 2, 3]))
    state, action = world.reset(keys), torch.ones(4, 2, dtype=torch.int64)
    for _ in range(30):
        state, transition = world.step(state, action)
    for i, task in enumerate(stream.tasks):
        alone = task.world((1,), 2)
        own = alone.reset(keys[i : i + 1])
        for _ in range(30):
            own, expected = alone.step(own, action[:1])
        assert torch.equal(transition.observation[i, ..., :4], expected.observation[0])
    assert transition.observation[0, 0, 1] * transition.observation[1, 0, 1] < 0, "the push is reversed"


def test_the_task_stands_at_the_end_of_an_observation():
    tasks = rl.stream("cartpole-conflicts")
    world, plain = (dataclasses.replace(tasks, observe_identity=shown).world((2,), 3) for shown in (True, False))
    assert world.observation_space.shape == (8,) and plain.observation_space.shape == (4,)
    assert world.observation_space.contains(np.zeros(8, np.float32))
    identity, keys, action = torch.tensor([2, 0]), make_keys([5, 6]), torch.ones(2, 3, dtype=torch.int64)
    for either in (world, plain):
        either.select(identity)
    state, other = world.reset(keys), plain.reset(keys)
    expected = torch.eye(4)[identity].unsqueeze(1).expand(2, 3, 4)
    for _ in range(60):  # episodes end
        assert torch.equal(world.observation(state)[..., 4:], expected)
        (state, seen), (other, bare) = world.step(state, action), plain.step(other, action)
        for name in ("observation", "next_observation"):
            assert torch.equal(getattr(seen, name)[..., :4], getattr(bare, name))
            assert torch.equal(getattr(seen, name)[..., 4:], expected)


def test_steps_of_a_stream_with_numbers_drawn_ahead():
    """Steps as in a recorded program, with a task of its own for every learner."""
    world, action = rl.stream("cartpole-conflicts").world((4,), 2), torch.ones(4, 2, dtype=torch.int64)
    world.select(torch.arange(4))
    state = other = world.reset(make_keys([5, 6, 7, 8]))
    for _ in range(40):
        noise, left = world.predraw_noise(state)
        state, seen = world.step(state, action, noise)
        other, expected = world.step(other, action)
        assert left > 0 and all(torch.equal(a, b) for a, b in zip(seen, expected))


def test_an_identity_that_is_hidden_or_has_no_place_is_refused():
    tasks = rl.stream("cartpole-conflicts").tasks
    with pytest.raises(SettingError, match="observe_identity shows what reveals hides"):
        streams.TaskStream("s", tasks, frozenset({"boundaries", "train_id"}), observe_identity=True)
    with pytest.raises(SettingError, match="for tasks to act in, not for samples"):
        dataclasses.replace(rl.stream("split-digits"), observe_identity=True)
    assert not rl.stream("cartpole-conflicts", observe_identity=False).observe_identity
    assert not rl.stream("cartpole-conflicts", reveals=["boundaries"]).observe_identity
    with pytest.raises(SettingError, match="observe_identity shows what reveals hides"):
        rl.stream("cartpole-conflicts", reveals=["boundaries"], observe_identity=True)
    with pytest.raises(SettingError, match="observations that are vectors of floats, not Discrete"):
        rl.stream(["FrozenLake-v1", "FrozenLake-v1"], observe_identity=True).world((1,), 1)
    assert rl.stream(["CartPole-v1"] * 2, observe_identity=True).world((1,), 1).observation_space.shape == (6,)


def test_other_environments_stand_side_by_side_in_one_order():
    stream = rl.stream([rl.task("CartPole-v1", native=False), rl.task("CartPole-v1", name="other", native=False)])
    world = stream.world((2,), 1)
    world.select(torch.tensor([1, 1]))
    state = world.reset(make_keys([0, 1]))
    assert world.step(state, torch.zeros(2, 1, dtype=torch.int64))[1].reward.shape == (2, 1)
    with pytest.raises(SettingError, match="orders of tasks as learners need native tasks"):
        world.select(torch.tensor([0, 1]))
    world.close()
    with pytest.raises(SettingError, match="orders of tasks as learners need native tasks"):
        dataclasses.replace(stream, order=2)
    with pytest.raises(SettingError, match="tasks of a stream need the same"):
        rl.stream(["CartPole-v1", "MountainCar-v0"]).world((1,), 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "stream", "data": "digits"}, "data with one of split, permute and rotate"),
        ({"kind": "stream", "data": "digits", "split": [[0, 1], [1, 2]]}, "groups of different classes"),
        ({"kind": "stream", "data": "digits", "split": [[0], [1, 2]], "scenario": "domain"}, "groups of one size"),
        ({"kind": "stream", "data": "digit", "split": [[0]]}, "did you mean digits"),
        ({"kind": "stream", "data": "digits", "permute": 2, "samples": 9999}, "expected 1 to the 1438"),
        ({"kind": "stream", "tasks": ["CartPole-v1"], "reveal": []}, "did you mean reveals"),
        ({"kind": "task", "env": "CartPole-v1"}, "expected a stream of tasks"),
    ],
)
def test_wrong_tables_are_refused(table, message):
    with pytest.raises(RlmetaError, match=message):
        streams.from_table("mine", table)


def test_streams_say_how_to_make_them_again():
    from rlmeta.runs.configuration import problem_again

    for stream in (
        rl.stream("split-digits", scenario="class", order=3),
        rl.stream("cartpole-conflicts", order="all"),
        rl.stream(["CartPole-v1", "cartpole-long-pole"], name="two"),
        rl.stream(["CartPole-v1", "cartpole-long-pole"], name="two", reveals=["train_id"]),
        rl.stream("cartpole-conflicts", reveals=["boundaries"]),
        rl.stream("split-digits", reveals=[], scenario="domain"),
        rl.stream("split-digits", restart_optimizer=False),
        rl.stream(["CartPole-v1", "cartpole-long-pole"], name="two", restart_optimizer=False),
        rl.stream(["CartPole-v1", "cartpole-long-pole"], name="two", observe_identity=True),
    ):
        again = problem_again(stream.describe(), None, "here")
        assert again.orders() == stream.orders() and again.scenario == stream.scenario
        assert [task.name for task in again.tasks] == [task.name for task in stream.tasks]
        assert again.reveals == stream.reveals and again.restarts == stream.restarts
        assert dataclasses.replace(again, tasks=stream.tasks, table=stream.table) == stream


def test_every_shipped_stream_of_embedded_data_can_be_made():
    with_digits = [name for name, path in names("envs").items() if read_toml(path).get("data") == "digits"]
    assert set(with_digits) >= {"split-digits", "permuted-digits", "rotated-digits"}
    for name in with_digits:
        assert len(rl.stream(name)) >= 5
