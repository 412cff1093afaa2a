"""What every reinforcement-learning agent shares: its parameters' set-up, its view of observations, the iteration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from rlmeta.agents.networks import check_network, zeros_of
from rlmeta.agents.recurrence import Recurrence
from rlmeta.agents.streams import Streams
from rlmeta.data.samples import EVERYTHING, DataWorld
from rlmeta.engine.capture import Capture
from rlmeta.envs.world import World
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import random, tree
from rlmeta.functional.normalise import (
    normalise,
    normalise_reward,
    reward_init,
    reward_update,
    running_init,
    running_update,
)
from rlmeta.learning import off_policy, replay
from rlmeta.learning.collect import Rollout, collect, episode_statistics
from rlmeta.learning.evaluate import Evaluation, evaluate, evaluation_rows
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics, Score, initial_memories, initial_state
from rlmeta.learning.method import Method, seen
from rlmeta.learning.minibatch import flatten_time
from rlmeta.learning.phases import TRAINING, own_step, whose
from rlmeta.learning.settings import require
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy
from rlmeta.nn import Block, Context, Distribution
from rlmeta.nn.encoder import ACTION_MASK
from rlmeta.rewards import Reward, apart_of, bound, distinct, first_memory, relabel, together

NetworkFactory = Callable[[gym.Space], nn.Module]
"""From an observation space to a module that turns a batch of observations into features `[B, D]`; its parameters with
`requires_grad=False` stay as they are."""


LOG_STD_RANGE = (-20.0, 20.0)
"""Where a Gaussian policy's `initial_log_std` may lie; its exponential is a number there."""

ORDINARY = (0.1, 10.0)
"""How many of a policy's initial deviations lie between the middle of an action's bounds and either of them, where
raw units do no harm."""


SPREAD = 8
"""Samples for lifelong methods are every eighth of an agent's fresh steps: neighbours in time are nearly the same."""


class Agent:
    """An agent bound to spaces. An algorithm adds `act`, `credit`, `losses` and `update`.

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
    a network of a user's own class needs, which may do anything (`nn.lifted.recordable`)."""

    steps_per_iteration: int
    """Steps every environment takes in one iteration."""
    num_tasks = 1
    reveals = EVERYTHING
    task_samples: int | None = None
    idle_steps = 0
    acting_network: str | None = None
    """The name of what it acts by, where that is not its first network."""
    counts = "environment steps"
    score = Score("return")
    acts = True
    answers = False
    classes = 0
    policy: Any = None
    """The network, among the weights under this name, that gives a distribution over actions; None without one."""
    head: Any = None
    """The policy's, which knows the distribution."""
    beside_observations: tuple[str, ...] = ()
    """Networks that are no functions of an observation alone, such as critics of actions."""
    keeps_streams = False
    """Whether it learns from streams of reward that stay apart."""
    recurrence: Recurrence | None = None
    """Its memory, where its networks are recurrent."""
    copies: tuple[Copy, ...] = ()
    """Target networks and averages, which are among the buffers."""

    def __init__(
        self, settings: Any, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        recorded = check_network(settings, observation_space, rows=True)
        self.settings = settings
        self.observation_space, self.action_space = observation_space, action_space
        _warn_of_raw_units(settings, action_space)
        self.methods = tuple(methods)
        self.rewards: tuple[Reward, ...] = bound(
            distinct(getattr(settings, "rewards", ())), observation_space, action_space
        )
        apart = apart_of(self.rewards)
        require(
            not apart or self.keeps_streams,
            f"{type(settings).__name__} has one value for all rewards, but that of "
            f"{', '.join(reward.name for reward in apart)} stays apart: use PPO or A2C",
        )
        self.streams = Streams(settings, apart, observation_space, recorded)
        self.pretrain: Callable[[State], State] | None = None
        self.capture = Capture() if recorded else None

    # ------------------------------------------------------------------ what an algorithm provides

    def networks(self) -> dict[str, Block]:
        """The blocks by name; called once per learner with that learner's seed, so that initial weights differ."""
        raise NotImplementedError

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]` and the memory after them."""
        raise NotImplementedError

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """The losses `{group: [*L]}` of a minibatch `[*L, B, ...]`."""
        raise NotImplementedError

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout; `rewards` names the reward streams `[*L, T, N]`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ set-up

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """The state at the start of a run: fresh weights from each learner's key, environments reset."""
        if isinstance(world, DataWorld):
            name = type(self.settings).__name__
            raise SettingError(f"{name} acts in environments, this problem is of labelled samples: use Classifier")
        state = initial_state(self.networks, key, hyper)
        state["world"] = world.reset(random.fold(key, "world"))
        state["episode"] = self._no_episodes(key, world)
        self._init_normalisers(state, world)
        state["memory"] = self.initial_memory(state["params"], (*key.shape, world.num_envs))
        state["methods"] = initial_memories(self, self.methods, state)
        return self._begin_rewards(state, world)

    def begin_task(self, state: State, world: World, key: Tensor) -> State:
        """Begin episodes of the task that the world has been set to; `key` is `[*L]`.

        A replay memory begins empty, for its steps are counted from here.
        """
        state = self.enter(state, world, key)
        state["count"] = {**state["count"], "task_steps": torch.zeros_like(state["count"]["task_steps"])}
        if "replay" in state:
            off_policy.forget(state)
        return self._begin_rewards(state, world)

    def enter(self, state: State, world: World, key: Tensor) -> State:
        """Go on in the task that the world has been set to, untold that it is another: only episodes begin anew.

        A replay memory stays as it is; the newest steps in it are the last of their episodes.
        """
        state["world"] = world.reset(key)
        state["episode"] = self._no_episodes(key, world)
        state["memory"] = self.initial_memory(state["params"], (*key.shape, world.num_envs))
        if "replay" in state:
            state["replay"] = replay.cut(state["replay"], key.dim())
        return state

    def _begin_rewards(self, state: State, world: World) -> State:
        if self.rewards:
            state["rewards"] = {
                reward.name: first_memory(reward, reward.init(self, state, world), state["key"])
                for reward in self.rewards
            }
        if self.streams.rewards:
            state["values"] = self.streams.init(state)
        return state

    def _no_episodes(self, key: Tensor, world: World) -> State:
        zero = torch.zeros(*key.shape, world.num_envs, dtype=torch.float64, device=key.device)
        return {"return": zero, "length": zero.clone()}

    def initial_memory(self, p: Params, rows: tuple[int, ...]) -> tree.Tree:
        """The memory of `rows` `[*L, N]` agents at the start of an episode; none for feed-forward agents."""
        if self.recurrence is None:
            return {}
        return self.recurrence.initial(rows, next(iter(p["weights"].values())).device)

    def seen(self, state: State) -> Params:
        """The parameters as forward passes see them, through the lifelong methods' hooks."""
        return seen(self.methods, state)

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
        """Run one of the agent's networks on raw observations, a recurrent one on its inputs."""
        tensors = {**p["weights"], **p["buffers"]} if p["buffers"] else p["weights"]
        if self.recurrence is None:
            seen = self.view(p, observation)
        else:
            seen = self.recurrence.of_network(observation, name)
            seen["observation"] = self.view(p, seen["observation"])
        return network.run(tensors, seen, ctx or Context(), f"{name}.")

    def inputs(self, rollout: Rollout) -> tree.Tree:
        """What the networks are given for every step of a rollout, `[*L, T, N, ...]`: its observations, and what a
        recurrent one remembers besides."""
        return rollout["observation"] if self.recurrence is None else self.recurrence.inputs(rollout)

    def items(self, credited: tree.Tree, axes: int) -> tree.Tree:
        """What was credited for every step `[*L, T, N, ...]` as items of minibatches, `[*L, M, ...]`: single steps, or
        with a memory whole sequences."""
        return flatten_time(credited, axes) if self.recurrence is None else self.recurrence.items(credited, axes)

    def samples(self, batch: tree.Tree) -> tree.Tree:
        """The items of a minibatch as single steps, `[*L, B, ...]`."""
        return batch if self.recurrence is None else self.recurrence.samples(batch)

    def scale_reward(self, state: State, rollout: Rollout, reward: Tensor) -> Tensor:
        """The reward divided by the running deviation of its discounted return, where the settings ask for it."""
        normalisers = state["params"]["normalisers"]
        if "reward" not in normalisers:
            return reward
        ended, gamma = rollout["terminated"] | rollout["truncated"], state["params"]["hyper"]["gamma"]
        normalisers["reward"] = reward_update(normalisers["reward"], reward, ended, gamma, rollout["valid"])
        return normalise_reward(reward, normalisers["reward"])

    # ------------------------------------------------------------------ what others ask of what it knows

    @property
    def predicts(self) -> tuple[str, ...]:
        """The network that `distribution` depends on."""
        return () if self.policy is None else ("policy",)

    @property
    def sequential(self) -> bool:
        """Whether a sample is a whole sequence, which a memory goes through."""
        return self.recurrence is not None

    def distribution(self, p: Params, batch: tree.Tree, ctx: Context) -> Distribution:
        """The parameters of the policy's distribution over actions `{name: [*L, B, ...]}`, in sequences of every step
        `{name: [*L, B, T, ...]}`, without those that only serve to sample."""
        parameters = self._of_samples(self.policy, "policy", p, batch["observation"], ctx)
        return {name: value for name, value in parameters.items() if name not in ("features", "noise_log_std")}

    def features(self, p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        """What the policy's head is given, `[*L, B, D]`, in sequences `[*L, B, T, D]`."""
        features: Tensor = self._of_samples(self.policy.body, "policy.body", p, batch["observation"], ctx)
        return self.policy.placed(features, batch["observation"])

    def _of_samples(self, block: Block, name: str, p: Params, inputs: tree.Tree, ctx: Context) -> Any:
        """`forward` of single steps, or of every step of sequences, whose memory is made anew from their first one."""
        if self.recurrence is None:
            return self.forward(block, name, p, inputs, ctx)
        axes = inputs["begins"].dim() - 2
        outputs = self.forward(block, name, p, self.recurrence.time_first(inputs), ctx)
        return tree.map(lambda x: x.transpose(axes, axes + 1), outputs)

    def log_prob(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """log pi(a | s) of every sample `[*L, B]`; of a sequence the sum over its steps, log pi(a_1 ... a_T | s_1 ...
        s_T): what Fisher information is taken of."""
        log_prob: Tensor = self.head.log_prob(self.distribution(p, batch, ctx or Context()), batch["action"])
        return log_prob.sum(-1) if self.sequential else log_prob

    def divergence(self, then: Distribution, now: Distribution) -> Tensor:
        """KL(then || now) in nats of every sample `[*L, B]`; of a sequence the mean over its steps."""
        divergence: Tensor = self.head.kl(then, now)
        return divergence.mean(-1) if self.sequential else divergence

    def blank(self, learners: tuple[int, ...], device: torch.device) -> tree.Tree:
        """A sample of zeros for each of the learners `*L`, `[*L, 1, ...]`: the form of what `draw` gives."""
        observation = zeros_of(self.observation_space, learners, device)
        if self.recurrence is not None:
            observation = self.recurrence.blank(observation, (*learners, 1), self.steps_per_iteration, device)
        return {"observation": observation}

    # ------------------------------------------------------------------ evaluation, and samples for lifelong methods

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Rows to play so many episodes in."""
        return evaluation_rows(episodes, native)

    def evaluate(
        self, p: Params, world: World, key: Tensor, episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Play `episodes` episodes with every learner."""
        return evaluate(self, p, world, key, episodes, deterministic=deterministic)

    @torch.no_grad()
    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """n fresh samples `[*L, n, ...]` of the policy as it is, from where the environments stand: every eighth step,
        or with a memory sequences as long as those that it learns from, one after another.

        The state stays as it is; live environments move on, so a new task must begin, or the run end, after it.
        """
        axes, every = state["key"].dim(), 1 if self.sequential else SPREAD
        rows = -(-n * every // world.num_envs)
        lengths = [self.steps_per_iteration] * rows if self.sequential else [rows]
        copied, drawn = tree.map(torch.clone, state), []
        copied["key"] = random.fold(state["key"], "draw")
        for steps in lengths:
            copied, rollout = collect(self, copied, world, steps)
            drawn.append(self._experience(rollout, axes))
        samples = tree.map(lambda *parts: torch.cat(parts, axes), *drawn)
        return tree.map(lambda x: x[(slice(None),) * axes + (slice(0, n * every, every),)], samples)

    def _experience(self, rollout: Rollout, axes: int) -> tree.Tree:
        """All of a rollout as samples `[*L, M, ...]`, with what its networks were given as their `observation`."""
        told = {name: value for name, value in rollout.items() if name != "first_memory"}
        return self.items({**told, "observation": self.inputs(rollout)}, axes)

    def watch(self, state: State, observation: tree.Tree) -> State:
        """Count observations from elsewhere, `[M, ...]` for every learner, among those that observations are
        normalised by: whatever trains the weights before the first rollout fills what normalises their input."""
        normalisers, learners = state["params"]["normalisers"], state["key"].shape
        if "observation" in normalisers:
            seen = observation.to(state["key"].device).expand(*learners, *observation.shape)
            normalisers["observation"] = running_update(normalisers["observation"], seen)
        return state

    # ------------------------------------------------------------------ one iteration

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Act for `steps_per_iteration` steps, learn from them; in a phase of a lifelong method's own it may be the
        method that learns, from all of the rollout's samples, and the agent stays as it is.

        Returns:
            The new state and the iteration's metrics `[*L]`.
        """
        if self.pretrain is not None and not bool(state["count"]["iterations"].any()):
            state = self.pretrain(state)
        state, rollout = collect(self, state, world, self.steps_per_iteration)
        self._warn_of_masks(rollout)
        state, episodes = episode_statistics(state, rollout)
        if whose(state["task"]) > TRAINING:
            own = own_step(self, state, self._experience(rollout, state["key"].dim()))
            if own is not None:
                return self._counted(own[0]), {**own[1], **episodes}
        state, rewards, relabelled = self.relabel(state, rollout)
        state, metrics = self.update(state, rollout, rewards)
        return self.end_iteration(state, rollout), {**metrics, **episodes, **relabelled}

    def _warn_of_masks(self, rollout: Rollout) -> None:
        """Say that an agent had to act where its observation allowed nothing; ends of episodes need no action."""
        mask = rollout["observation"].get(ACTION_MASK) if isinstance(rollout["observation"], dict) else None
        if mask is not None and bool((~mask.bool().any(-1) & rollout["valid"]).any()):
            warnings.warn(
                f"an observation to act on allows no action (its {ACTION_MASK} is 0 everywhere): it was taken to allow "
                "every one; give the environment an action for passing",
                RuntimeWarning,
                stacklevel=2,
            )

    def relabel(self, state: State, rollout: Rollout) -> tuple[State, dict[str, Tensor], Metrics]:
        """The streams of reward that a rollout is learned from: the task's own, through what `rewards` lists."""
        rewards, metrics = {"task": rollout["reward"]}, Metrics()
        if self.rewards:
            state, rewards, metrics = relabel(self, self.rewards, state, rollout, rewards)
        if "reward" in state["params"]["normalisers"]:
            apart = {reward.name: rewards[reward.name] for reward in self.streams.rewards}
            total = together(rewards, self.streams.rewards)
            rewards = {"task": self.scale_reward(state, rollout, total), **apart}
        return state, rewards, metrics

    @torch.no_grad()
    def end_iteration(self, state: State, rollout: Rollout) -> State:
        """Count the iteration and move the running statistics on: a rollout is learned from as it was acted upon."""
        normalisers, axes = state["params"]["normalisers"], state["key"].dim()
        if "observation" in normalisers:
            observation, valid = rollout["observation"].flatten(axes, axes + 1), rollout["valid"].flatten(axes)
            normalisers["observation"] = running_update(normalisers["observation"], observation, valid)
        return self._counted(state)

    def _counted(self, state: State) -> State:
        """The state after an iteration more."""
        count = state["count"]
        state["count"] = {
            **count,
            "iterations": count["iterations"] + 1,
            "task_steps": count["task_steps"] + self.steps_per_iteration,
        }
        return state


def _warn_of_raw_units(settings: Any, space: gym.Space) -> None:
    """Say that a policy in raw units starts where its actions are all at the bounds, or all alike."""
    if getattr(settings, "action_bounds", "scale") != "clip" or not isinstance(space, gym.spaces.Box):
        return
    deviation = math.exp(settings.initial_log_std)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    far = ((high - low) / 2 < ORDINARY[0] * deviation) | (low > 0) | (high < 0)
    far |= np.isfinite(high - low) & ((high - low) / 2 > ORDINARY[1] * deviation)
    if far.any():
        warnings.warn(
            f'action_bounds="clip": the policy begins around 0 with a deviation of {deviation:g}, far from the bounds '
            f'of {space}, which it is not told: use action_bounds="scale"',
            RuntimeWarning,
            stacklevel=2,
        )
