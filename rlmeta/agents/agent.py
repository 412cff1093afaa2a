"""What every reinforcement-learning agent shares: its parameters' set-up, its view of observations, the iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from rlmeta.agents.rewards import Reward, distinct, relabel
from rlmeta.envs.world import World
from rlmeta.errors import SpaceError
from rlmeta.functional import random, tree
from rlmeta.functional.normalise import (
    normalise,
    normalise_reward,
    reward_init,
    reward_update,
    running_init,
    running_update,
)
from rlmeta.learning.capture import Capture
from rlmeta.learning.collect import Rollout, collect, episode_statistics
from rlmeta.learning.method import Method
from rlmeta.learning.state import Params, State
from rlmeta.nn import Block, Context, stack

NetworkFactory = Callable[[gym.Space], nn.Module]
"""From an observation space to a module that turns a batch of observations into features `[B, D]`."""

Metrics = dict[str, Tensor]
"""Figures of one iteration, `[*L]` each."""


class Agent:
    """An agent bound to spaces. An algorithm adds `act`, `credit`, `losses`, `log_prob` and `update`.

    Args:
        settings: the algorithm's settings.
        observation_space: of one environment.
        action_space: of one environment.
        methods: lifelong methods, in order.
    """

    noise_hold = 1
    """For how many steps a key is kept while acting."""

    capture: Capture | None
    """Replays `act` and `losses` once they are warm: both depend on their tensors alone. None calls them every time, as
    a user's network needs, which may do anything."""

    steps_per_iteration: int
    """Steps every environment takes in one iteration."""

    def __init__(
        self, settings: Any, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        self.settings = settings
        self.observation_space, self.action_space = observation_space, action_space
        self.methods = tuple(methods)
        self.rewards: tuple[Reward, ...] = distinct(getattr(settings, "rewards", ()))
        self.capture = Capture() if getattr(settings, "network", None) is None else None

    # ------------------------------------------------------------------ what an algorithm provides

    def networks(self) -> dict[str, Block]:
        """The blocks by name; called once per learner with that learner's seed, so that initial weights differ."""
        raise NotImplementedError

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]` and the memory after them."""
        raise NotImplementedError

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout; `rewards` names the reward streams `[*L, T, N]`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ set-up

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """The state at the start of a run: fresh weights from each learner's key, environments reset."""
        built = stack(lambda: nn.ModuleDict(self.networks()), random.fold(key, "initialisation"))
        trained = {name for name, _ in nn.ModuleDict(self.networks()).named_parameters()}
        weights = {name: value for name, value in built.items() if name in trained}
        buffers = {name: value for name, value in built.items() if name not in trained}
        zero = torch.zeros(key.shape, dtype=torch.int64, device=key.device)
        rows = (*key.shape, world.num_envs)
        state: State = {
            "params": {"weights": weights, "buffers": buffers, "normalisers": {}, "hyper": hyper},
            "key": key,
            "count": {"iterations": zero, "vector_steps": zero.clone(), "env_steps": zero.clone()},
            "progress": torch.zeros(key.shape, dtype=torch.float64, device=key.device),
            "active": torch.ones(key.shape, dtype=torch.bool, device=key.device),
            "world": world.reset(random.fold(key, "world")),
            "episode": {
                "return": torch.zeros(rows, dtype=torch.float64, device=key.device),
                "length": torch.zeros(rows, dtype=torch.float64, device=key.device),
            },
        }
        self._init_normalisers(state, world)
        state["memory"] = self.initial_memory(state["params"], rows)
        state["methods"] = {method.name: method.init(self, state) for method in self.methods}
        if self.rewards:
            state["rewards"] = {reward.name: reward.init(self, state, world) for reward in self.rewards}
        return state

    def initial_memory(self, p: Params, rows: tuple[int, ...]) -> tree.Tree:
        """The memory of `rows` `[*L, N]` agents at the start of an episode; none for feed-forward agents."""
        return {}

    def seen(self, state: State) -> Params:
        """The parameters as forward passes see them, through the lifelong methods' hooks."""
        p = state["params"]
        for method in self.methods:
            p = method.params(p, state["methods"][method.name], state["task"])
        return p

    # ------------------------------------------------------------------ observations and rewards

    def _init_normalisers(self, state: State, world: World) -> None:
        shape, device = state["key"].shape, state["key"].device
        normalisers, space = state["params"]["normalisers"], self.observation_space
        if getattr(self.settings, "normalise_observation", False):
            if not isinstance(space, gym.spaces.Box):
                raise SpaceError(f"normalise_observation needs Box observations, the task has {space}: switch it off")
            normalisers["observation"] = running_init(shape, space.shape, device)
        if getattr(self.settings, "normalise_reward", False):
            normalisers["reward"] = reward_init(shape, world.num_envs, device)

    def view(self, p: Params, observation: tree.Tree) -> tree.Tree:
        """The observation as the networks see it: normalised by the running statistics, which only training moves."""
        stats = p["normalisers"].get("observation")
        return observation if stats is None else normalise(observation, stats)

    def forward(self, network: Block, name: str, p: Params, observation: tree.Tree, ctx: Context | None = None) -> Any:
        """Run one of the agent's networks on raw observations."""
        tensors = {**p["weights"], **p["buffers"]} if p["buffers"] else p["weights"]
        return network.run(tensors, self.view(p, observation), ctx or Context(), f"{name}.")

    def scale_reward(self, state: State, rollout: Rollout, reward: Tensor) -> Tensor:
        """The reward divided by the running deviation of its discounted return, where the settings ask for it."""
        normalisers = state["params"]["normalisers"]
        if "reward" not in normalisers:
            return reward
        ended, gamma = rollout["terminated"] | rollout["truncated"], state["params"]["hyper"]["gamma"]
        normalisers["reward"] = reward_update(normalisers["reward"], reward, ended, gamma, rollout["valid"])
        return normalise_reward(reward, normalisers["reward"])

    # ------------------------------------------------------------------ one iteration

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Act for `steps_per_iteration` steps, learn from them.

        Returns:
            The new state and the iteration's metrics `[*L]`.
        """
        state, rollout = collect(self, state, world, self.steps_per_iteration)
        state, episodes = episode_statistics(state, rollout)
        state, rewards, relabelled = self.relabel(state, rollout)
        state, metrics = self.update(state, rollout, rewards)
        return self.end_iteration(state, rollout), {**metrics, **episodes, **relabelled}

    def relabel(self, state: State, rollout: Rollout) -> tuple[State, dict[str, Tensor], Metrics]:
        """The streams of reward that a rollout is learned from: the task's own, through what `rewards` lists."""
        rewards, metrics = {"task": rollout["reward"]}, Metrics()
        if self.rewards:
            state, rewards, metrics = relabel(self, self.rewards, state, rollout, rewards)
        if "reward" in state["params"]["normalisers"]:
            total = torch.stack(list(rewards.values())).sum(0)
            rewards = {"task": self.scale_reward(state, rollout, total)}
        return state, rewards, metrics

    @torch.no_grad()
    def end_iteration(self, state: State, rollout: Rollout) -> State:
        """Count the iteration and move the running statistics on: a rollout is learned from as it was acted upon."""
        normalisers, axes = state["params"]["normalisers"], state["key"].dim()
        if "observation" in normalisers:
            observation, valid = rollout["observation"].flatten(axes, axes + 1), rollout["valid"].flatten(axes)
            normalisers["observation"] = running_update(normalisers["observation"], observation, valid)
        count = state["count"]
        state["count"] = {**count, "iterations": count["iterations"] + 1}
        return state
