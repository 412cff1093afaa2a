"""Soft actor-critic (Haarnoja et al., 2018): off-policy maximum entropy reinforcement learning.

Two critics learn the soft value of an action, the policy climbs the lesser of them, and a temperature is set so that
the policy keeps the entropy it is asked for. With Discrete actions (Christodoulou, 2019) the critics value all of them
at once, and means over the policy's actions are exact instead of sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.critics import box_units, critic_ensemble
from rlmeta.agents.networks import Network, build_body, check_mask, q_network, whitens, with_memory
from rlmeta.agents.recurrence import MemoryName, Recurrence, SeenName, check_sequence_settings
from rlmeta.envs.goals import Goals
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.learning import hindsight, off_policy
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.hindsight import HindsightName
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy, with_copy
from rlmeta.nn import Block, Context, Ensemble, allowed, bare, head_for
from rlmeta.nn.encoder import ACTION_MASK
from rlmeta.nn.initialisers import parameter
from rlmeta.rewards import Reward, check_rewards

TARGET = Copy("target", "q")


@dataclass(frozen=True)
class SAC:
    """Settings of SAC. A list for a number marked per learner compares its values."""

    num_envs: int = 4
    """Environments of each learner."""
    num_steps: int = 4
    """Steps in every environment between updates."""
    gradient_steps: int = 16
    """Gradient steps in each update."""
    batch_size: int = 256
    """Transitions in a minibatch."""
    capacity: int = 100_000
    """Transitions that each learner's replay memory holds."""
    learning_starts: int = 1_000
    """Transitions collected, with uniformly random actions, before the first gradient step."""
    actor_learning_rate: PerLearner = 3e-4
    """Adam's step size of the policy."""
    critic_learning_rate: PerLearner = 1e-3
    """Adam's step size of the critics."""
    temperature_learning_rate: PerLearner = 1e-3
    """Adam's step size of the temperature's logarithm; 0 keeps the initial one."""
    initial_temperature: float = 1.0
    """Initial temperature (entropy coefficient): the reward for a nat of entropy."""
    target_entropy: PerLearner = -1.0
    """Box actions: target entropy in nats per component of an action, in units of its bounds."""
    entropy_fraction: PerLearner = 0.2
    """Discrete actions: target entropy as a fraction of the largest, the mean log number of the allowed actions. The
    paper's 0.98 asks for a nearly uniform policy, and the temperature may grow without bound in search of one."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    target_rate: PerLearner = 0.005
    """Rate (tau) at which the target critics follow the critics in each gradient step."""
    critics: int = 2
    """Number of critics, of which the minimum is taken."""
    state_dependent_exploration: bool = False
    """Box actions: noise as a function of the features, held for noise_hold steps (gSDE, Raffin et al., 2021)."""
    noise_hold: int = 4
    """With state-dependent exploration: steps between two draws of the noise, and of the random actions before."""
    initial_log_std: float = 0.0
    """Box actions: the logarithm of the initial deviation, before actions are squashed into their bounds; with
    state-dependent exploration that of the noise's weights."""
    max_grad_norm: PerLearner = float("inf")
    """Clip each learner's gradients, those of policy and critics apart, to this norm."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the default network, and of the critics behind any."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    memory: MemoryName = "none"
    """A memory behind the bodies of policy and critics, for partially observable tasks: a gated recurrent unit (GRU),
    an LSTM, or attention over the last steps; minibatches then are of sequences."""
    memory_size: int = 64
    """Features of the memory."""
    memory_layers: int = 1
    """Layers of the memory."""
    context: int = 32
    """With attention: steps of its episode that the memory holds; a layer looks at these and at the present one."""
    attention_heads: int = 4
    """With attention: heads of every layer; twice their number divides memory_size."""
    sees: tuple[SeenName, ...] = ()
    """Additional inputs of the memory: the last action, its reward, whether an episode starts."""
    sequence_length: int = 16
    """With a memory: steps of a sequence, which divide batch_size. Each begins where a rollout of num_steps did: the
    policy's memory with the state that acting had there (R2D2, Kapturowski et al., 2019), those of the critics with
    that of an episode's start."""
    burn_in: int = 0
    """With a memory: first steps of a sequence that refresh the state, and are not learned from."""
    hindsight: HindsightName = "none"
    """Goals taken in hindsight, for tasks with goals (HER, Andrychowicz et al., 2017): "future" trains on drawn
    transitions as if a goal that was achieved later in their episode had been the desired one; "none" does not."""
    hindsight_goals: PerLearner = 4.0
    """With hindsight: transitions with a goal taken so for every one with its own (the paper's k)."""
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        for name in ("actor_learning_rate", "critic_learning_rate", "max_grad_norm", "initial_temperature"):
            require_range(self, name, 0.0, above=True)
        require_range(self, "temperature_learning_rate", 0.0)
        require_range(self, "entropy_fraction", 0.0, 1.0)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        require_range(self, "noise_hold", 1)
        require_range(self, "gamma", 0.0, 1.0)
        require_range(self, "target_rate", 0.0, 1.0, above=True)
        require_range(self, "critics", 1)
        require_range(self, "hidden_sizes", 1)
        off_policy.check_settings(self)
        hindsight.check_settings(self)
        check_sequence_settings(self)
        if self.memory != "none":
            off_policy.check_settings(self, self.sequence_length)
            require(self.hindsight == "none", "SAC: hindsight draws no sequences, which a memory needs: leave one out")

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> SACAgent:
        """Create the SAC agent for an observation and an action space."""
        return SACAgent(self, observation_space, action_space, methods)


class Temperature(Block):
    """Temperature (entropy coefficient): a parameter, its logarithm."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log = parameter(value=float(torch.tensor(initial).log()))


class SACAgent(Agent):
    """SAC agent for an observation and an action space."""

    settings: SAC
    goals: Goals | None = None
    """What the task pays for other goals, where transitions take them in hindsight."""

    def __init__(
        self, settings: SAC, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.units = None if self.discrete else box_units("SAC", action_space)
        require(
            not (self.discrete and settings.state_dependent_exploration),
            f"SAC: state_dependent_exploration is for a Box, the actions are {action_space}: leave it out",
        )
        hindsight.check_space(settings, observation_space)
        super().__init__(settings, observation_space, action_space, methods)
        self.noise_hold = settings.noise_hold if settings.state_dependent_exploration else 1
        self.steps_per_iteration = settings.num_steps
        self.least_steps = 1 if settings.memory == "none" else settings.sequence_length
        self.idle_steps = off_policy.idle_steps(settings, self.least_steps)
        blocks: dict[str, Any] = bare(self.networks)
        self.policy, self.q = blocks["policy"], blocks["q"]
        self.head = self.policy.head
        if settings.memory != "none":
            self.recurrence = Recurrence(settings.sees, action_space, blocks)
        self.copies, self.beside_observations = (TARGET,), ("q", "temperature")

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, a squashed Gaussian or categorical, `q`, all critics, and `temperature`."""
        s, space, actions = self.settings, self.observation_space, self.action_space
        check_mask(space, actions)
        body, features = build_body(s.network, space, s.hidden_sizes, s.activation, "torch", whitens(s))
        body, features = with_memory(s, body, features, actions)
        if self.units is None:
            head = head_for(actions, features, initial_scale=1.0)
            q = Ensemble(lambda: q_network(s, space, actions), s.critics)
        else:
            head = head_for(
                actions,
                features,
                initial_scale=1.0,
                initial_log_std=s.initial_log_std,
                action_bounds="squash",
                state_dependent_noise=s.state_dependent_exploration,
            )
            q = critic_ensemble(s, space, self.units, s.critics)
        return {"policy": Network(body, head, features), "q": q, "temperature": Temperature(s.initial_temperature)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: target critics are copies of the critics, the replay memory is empty."""
        self.goals = hindsight.goals_for(self.settings, world)
        state = super().init(key, hyper, world)
        p = with_copy(state["params"], TARGET)
        state["params"] = {**p, "hyper": {**hyper, "warms_up": torch.ones_like(key, dtype=torch.bool)}}
        state["optimizer"] = init_optimizer(self.groups(state)[0], state)
        inputs = None
        if self.recurrence is not None:
            inputs = self.recurrence.acting_inputs(world.observation(state["world"]), state["memory"])
        state["replay"] = off_policy.init_replay(self.settings, world, state, inputs)
        return state

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions: a sample from the policy, random before learning starts; or the policy's likeliest."""
        distribution, memory_after = self.answer_at(self.policy, "policy", p, observation, memory)
        if deterministic:
            action = self.head.mode(distribution)
            return action, memory_after(action)
        action = self.head.sample(distribution, key)
        uniform = self._uniform(distribution, key)
        action = torch.where(align(p["hyper"]["warms_up"], action), uniform, action)
        return action, memory_after(action)

    def _uniform(self, distribution: dict[str, Tensor], key: Tensor) -> Tensor:
        """Uniformly random actions, among those that a mask allows."""
        if self.units is None:
            logits = distribution["logits"]
            allowed = torch.where(logits > torch.finfo(logits.dtype).min, 0.0, logits)
            return self.head.sample({"logits": allowed}, random.fold(key, "exploration"))
        shape = distribution["mean"].shape[key.dim() :]
        return self.units.to_environment(random.uniform(key, "exploration", 0, shape) * 2.0 - 1.0)

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """One training iteration, with random actions before learning starts."""
        state["params"]["hyper"]["warms_up"] = off_policy.warms_up(self, state)
        self.goals = hindsight.goals_for(self.settings, world)
        return super().iterate(state, world)

    # ------------------------------------------------------------------ learn

    def values(self, p: Params, name: str, observation: tree.Tree, action: Tensor | None, ctx: Context) -> Tensor:
        """Values by all critics `name` of actions `[*L, B, ...]`: `[*L, critics, B]`.

        None gives those of all Discrete actions, `[*L, critics, B, A]`; masked ones are minus infinity.
        """
        tensors, seen = {**p["weights"], **p["buffers"]}, self._seen_by_critics(p, name, observation)
        if self.units is not None:
            return self.q.run(tensors, {"observation": seen, "action": action}, ctx, f"{name}.")
        q: Tensor = self.q.run(tensors, seen, ctx, f"{name}.")
        if action is None:
            return q
        chosen = action.unsqueeze(-2).unsqueeze(-1).expand(*q.shape[:-1], 1)
        return q.gather(-1, chosen).squeeze(-1)

    def _seen_by_critics(self, p: Params, name: str, inputs: tree.Tree) -> tree.Tree:
        """Inputs of the critics `name`; their memories begin every sequence as an episode."""
        if self.recurrence is None:
            return self.preprocess(p, inputs)
        weight, axes = p["weights"]["temperature.log"], p["hyper"]["gamma"].dim()
        rows = next(tree.leaves(inputs["hidden"])).shape[: axes + 1]
        state = self.q.member.body.memory.initial(tuple(rows), weight.device)
        hidden = tree.map(lambda x: x.to(weight.dtype) if x.is_floating_point() else x, state)
        return self._seen(p, {**inputs, "hidden": {"q": hidden}}, name)

    def soft(
        self, p: Params, critics: str, observation: tree.Tree, ctx: Context, key: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Soft value E[min Q(s, a) - alpha log pi(a | s)] of the policy, and its entropy, `[*L, B]` each.

        Of Discrete actions the mean is over all, else it is taken at one that is sampled.
        """
        axes, now = key.dim(), self.forward(self.policy, "policy", p, observation, ctx)
        if self.units is None:
            q = self.values(p, critics, observation, None, Context()).amin(axes)
            return losses.expected_soft_value(q, now["logits"], alpha), self.head.entropy(now)
        action, log_prob = self.head.sample_log_prob(now, key)
        q = self.values(p, critics, observation, action, Context()).amin(axes)
        return losses.soft_value(q, log_prob, alpha), -log_prob

    def wanted(self, p: Params, observation: tree.Tree, valid: Tensor) -> Tensor:
        """Target entropy in nats, `[*L]`."""
        h = p["hyper"]
        if self.units is not None:
            return h["target_entropy"] * self.units.centre.numel() + self.head.log_half_width
        number = torch.full(valid.shape, float(self.action_space.n), device=valid.device)  # type: ignore[attr-defined]
        observation = observation["observation"] if self.sequential else observation
        if isinstance(observation, dict) and ACTION_MASK in observation:
            number = allowed(observation[ACTION_MASK]).sum(-1).to(number.dtype)
        return h["entropy_fraction"] * masked_mean(number.log(), valid)

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of critics, policy and temperature for transitions `[*L, B, ...]`; needs a key."""
        assert ctx.key is not None
        axes, valid = ctx.key.dim(), batch["valid"]
        alpha = p["weights"]["temperature.log"].exp()
        observation, next_observation = batch["observation"], batch["next_observation"]

        # critics: (Q(s, a) - y)^2 with y = r + gamma (min Q'(s', a') - alpha log pi(a' | s')), a' ~ pi(. | s')
        with torch.no_grad():
            next_key = random.fold(ctx.key, "next action")
            after, _ = self.soft(p, "target", next_observation, Context(), next_key, alpha)
            target = losses.td_target(batch["reward"], batch["discount"], after)
        q = self.values(p, "q", observation, batch["action"], ctx)
        error = (q - target.unsqueeze(axes)).square()
        critic = masked_mean(error, valid.unsqueeze(axes).expand_as(error)).sum(-1)

        # policy: alpha log pi(a | s) - min Q(s, a), a ~ pi(. | s)
        value, entropy = self.soft(p, "q", observation, ctx, random.fold(ctx.key, "action"), alpha)
        actor = -masked_mean(value, valid)

        # temperature: -log alpha (log pi(a | s) + wanted entropy)
        mean_entropy = masked_mean(entropy.detach(), valid)
        temperature = p["weights"]["temperature.log"] * (mean_entropy - self.wanted(p, observation, valid))
        if ctx.report:
            mean_q = masked_mean(q, valid.unsqueeze(axes).expand_as(q)).mean(-1)
            seen = {"temperature": alpha, "entropy": mean_entropy, "q_values": mean_q}
            ctx.info |= {f"losses/{name}": value for name, value in seen.items()}
        return {"critic": critic, "actor": actor, "temperature": temperature}

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Add the rollout to the replay memory; after a warm-up, take gradient steps on random transitions."""
        off_policy.remember(self, state, rollout, rewards)
        if not off_policy.ready(self, state, self.least_steps):
            return state, {}
        rate = state["params"]["hyper"]["target_rate"]
        follow = {TARGET: rate.expand(self.settings.gradient_steps, *rate.shape)}
        state, info = off_policy.learn(self, state, self.groups, follow, draw=hindsight.drawing(self.goals, state))
        off_policy.end_warm_up(state)
        return state, info

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: critics, policy and temperature in every gradient step, each on its own loss alone."""
        h = state["params"]["hyper"]
        return [
            (
                Group("critic", ("q.",), ("critic",), optim.adam(h["critic_learning_rate"]), h["max_grad_norm"]),
                Group("actor", ("policy.",), ("actor",), optim.adam(h["actor_learning_rate"]), h["max_grad_norm"]),
                Group("temperature", ("temperature.",), ("temperature",), optim.adam(h["temperature_learning_rate"])),
            )
        ]
