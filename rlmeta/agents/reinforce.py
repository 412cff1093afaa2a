"""REINFORCE (Williams, 1992), with the steps by which it became an actor-critic as settings.

grad J = E[ sum_t grad log pi(a_t | s_t) * credit_t ], where the credit of an action is, in the order of the course:
the reward it got at once; the whole episode's return; the return from there on (`to_go`); discounted; normalised; less
a learned baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.networks import policy_network, value_network
from rlmeta.agents.recurrence import MemoryName, Recurrence, SeenName, check_memory_settings
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.returns import monte_carlo_return
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.nn import ActionBounds, Block, bare
from rlmeta.rewards import Reward, check_rewards


@dataclass(frozen=True)
class REINFORCE:
    """Settings of REINFORCE. A list for a number marked per learner compares its values."""

    num_envs: int = 8
    """Environments of each learner."""
    num_steps: int = 250
    """Steps in every environment between updates; only whole episodes count, unless a baseline bootstraps the rest."""
    credit: Literal["immediate", "episode", "to_go"] = "to_go"
    """Return of an action: its own reward, the whole episode's return, or the return from there on."""
    gamma: PerLearner = 0.99
    """Discount factor; 1 adds rewards up."""
    normalise_return: bool = True
    """Centre and scale the credit over the batch, per learner."""
    baseline: Literal["none", "batch", "learned"] = "learned"
    """Subtract nothing, the mean of the other environments at the same step, or a value learned by regression."""
    value_coefficient: PerLearner = 0.5
    """Weight of the baseline's loss, mean (return - value)^2."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size."""
    learning_rate_schedule: ScheduleName = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    entropy_coefficient: PerLearner = 0.0
    """Weight of the entropy bonus."""
    action_noise: PerLearner = 0.0
    """Exploration on top of the policy's own: probability of a uniform action, or deviation of
    noise on Box actions, in the policy's unit."""
    max_grad_norm: PerLearner = 1.0
    """Clip each learner's gradient to this norm."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    normalise_reward: bool = False
    """Divide rewards by the running deviation of their discounted return."""
    action_bounds: ActionBounds = "scale"
    """Box actions: take the bounds for the policy's unit, so that it acts on the scale of the task whatever it counts
    in; or squash actions into them by a tanh; or act in raw units, clipped at the bounds."""
    initial_log_std: float = 0.0
    """Box actions: the logarithm of the initial deviation, in the policy's unit."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    memory: MemoryName = "none"
    """A memory behind the body of every network, for partially observable tasks: a gated recurrent unit (GRU), an LSTM,
    or attention over the last steps; gradients then reach back num_steps."""
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
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        for name in ("learning_rate", "max_grad_norm"):
            require_range(self, name, 0.0, above=True)
        for name in ("entropy_coefficient", "value_coefficient", "action_noise"):
            require_range(self, name, 0.0)
        require_range(self, "gamma", 0.0, 1.0)
        for name in ("num_envs", "num_steps"):
            require_range(self, name, 1)
        check_memory_settings(self)
        require(self.baseline != "batch" or self.num_envs > 1, "REINFORCE: baseline batch needs num_envs of 2 or more")

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> REINFORCEAgent:
        """Create the REINFORCE agent for an observation and an action space."""
        return REINFORCEAgent(self, observation_space, action_space, methods)


class REINFORCEAgent(Agent):
    """REINFORCE agent for an observation and an action space."""

    settings: REINFORCE

    def __init__(
        self,
        settings: REINFORCE,
        observation_space: gym.Space,
        action_space: gym.Space,
        methods: Sequence[Method] = (),
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        blocks = bare(self.networks)
        self.policy, self.value = blocks["policy"], blocks.get("value")
        self.head: Any = self.policy.head
        if settings.memory != "none":
            self.recurrence = Recurrence(settings.sees, action_space, blocks)

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, the parameters of an action distribution, and `value`, a learned baseline."""
        spaces = self.observation_space, self.action_space
        policy = policy_network(self.settings, *spaces)
        if self.settings.baseline != "learned":
            return {"policy": policy}
        return {"policy": policy, "value": value_network(self.settings, *spaces)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run."""
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(optim.adam(hyper["learning_rate"]), state)
        return state

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions `[*L, N, ...]`: a sample from the policy with exploration noise, or the mode."""
        distribution, memory_after = self.answer_at(self.policy, "policy", p, observation, memory)
        action = self.head.mode(distribution) if deterministic else self._explored(p, distribution, key)
        return action, memory_after(action)

    def _explored(self, p: Params, distribution: Any, key: Tensor) -> Tensor:
        """Sample of the policy with the exploration noise on top of it."""
        action: Tensor = self.head.sample(distribution, key)
        noise = align(p["hyper"]["action_noise"], action)
        shape = action.shape[key.dim() :]
        if action.is_floating_point():
            return action + self.head.units.step(noise * random.normal(key, "noise", 0, shape))
        other = self.head.sample(tree.map(_uniform, distribution), random.fold(key, "uniform action"))
        explore = random.uniform(key, "noise", 0, shape[:1]).reshape(*key.shape, -1, *(1,) * (len(shape) - 1)) < noise
        return torch.where(explore, other, action)

    # ------------------------------------------------------------------ credit

    @torch.no_grad()
    def credit(self, p: Params, rollout: Rollout, rewards: dict[str, Tensor]) -> tree.Tree:
        """Estimate the return or advantage of every action, the training data of `losses`, `[*L, T, N, ...]`."""
        s = self.settings
        reward = torch.stack(list(rewards.values())).sum(0)
        ended = (rollout["terminated"] | rollout["truncated"]) & rollout["valid"]
        cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
        next_value = None
        if self.value is not None:
            next_value = self.forward(self.value, "value", p, self.next_inputs(rollout))
        discount = align(p["hyper"]["gamma"], reward) * ~rollout["terminated"]
        to_go = monte_carlo_return(reward, discount, next_value, cut)
        whole = ended.flip(-2).cumsum(-2).flip(-2) > 0  # the episode ends within the rollout
        credit, valid = to_go, rollout["valid"] & (whole if self.value is None else torch.ones_like(whole))
        if s.credit == "immediate":
            credit, valid = reward, rollout["valid"]
        elif s.credit == "episode":
            credit = _at_episode_start(to_go, ended)
        if s.baseline == "batch":
            credit = (credit - credit.mean(-1, keepdim=True)) * (credit.shape[-1] / (credit.shape[-1] - 1))
        kept = {"observation": self.inputs(rollout), "action": rollout["action"]}
        return {**kept, "valid": valid, "credit": credit, "return": to_go}

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Policy loss and, with a learned baseline, value loss `[*L]` of a batch `[*L, B, ...]`."""
        h, batch = p["hyper"], self.samples(batch)
        valid, credit = batch["valid"], batch["credit"]
        baseline_loss: dict[str, Tensor] = {}
        if self.value is not None:
            value = self.forward(self.value, "value", p, batch["observation"], ctx)
            baseline_loss["value"] = h["value_coefficient"] * losses.value_loss(value, batch["return"], valid)
            credit = credit - value.detach()
        if self.settings.normalise_return:
            credit = losses.normalise_advantage(credit, valid)
        distribution = self.forward(self.policy, "policy", p, batch["observation"], ctx)
        log_prob = self.head.log_prob(distribution, batch["action"])
        policy = losses.twice_differentiable_policy_gradient_loss(log_prob, credit, valid)
        entropy = masked_mean(self.head.entropy(distribution), valid)
        ctx.info.update({"losses/policy_loss": policy, "losses/entropy": entropy})
        return {"policy": policy - h["entropy_coefficient"] * entropy, **baseline_loss}

    def annealed(self, state: State) -> Tensor:
        """Annealed learning rate `[*L]` at the current progress."""
        rate = state["params"]["hyper"]["learning_rate"]
        return anneal(rate, self.settings.learning_rate_schedule, state["progress"])

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Take one gradient step on the whole rollout."""
        h = state["params"]["hyper"]
        batch = self.items(self.credit(self.effective_params(state), rollout, rewards), state["key"].dim())
        rate = self.annealed(state)
        state, info = step(self, state, batch, optim.adam(rate), max_grad_norm=h["max_grad_norm"], methods=self.methods)
        return state, {**info, "charts/learning_rate": rate}


def _uniform(logits: Tensor) -> Tensor:
    """Logits of the uniform distribution over the actions that a mask allows."""
    return torch.where(logits == torch.finfo(logits.dtype).min, logits, 0.0)


def _at_episode_start(to_go: Tensor, ended: Tensor) -> Tensor:
    """Return of the whole episode at every step `[*L, T, N]`: the return to go at its first step."""
    current, starts = to_go[..., 0, :], []
    for t, end in enumerate(ended.unbind(-2)):
        starts.append(current)
        if t + 1 < to_go.shape[-2]:
            current = torch.where(end, to_go[..., t + 1, :], current)
    return torch.stack(starts, -2)
