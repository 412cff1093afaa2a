"""Base class of reinforcement-learning agents: initial state, observation normalisation, evaluation, one iteration."""

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
from rlmeta.learning.method import Method, effective_params
from rlmeta.learning.minibatch import flatten_time
from rlmeta.learning.phases import TRAINING, own_step, whose
from rlmeta.learning.settings import require
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy
from rlmeta.nn import Block, Context, Distribution
from rlmeta.nn.encoder import ACTION_MASK
from rlmeta.rewards import Reward, bind_rewards, check_memory, check_rewards, relabel, separate_rewards, total_reward

NetworkFactory = Callable[[gym.Space], nn.Module]
"""Function from an observation space to a module that computes features `[B, D]` of a batch of observations; its
parameters with `requires_grad=False` are frozen."""


LOG_STD_RANGE = (-20.0, 20.0)
"""Range of a Gaussian policy's `initial_log_std`, in which its exponential is a finite number above 0."""

ORDINARY = (0.1, 10.0)
"""Range of the distance from the middle of an action's bounds to either bound, in initial deviations of the policy,
in which a policy in raw units works."""


SPREAD = 8
"""Stride of samples for lifelong methods: every eighth step, since neighbours in time are nearly the same."""


class Agent:
    """Base class of agents, for an observation and an action space. An algorithm adds `act`, `losses` and `update`.

    Args:
        settings: the algorithm's settings.
        observation_space: of one environment.
        action_space: of one environment.
        methods: lifelong methods, in order.
    """

    noise_hold = 1
    """Number of steps that share a random key while acting."""

    capture: Capture | None
    """Recorder that replays `act` and `losses` after some calls, since both depend on their tensors alone. None never
    records, as for networks of a user's own class, which may do anything (`nn.lifted.recordable`)."""

    steps_per_iteration: int
    """Steps of every environment in one iteration."""
    num_tasks = 1
    reveals = EVERYTHING
    task_samples: int | None = None
    idle_steps = 0
    acting_network: str | None = None
    """Name of the network that chooses actions, if it is not the first one."""
    counts = "environment steps"
    score = Score("return")
    acts = True
    answers = False
    classes = 0
    policy: Any = None
    """Policy network, a distribution over actions, whose weights begin with `policy.`; None without one."""
    head: Any = None
    """Head of the policy, which computes log probabilities and divergences."""
    beside_observations: tuple[str, ...] = ()
    """Names of networks with other inputs than an observation alone, such as critics of actions."""
    supports_separate_rewards = False
    """Whether the agent supports reward streams with value functions of their own."""
    recurrence: Recurrence | None = None
    """Memories and additional inputs of the networks; None for feed-forward ones."""
    copies: tuple[Copy, ...] = ()
    """Target networks and weight averages, which are kept among the buffers."""

    def __init__(
        self, settings: Any, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        recorded = check_network(settings, observation_space, rows=True)
        self.settings = settings
        self.observation_space, self.action_space = observation_space, action_space
        _warn_of_raw_units(settings, action_space)
        self.methods = tuple(methods)
        self.rewards: tuple[Reward, ...] = bind_rewards(
            check_rewards(getattr(settings, "rewards", ())), observation_space, action_space
        )
        separate = separate_rewards(self.rewards)
        require(
            not separate or self.supports_separate_rewards,
            f"{type(settings).__name__} has one value for all rewards, but that of "
            f"{', '.join(reward.name for reward in separate)} needs a value of its own: use PPO or A2C",
        )
        self.streams = Streams(settings, separate, observation_space, recorded)
        self.pretrain: Callable[[State], State] | None = None
        self.capture = Capture() if recorded else None

    # ------------------------------------------------------------------ to be implemented by an algorithm

    def networks(self) -> dict[str, Block]:
        """Build the networks by name; called once per learner with its seed, so that initial weights differ."""
        raise NotImplementedError

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions `[*L, N, ...]`; returns them and the recurrent memory after them."""
        raise NotImplementedError

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Compute the losses `{group: [*L]}` of a minibatch `[*L, B, ...]`."""
        raise NotImplementedError

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout; `rewards` names the reward streams `[*L, T, N]`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ set-up

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: random weights from each learner's key, environments reset."""
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
        """Begin a task of a stream: reset the environments to the task the world was set to; `key` is `[*L]`.

        A replay memory begins empty, for its steps are counted from here.
        """
        state = self.enter(state, world, key)
        state["count"] = {**state["count"], "task_steps": torch.zeros_like(state["count"]["task_steps"])}
        if "replay" in state:
            off_policy.forget(state)
        return self._begin_rewards(state, world)

    def enter(self, state: State, world: World, key: Tensor) -> State:
        """Switch to another task without a task boundary: reset the environments, and nothing else.

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
                reward.name: check_memory(reward, reward.init(self, state, world), state["key"])
                for reward in self.rewards
            }
        if self.streams.rewards:
            state["values"] = self.streams.init(state)
        return state

    def _no_episodes(self, key: Tensor, world: World) -> State:
        zero = torch.zeros(*key.shape, world.num_envs, dtype=torch.float64, device=key.device)
        return {"return": zero, "length": zero.clone()}

    def initial_memory(self, p: Params, rows: tuple[int, ...]) -> tree.Tree:
        """Initial recurrent memory of `rows` `[*L, N]` environments; empty for feed-forward agents."""
        if self.recurrence is None:
            return {}
        weight = next(iter(p["weights"].values()))
        memory = self.recurrence.initial(rows, weight.device)
        state = tree.map(lambda x: x.to(weight.dtype) if x.is_floating_point() else x, memory["hidden"])
        return {**memory, "hidden": state}

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes: the weights after the lifelong methods' hooks."""
        return effective_params(self, state)

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

    def preprocess(self, p: Params, observation: tree.Tree) -> tree.Tree:
        """Normalise an observation by the running statistics, which are updated in training alone."""
        stats = p["normalisers"].get("observation")
        return observation if stats is None else normalise(observation, stats)

    def forward(self, network: Block, name: str, p: Params, observation: tree.Tree, ctx: Context | None = None) -> Any:
        """Forward pass of one of the agent's networks on raw observations, of one with a memory on its inputs."""
        tensors = {**p["weights"], **p["buffers"]} if p["buffers"] else p["weights"]
        return network.run(tensors, self._seen(p, observation, name), ctx or Context(), f"{name}.")

    def _seen(self, p: Params, inputs: tree.Tree, name: str) -> tree.Tree:
        """Inputs of one network, with normalised observations."""
        if self.recurrence is None:
            return self.preprocess(p, inputs)
        network = name.partition(".")[0]
        sources = {copy.name: copy.source for copy in self.copies}  # a target network has the states of its source
        seen = self.recurrence.of_network(inputs, sources.get(network, network))
        if "before" in seen:
            before = seen["before"]
            seen["before"] = {**before, "observation": self.preprocess(p, before["observation"])}
        return {**seen, "observation": self.preprocess(p, seen["observation"])}

    def answer_at(
        self,
        network: Any,
        name: str,
        p: Params,
        observation: tree.Tree,
        memory: tree.Tree,
        ctx: Context | None = None,
    ) -> tuple[Any, Callable[[Tensor], tree.Tree]]:
        """Output of the acting network for one step `[*L, N, ...]`, and a function from the action to the memory after.

        The memories of all networks move on.
        """
        if self.recurrence is None:
            return self.forward(network, name, p, observation, ctx), lambda action: memory
        recurrence, inputs = self.recurrence, self.recurrence.acting_inputs(observation, memory)
        tensors, features, hidden = {**p["weights"], **p["buffers"]}, {}, {}
        for each, body in recurrence.bodies.items():
            prefix = name if body is network.body else each
            seen = self._seen(p, inputs, each)
            features[prefix], hidden[each] = body.step(tensors, seen, Context(), f"{prefix}.body.")
        out = network.answer(tensors, features[name], inputs, ctx or Context(), f"{name}.")
        return out, lambda action: recurrence.after(memory, hidden, action)

    def inputs(self, rollout: Rollout) -> tree.Tree:
        """Network inputs for every step of a rollout, `[*L, T, N, ...]`.

        They are observations, of networks with a memory with its state and additional inputs.
        """
        return rollout["observation"] if self.recurrence is None else self.recurrence.inputs(rollout)

    def next_inputs(self, rollout: Rollout) -> tree.Tree:
        """Network inputs for the next observation of every step of a rollout, `[*L, T, N, ...]`."""
        return rollout["next_observation"] if self.recurrence is None else self.recurrence.next_inputs(rollout)

    def items(self, credited: tree.Tree, axes: int) -> tree.Tree:
        """Reshape a batch of steps `[*L, T, N, ...]` to the items of minibatches, `[*L, M, ...]`.

        They are single steps, or of a recurrent agent whole sequences.
        """
        return flatten_time(credited, axes) if self.recurrence is None else self.recurrence.items(credited, axes)

    def samples(self, batch: tree.Tree) -> tree.Tree:
        """Flatten the items of a minibatch to single steps, `[*L, B, ...]`."""
        return batch if self.recurrence is None else self.recurrence.samples(batch)

    def scale_reward(self, state: State, rollout: Rollout, reward: Tensor) -> Tensor:
        """Normalise the reward by the running deviation of its discounted return, if `normalise_reward` is set."""
        normalisers = state["params"]["normalisers"]
        if "reward" not in normalisers:
            return reward
        ended, gamma = rollout["terminated"] | rollout["truncated"], state["params"]["hyper"]["gamma"]
        normalisers["reward"] = reward_update(normalisers["reward"], reward, ended, gamma, rollout["valid"])
        return normalise_reward(reward, normalisers["reward"])

    # ------------------------------------------------------------------ predictions, for lifelong methods and imitation

    @property
    def predicts(self) -> tuple[str, ...]:
        """Names of the networks that `distribution` depends on."""
        return () if self.policy is None else ("policy",)

    @property
    def sequential(self) -> bool:
        """Whether a sample is a whole sequence, as of recurrent agents."""
        return self.recurrence is not None

    def distribution(self, p: Params, batch: tree.Tree, ctx: Context) -> Distribution:
        """Action distribution of the policy: parameters `{name: [*L, B, ...]}`, of sequences `{name: [*L, B, T, ...]}`.

        Those that are only needed to sample are left out.
        """
        parameters = self._of_samples(self.policy, "policy", p, batch["observation"], ctx)
        return {name: value for name, value in parameters.items() if name not in ("features", "noise_log_std")}

    def features(self, p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        """Last hidden features of the policy, the input of its head: `[*L, B, D]`, of sequences `[*L, B, T, D]`."""
        features: Tensor = self._of_samples(self.policy.body, "policy.body", p, batch["observation"], ctx)
        return self.policy.placed(features, batch["observation"])

    def _of_samples(self, block: Block, name: str, p: Params, inputs: tree.Tree, ctx: Context) -> Any:
        """Forward pass of single steps, or of sequences, whose hidden states are recomputed from the first step."""
        if self.recurrence is None:
            return self.forward(block, name, p, inputs, ctx)
        axes = inputs["begins"].dim() - 2
        outputs = self.forward(block, name, p, self.recurrence.time_first(inputs), ctx)
        return tree.map(lambda x: x.transpose(axes, axes + 1), outputs)

    def log_prob(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Log probability of the actions, log pi(a | s), of every sample `[*L, B]`.

        Of a sequence it is the sum over its steps, log pi(a_1 ... a_T | s_1 ... s_T), as Fisher information needs it.
        """
        log_prob: Tensor = self.head.log_prob(self.distribution(p, batch, ctx or Context()), batch["action"])
        return log_prob.sum(-1) if self.sequential else log_prob

    def divergence(self, then: Distribution, now: Distribution) -> Tensor:
        """KL divergence KL(then || now) in nats of every sample `[*L, B]`; of a sequence the mean over its steps."""
        divergence: Tensor = self.head.kl(then, now)
        return divergence.mean(-1) if self.sequential else divergence

    def blank(self, learners: tuple[int, ...], device: torch.device) -> tree.Tree:
        """Zero sample `[*L, 1, ...]` of the learners `*L`, with the names, shapes and dtypes of what `draw` returns."""
        observation = zeros_of(self.observation_space, learners, device)
        if self.recurrence is not None:
            observation = self.recurrence.blank(observation, (*learners, 1), self.steps_per_iteration, device)
        return {"observation": observation}

    # ------------------------------------------------------------------ evaluation, and samples for lifelong methods

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Number of parallel environments for the evaluation of `episodes` episodes."""
        return evaluation_rows(episodes, native)

    def evaluate(
        self, p: Params, world: World, key: Tensor, episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Evaluate every learner on `episodes` episodes."""
        return evaluate(self, p, world, key, episodes, deterministic=deterministic)

    @torch.no_grad()
    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Sample n on-policy samples `[*L, n, ...]`, from the current states of the environments onwards.

        They are every eighth step, or of a recurrent agent sequences as long as those in training, one after another.

        The state stays as it is; live environments move on, so a new task must begin, or the run end, after it.
        """
        axes, every = state["key"].dim(), 1 if self.sequential else SPREAD
        rows = -(-n // world.num_envs)  # one sample in each environment makes a row
        lengths = [self.steps_per_iteration] * rows if self.sequential else [rows * every]
        copied, drawn = tree.map(torch.clone, state), []
        copied["key"] = random.fold(state["key"], "draw")
        for steps in lengths:
            copied, rollout = collect(self, copied, world, steps)
            spread = {name: _every(x, axes, every) for name, x in rollout.items() if name != "first_memory"}
            drawn.append(self._experience(rollout if self.sequential else spread, axes))
        samples = tree.map(lambda *parts: torch.cat(parts, axes), *drawn)
        return tree.map(lambda x: x.narrow(axes, 0, n), samples)

    def _experience(self, rollout: Rollout, axes: int) -> tree.Tree:
        """Reshape a rollout to samples `[*L, M, ...]`, with the network inputs as their `observation`."""
        told = {name: value for name, value in rollout.items() if name != "first_memory"}
        return self.items({**told, "observation": self.inputs(rollout)}, axes)

    def watch(self, state: State, observation: tree.Tree) -> State:
        """Update the observation normaliser with observations `[M, ...]` from elsewhere, for every learner.

        Pretraining, such as behaviour cloning, needs it before the first rollout.
        """
        normalisers, learners = state["params"]["normalisers"], state["key"].shape
        if "observation" in normalisers:
            seen = observation.to(state["key"].device).expand(*learners, *observation.shape)
            normalisers["observation"] = running_update(normalisers["observation"], seen)
        return state

    # ------------------------------------------------------------------ one iteration

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """One training iteration: collect a rollout of `steps_per_iteration` steps, and learn from it.

        In a phase of a lifelong method it may be the method that learns, from all samples of the rollout, while the
        agent stays as it is.

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
        """Warn if an action mask allowed no action where one was needed; ends of episodes need none."""
        mask = rollout["observation"].get(ACTION_MASK) if isinstance(rollout["observation"], dict) else None
        if mask is not None and bool((~mask.bool().any(-1) & rollout["valid"]).any()):
            warnings.warn(
                f"an observation to act on allows no action (its {ACTION_MASK} is 0 everywhere): it was taken to allow "
                "every one; give the environment an action for passing",
                RuntimeWarning,
                stacklevel=2,
            )

    def relabel(self, state: State, rollout: Rollout) -> tuple[State, dict[str, Tensor], Metrics]:
        """Compute the reward streams of a rollout: the task's reward, changed by the rewards of the settings."""
        rewards, metrics = {"task": rollout["reward"]}, Metrics()
        if self.rewards:
            state, rewards, metrics = relabel(self, self.rewards, state, rollout, rewards)
        if "reward" in state["params"]["normalisers"]:
            separate = {reward.name: rewards[reward.name] for reward in self.streams.rewards}
            total = total_reward(rewards, self.streams.rewards)
            rewards = {"task": self.scale_reward(state, rollout, total), **separate}
        return state, rewards, metrics

    @torch.no_grad()
    def end_iteration(self, state: State, rollout: Rollout) -> State:
        """Count the iteration and update the observation normaliser, after learning with the statistics of acting."""
        normalisers, axes = state["params"]["normalisers"], state["key"].dim()
        if "observation" in normalisers:
            observation, valid = rollout["observation"].flatten(axes, axes + 1), rollout["valid"].flatten(axes)
            normalisers["observation"] = running_update(normalisers["observation"], observation, valid)
        return self._counted(state)

    def _counted(self, state: State) -> State:
        """Count an iteration, and the steps of the task."""
        count = state["count"]
        state["count"] = {
            **count,
            "iterations": count["iterations"] + 1,
            "task_steps": count["task_steps"] + self.steps_per_iteration,
        }
        return state


def _warn_of_raw_units(settings: Any, space: gym.Space) -> None:
    """Warn if the initial actions of a policy in raw units are all at the bounds, or all alike."""
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


def _every(x: tree.Tree, axis: int, stride: int) -> tree.Tree:
    """Take every so many entries of an axis."""
    return tree.map(lambda leaf: leaf[(slice(None),) * axis + (slice(0, None, stride),)], x)
