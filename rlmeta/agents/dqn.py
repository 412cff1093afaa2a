"""Deep Q-networks (Mnih et al., 2015), with the extensions that together are Rainbow (Hessel et al., 2018).

Each is a setting of its own: double Q-learning (van Hasselt et al., 2016), n-step targets, dueling networks (Wang et
al., 2016), prioritised replay (Schaul et al., 2016), noisy networks (Fortunato et al., 2018), and distributions of
returns by atoms (Bellemare et al., 2017) or quantiles (Dabney et al., 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.networks import q_network
from rlmeta.agents.recurrence import MemoryName, Recurrence, SeenName, check_sequence_settings
from rlmeta.envs.world import World
from rlmeta.errors import SpaceError
from rlmeta.functional import distributional, losses, optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.schedules import ScheduleName, anneal, linear
from rlmeta.learning import off_policy
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group, whole
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_finite, require_range, values_of
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy, follow, with_copy
from rlmeta.nn import Block, CategoricalQHead, Context, QHead, QuantileQHead, StreamOptions, bare
from rlmeta.rewards import Reward, check_rewards

TARGET = Copy("target", "q")
AVERAGE = Copy("average", "q")


@dataclass(frozen=True)
class DQN:
    """Settings of DQN. A list for a number marked per learner compares its values."""

    num_envs: int = 4
    """Environments of each learner."""
    num_steps: int = 4
    """Steps in every environment between updates."""
    gradient_steps: int = 8
    """Gradient steps in each update."""
    batch_size: int = 64
    """Transitions in a minibatch."""
    capacity: int = 50_000
    """Transitions that each learner's replay memory holds."""
    learning_starts: int = 1_000
    """Transitions collected, with random actions, before the first gradient step."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon, which bounds its steps where gradients are small."""
    learning_rate_schedule: ScheduleName = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    double: bool = True
    """Double Q-learning: choose the next action by the online network, evaluate it by the target network."""
    n_steps: int = 1
    """Steps of n-step returns, after which the target network's value is used."""
    dueling: bool = False
    """Dueling network: the value of a state and the advantages of actions have layers of their own."""
    distribution: Literal["none", "categorical", "quantile"] = "none"
    """Learn the distribution of returns: "categorical" (C51) by the probabilities of `atoms` returns from `v_min` to
    `v_max`, "quantile" (QR-DQN) by `atoms` quantiles; "none" learns its mean alone."""
    atoms: int = 51
    """Atoms, or quantiles, of a distribution of returns."""
    v_min: float = -10.0
    """Smallest return of a categorical distribution."""
    v_max: float = 10.0
    """Largest return of a categorical distribution."""
    prioritised: bool = False
    """Prioritised replay: draw transitions in proportion to their errors, not uniformly."""
    priority_exponent: PerLearner = 0.5
    """Exponent (alpha) of errors in priorities; 0 draws uniformly."""
    importance_exponent: PerLearner = 0.4
    """Exponent (beta) of importance weights at the start; it rises to 1 with the budget."""
    noisy: bool = False
    """Noisy network: layers of the head have random weights of learned spread, so that epsilon may be 0."""
    target_every: int = 100
    """Gradient steps between two updates of the target network."""
    target_rate: PerLearner = 1.0
    """Rate (tau) at which the target network follows the online one; 1 copies it."""
    average_rate: PerLearner = 1.0
    """Below 1, greedy actions (evaluation, `act`) come from a moving average of the weights, which goes this far
    towards them after each update; 1 acts by the weights themselves, as do runs with lifelong methods."""
    epsilon_start: PerLearner = 1.0
    """Probability of a random action at the start."""
    epsilon_end: PerLearner = 0.05
    """Probability of a random action once the exploration is over."""
    exploration_fraction: PerLearner = 0.2
    """Part of the budget over which epsilon falls linearly."""
    huber_delta: PerLearner = math.inf
    """Threshold of the Huber loss; infinity for the squared error, 1 is the paper's clipped error. Quantiles need a
    finite one, a categorical distribution has none."""
    max_grad_norm: PerLearner = 10.0
    """Clip each learner's gradient to this norm."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the default network."""
    head_sizes: tuple[int, ...] = ()
    """Widths of hidden layers of the head, with ReLUs, after the network: of each stream of a dueling one, and noisy in
    a noisy one."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    memory: MemoryName = "none"
    """A memory behind the body of the network, for partially observable tasks: a gated recurrent unit (GRU), an LSTM,
    or attention over the last steps; minibatches then are of sequences (DRQN, Hausknecht and Stone, 2015)."""
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
    """With a memory: steps of a sequence, which divide batch_size. Each begins where a rollout of num_steps did, with
    the state that acting had there (R2D2, Kapturowski et al., 2019)."""
    burn_in: int = 0
    """With a memory: first steps of a sequence that refresh the stored state, and are not learned from."""
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "huber_delta"):
            require_range(self, name, 0.0, above=True)
        for name in ("gamma", "epsilon_start", "epsilon_end", "priority_exponent", "importance_exponent"):
            require_range(self, name, 0.0, 1.0)
        for name in ("target_rate", "average_rate", "exploration_fraction"):
            require_range(self, name, 0.0, 1.0, above=True)
        for name in ("n_steps", "target_every"):
            require_range(self, name, 1)
        require_range(self, "atoms", 2)
        require_finite(self, "v_min", "v_max")
        name = type(self).__name__
        require(self.v_min < self.v_max, f"{name}: v_min is {self.v_min:g}, expected less than v_max, {self.v_max:g}")
        bounded = self.distribution != "quantile" or max(values_of(self.huber_delta)) < math.inf
        require(bounded, f"{name}: huber_delta is inf, expected a finite one for quantiles, such as 1")
        off_policy.check_settings(self, self.n_steps)
        check_sequence_settings(self)
        if self.memory != "none":
            self._check_sequences()

    def _check_sequences(self) -> None:
        require(not self.prioritised, f"{type(self).__name__}: prioritised draws no sequences, which a memory needs")
        require(self.n_steps == 1, f"DQN: with a memory targets are of one step, got n_steps = {self.n_steps}: give 1")
        off_policy.check_settings(self, self.sequence_length)

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> DQNAgent:
        """Create the DQN agent for an observation and an action space."""
        return DQNAgent(self, observation_space, action_space, methods)


class DQNAgent(Agent):
    """DQN agent for an observation and an action space."""

    settings: DQN

    def __init__(
        self, settings: DQN, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        if not isinstance(action_space, gym.spaces.Discrete):
            raise SpaceError(f"DQN chooses among Discrete actions, the task has {action_space}: use PPO or A2C")
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.least_steps = settings.n_steps if settings.memory == "none" else settings.sequence_length
        self.idle_steps = off_policy.idle_steps(settings, self.least_steps)
        self.averaged = min(values_of(settings.average_rate)) < 1.0 and not self.methods
        self.acting_network = "average" if self.averaged else "q"
        self.copies = (TARGET, AVERAGE) if self.averaged else (TARGET,)
        blocks = bare(self.networks)
        self.q: Any = blocks["q"]
        if settings.memory != "none":
            self.recurrence = Recurrence(settings.sees, action_space, blocks)

    def networks(self) -> dict[str, Block]:
        """Build the network: `q`, the value of every action or the distribution of its return."""
        return {"q": q_network(self.settings, self.observation_space, self.action_space, self._head)}

    def _head(self, features: int, actions: int) -> Block:
        s = self.settings
        options = StreamOptions(s.dueling, s.noisy, tuple(s.head_sizes))
        if s.distribution == "categorical":
            return CategoricalQHead(features, actions, s.atoms, s.v_min, s.v_max, options)
        if s.distribution == "quantile":
            return QuantileQHead(features, actions, s.atoms, options)
        return QHead(features, actions, options=options)

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: the target network is a copy of the online one, the replay memory is empty."""
        state = super().init(key, hyper, world)
        p = with_copy(state["params"], TARGET)
        p = with_copy(p, AVERAGE) if self.averaged else p
        state["params"] = {**p, "hyper": {**hyper, "epsilon": hyper["epsilon_start"].clone()}}
        state["optimizer"] = init_optimizer(optim.adam(hyper["learning_rate"]), state)
        inputs = None
        if self.recurrence is not None:
            inputs = self.recurrence.acting_inputs(world.observation(state["world"]), state["memory"])
        prioritised = self.settings.prioritised
        state["replay"] = off_policy.init_replay(self.settings, world, state, inputs, prioritised)
        return state

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose epsilon-greedy actions `[*L, N]`; a masked action is never taken.

        Environments explore with noise of their own; evaluation has none.
        """
        noise = None
        if self.settings.noisy and not deterministic:
            numbers = torch.arange(next(tree.leaves(observation)).shape[key.dim()], device=key.device)
            noise = random.fold(random.fold(key, "noise").unsqueeze(-1), numbers)
        output, memory_after = self._acting(p, observation, memory, noise, deterministic)
        values = self.q.head.values(output)
        best = values.argmax(-1)
        if deterministic:
            return best, memory_after(best)
        rows = best.shape[key.dim() :]
        other = random.uniform(key, "exploration", 0, values.shape[key.dim() :]).masked_fill(values == -torch.inf, -1.0)
        explore = random.uniform(key, "epsilon", 0, rows) < align(p["hyper"]["epsilon"], best)
        action = torch.where(explore, other.argmax(-1), best)
        return action, memory_after(action)

    def _acting(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, noise: Tensor | None, deterministic: bool
    ) -> tuple[Any, Callable[[Tensor], tree.Tree]]:
        """Output of the acting network's head, and a function from the action to the memory after it."""
        name = "average" if deterministic and self.averaged else "q"
        if self.recurrence is not None:
            return self.answer_at(self.q, name, p, observation, memory, Context(key=noise))
        return self.outputs(name, p, observation, noise), lambda action: memory

    def outputs(
        self, name: str, p: Params, observation: tree.Tree, noise: Tensor | None, ctx: Context | None = None
    ) -> Any:
        """Output of the head for observations `[*L, N, ...]`.

        Args:
            name: the network, "q" or that of a copy.
            p: the effective parameters.
            observation: as the environment gives them.
            noise: key of a noisy head, `[*L]`, or `[*L, N]` for other noise in every row; None for no noise.
            ctx: of the rest of the network.
        """
        ctx = ctx or Context()
        features = self.forward(self.q.body, f"{name}.body", p, observation, ctx)
        tensors = {**p["weights"], **p["buffers"]} if p["buffers"] else p["weights"]
        return self.q.answer(tensors, features, observation, replace(ctx, key=noise), f"{name}.")

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """One training iteration, with the epsilon of the current progress."""
        state["params"]["hyper"]["epsilon"] = self.epsilon(state)
        return super().iterate(state, world)

    def epsilon(self, state: State) -> Tensor:
        """Probability of a random action `[*L]` at the current progress; 1 before learning starts."""
        h = state["params"]["hyper"]
        spent = state["progress"] / h["exploration_fraction"]
        epsilon = torch.as_tensor(linear(h["epsilon_start"], h["epsilon_end"])(spent))
        return torch.where(off_policy.warms_up(self, state), torch.ones_like(epsilon), epsilon)

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Temporal-difference loss `[*L]` of a minibatch of transitions `[*L, B, ...]`, of a memory in sequences.

        The errors of the samples go into `ctx`.
        """
        kind, delta = self.settings.distribution, p["hyper"]["huber_delta"]
        with torch.no_grad():
            target = self.target(p, batch, ctx)
        output = self.outputs("q", p, batch["observation"], self._noise(ctx, "online"), ctx)
        chosen = self.q.head.take(output, batch["action"])
        if kind == "none":
            chosen = chosen.masked_fill(~batch["valid"], 0.0)  # where nothing was done a mask may close the action
            error = losses.huber_error(chosen, target, delta)
            ctx.errors = (chosen - target).abs()
        elif kind == "categorical":
            ctx.errors = error = distributional.categorical_divergence(chosen, target)
        else:
            ctx.errors = error = distributional.quantile_huber(chosen, target, delta)
        if ctx.report:
            values = self.q.head.values(output).gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
            ctx.info["losses/q_values"] = masked_mean(values, batch["valid"])
        return {"q": distributional.weighted_mean(error, batch["valid"], batch.get("weight"))}

    def target(self, p: Params, batch: tree.Tree, ctx: StepContext) -> Tensor:
        """Target of the actions taken: values `[*L, B]`, or distributions of returns `[*L, B, K]`."""
        s, head, reward, discount = self.settings, self.q.head, batch["reward"], batch["discount"]
        output = chooser = self.outputs("target", p, batch["next_observation"], self._noise(ctx, "target"))
        if s.double:
            chooser = self.outputs("q", p, batch["next_observation"], self._noise(ctx, "choice"))
        following = head.take(output, head.values(chooser).argmax(-1))
        if s.distribution == "categorical":
            probabilities = following.softmax(-1)
            return distributional.categorical_projection(probabilities, reward, discount, s.v_min, s.v_max)
        if s.distribution == "quantile":
            return distributional.quantile_target(following, reward, discount)
        return losses.td_target(reward, discount, following)

    def _noise(self, ctx: Context, stream: str) -> Tensor | None:
        """Key of the noise of one of a gradient step's forward passes, None without noise."""
        return random.fold(ctx.key, stream) if self.settings.noisy and ctx.key is not None else None

    def log_prob(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Log probability of the actions, the log softmax of the action values, `[*L, B]`; of a sequence their sum."""
        ctx = ctx or Context()
        if self.sequential:
            output = self._of_samples(self.q, "q", p, batch["observation"], ctx)
        else:
            output = self.outputs("q", p, batch["observation"], self._noise(ctx, "online"), ctx)
        log_prob = self.q.head.values(output).log_softmax(-1).gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        return log_prob.sum(-1) if self.sequential else log_prob

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Add the rollout to the replay memory; after a warm-up, take gradient steps on random transitions."""
        s, h = self.settings, state["params"]["hyper"]
        off_policy.remember(self, state, rollout, rewards)
        metrics = {"charts/learning_rate": self.annealed(state), "charts/epsilon": h["epsilon"]}
        if not off_policy.ready(self, state, self.least_steps):
            return state, metrics
        moves = self.moves(state)
        state, info = off_policy.learn(self, state, self.groups, moves, s.n_steps, prioritised=s.prioritised)
        if self.averaged:
            follow(state, AVERAGE, h["average_rate"])
        return state, {**info, **metrics}

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: all weights in every gradient step."""
        adam = optim.adam(self.annealed(state), eps=self.settings.adam_epsilon)
        return [whole(adam, state["params"]["hyper"]["max_grad_norm"])]

    def moves(self, state: State) -> dict[Copy, Tensor]:
        """Target update rates after each gradient step, `[gradient_steps, *L]`; none if the target network stays."""
        done, every = int(state["count"]["gradient_steps"].max()), self.settings.target_every
        moves = [(done + number) % every == 0 for number in range(1, self.settings.gradient_steps + 1)]
        rate = state["params"]["hyper"]["target_rate"]
        return {TARGET: torch.stack([rate * move for move in moves])} if any(moves) else {}

    def annealed(self, state: State) -> Tensor:
        """Annealed learning rate `[*L]` at the current progress."""
        rate = state["params"]["hyper"]["learning_rate"]
        return anneal(rate, self.settings.learning_rate_schedule, state["progress"])
