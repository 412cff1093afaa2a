"""Generative adversarial imitation learning (GAIL, Ho and Ermon, 2016): PPO with the reward of a discriminator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlmeta.agents.ppo import PPO, PPOAgent
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.engine.capture import Capture
from rlmeta.envs.world import World
from rlmeta.errors import DemonstrationError, SettingError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.normalise import normalise, running_init, running_update
from rlmeta.imitation.behaviour_cloning import draw, load_demonstrations, warm_start
from rlmeta.learning import owners
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types, shown
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import flatten_time, gather
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.nn import ActionUnits, Block, Context, Encoder, bare
from rlmeta.nn.feature_pictures import feature_network
from rlmeta.rewards import check_rewards
from rlmeta.rewards.reward import Memory, Rewards, check_name

SMALLEST_VARIANCE = 1e-4
"""Lower bound on the variance of a discriminator input, for inputs that hardly vary in demonstrations."""

Form = Literal["softplus", "logit", "log_sigmoid"]
"""Reward of a logit x: -log(1 - D) = softplus(x), x itself (the sum of both), or log D = -softplus(-x)."""


@dataclass(frozen=True)
class GAIL(PPO):
    """Settings of GAIL: those of PPO, whose reward is that of a discriminator, and of the discriminator.

    Any other agent learns from the same reward with `rewards=(AdversarialReward(...),)`.
    """

    demonstrations: Demonstrations | str | None = None
    """Expert demonstrations: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of demonstrated episodes to use, the first ones; 0 for all."""
    shuffled: bool = False
    """Control that must fail: shuffle which steps are of the demonstrations and which of the agent."""
    form: Form = "softplus"
    """Form of the learned reward: softplus (the paper's, always positive), logit, or log_sigmoid (always negative)."""
    discriminator_updates: int = 50
    """Gradient steps of the discriminator for each rollout."""
    discriminator_batch_size: int = 256
    """Batch size of the discriminator, for demonstrations and rollout each."""
    discriminator_learning_rate: PerLearner = 3e-3
    """Adam's learning rate for the discriminator."""
    discriminator_hidden_sizes: tuple[int, ...] = (32, 32)
    """Widths of the discriminator's hidden layers."""
    gradient_penalty: PerLearner = 1.0
    """Weight of (|d logit / d input| - 1)^2 between demonstrations and rollout (Gulrajani et al., 2017)."""
    absorbing: bool = False
    """Absorbing states after terminal ones in the discriminator (Kostrikov et al., 2019). Without them, an always
    positive reward favours long episodes and an always negative one short ones, whatever the demonstrations."""
    warm_start: int = 0
    """Gradient steps of behaviour cloning before the first rollout."""

    adapts = False
    """Whether it can be the inner loop of a meta-learner."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "discriminator_learning_rate", 0.0, above=True)
        require_range(self, "gradient_penalty", 0.0)
        for name in ("discriminator_updates", "discriminator_batch_size"):
            require_range(self, name, 1)
        for name in ("episodes", "warm_start"):
            require_range(self, name, 0)

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> PPOAgent:
        """Create the PPO agent for an observation and an action space, with the discriminator as its first reward.

        If the demonstrations are left unread, the agent can only act.
        """
        loaded = load_demonstrations(self.demonstrations, self.episodes, observation_space, action_space)
        if loaded is None:
            return PPOAgent(self, observation_space, action_space, methods)
        learned = AdversarialReward(
            loaded,
            self.form,
            self.discriminator_updates,
            self.discriminator_batch_size,
            hidden_sizes=self.discriminator_hidden_sizes,
            absorbing=self.absorbing,
            shuffled=self.shuffled,
        )
        agent = PPOAgent(self, observation_space, action_space, methods)
        agent.rewards = check_rewards((learned, *agent.rewards))
        if self.warm_start:
            steps = loaded.transitions()
            agent.pretrain = lambda state: warm_start(agent, state, steps, self.warm_start, 64, 1e-3)
        return agent


@dataclass(frozen=True, eq=False)
class AdversarialReward:
    """Adversarial reward: replaces the task's reward by that of a discriminator.

    The discriminator is trained on every rollout, before it computes the rewards of that rollout. It maximises
    E_demonstrations[log D] + E_agent[log(1 - D)] with D = sigmoid(logit(s, a)).
    """

    demonstrations: Demonstrations
    """Expert demonstrations."""
    form: Form = "softplus"
    """See `Form`."""
    updates: int = 50
    """Gradient steps for each rollout."""
    batch_size: int = 256
    """Batch size, for demonstrations and rollout each."""
    learning_rate: float = 3e-3
    """Adam's learning rate, unless the agent has the setting `discriminator_learning_rate`."""
    gradient_penalty: float = 1.0
    """Weight of (|d logit / d input| - 1)^2 between the two sides, unless the agent has this setting."""
    hidden_sizes: tuple[int, ...] = (32, 32)
    """Widths of the hidden layers."""
    absorbing: bool = False
    """Absorbing states after terminal ones in the discriminator."""
    shuffled: bool = False
    """Control that must fail: shuffle which steps are of the demonstrations and which of the agent."""
    name: str = "imitation"
    """Name of the reward stream and of its state."""

    def __post_init__(self) -> None:
        check_types(self)
        check_name(self.name)
        if not isinstance(self.demonstrations, Demonstrations):
            raise SettingError(
                f"AdversarialReward: demonstrations is {shown(self.demonstrations)}, expected Demonstrations: load a "
                "file by Demonstrations.load(path)"
            )
        require_range(self, "learning_rate", 0.0, above=True)
        require_range(self, "gradient_penalty", 0.0)
        for name in ("updates", "batch_size"):
            require_range(self, name, 1)

    # ------------------------------------------------------------------ set-up

    @cached_property
    def discriminator(self) -> Discriminator:
        """Discriminator for the demonstrations' spaces."""
        return Discriminator(self.demonstrations, self.hidden_sizes, self.absorbing)

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """Initial discriminator of every learner, with its optimizer.

        Raises:
            DemonstrationError: the demonstrations' spaces are not the task's.
            SettingError: `absorbing` without a discount below 1.
        """
        self.demonstrations.check(world.observation_space, world.action_space)
        if self.absorbing and not bool((state["params"]["hyper"]["gamma"] < 1).all()):
            raise SettingError("absorbing=True needs gamma below 1: an absorbing state pays for ever")
        rate = self.hyper(state)["discriminator_learning_rate"]
        memory: Memory = owners.init(
            self.discriminator, owners.own_key(state, f"rewards/{self.name}"), optim.adam(rate)
        )
        memory["digest"] = torch.full_like(memory["key"], int(self.demonstrations.digest[:15], 16))
        return memory

    def hyper(self, state: State) -> dict[str, Tensor]:
        """Settings `[*L]` of the discriminator: the agent's if it has them, else this reward's."""
        own = {"discriminator_learning_rate": self.learning_rate, "gradient_penalty": self.gradient_penalty}
        full = {name: torch.full_like(state["progress"], value, dtype=torch.float32) for name, value in own.items()}
        return {name: state["params"]["hyper"].get(name, value) for name, value in full.items()}

    # ------------------------------------------------------------------ training and rewards

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """Train the discriminator on a rollout, and replace the task's reward by its reward.

        Metrics: loss and entropy of the discriminator, and its accuracy on either side.

        Args:
            agent: not used.
            state: of the run.
            memory: state of the discriminator.
            rollout: to learn from.
            rewards: reward streams `[*L, T, N]` by name.

        Returns:
            The discriminator's new state, the reward streams, and metrics `[*L]`.

        Raises:
            DemonstrationError: the demonstrations are not those of the run.
        """
        if bool((memory["digest"] != int(self.demonstrations.digest[:15], 16)).any()):
            raise DemonstrationError("the demonstrations are not those the run began with: give it the same file")
        steps = self.read(rollout)
        if not self.absorbing and bool(steps["ends"].any()):
            _warn_of_horizons(self.form)
        flat = flatten_time(steps, state["key"].dim())
        memory, metrics = self.train(memory, flat, self.hyper(state), state["active"])
        owners.deactivate_nonfinite(state, memory)
        reward = self.judge(memory["params"], steps, state["params"]["hyper"]["gamma"])
        others = {name: stream for name, stream in rewards.items() if name != "task"}
        return memory, {self.name: reward, **others}, metrics

    def read(self, rollout: Rollout) -> dict[str, Tensor]:
        """Convert a rollout to discriminator inputs `[*L, T, N, ...]`: `input`, and `ends` and `valid` as numbers."""
        inputs = self.discriminator.encode(rollout["observation"], rollout["action"])
        ends = rollout["terminated"] & rollout["valid"]
        return {"input": inputs, "ends": ends.to(inputs.dtype), "valid": rollout["valid"].to(inputs.dtype)}

    def train(
        self, memory: Memory, steps: dict[str, Tensor], hyper: dict[str, Tensor], active: Tensor
    ) -> tuple[Memory, dict[str, Tensor]]:
        """Train the discriminator on minibatches of the demonstrations and of a rollout.

        Args:
            memory: state of the discriminator.
            steps: of the rollout, as `read` returns them, `[*L, M, ...]`.
            hyper: settings `[*L]` of the discriminator.
            active: `[*L]` bool, learners to train.

        Returns:
            The discriminator's new state, and metrics `[*L]`.
        """
        batches = (self._minibatch(memory, number, steps, hyper) for number in range(self.updates))
        optimizer = optim.adam(hyper["discriminator_learning_rate"])
        memory, reported = owners.train(self.discriminator, memory, batches, optimizer, active)
        return memory, {f"discriminator/{name.split('/')[-1]}": value for name, value in reported.items()}

    def _minibatch(self, memory: Memory, number: int, steps: dict[str, Tensor], hyper: dict[str, Tensor]) -> tree.Tree:
        """Draw the minibatch of a gradient step, by its number after those counted in `memory`."""
        key, counter = memory["key"], memory["count"]["gradient_steps"] + number
        rows = random.integers(key, "rollout", counter, (self.batch_size,), steps["input"].shape[-2])
        shown, own = draw(self.discriminator.shown, key, counter, self.batch_size), gather(steps, rows)
        if self.shuffled:
            shown, own = _shuffled(shown, own, random.uniform(key, "shuffled", counter, (self.batch_size,)) < 0.5)
        return {
            "demonstrations": shown,
            "agent": own,
            "mix": random.uniform(key, "mix", counter, (self.batch_size, 1)),
            "gradient_penalty": hyper["gradient_penalty"],
        }

    def judge(self, p: Params, steps: dict[str, Tensor], gamma: Tensor) -> Tensor:
        """Compute the reward `[*L, T, N]` of the steps of a rollout.

        With `absorbing`, a terminal step also gets r gamma / (1 - gamma), the return of an absorbing state with reward
        r at every step.
        """
        reward = _form(self.form, self.discriminator.logit(p, steps["input"]))
        if self.absorbing:
            for_ever = _form(self.form, self.discriminator.absorbing_logit(p)) * (gamma / (1 - gamma))
            reward = reward + steps["ends"] * align(for_ever, reward)
        return reward * steps["valid"]


class Discriminator:
    """Discriminator: the logit that a step is of the demonstrations, from observation and action.

    Inputs are normalised by the mean and standard deviation of the demonstrations.

    Args:
        demonstrations: expert data.
        hidden_sizes: widths of the hidden layers.
        absorbing: add an input that is 1 in the absorbing state and 0 elsewhere.
    """

    def __init__(self, demonstrations: Demonstrations, hidden_sizes: tuple[int, ...], absorbing: bool) -> None:
        space = demonstrations.action_space
        self.observation, self.action = Encoder(demonstrations.observation_space), Encoder(space)
        self.bounds: tuple[Tensor, Tensor] | None = None
        if isinstance(space, gym.spaces.Box):
            low, high = space.low.reshape(-1), space.high.reshape(-1)
            self.bounds = torch.from_numpy(space.low), torch.from_numpy(space.high)
            self.units = ActionUnits(space.shape, low.tolist(), high.tolist())
        self.features = self.observation.features + self.action.features + absorbing
        self._space, self._following = demonstrations.observation_space, self.action.features + absorbing
        self.hidden_sizes, self.absorbing = hidden_sizes, absorbing
        self.network, self.capture = bare(self.networks)["discriminator"], Capture()
        steps = demonstrations.transitions()
        inputs = self._features(steps["observation"], steps["action"])
        self.statistics = running_update(running_init((), inputs.shape[-1:]), inputs)
        whitened = self.encode(steps["observation"], steps["action"])
        self.shown = {"input": whitened, "ends": steps["terminated"].to(whitened.dtype)}
        """Input of the discriminator for the demonstrations: `input` `[M, D]`, `ends` `[M]`."""

    def networks(self) -> dict[str, Block]:
        """Networks: `discriminator`, from inputs to a logit."""
        return {"discriminator": feature_network(self._space, self.hidden_sizes, 1, following=self._following)}

    def encode(self, observation: tree.Tree, action: Tensor) -> Tensor:
        """Encode steps `[*L, ...]` as normalised inputs `[*L, ..., D]`."""
        features = self._features(observation, action)
        statistics = tree.map(lambda leaf: leaf.to(features.device), self.statistics)
        whitened = normalise(features, statistics, eps=SMALLEST_VARIANCE)
        return torch.cat((whitened, torch.zeros_like(whitened[..., :1])), -1) if self.absorbing else whitened

    def _features(self, observation: tree.Tree, action: Tensor) -> Tensor:
        """Concatenate observation and action; Box actions are clipped to their bounds and in units of these.

        In their own units, actions of a small scale would be divided by `SMALLEST_VARIANCE` instead of their variance.
        """
        seen = self.observation.run({}, observation, Context())
        if self.bounds is None:
            return torch.cat([seen, self.action.run({}, action, Context())], -1)
        low, high = (bound.to(action) for bound in self.bounds)
        return torch.cat([seen, self.units.to_policy(action.clamp(low, high)).to(seen.dtype)], -1)

    def logit(self, p: Params, inputs: Tensor) -> Tensor:
        """Logit of inputs, `[*L, ..., D]` -> `[*L, ...]`."""
        return self.network.run(p["weights"], inputs, Context(), "discriminator.").squeeze(-1)

    def absorbing_logit(self, p: Params) -> Tensor:
        """Logit of the absorbing state, `[*L]`."""
        return self.logit(p, self._absorbing_input(p)).squeeze(-1)

    def _absorbing_input(self, p: Params) -> Tensor:
        """Input of the absorbing state, `[*L, 1, D]`."""
        bias = min(p["weights"].values(), key=lambda weight: weight.dim())
        row = torch.zeros(1, self.features, dtype=bias.dtype, device=bias.device)
        row[..., -1] = 1.0
        return row.expand(*bias.shape[:-1], 1, self.features)

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Discriminator loss `[*L]`: binary cross-entropy with equal weights of both sides, and gradient penalty.

        Demonstrations have label 1, steps of the agent label 0. With `absorbing`, a visit of the absorbing state
        follows every terminal step.
        """
        shown, own = batch["demonstrations"], batch["agent"]
        inputs = [shown["input"], own["input"]]
        if self.absorbing:
            inputs.append(self._absorbing_input(p))
        sizes = [x.shape[-2] for x in inputs]
        real, fake, *rest = torch.split(self.logit(p, torch.cat(inputs, -2)), sizes, -1)
        valid = own["valid"]
        real_loss, fake_loss = softplus(-real).mean(-1), masked_mean(softplus(fake), valid)
        if rest:
            real_ends, fake_ends = shown["ends"].mean(-1), masked_mean(own["ends"], valid)
            absorbed = rest[0].squeeze(-1)
            real_loss = (real_loss + real_ends * softplus(-absorbed)) / (1 + real_ends)
            fake_loss = (fake_loss + fake_ends * softplus(absorbed)) / (1 + fake_ends)
        if ctx.report:
            with torch.no_grad():
                ctx.info["accuracy_demonstrations"] = (real > 0).to(real.dtype).mean(-1)
                ctx.info["accuracy_agent"] = masked_mean((fake < 0).to(fake.dtype), valid)
                both = torch.cat((real, fake), -1)
                ctx.info["entropy"] = (softplus(both) - both * both.sigmoid()).mean(-1)
        mixed = torch.lerp(own["input"], shown["input"], batch["mix"]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.logit(p, mixed).sum(), mixed, create_graph=True)
        penalty = (slope.square().sum(-1).add(1e-12).sqrt() - 1).square().mean(-1)
        return {"loss": real_loss + fake_loss, "gradient_penalty": batch["gradient_penalty"] * penalty}


def _shuffled(shown: tree.Tree, own: tree.Tree, swap: Tensor) -> tuple[tree.Tree, tree.Tree]:
    """Swap the rows of two minibatches `[*L, B, ...]` where `swap` `[*L, B]` is set."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(align(swap, a), a, b)

    sides = {name: own[name] for name in shown}
    return tree.map(choose, sides, shown), {**own, **tree.map(choose, shown, sides)}


def _form(form: Form, logit: Tensor) -> Tensor:
    if form == "softplus":
        return softplus(logit)
    return logit if form == "logit" else -softplus(-logit)


def _warn_of_horizons(form: Form) -> None:
    """Warn about the survival bias of a learned reward if episodes terminate (Kostrikov et al., 2019)."""
    bias = {
        "softplus": "form='softplus' is always positive and so pays for surviving",
        "log_sigmoid": "form='log_sigmoid' is always negative and so pays for ending soon",
        "logit": "form='logit' has no sign of its own, but nothing is learned of what comes after an end",
    }
    text = (
        f"episodes terminate at different times: {bias[form]}, whatever was demonstrated; absorbing=True removes that"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=2)
