"""Agents that see pictures: the default network is convolutional, recorded, learned with, and resumed exactly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.engine import capture as capture_module
from rlmeta.envs.native import NativeEnv
from rlmeta.errors import SpaceError
from rlmeta.functional import tree
from rlmeta.runs.train import prepare

SIDE = 5


@dataclass(frozen=True)
class Side(NativeEnv):
    """A picture of bytes with one bright pixel: the action says in which half it is, 1 for the right one, for a
    reward of 1. Ten pictures are an episode."""

    as_dict: bool = False
    continuous: bool = False
    max_episode_steps: int | None = 10
    reset_noise = 2
    step_noise = 2

    @property
    def observation_space(self) -> gym.Space:
        picture = gym.spaces.Box(0, 255, (SIDE, SIDE + 1, 1), np.uint8)
        return gym.spaces.Dict(picture=picture, zero=gym.spaces.Box(-1, 1, (2,))) if self.as_dict else picture

    @property
    def action_space(self) -> gym.Space:
        return gym.spaces.Box(-1, 1, (1,), np.float32) if self.continuous else gym.spaces.Discrete(2)

    def _place(self, noise: Tensor) -> dict[str, Tensor]:
        row, column = (noise[..., 0] * SIDE).long(), (noise[..., 1] * (SIDE + 1)).long()
        return {"place": torch.stack([row.clamp(0, SIDE - 1), column.clamp(0, SIDE)], -1)}

    def reset(self, noise: Tensor, physics: Any) -> dict[str, Tensor]:
        return self._place(noise)

    def step(self, state: Any, action: Tensor, noise: Tensor, physics: Any) -> tuple[Any, Tensor, Tensor]:
        right = action[..., 0] > 0 if self.continuous else action == 1
        reward = (right == (state["place"][..., 1] > SIDE // 2)).float()
        return self._place(noise), reward, torch.zeros_like(reward).bool()

    def observe(self, state: Any) -> Any:
        row, column = (x.unsqueeze(-1) == torch.arange(SIDE + 1, device=x.device) for x in state["place"].unbind(-1))
        lit = row[..., :SIDE, None] & column[..., None, :]
        picture = (255 * lit).to(torch.uint8).unsqueeze(-1)
        return (
            {"picture": picture, "zero": torch.zeros_like(picture[..., :2, 0, 0]).float()} if self.as_dict else picture
        )


SETTINGS: dict[str, Any] = {
    "ppo": rl.PPO(num_envs=8, num_steps=32, batch_size=64, num_epochs=4, learning_rate=3e-3, hidden_sizes=(32,)),
    "dqn": rl.DQN(
        num_envs=8, learning_starts=64, batch_size=32, learning_rate=1e-3, hidden_sizes=(32,), gradient_steps=2
    ),
}
SMALL = {
    "ppo": rl.PPO(num_envs=4, num_steps=8, batch_size=16, num_epochs=1, hidden_sizes=(8,), share_network=True),
    "dqn": rl.DQN(num_envs=4, learning_starts=16, batch_size=8, gradient_steps=1, hidden_sizes=(8,)),
}
PROBLEM = rl.task(Side(), name="side")


def convolutions(run: Any) -> list[Tensor]:
    """Weights of the picture's only convolution, in every network."""
    weights = run.state["params"]["weights"].values()
    return [value for value in weights if value.shape[-4:] == (16, 1, 3, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_an_agent_learns_from_pictures(name: str) -> None:
    budget = rl.Budget(steps=2_560, final_episodes=20, eval_every=10**6)
    run = rl.train(SETTINGS[name], PROBLEM, seeds=2, budget=budget)
    assert (run.scores > 9.0).all(), run.scores


@pytest.mark.filterwarnings("error:.*not recorded")
@pytest.mark.parametrize("name", SMALL)
def test_a_run_is_recorded_and_resumes_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "WARM_UP", 2)
    budget = rl.Budget(steps=256, final_episodes=2, eval_every=10**6)
    whole = rl.train(SMALL[name], PROBLEM, seeds=2, budget=budget)
    programs = whole.agent.capture._programs.values()
    assert convolutions(whole) and len(programs) >= 2 and None not in programs
    stop = [lambda run, line: line["iteration"] >= 5]
    part = rl.train(SMALL[name], PROBLEM, seeds=2, budget=budget, out=tmp_path / "run", callbacks=stop)
    assert part.stopped and part.env_steps < whole.env_steps
    again = rl.resume(tmp_path / "run", env=PROBLEM)
    for ours, theirs in zip(tree.leaves(again.state["params"]), tree.leaves(whole.state["params"]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("error:.*not recorded")
def test_a_single_learner_is_recorded_and_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for warm_up in (10**9, 2):
        monkeypatch.setattr(capture_module, "WARM_UP", warm_up)
        run = prepare(SMALL["ppo"], PROBLEM, rl.Budget(steps=1_000), seeds=1)
        for _ in range(5):
            run.state, _ = run.agent.iterate(run.state, run.world)
        ends.append(run.state)
    programs = run.agent.capture._programs.values()
    assert len(programs) >= 2 and None not in programs
    assert all(tree.flatten(tree.map(torch.equal, *ends)).values())


@pytest.mark.parametrize(
    "settings",
    [
        rl.A2C(num_envs=2, num_steps=4),
        rl.PPO(num_envs=2, num_steps=4, batch_size=4, share_network=True, memory="gru", memory_size=4),
        rl.SAC(num_envs=2, learning_starts=8, batch_size=4, hidden_sizes=(8,), gradient_steps=1),
        rl.TD3(num_envs=2, learning_starts=8, batch_size=4, hidden_sizes=(8,), gradient_steps=2),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_every_agent_has_convolutions_for_the_pictures_of_a_dictionary(settings: Any) -> None:
    problem = Side(as_dict=True, continuous=isinstance(settings, rl.SAC | rl.TD3))
    run = prepare(settings, rl.task(problem, name="side"), rl.Budget(steps=1_000), seeds=2)
    before = convolutions(run)
    assert len(before) == (1 if isinstance(settings, rl.PPO) else 2)
    for _ in range(5):
        run.state, _ = run.agent.iterate(run.state, run.world)
    for old, new in zip(before, convolutions(run), strict=True):
        assert not torch.equal(old, new) and new.isfinite().all()


def test_a_picture_whose_axes_are_not_clear_is_refused_by_a_sentence() -> None:
    space, actions = gym.spaces.Box(0, 255, (3, 84, 3), np.uint8), gym.spaces.Discrete(2)
    with pytest.raises(SpaceError, match=r"may be \[H, W, C\] or \[C, H, W\]"):
        rl.PPO().bind(space, actions)
    rl.PPO(network=lambda space: torch.nn.Sequential(torch.nn.Flatten(), rl.nn.Activation(lambda x: x / 255.0))).bind(
        space, actions
    )


def test_a_papers_network_is_named_in_a_run_and_found_again(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL["ppo"], network=rl.nn.impala_cnn)
    budget = rl.Budget(steps=32, final_episodes=1, eval_every=10**6)
    run = rl.train(settings, PROBLEM, budget=budget, out=tmp_path / "run")
    again = rl.load(tmp_path / "run", env=PROBLEM)
    observation = np.zeros((SIDE, SIDE + 1, 1), np.uint8)
    assert again.act(observation) == run.act(observation)
    assert sum(value.dim() == 5 for value in again.state["params"]["weights"].values()) == 15
