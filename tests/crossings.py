"""What agents, networks, observations and problems are crossed with: a walk along five cells, and points to label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import rlmeta as rl
from rlmeta.data.samples import DataTask, Samples
from rlmeta.envs.native import NativeEnv

CELLS = 5
OBSERVATIONS = ("box", "bytes", "dict", "masked", "discrete")
NETWORKS = ("mlp", "convolution", "group norm, frozen layer", "batch norm")
PROBLEMS = ("task", "family", "stream")

WHERE = gym.spaces.Box(-1, 1, (3,), np.float32)
FORCE = gym.spaces.Box(0, 2, (1,), np.float32)
SPACES: dict[str, gym.Space] = {
    "box": WHERE,
    "bytes": gym.spaces.Box(0, 255, (1, 4, CELLS), np.uint8),
    "dict": gym.spaces.Dict({"where": WHERE, "cell": gym.spaces.Discrete(CELLS)}),
    "masked": gym.spaces.Dict({"where": WHERE, "action_mask": gym.spaces.MultiBinary(2)}),
    "discrete": gym.spaces.Discrete(CELLS),
}


@dataclass(frozen=True)
class Walk(NativeEnv):
    """Left or right along five cells from the first; the last pays and ends the episode, and a step may slip."""

    kind: str = "box"
    pay: float = 1.0
    slip: float = 0.1
    continuous: bool = False
    max_episode_steps: int | None = 8
    step_noise = 1

    @property
    def observation_space(self) -> gym.Space:
        return SPACES[self.kind]

    @property
    def action_space(self) -> gym.Space:
        return FORCE if self.continuous else gym.spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Any) -> dict[str, Tensor]:
        return {"cell": torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)}

    def step(self, state: Any, action: Tensor, noise: Tensor, physics: Any) -> tuple[Any, Tensor, Tensor]:
        slips = noise[..., 0] < physics.get("slip", self.slip)
        right = (action[..., 0] > 1).long() if self.continuous else action
        move = torch.where(slips, -1, 2 * right - 1)
        cell = (state["cell"] + move).clamp(0, CELLS - 1)
        ended = cell == CELLS - 1
        pay = physics.get("pay", torch.full_like(noise[..., 0], self.pay))
        return {"cell": cell}, (ended * pay).float(), ended

    def observe(self, state: Any) -> Any:
        cell = state["cell"]
        place = cell.float() / (CELLS - 1)
        where = torch.stack([place, 1 - 2 * place, (cell % 2).float()], -1)
        if self.kind == "dict":
            return {"where": where, "cell": cell}
        if self.kind == "masked":
            return {"where": where, "action_mask": torch.stack([(cell > 0).long(), torch.ones_like(cell)], -1)}
        if self.kind == "bytes":
            lit = cell.unsqueeze(-1) == torch.arange(CELLS, device=cell.device)
            return (255 * lit).to(torch.uint8)[..., None, None, :].expand(*lit.shape[:-1], 1, 4, CELLS).contiguous()
        return cell if self.kind == "discrete" else where


class GymWalk(gym.Env):
    """The same as a gymnasium environment."""

    def __init__(self, kind: str = "box", pay: float = 1.0, continuous: bool = False) -> None:
        self.observation_space, self.kind, self.pay = SPACES[kind], kind, pay
        self.continuous, self.action_space = continuous, FORCE if continuous else gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.cell, self.steps = 0, 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        slips = self.np_random.random() < 0.1
        assert self.kind != "masked" or self.cell > 0 or action == 1, "a masked action was taken"
        right = int(action[0] > 1) if self.continuous else int(action)
        self.cell = int(np.clip(self.cell + (-1 if slips else 2 * right - 1), 0, CELLS - 1))
        self.steps += 1
        ended = self.cell == CELLS - 1
        return self._observation(), float(ended) * self.pay, ended, self.steps >= 8, {}

    def _observation(self) -> Any:
        seen = Walk(self.kind).observe({"cell": torch.tensor(self.cell)})
        if self.kind == "discrete":
            return self.cell
        if isinstance(seen, dict):
            types = {"cell": np.int64, "action_mask": np.int8, "where": np.float32}
            return {
                name: types[name](x.item()) if x.dim() == 0 else x.numpy().astype(types[name])
                for name, x in seen.items()
            }
        return seen.numpy()


# ---------------------------------------------------------------------- networks


class Body(nn.Module):
    """A user's network for any of the observations."""

    recordable = True

    def __init__(self, space: gym.Space, network: str) -> None:
        super().__init__()
        self.space, self.network = space, network
        size = int(self.flat(gym.vector.utils.batch_space(space, 1).sample()).shape[-1])
        if network == "convolution":
            self.first = nn.Conv1d(1, 4, 3, padding=1)
            self.last = nn.Linear(4 * size, 8)
            return
        self.frozen = nn.Linear(size, 8)
        self.norm = nn.GroupNorm(2, 8) if network.startswith("group") else nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 8)
        if network.startswith("group"):
            self.frozen.requires_grad_(False)

    def flat(self, x: Any) -> Tensor:
        """`[B, D]` floats of observations `[B, ...]`."""
        if isinstance(self.space, gym.spaces.Dict):
            parts = [torch.as_tensor(x["where"])]
            if "cell" in self.space.spaces:
                parts.append(nn.functional.one_hot(torch.as_tensor(x["cell"]).long(), CELLS))
            return torch.cat([part.float() for part in parts], -1)
        x = torch.as_tensor(x)
        if isinstance(self.space, gym.spaces.Discrete):
            return (x.unsqueeze(-1) == torch.arange(CELLS, device=x.device)).float()
        return x.float().flatten(1) / (255 if self.space.dtype == np.uint8 else 1)

    def forward(self, x: Any) -> Tensor:
        x = self.flat(x)
        if self.network == "convolution":
            return torch.tanh(self.last(torch.relu(self.first(x.unsqueeze(1))).flatten(1)))
        return torch.tanh(self.last(self.norm(self.frozen(x))))


def network(name: str) -> Any:
    """What an agent's setting `network` is to be."""
    return None if name == "mlp" else partial(Body, network=name)


# ---------------------------------------------------------------------- problems


def walk(kind: str, native: bool, pay: float = 1.0, continuous: bool = False) -> rl.Task:
    """A task to act in, with two actions or a force."""
    if native:
        return rl.task(Walk(kind, pay, continuous=continuous), name=f"walk for {pay:g}")
    return rl.task(partial(GymWalk, kind, pay, continuous), name=f"gymnasium's walk for {pay:g}")


def walks(problem: str, kind: str, native: bool, continuous: bool = False) -> Any:
    """The task, family or stream of two tasks."""
    one = walk(kind, native, continuous=continuous)
    if problem == "family":
        return rl.TaskFamily("walks", one, {"pay": (0.5, 1.5), "slip": (0.0, 0.2)})
    if problem == "stream":
        return rl.stream([one, walk(kind, native, 2.0, continuous)], "walks")
    return one


@cache
def shown(kind: str, native: bool) -> Any:
    """Demonstrations of a learner that has hardly begun."""
    run = rl.train(rl.A2C(), walk(kind, native), budget=rl.Budget(steps=80, final_episodes=2, eval_every=10**6))
    return rl.record(run, episodes=3, deterministic=False)


@cache
def labelled(kind: str, classes: int, pay: int) -> DataTask:
    """Inputs and targets, classes or (`classes` 0) three numbers."""
    generator = torch.Generator().manual_seed(pay)
    x = torch.rand(40, *SPACES[kind].shape, generator=generator)
    x = (255 * x).to(torch.uint8) if kind == "bytes" else x
    y = x.flatten(1).float() @ torch.rand(x[0].numel(), 3, generator=generator)
    y = y.argmax(-1) % classes if classes else y
    parts = Samples(x[:32], y[:32]), Samples(x[32:], y[32:])
    return DataTask(f"points-{pay}", *parts, tuple(range(classes)), classes)
