"""Decision Transformer: offline reinforcement learning as a sequence model (Chen et al., 2021).

A causal Transformer over (return-to-go, observation, action) of the last steps predicts the data's action. To act it is
asked for a return, of which the rewards are subtracted as they come.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.critics import box_units
from rlmeta.agents.networks import build_body, check_mask, whitens, zeros_of
from rlmeta.agents.recurrence import last_action
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.world import World
from rlmeta.errors import SpaceError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.axes import masked_mean
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.imitation.behaviour_cloning import load_demonstrations
from rlmeta.learning.collect import LAST_REWARD
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group, whole
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.nn import (
    Block,
    Context,
    DeterministicHead,
    Embedding,
    LayerNorm,
    Linear,
    TransformerLayer,
    bare,
    causal_mask,
    head_for,
)
from rlmeta.nn.encoder import ACTION_MASK
from rlmeta.offline.fixed_data import check_settings, learn


@dataclass(frozen=True)
class DecisionTransformer:
    """Settings of the Decision Transformer. A list for a number marked per learner compares its values."""

    demonstrations: Demonstrations | str | None = None
    """Recorded episodes to learn from: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of recorded episodes to use, the first ones; 0 for all."""
    target_return: PerLearner = float("inf")
    """Return to ask for when acting; inf for the best one of the recorded episodes."""
    return_scale: float = 1000.0
    """Divisor of returns before they enter the network."""
    context: int = 20
    """Number of last steps that the network sees."""
    max_length: int = 1000
    """Number of time steps of an episode that have an embedding; later ones share the last."""
    num_steps: int = 50
    """Gradient steps per iteration; budgets count them."""
    batch_size: int = 64
    """Sequences of `context` steps in a minibatch, drawn with replacement."""
    learning_rate: PerLearner = 1e-4
    """AdamW's step size."""
    learning_rate_schedule: ScheduleName = "constant"
    """Schedule of the learning rate: constant, or annealed to 0 over the budget, linearly or along a cosine."""
    weight_decay: PerLearner = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: PerLearner = 0.25
    """Clip each learner's gradient to this norm."""
    features: int = 128
    """Size of the tokens' embeddings."""
    layers: int = 3
    """Layers of the Transformer."""
    heads: int = 1
    """Attention heads of every layer."""
    normalise_observation: bool = True
    """Normalise observations by the statistics of the recorded ones."""
    network: NetworkFactory | None = None
    """Feature network: a function from the observation space to a module that returns features [B, D]."""

    num_envs = 1

    adapts = False
    """Whether it can be the inner loop of a meta-learner."""

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self)
        require_range(self, "target_return", -sys.float_info.max)
        for name in ("learning_rate", "max_grad_norm", "return_scale"):
            require_range(self, name, 0.0, above=True)
        require_range(self, "weight_decay", 0.0)
        for name in ("context", "max_length", "features", "layers", "heads"):
            require_range(self, name, 1)
        require(
            self.features % self.heads == 0,
            f"DecisionTransformer: features {self.features} do not divide into heads = {self.heads}: give a multiple",
        )

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> DecisionTransformerAgent:
        """Create the Decision Transformer for an observation and an action space."""
        return DecisionTransformerAgent(self, observation_space, action_space, methods)


class DecisionNetwork(Block):
    """Network of the Decision Transformer: three tokens a step, each embedded with the time, and causal layers.

    Args:
        s: the settings.
        observation_space: of one environment.
        action_space: of one environment.
        head: function from the number of features to the head of actions.
    """

    def __init__(
        self, s: DecisionTransformer, observation_space: gym.Space, action_space: gym.Space, head: Any
    ) -> None:
        super().__init__()
        self.body, size = build_body(s.network, observation_space, (), "relu", "torch", whitens(s))
        actions, self._encode = last_action(action_space)
        self.of_return, self.of_observation = Linear(1, s.features), Linear(size, s.features)
        self.of_action, self.of_time = Linear(actions, s.features), Embedding(s.max_length, s.features)
        self.norm, self.last_norm = LayerNorm(s.features), LayerNorm(s.features)
        self._layers = [TransformerLayer(s.features, s.heads, 4 * s.features, "pre") for _ in range(s.layers)]
        for k, layer in enumerate(self._layers):
            self.add_module(str(k), layer)
        self.head = head(s.features)

    def run(self, params: Params, x: tree.Tree, ctx: Context, prefix: str = "") -> Any:
        """Output of the head for the action of every step, which is not seen.

        Args:
            params: this block's tensors are those whose name starts with `prefix`.
            x: `observation` `[*L, B, K, ...]`, `action` `[*L, B, K, ...]`, scaled `returns` to go, whole `time` and
                `valid`, which is false where an episode had not begun, each `[*L, B, K]`.
            ctx: of the forward pass.
            prefix: of this block's names in `params`.
        """
        features = self.body.run(params, x["observation"], ctx, f"{prefix}body.")
        seen = {"of_return": x["returns"].unsqueeze(-1), "of_observation": features}
        seen["of_action"] = self._encode(x["action"]).to(features.dtype)
        tokens = [getattr(self, name).run(params, value, ctx, f"{prefix}{name}.") for name, value in seen.items()]
        time = self.of_time.run(params, x["time"], ctx, f"{prefix}of_time.")
        h = (torch.stack(tokens, -2) + time.unsqueeze(-2)).flatten(-3, -2)
        h = self.norm.run(params, h, ctx, f"{prefix}norm.")
        mask = causal_mask(h.shape[-2], device=h.device) & x["valid"].repeat_interleave(3, -1).unsqueeze(-2)
        for k, layer in enumerate(self._layers):
            h = layer.run(params, {"input": h, "mask": mask}, ctx, f"{prefix}{k}.")
        h = self.last_norm.run(params, h[..., 1::3, :], ctx, f"{prefix}last_norm.")
        return self.head.run(params, h, ctx, f"{prefix}head.")


class DecisionTransformerAgent(Agent):
    """Decision Transformer for an observation and an action space."""

    settings: DecisionTransformer
    counts = "gradient steps"

    def __init__(
        self,
        settings: DecisionTransformer,
        observation_space: gym.Space,
        action_space: gym.Space,
        methods: Sequence[Method] = (),
    ) -> None:
        check_mask(observation_space, action_space)
        if isinstance(observation_space, gym.spaces.Dict) and ACTION_MASK in observation_space.spaces:
            raise SpaceError(f"DecisionTransformer sees no {ACTION_MASK}: drop it from {observation_space}, or use IQL")
        box = isinstance(action_space, gym.spaces.Box)
        self.units = box_units("DecisionTransformer", action_space) if box else None
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        source = settings.demonstrations
        loaded = load_demonstrations(source, settings.episodes, observation_space, action_space)
        self.steps = None if loaded is None else steps_of(loaded)
        self.best_return = 0.0 if loaded is None else float(loaded.returns.max())
        self.transformer: Any = bare(self.networks)["transformer"]

    def networks(self) -> dict[str, Block]:
        """Networks: `transformer`, from sequences to the parameters of actions."""

        def head(features: int) -> Block:
            if self.units is not None:
                return DeterministicHead(features, self.units)
            return head_for(self.action_space, features)

        return {"transformer": DecisionNetwork(self.settings, self.observation_space, self.action_space, head)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run."""
        best = torch.full_like(hyper["target_return"], self.best_return)
        state = super().init(key, {**hyper, "best_return": best}, world)
        state["optimizer"] = init_optimizer(self.groups(state)[0], state)
        return state if self.steps is None else self.watch(state, self.steps["observation"])

    # ------------------------------------------------------------------ act

    def initial_memory(self, p: Params, rows: tuple[int, ...]) -> tree.Tree:
        """Initial memory of `rows` `[*L, N]` environments: the return to ask for, and no step."""
        h = p["hyper"]
        wanted = torch.where(h["target_return"].isfinite(), h["target_return"], h["best_return"])
        spaces = {"observation": self.observation_space, "action": self.action_space}
        empty = {name: zeros_of(space, rows, wanted.device) for name, space in spaces.items()}
        axes, size = len(rows), self.settings.context
        memory = tree.map(lambda x: x.expand(*rows, size, *x.shape[axes + 1 :]).clone(), empty)
        zero = torch.zeros(rows, dtype=wanted.dtype, device=wanted.device)
        returns = zero.unsqueeze(-1).repeat(*(1,) * axes, size)
        time = torch.zeros(rows, dtype=torch.int64, device=wanted.device)
        to_go = wanted.reshape(*wanted.shape, *(1,) * (axes - wanted.dim())).expand(rows).clone()
        return {**memory, "returns": returns, "to_go": to_go, "time": time, LAST_REWARD: zero}

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]` for the return that is left; of Discrete ones a sample or the most probable."""
        axes, size = memory["time"].dim(), self.settings.context
        to_go = memory["to_go"] - memory[LAST_REWARD].to(memory["to_go"].dtype)

        def shifted(window: Tensor, new: Tensor) -> Tensor:
            return torch.cat((window.narrow(axes, 1, size - 1), new.unsqueeze(axes).to(window.dtype)), axes)

        window = {
            "observation": tree.map(shifted, memory["observation"], observation),
            "action": shifted(memory["action"], torch.zeros_like(memory["action"].select(axes, 0))),
            "returns": shifted(memory["returns"], to_go),
        }
        time = memory["time"].unsqueeze(-1) + torch.arange(1 - size, 1, device=to_go.device)
        parameters = self._predicted(p, {**window, "time": time.clamp(min=0), "valid": time >= 0}, Context())
        last = {name: value.select(axes, size - 1) for name, value in parameters.items()}
        head = self.transformer.head
        action = head.mode(last) if deterministic or self.units is not None else head.sample(last, key)
        window["action"] = shifted(memory["action"], action)
        return action, {**memory, **window, "to_go": to_go, "time": memory["time"] + 1}

    def _predicted(self, p: Params, batch: tree.Tree, ctx: Context) -> Any:
        """Parameters of the action of every step of sequences `[*L, B, K, ...]`, from raw observations and returns."""
        s = self.settings
        inputs = {
            **batch,
            "returns": batch["returns"] / s.return_scale,
            "time": batch["time"].clamp(max=s.max_length - 1),
        }
        return self.forward(self.transformer, "transformer", p, inputs, ctx)

    def preprocess(self, p: Params, observation: tree.Tree) -> tree.Tree:
        """Normalise the observations among the inputs."""
        return {**observation, "observation": super().preprocess(p, observation["observation"])}

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Error of the actions `[*L]` in sequences `[*L, B, K, ...]`: squared, or else the cross-entropy."""
        parameters = self._predicted(p, batch, ctx)
        if self.units is not None:
            error = (parameters["mean"] - self.units.to_policy(batch["action"])).square().mean(-1)
        else:
            error = -self.transformer.head.log_prob(parameters, batch["action"])
        return {"transformer": masked_mean(error, batch["valid"], 2)}

    def windows(self, keys: Tensor, count: int) -> tree.Tree:
        """Sequences that end in random steps of the data, `[*lead, *L, count, K, ...]`; keys are `[*lead, *L]`."""
        assert self.steps is not None
        time = self.steps["time"].to(keys.device)
        rows = random.integers(keys, "demonstrations", 0, (count,), len(time)).unsqueeze(-1)
        back = torch.arange(1 - self.settings.context, 1, device=keys.device)
        valid = time[rows] + back >= 0
        index = torch.where(valid, rows + back, rows)
        return {**tree.map(lambda x: x.to(keys.device)[index], self.steps), "valid": valid}

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Iteration: gradient steps on sequences of the data, without acting."""
        return learn(self, state, lambda keys: self.windows(keys, self.settings.batch_size), self.groups, {})

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: all weights in every gradient step."""
        h = state["params"]["hyper"]
        rate = anneal(h["learning_rate"], self.settings.learning_rate_schedule, state["progress"])
        return [whole(optim.adamw(rate, weight_decay=h["weight_decay"]), h["max_grad_norm"])]

    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Draw n sequences of the data, `[*L, n, K, ...]`."""
        return self.windows(random.fold(state["key"], state["count"]["iterations"]), n)


def steps_of(recorded: Demonstrations) -> tree.Tree:
    """Steps `[M, ...]` of recorded episodes: `observation, action`, `returns` to go and `time` in the episode.

    The return to go of step t is the sum of the rewards from t to the episode's end, without discount.
    """
    lengths, transitions = recorded.lengths, recorded.transitions()
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    before = recorded.reward.double().cumsum(0) - recorded.reward.double()
    of_episode = before[starts] + torch.repeat_interleave(recorded.returns, lengths)
    return {
        "observation": transitions["observation"],
        "action": transitions["action"],
        "returns": (of_episode - before).to(recorded.reward.dtype),
        "time": torch.arange(recorded.steps, device=lengths.device) - starts,
    }
