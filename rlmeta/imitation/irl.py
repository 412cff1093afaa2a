"""Maximum causal entropy inverse reinforcement learning, with known dynamics (Ziebart, 2010)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.networks import value_network
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.native import Tabular
from rlmeta.envs.world import World
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import optim, random, tabular, tree
from rlmeta.imitation.behaviour_cloning import count_steps, draw, load_demonstrations
from rlmeta.learning.average import Average
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.nn import Block, Context, bare


@dataclass(frozen=True)
class IRL:
    """Settings of maximum causal entropy IRL. A list for a number marked per learner compares its values."""

    demonstrations: Demonstrations | str | None = None
    """Expert demonstrations: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of demonstrated episodes to use, the first ones; 0 for all."""
    horizon: int = 0
    """Planning horizon of the demonstrator, with a policy per step; 0 for one stationary policy with discounting."""
    gamma: float = 0.9
    """Discount factor of the demonstrator."""
    num_steps: int = 10
    """Gradient steps per iteration; budgets count gradient steps, since no environment is stepped."""
    learning_rate: PerLearner = 0.05
    """Adam's learning rate."""
    hidden_sizes: tuple[int, ...] = ()
    """Widths of the hidden layers of the reward network: none for a table of the states; some for deep MaxEnt."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the reward network."""
    network: NetworkFactory | None = None
    """Feature network: a function from the observation space to a module that returns features [B, D]."""

    num_envs = 1

    adapts = False
    """Whether it can be the inner loop of a meta-learner."""

    def __post_init__(self) -> None:
        check_types(self)
        require_range(self, "learning_rate", 0.0, above=True)
        require_range(self, "gamma", 0.0, 1.0)
        require_range(self, "num_steps", 1)
        for name in ("horizon", "episodes"):
            require_range(self, name, 0)
        if self.horizon == 0 and self.gamma >= 1:
            raise SettingError("IRL: gamma is 1 without a horizon, expected below 1: an endless sum has no value")

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> IRLAgent:
        """Create the inverse reinforcement learner for the spaces of a tabular task."""
        return IRLAgent(self, observation_space, action_space, methods)


class IRLAgent(Agent):
    """Maximum causal entropy IRL: learns a state reward that maximises the likelihood of the demonstrations.

    It acts by the soft policy of the reward.
    """

    settings: IRL
    counts = "gradient steps"

    def __init__(
        self, settings: IRL, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        for role, space in (("states", observation_space), ("actions", action_space)):
            if not isinstance(space, gym.spaces.Discrete):
                raise SpaceError(f"IRL plans over {role} that can be counted, the task has {space}: use GAIL")
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        loaded = load_demonstrations(settings.demonstrations, settings.episodes, observation_space, action_space)
        self.num_states: int = int(observation_space.n)  # type: ignore[attr-defined]
        if loaded is not None:
            self.transitions = loaded.transitions()
            self.visits = demonstrated_visits(loaded, self.num_states, settings.horizon, settings.gamma)
            self.cut = cut_off(loaded, self.num_states, settings.gamma if settings.horizon == 0 else 0.0)
        self.reward_network = bare(self.networks)["reward"]
        self.capture = None  # without a horizon, planning stops on convergence, which cannot be recorded

    def networks(self) -> dict[str, Block]:
        """Networks: `reward`, from a state to a number."""
        return {"reward": value_network(self.settings, self.observation_space)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run.

        Raises:
            SettingError: the dynamics of the task are not known.
        """
        env = getattr(world, "env", None)
        if not isinstance(env, Tabular):
            raise SettingError("IRL needs known dynamics: a tabular task (GridWorld-v0, FrozenLake-v1, a TabularMDP)")
        self.P, self.start = env.dynamics()[0].to(key.device), env.tables.start.to(key.device)
        probability, next_state, _, terminated, _ = env.tables
        ending = torch.zeros(*next_state.shape[:2], self.num_states, dtype=torch.float64, device=next_state.device)
        self.P_end = ending.scatter_add_(-1, next_state, probability * terminated).to(key.device)
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(optim.adam(hyper["learning_rate"]), state)
        return state

    # ------------------------------------------------------------------ plan

    def reward(self, p: Params, ctx: Context | None = None) -> Tensor:
        """Learned reward of every state, `[*L, S]` float64."""
        states = torch.arange(self.num_states, device=self.P.device)
        learners = next(tree.leaves(p["hyper"])).shape
        return self.forward(self.reward_network, "reward", p, states.expand(*learners, -1), ctx).double()

    def plan(self, reward: Tensor) -> tabular.Plan:
        """Soft policy of a reward `[*L, S]`, which is paid for acting in a state and for terminating in one."""
        s = self.settings
        paid = reward.unsqueeze(-1) + s.gamma * torch.einsum("saz,...z->...sa", self.P_end, reward)
        if s.horizon:
            return tabular.soft_plan(self.P, paid, s.horizon, s.gamma)
        return tabular.soft_plan_discounted(self.P, paid, s.gamma)

    def policy_visits(self, plan: tabular.Plan) -> Tensor:
        """Discounted state occupancy of a policy, `[*L, S]`: how often it acts or terminates in every state.

        Without a horizon, the visits after a time limit of the demonstrations are subtracted: with log pi = Q - V,

            sum_(t < T) gamma^t log pi(a_t | s_t) = sum_(t < T) gamma^t r(s_t) + gamma^T V(s_T) - V(s_0)

        in expectation over transitions, and dV(s) / dr is the occupancy of the policy from s on.
        """
        s, policy = self.settings, plan.log_policy.exp()
        if s.horizon:
            acts = tabular.occupancy(self.P, self.start, policy, s.gamma)[..., :-1, :]
            taken = (acts.unsqueeze(-1) * policy).sum(-3)
        else:
            start = self.start - self.cut.to(self.start)
            taken = tabular.occupancy_discounted(self.P, start, policy, s.gamma).unsqueeze(-1) * policy
        return taken.sum(-1) + s.gamma * torch.einsum("...sa,saz->...z", taken, self.P_end)

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Surrogate loss `[*L]` with the gradient of the demonstrations' negative log-likelihood.

        The gradient is the occupancy of the policy minus that of the demonstrations (`batch["visits"]` `[*L, S]`),
        times d reward.
        """
        reward = self.reward(p, ctx)
        with torch.no_grad():
            difference = self.policy_visits(self.plan(reward)) - batch["visits"]
            ctx.info["losses/visits_difference"] = difference.abs().amax(-1)
        return {"reward": (difference * reward).sum(-1)}

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Iteration: gradient steps on the reward, without acting."""
        average, rate = Average(), state["params"]["hyper"]["learning_rate"]
        visits = self.visits.to(self.P.device).expand(*state["key"].shape, -1)
        for _ in range(self.settings.num_steps):
            state, info = step(self, state, {"visits": visits}, optim.adam(rate), methods=self.methods)
            average.add(info)
        return count_steps(state, self.settings.num_steps), average.result()

    # ------------------------------------------------------------------ act

    def initial_memory(self, p: Params, rows: tuple[int, ...]) -> tree.Tree:
        """Initial memory: with a horizon, the time step of every row."""
        return {"time": torch.zeros(rows, dtype=torch.int64, device=self.P.device)} if self.settings.horizon else {}

    def evaluate(self, p: Params, world: Any, key: Tensor, episodes: int, *, deterministic: bool = True) -> Evaluation:
        """Evaluate every learner on `episodes` episodes, with a policy that is planned once."""
        planned = {**p, "log_policy": self.plan(self.reward(p)).log_policy}
        return super().evaluate(planned, world, key, episodes, deterministic=deterministic)

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N]` of the soft policy in states `[*L, N]`, sampled or the most probable."""
        log_policy = p["log_policy"] if "log_policy" in p else self.plan(self.reward(p)).log_policy
        learner_axes, last = observation.dim() - 1, self.settings.horizon - 1
        if memory:
            time = memory["time"].clamp(max=last)
            memory = {"time": memory["time"] + 1}
            log_policy = log_policy.flatten(learner_axes, learner_axes + 1)
            observation = time * self.num_states + observation
        index = observation.unsqueeze(-1).expand(*observation.shape, log_policy.shape[-1])
        chances = log_policy.gather(-2, index)
        if deterministic:
            return chances.argmax(-1), memory
        noise = random.gumbel(key, "policy", 0, chances.shape[learner_axes:], chances.dtype)
        return (chances + noise).argmax(-1), memory

    def log_prob(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Log-probability of actions `[*L, B]`; with a horizon, under the policy of the first step."""
        log_policy = self.plan(self.reward(p, ctx)).log_policy
        log_policy = log_policy.select(-3, 0) if self.settings.horizon else log_policy
        rows = batch["observation"].unsqueeze(-1)
        chosen_rows = log_policy.gather(-2, rows.expand(*rows.shape[:-1], log_policy.shape[-1]))
        return chosen_rows.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)

    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Draw n steps of the demonstrations, `[*L, n, ...]`."""
        return draw(self.transitions, random.fold(state["key"], "draw"), state["count"]["iterations"], n)


def demonstrated_visits(demonstrations: Demonstrations, num_states: int, horizon: int, gamma: float) -> Tensor:
    """Discounted state occupancy of the demonstrations, per episode: `[S]` float64.

    Args:
        demonstrations: their observations are states.
        num_states: S.
        horizon: number of steps of an episode to count, 0 for all.
        gamma: discount factor.
    """
    visits = torch.zeros(num_states, dtype=torch.float64, device=demonstrations.observation.device)
    episodes = torch.split(demonstrations.observation, (demonstrations.lengths + 1).tolist())
    for episode, terminated in zip(episodes, demonstrations.terminated.tolist()):
        acted = len(episode) - 1
        counted = min(acted, horizon or acted) + (terminated and acted <= (horizon or acted))
        weight = gamma ** torch.arange(counted, dtype=torch.float64, device=visits.device)
        visits = visits.index_add(0, episode[:counted], weight)
    return visits / len(demonstrations)


def cut_off(demonstrations: Demonstrations, num_states: int, gamma: float) -> Tensor:
    """Discounted weight gamma^T of the last states of truncated episodes of T steps, per episode: `[S]` float64.

    Args:
        demonstrations: their observations are states.
        num_states: S.
        gamma: discount factor; 0 to ignore truncation.
    """
    last = (demonstrations.lengths + 1).cumsum(0) - 1
    weight = gamma ** demonstrations.lengths.double() * ~demonstrations.terminated
    cut = torch.zeros(num_states, dtype=torch.float64, device=weight.device)
    cut = cut.index_add(0, demonstrations.observation[last], weight)
    return cut / len(demonstrations)
