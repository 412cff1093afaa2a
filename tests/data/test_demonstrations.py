"""Demonstrations: what they give, the file, what is refused; recorded from runs on native and gymnasium tasks."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as decode
from safetensors.torch import save_file

import rlmeta as rl
from rlmeta.data.demonstrations import Demonstrations, join
from rlmeta.errors import DemonstrationError, SettingError
from rlmeta.functional import tree
from rlmeta.runs.record_demonstrations import record
from tests.agents.worlds import Target

BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
NESTED = gym.spaces.Dict(
    {
        "image": gym.spaces.Box(0, 255, (2, 3), np.uint8),
        "more": gym.spaces.Tuple((gym.spaces.MultiBinary(2), gym.spaces.MultiDiscrete([2, 3]))),
    }
)


def make(episode_lengths: tuple[int, ...] = (3, 1, 2), space: gym.Space = BOX, **changed: Any) -> Demonstrations:
    """Episodes whose observations are numbered, with actions 0, 1, 2, 0, ..."""
    steps, episodes = sum(episode_lengths), len(episode_lengths)
    observation: Any = torch.arange(2 * (steps + episodes)).reshape(-1, 2).float()
    if space is NESTED:
        rows = steps + episodes
        observation = {
            "image": torch.arange(rows * 6).reshape(rows, 2, 3).to(torch.uint8),
            "more": {"0": torch.ones(rows, 2, dtype=torch.int64), "1": torch.zeros(rows, 2, dtype=torch.int64)},
        }
    given = {
        "observation": observation,
        "action": torch.arange(steps) % 3,
        "reward": torch.arange(steps).float(),
        "lengths": torch.tensor(episode_lengths),
        "terminated": torch.arange(episodes) % 2 == 0,
        "truncated": torch.arange(episodes) % 2 == 1,
        "observation_space": space,
        "action_space": gym.spaces.Discrete(3),
        "about": {"who": "a test"},
    }
    return Demonstrations(**{**given, **changed})


def assert_equal(one: Demonstrations, two: Demonstrations) -> None:
    first, second = tree.flatten(one._tensors()), tree.flatten(two._tensors())
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        assert torch.equal(leaf, second[name]) and leaf.dtype == second[name].dtype, name
    assert (one.observation_space, one.action_space) == (two.observation_space, two.action_space)
    assert one.about == two.about and one.digest == two.digest


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_transitions_never_cross_an_episode(lengths):
    made = make(tuple(lengths))
    steps = made.transitions()
    at, row = 0, 0
    for episode, length in enumerate(lengths):
        for t in range(length):
            assert torch.equal(steps["observation"][at], made.observation[row + t])
            assert torch.equal(steps["next_observation"][at], made.observation[row + t + 1])
            last = t == length - 1
            assert bool(steps["terminated"][at]) == (last and episode % 2 == 0)
            assert bool(steps["truncated"][at]) == (last and episode % 2 == 1)
            at += 1
        row += length + 1
    assert made.steps == at == sum(lengths) and len(made) == len(lengths)
    assert made.returns.sum() == made.reward.sum() and len(made.returns) == len(lengths)


@pytest.mark.parametrize("space", [BOX, NESTED, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)], ids=str)
def test_saved_and_loaded_are_equal(space, tmp_path):
    made = make(space=space)
    path = made.save(tmp_path / "deep" / "demo.safetensors")
    loaded = Demonstrations.load(path)
    assert_equal(made, loaded)
    assert loaded.path == str(path)
    assert decode(path.read_bytes()).keys() == tree.flatten(made._tensors()).keys()  # any reader of safetensors
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "action_space",
    [gym.spaces.Discrete(3, start=5), gym.spaces.MultiDiscrete([3, 4]), gym.spaces.MultiBinary(2),
     gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, np.inf], np.float32)),
     gym.spaces.Box(0, 1, (2,))],
    ids=str,
)  # fmt: skip
def test_every_action_space_comes_back(action_space, tmp_path):
    shape, real = action_space.shape, isinstance(action_space, gym.spaces.Box)
    action = torch.ones(6, *shape) if real else torch.ones(6, *shape, dtype=torch.int64)
    made = make(action=action, action_space=action_space)
    assert_equal(made, Demonstrations.load(made.save(tmp_path / "demo")))


def test_the_first_episodes_and_joined_ones():
    made = make()
    two = made.first(2)
    assert two.lengths.tolist() == [3, 1] and two.steps == 4 and len(two.observation) == 6
    assert torch.equal(two.transitions()["next_observation"], made.transitions()["next_observation"][:4])
    both = join([two, made])
    assert both.lengths.tolist() == [3, 1, 3, 1, 2]
    assert torch.equal(both.transitions()["observation"][4:], made.transitions()["observation"])
    assert both.about == {"joined": [{"who": "a test"}] * 2}
    assert join([made]).about == made.about
    with pytest.raises(DemonstrationError, match="no demonstrations to join"):
        join([])
    with pytest.raises(DemonstrationError, match="have observation space"):
        join([made, make(space=NESTED)])
    with pytest.raises(DemonstrationError, match="4 episodes of demonstrations asked for, expected 1 to 3"):
        made.first(4)
    with pytest.raises(DemonstrationError, match="expected 1 to 3"):
        made.first(0)


def test_shuffled_keeps_the_numbers_and_no_place_of_any():
    made = make((40, 20))
    control = made.shuffled()
    assert torch.equal(control.observation.flatten().sort().values, made.observation.flatten().sort().values)
    assert (control.observation == made.observation).float().mean() < 0.1
    assert not torch.equal(control.observation[:, 0].sort().values, made.observation[:, 0].sort().values)
    nested = make((40, 20), space=NESTED).shuffled()
    assert not torch.equal(nested.observation["image"], make((40, 20), space=NESTED).observation["image"])
    assert not torch.equal(control.action, made.action)
    assert torch.equal(control.action.sort().values, made.action.sort().values)
    assert torch.equal(control.action, made.shuffled().action)
    assert not torch.equal(control.action, made.shuffled(1).action)
    assert control.digest != made.digest


NAN = torch.full((9, 2), float("nan"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": torch.tensor([], dtype=torch.int64)}, "without an episode"),
        ({"lengths": torch.tensor([3, 0, 3])}, r"episodes \[1\].* are empty"),
        ({"lengths": torch.tensor([3, 1, 3])}, "have 9 rows of observation, expected 10 for 3 episodes of 7 steps"),
        ({"action": torch.zeros(5, dtype=torch.int64)}, "have 5 rows of action, expected 6"),
        ({"reward": torch.zeros(7)}, "have 7 rows of reward, expected 6"),
        ({"terminated": torch.ones(2, dtype=torch.bool)}, "have 2 rows of terminated, expected 3"),
        ({"terminated": torch.zeros(3, dtype=torch.bool)}, r"episodes \[0, 2\].* are cut"),
        ({"observation": NAN}, r"observation of the demonstrations is not finite \(row 0\)"),
        ({"reward": torch.tensor([0, 0, 0, 0, torch.inf, 0])}, r"reward .* not finite \(row 4\)"),
        ({"observation": torch.zeros(9, 3)}, r"observation of the demonstrations has shape \(3,\)"),
        ({"action": torch.full((6,), 3)}, r"action of the demonstrations holds int64 from 3 to 3.*Discrete\(3\)"),
        ({"action": torch.zeros(6)}, "action of the demonstrations holds float32"),
        ({"observation": {"a": torch.zeros(9, 2)}}, "observation of the demonstrations has shape missing"),
        ({"action": torch.tensor(0)}, "action of the demonstrations is a single number"),
        (
            {"reward": torch.zeros(6, 1)},
            r"reward of the demonstrations has shape \(6, 1\), expected one number for every step",
        ),
        ({"terminated": torch.ones(3, 1) > 0}, r"terminated .* shape \(3, 1\), expected one number for every episode"),
        ({"lengths": np.array([3, 1, 2])}, "lengths of the demonstrations is ndarray, expected a tensor"),
        ({"reward": [0.0] * 6}, "reward of the demonstrations is list, expected a tensor"),
    ],
)
def test_broken_demonstrations_are_refused(changed, message):
    with pytest.raises(DemonstrationError, match=message):
        make(**changed)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "role"),
    [
        (gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(3), "observation"),
        (gym.spaces.Dict({"a": BOX}), gym.spaces.Discrete(3), "observation"),
        (BOX, gym.spaces.Discrete(2), "action"),
        (BOX, gym.spaces.Box(-1, 1, ()), "action"),
        (BOX, gym.spaces.MultiDiscrete([3]), "action"),
    ],
)
def test_another_tasks_spaces_are_refused(observation_space, action_space, role):
    with pytest.raises(DemonstrationError, match=f"have {role} space"):
        make().check(observation_space, action_space)
    make().check(gym.spaces.Box(-5, 5, (2,), np.float32), gym.spaces.Discrete(3))  # bounds may differ


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(DemonstrationError, match="rlmeta record RUN"):
        Demonstrations.load(tmp_path / "none")
    path = make().save(tmp_path / "demo")
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-8]):
        path.write_bytes(content)
        with pytest.raises(DemonstrationError, match="damaged or no file of demonstrations"):
            Demonstrations.load(path)
    at = whole.index(make().observation[3:5].numpy().tobytes())
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])  # one bit of a number: all else still fits
    with pytest.raises(DemonstrationError, match="its checksum is wrong"):
        Demonstrations.load(path)
    save_file({"action": torch.zeros(3)}, path)
    with pytest.raises(DemonstrationError, match="no demonstrations"):
        Demonstrations.load(path)
    save_file({"action": torch.zeros(3)}, path, {"demonstrations": '{"format": "rlmeta demonstrations 1"}'})
    with pytest.raises(DemonstrationError, match="damaged"):
        Demonstrations.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rlmeta demonstrations 1", "rlmeta demonstrations 9", "says it is 'rlmeta demonstrations 9'"),
        ('"kind": "Box"', '"kind": "Bxx"', "Bxx"),
        ('"shape": [2]', '"shape": [7]', "damaged"),
        ('"float32"', '"flxxt32"', "damaged"),
        ('"n": 3', '"n":-3', "damaged"),
    ],
)
def test_a_header_that_says_something_else_is_refused(old, new, message, tmp_path):
    bounds = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 9.0], np.float32))
    path = make(space=bounds).save(tmp_path / "demo")
    whole = path.read_bytes()
    old, new = (json.dumps(text)[1:-1].encode() for text in (old, new))  # JSON within JSON
    assert whole.count(old)
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(DemonstrationError, match=message):
        Demonstrations.load(path)


@pytest.mark.parametrize("name", ["about", "observation_space", "digest", "sha256"])
def test_no_changed_word_of_a_header_goes_unnoticed(name, tmp_path):
    path = make(about={"agent": "ppo", 3: (1.5, float("inf"))}).save(tmp_path / "demo")
    assert Demonstrations.load(path).about == {"agent": "ppo", "3": [1.5, float("inf")]}
    tensors = decode(path.read_bytes())
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["demonstrations"])
    bounds = {**header["observation_space"], "high": "0.5"}
    others = {"about": {"agent": "dqn"}, "observation_space": bounds, "digest": "0" * 16, "sha256": "0" * 64}
    without = {other: value for other, value in header.items() if other != name}
    for changed in ({**header, name: others[name]}, without):
        save_file(tensors, path, {"demonstrations": json.dumps(changed)})
        with pytest.raises(DemonstrationError, match="damaged"):
            Demonstrations.load(path)


@pytest.mark.parametrize(
    ("role", "space"),
    [
        ("observation", {"kind": "Box", "shape": [10**9, 10**9], "dtype": "float32", "low": "-1.0", "high": "1.0"}),
        ("observation", {"kind": "Box", "shape": 10**15, "dtype": "float32", "low": "-1.0", "high": "1.0"}),
        ("observation", {"kind": "Box", "shape": [2], "dtype": "V999999999999", "low": "-1.0", "high": "1.0"}),
        ("observation", {"kind": "MultiBinary", "n": [10**9, 10**9]}),
        ("action", {"kind": "MultiBinary", "n": 10**15}),
        ("action", {"kind": "Discrete", "n": 10**30, "start": 0}),
        ("action", {"kind": "Discrete", "n": 3, "start": 10**30}),
        ("action", {"kind": "MultiDiscrete", "nvec": [10**30], "start": [0]}),
        ("action", {"kind": "MultiDiscrete", "nvec": [10**18] * 2, "start": [0, 0]}),
        ("action", {"kind": "Dict", "spaces": {"a": {"kind": "MultiBinary", "n": 10**15}}}),
        ("action", {"kind": "Tuple", "spaces": [{"kind": "MultiBinary", "n": 10**15}]}),
    ],
)
def test_a_header_cannot_claim_a_size_that_the_tensors_have_not(role, space, tmp_path):
    path = make().save(tmp_path / "demo")
    tensors = decode(path.read_bytes())
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["demonstrations"])
    for nested in (space, {"kind": "Dict", "spaces": {"b": space}}):
        save_file(tensors, path, {"demonstrations": json.dumps({**header, f"{role}_space": nested})})
        with pytest.raises(DemonstrationError):
            Demonstrations.load(path)


def test_rows_of_no_numbers_cannot_claim_any_number_of_steps(tmp_path):
    """They take no room in the file, and everything that is made of them afterwards would."""
    none, steps = {"kind": "Box", "shape": [0], "dtype": "float32", "low": "-1.0", "high": "1.0"}, 10**11
    header = {"format": "rlmeta demonstrations 1", "observation_space": none, "action_space": none, "about": {}}
    empty = {"observation": [steps + 1, 0], "action": [steps, 0], "reward": [steps, 0]}
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in empty.items()}
    entries["lengths"] = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    for at, name in enumerate(("terminated", "truncated"), 8):
        entries[name] = {"dtype": "BOOL", "shape": [1], "data_offsets": [at, at + 1]}
    text = json.dumps({"__metadata__": {"demonstrations": json.dumps(header)}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "demo"
    path.write_bytes(len(text).to_bytes(8, "little") + text + steps.to_bytes(8, "little") + b"\1\0")
    with pytest.raises(DemonstrationError, match=r"reward of the demonstrations.* has shape \(100000000000, 0\)"):
        Demonstrations.load(path)


def test_nothing_is_written_through_a_link_beside_the_file(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "demo.tmp").symlink_to(tmp_path / "outside")
    assert_equal(Demonstrations.load(make().save(tmp_path / "demo")), make())
    assert (tmp_path / "outside").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "outside"]


def test_a_header_of_endless_depth_and_lengths_that_overflow_are_refused(tmp_path):
    path = make().save(tmp_path / "demo")
    tensors = decode(path.read_bytes())
    with safe_open(path, "pt") as file:
        header = file.metadata()["demonstrations"]
    save_file(tensors, path, {"demonstrations": "[" * 200_000})
    with pytest.raises(DemonstrationError, match="damaged or no file"):
        Demonstrations.load(path)
    claimed = json.dumps({**json.loads(header), "observation_space": "here"})
    for depth in (300, 1000, 100_000):
        deep = '{"kind": "Tuple", "spaces": [' * depth + "1" + "]}" * depth
        save_file(tensors, path, {"demonstrations": claimed.replace('"here"', deep)})
        with pytest.raises(DemonstrationError, match="damaged"):
            Demonstrations.load(path)
    tensors["lengths"] = torch.tensor([2**62, 2**62, 6 - 2**63])
    save_file(tensors, path, {"demonstrations": header})
    with pytest.raises(DemonstrationError):
        Demonstrations.load(path)
    tensors["lengths"] = torch.tensor([2**63 - 1, 2**63 - 1, 8])  # which sum to 6
    save_file(tensors, path, {"demonstrations": header})
    with pytest.raises(DemonstrationError, match="expected whole numbers up to the 6 steps"):
        Demonstrations.load(path)
    with pytest.raises(DemonstrationError, match=r"lengths of the demonstrations are torch\.float32"):
        make(lengths=torch.tensor([3.0, 1.0, 2.0]))


def _dict_of(names):
    """A space whose entries stand in this order, and observations of it."""
    parts = {"zeta": gym.spaces.Box(-1, 1, (2,)), "alpha": gym.spaces.Discrete(3), "mid": gym.spaces.Box(-9, 9, (1,))}
    rows = {"zeta": torch.zeros(9, 2), "alpha": torch.arange(9) % 3, "mid": torch.arange(9.0).reshape(9, 1) / 2}
    space = gym.spaces.Dict(**{name: parts[name] for name in names})
    assert list(space.spaces) == names  # not sorted, as those that are read from a file
    return space, {name: rows[name] for name in names}


def test_the_order_of_a_dicts_keys_does_not_matter(tmp_path):
    first, seen = _dict_of(["zeta", "mid", "alpha"])
    second, other = _dict_of(["alpha", "zeta", "mid"])
    one, two = make(space=first, observation=seen), make(space=second, observation=other)
    loaded = Demonstrations.load(one.save(tmp_path / "demo"))
    assert one.digest == two.digest == loaded.digest
    for made in (one, two, loaded):
        for space in (first, second):
            made.check(space, gym.spaces.Discrete(3))
        assert join([one, made]).steps == 12
    for name in ("zeta", "mid", "alpha"):
        assert torch.equal(one.shuffled().observation[name], two.shuffled().observation[name])
    with pytest.raises(DemonstrationError, match="have observation space"):
        one.check(gym.spaces.Dict(**{**first.spaces, "mid": gym.spaces.Box(-9, 9, (2,))}), gym.spaces.Discrete(3))


def test_bytes_are_not_taken_for_numbers():
    pictures = make(observation=torch.zeros(9, 2, dtype=torch.uint8), space=gym.spaces.Box(0, 255, (2,), np.uint8))
    pictures.check(gym.spaces.Box(0, 9, (2,), np.uint8), gym.spaces.Discrete(3))
    with pytest.raises(DemonstrationError, match="have observation space"):
        pictures.check(gym.spaces.Box(0, 255, (2,), np.float32), gym.spaces.Discrete(3))


class TwoParts(gym.Env):
    """Shows a Dict whose keys stand in a given order; the action is counted from 1."""

    def __init__(self, names):
        shapes = {"zeta": (2,), "alpha": (3,)}
        self.observation_space = gym.spaces.Dict(**{name: gym.spaces.Box(-1, 1, shapes[name]) for name in names})
        self.action_space = gym.spaces.Discrete(2, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action):
        assert action in (1, 2)
        self.count += 1
        return self._observe(), float(action == 1), False, self.count >= 6, {}

    def _observe(self):
        drawn = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        shown = {"zeta": np.full(2, self.count / 9, np.float32), "alpha": drawn}
        return {name: shown[name] for name in self.observation_space.spaces}


def test_runs_do_not_depend_on_the_order_of_a_dicts_keys(tmp_path):
    """Training, its file of demonstrations, cloning from it: bit for bit."""
    found = []
    for names in (["zeta", "alpha"], ["alpha", "zeta"]):
        task = rl.task(partial(TwoParts, names), name="two-parts")
        run = rl.train(rl.PPO(num_envs=2, num_steps=8, batch_size=8, hidden_sizes=(8,)), task, seeds=2, budget=TINY)
        path = record(run, 4).save(tmp_path / names[0])
        settings = rl.BehaviourCloning(demonstrations=str(path), hidden_sizes=(8,), normalise_observation=False)
        clone = rl.train(settings, task, seeds=2, budget=TINY)
        found.append([dict(one.state["params"]["weights"]) for one in (run, clone)])
    for first, second in zip(*found):
        assert first.keys() == second.keys()
        assert all(torch.equal(leaf, second[name]) for name, leaf in first.items())


def test_what_is_neither_a_file_nor_demonstrations_is_refused():
    with pytest.raises(DemonstrationError, match="demonstrations are 5, expected the name of a file"):
        rl.train(rl.BehaviourCloning(demonstrations=5), "CartPole-v1", steps=50, progress=False)


# ------------------------------------------------------------------------------------------------------- recorded

TINY = rl.Budget(steps=64, eval_every=32, eval_episodes=2, final_episodes=2)


def tiny(problem: Any, **settings: Any) -> rl.Run:
    return rl.train(rl.A2C(num_envs=2, hidden_sizes=(8,), **settings), problem, seeds=3, budget=TINY)


def test_a_recording_replays_in_the_environment_itself():
    run = tiny("CartPole-v1")
    made = record(run, 5, learner=1, deterministic=False)
    assert len(made) == 5 and made.about["learner"] == 1
    made.check(run.world.observation_space, run.world.action_space)
    steps = made.transitions()
    env = rl.task("CartPole-v1").source
    state = {"state": steps["observation"].double()}
    state, reward, terminated = env.step(state, steps["action"], torch.empty(made.steps, 0), {})
    torch.testing.assert_close(env.observe(state), steps["next_observation"], rtol=1e-5, atol=1e-6)
    assert torch.equal(reward, made.reward) and torch.equal(terminated, steps["terminated"])
    assert torch.equal(made.returns, made.lengths.double())


def test_learners_parameters_and_seeds_of_a_recording_are_what_was_asked_for():
    run = tiny("CartPole-v1")
    assert_equal(record(run, 2, learner=0), record(run, 2, learner=0))
    assert record(run, 2, learner=0).digest != record(run, 2, learner=0, seed=1).digest
    chosen = int(run.scores.argmax())
    assert record(run, 2).about["learner"] == chosen
    best = record(run, 2, learner=0, best=True)
    run.state["best"]["params"]["weights"] = tree.map(torch.zeros_like, run.state["best"]["params"]["weights"])
    zero = record(run, 2, learner=0, best=True)
    assert best.digest != zero.digest and not zero.action.any()
    with pytest.raises(SettingError, match="learners 0 to 2"):
        record(run, 2, learner=3)
    del run.state["best"]
    with pytest.raises(SettingError, match="no best parameters"):
        record(run, 2, best=True)


@pytest.mark.parametrize("kind", ["discrete", "shifted", "multidiscrete", "box"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_gymnasiums_tasks_are_recorded_as_they_are(kind, as_dict, tmp_path):
    run = tiny(rl.task(partial(Target, kind, as_dict=as_dict), name="target"))
    made = record(run, 6, deterministic=False)
    assert made.lengths.tolist() == [1] * 6 and made.terminated.all()
    if kind == "box":
        assert made.action.abs().max() <= 1  # as the environment took it
    assert_equal(made, Demonstrations.load(made.save(tmp_path / "demo")))
