"""`rlmeta check`: every fault is one line with its topic, and what is right has none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.envs.check import Finding, check
from rlmeta.envs.native import NATIVE, CartPole, Physics, PointReach
from rlmeta.envs.world import State
from rlmeta.errors import MissingExtraError, UnknownNameError
from tests.envs.bad_environment import Bad

STEPS = 120


class Fine(gym.Env[Any, Any]):
    """Environment without a fault; each of the others has one."""

    observation_space: gym.Space[Any] = spaces.Box(-1, 1, (2,), np.float32)
    action_space: gym.Space[Any] = spaces.Box(-1, 1, (2,), np.float32)
    limit = 20

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.place = np.clip(self.place + 0.1 * action, -1, 1).astype(np.float32)
        return self.place.copy(), float(-np.abs(self.place).sum()), False, self.time >= self.limit, {}


class Unseeded(Fine):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.random.uniform(-1, 1, 2).astype(np.float32)
        return self.place.copy(), {}


class Outlives(Fine):
    episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        shown = super().reset(seed=seed)
        self.episodes += 1
        return np.float32(shown[0] / self.episodes), shown[1]


class Constant(Fine):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.zeros(2, np.float32)
        return self.place.copy(), {}


class WritesAction(Fine):
    def step(self, action: Any) -> Any:
        result = super().step(action)
        action *= 0
        return result


class WritesObservation(Fine):
    def step(self, action: Any) -> Any:
        _, *rest = super().step(action)
        return (self.place, *rest)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.place, {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "place" and hasattr(self, "place"):
            self.place[:] = value
        else:
            super().__setattr__(name, value)


class Endless(Fine):
    limit = 10**9


class Terminates(Fine):
    def step(self, action: Any) -> Any:
        observation, reward, _, over, info = super().step(action)
        return observation, reward, over, False, info


class Wide(Fine):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        observation, info = super().reset(seed=seed)
        return observation + np.float32(5), info


class Unbounded(Fine):
    action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class FailsAtBound(Fine):
    def step(self, action: Any) -> Any:
        if (np.abs(action) == 1).all():
            raise ValueError("too far")
        return super().step(action)


class NanAtBound(Fine):
    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        return (observation * np.nan if (np.abs(action) == 1).any() else observation, *rest)


class SeedsNumpy(Fine):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        np.random.seed(seed)
        return super().reset(seed=seed)


FAULTS: dict[Any, str] = {
    Unseeded: "wrong: seeding: two environments with seed 0",
    Outlives: "wrong: seeding: after an episode reset",
    Constant: "note: seeding: four seeds gave the same episode",
    WritesAction: r"wrong: contract: step\(\) writes into the action",
    WritesObservation: r"note: contract: step\(\) writes into the observation",
    Endless: "wrong: time limit: no episode ended in 120 steps",
    Terminates: "note: time limit: all 6 episodes terminated after 20 steps",
    Wide: r"wrong: spaces: reset\(\) returned an observation outside of its space",
    Unbounded: "note: action bounds: the actions .* have no bounds",
    FailsAtBound: "wrong: action bounds: step.* failed with ValueError: too far",
    NanAtBound: "wrong: action bounds: the action .* gave an observation with NaN",
    SeedsNumpy: r"note: seeding: reset\(\) changes the generator of numpy",
}
STEP_FAULTS = {
    "NaN observation": r"wrong: not finite: step\(\) returned an observation",
    "infinite reward": r"wrong: not finite: step\(\) returned the reward",
    "no flag": r"wrong: contract: step\(\) returned terminated=None",
    "no info": r"wrong: contract: step\(\) returned the info None",
    "text for a reward": r"wrong: contract: step\(\) returned the reward '1'",
    "four values": r"wrong: contract: step\(\) returned tuple, expected gymnasium's 5",
    "other shape": r"wrong: contract: .*observation of shape \(4,\)",
    "raises": "wrong: contract: .* failed with RuntimeError: the wheel came off",
    "outside of the space": "wrong: spaces: .* outside of its space",
    "both flags": "note: time limit: an episode was terminated and truncated",
    "raises in reset": "wrong: contract: .*no way back",
}


def lines(source: Any, **settings: Any) -> list[str]:
    return [str(finding) for finding in check(rl.task(source, **settings), STEPS)]


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert lines(Fine) == []
    for name in ("CartPole-v1", "Pendulum-v1", "FrozenLake-v1"):
        assert lines(name, native=False) == [], name


@pytest.mark.parametrize("cls", FAULTS, ids=lambda cls: cls.__name__)
def test_a_fault_is_one_line(cls: type[Fine]) -> None:
    found = lines(cls)
    assert any(re.match(FAULTS[cls], line) for line in found), found
    assert len(found) == len(set(found)) <= 3 and not any("\n" in line for line in found)


@pytest.mark.parametrize("kind", STEP_FAULTS)
def test_a_faulty_step_is_named(kind: str) -> None:
    found = lines(lambda: Bad(kind, begins=3))
    assert any(re.match(STEP_FAULTS[kind], line) for line in found), found


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_environments_pass(name: str) -> None:
    found = check(rl.task(name), 40)
    # there are more steps to an end than 40
    assert [finding for finding in found if finding.wrong and finding.topic != "time limit"] == []


def _mixes(new: State, observation: Tensor) -> Tensor:
    return observation + 1e-3 * observation.mean()


def _nan(new: State, observation: Tensor) -> Tensor:
    return torch.where(observation > 0, torch.nan, observation)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [(_mixes, "goes another way alone"), (_nan, "NaN or infinity"), (lambda _, x: x[..., :2], "expected")],
)
def test_faults_of_native_environments(spoil: Callable[[State, Tensor], Tensor], match: str) -> None:
    class Faulty(CartPole):
        def observe(self, state: State) -> Tensor:
            return spoil(state, super().observe(state))

    assert any(match in line for line in lines(Faulty()))


def test_a_native_environment_that_writes_into_its_state() -> None:
    class Writes(CartPole):
        def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
            new, *rest = super().step(state, action, noise, physics)
            state["state"].zero_()
            return (new, *rest)  # type: ignore[return-value]

    assert any("writes into the state" in line for line in lines(Writes()))


class Pays(Fine):
    """A goal on a line that pays the distance; `cost` is paid by the step alone, `one` takes one goal at a time."""

    observation_space = spaces.Dict(
        dict.fromkeys(("observation", "achieved_goal", "desired_goal"), Fine.observation_space)
    )
    cost, one = 0.0, False

    def _seen(self) -> Any:
        return {"observation": self.place, "achieved_goal": self.place, "desired_goal": np.ones(2, np.float32)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        super().step(action)
        paid = self.compute_reward(self.place, np.ones(2, np.float32), {}) - self.cost
        return self._seen(), float(paid), False, self.time >= self.limit, {}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return -np.linalg.norm(achieved_goal - desired_goal, axis=None if self.one else -1)


def test_goals_are_paid_as_the_steps_were() -> None:
    assert lines(Pays) == []
    assert any("wrong: goals: a step was paid" in line for line in lines(type("Costs", (Pays,), {"cost": 0.1})))
    assert any("goals at once" in line for line in lines(type("One", (Pays,), {"one": True})))

    class Nearer(PointReach):
        def compute_reward(self, achieved_goal: Tensor, desired_goal: Tensor) -> Tensor:
            return super().compute_reward(achieved_goal, desired_goal) - 1.0

    assert any("wrong: goals: compute_reward of Nearer" in line for line in lines(Nearer()))


def test_vector_environments() -> None:
    def lacks_mode(num_envs: int) -> Any:
        env = gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")
        env.metadata = {key: value for key, value in env.metadata.items() if key != "autoreset_mode"}
        return env

    assert lines(lambda num_envs: gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")) == []
    assert any(line.startswith("wrong: autoreset: ") for line in lines(lacks_mode))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_checked.py").write_text(
        "import gymnasium as gym\nfrom tests.envs.test_check import Endless, Fine\n"
        "gym.register('OwnChecked-v0', 'own_checked:Endless', max_episode_steps=50)\n"
    )
    assert main(["check", "own_checked:Fine", "--steps", "50"]) == 0
    assert capsys.readouterr().out == "own_checked:Fine: nothing wrong\n"
    assert main(["check", "own_checked:OwnChecked-v0", "--steps", "50"]) == 0
    gym.registry.pop("OwnChecked-v0")
    capsys.readouterr()
    assert main(["check", "own_checked:Endless", "--steps", "50"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("wrong: time limit") and out[-1] == "own_checked:Endless: 1 wrong"
    assert main(["check", "own_checked:Endless", "--steps", "50", "--max-episode-steps", "9"]) == 0
    assert main(["check", "CartPole-v1", "--env.gravity", "1.6", "--steps", "20"]) == 0
    assert (
        main(["check"]) == 2
        and main(["check", "digit-mlps"]) == 2
        and main(["check", "CartPole-v1", "--ewc.a", "1"]) == 2
    )
    assert main(["check", "CartPole-v9"]) == 2


def test_what_is_not_the_environments_fault_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(MissingExtraError, match="needs ale_py"):
        check(rl.task("atari:Pong-v5"))
    with pytest.raises(UnknownNameError, match="did you mean"):
        check(rl.task("gymnasium:CartPole-v7"))

    class Texts(Fine):
        observation_space = spaces.Text(5)

    assert lines(Texts)[0].startswith("wrong: spaces: the observation space Text")


def test_a_finding_is_one_line() -> None:
    assert str(Finding("spaces", "two\nlines")) == "wrong: spaces: two lines"
