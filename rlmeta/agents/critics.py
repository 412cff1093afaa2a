"""Critics of continuous actions: Q-values of an observation and an action, of one network or an ensemble."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.networks import build_body, check_mask, whitens, with_memory
from rlmeta.errors import SpaceError
from rlmeta.functional.tree import Tree
from rlmeta.nn import MLP, ActionUnits, Block, Context, Ensemble, Params, ValueHead


class Critic(Block):
    """Critic network Q(s, a): an MLP on the observation's features and the action, in units of its bounds.

    Where its body has a memory it is given the inputs of a network with one in the place of the observation.
    """

    def __init__(self, body: Block, joint: Block, head: ValueHead, units: ActionUnits) -> None:
        super().__init__()
        self.body, self.joint, self.head, self._units = body, joint, head, (units,)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Q-values `[*L, ...]` of `{"observation": [*L, ...], "action": [*L, ..., *shape]}`."""
        assert isinstance(x, dict)
        features = self.body.run(params, x["observation"], ctx, f"{prefix}body.")
        assert isinstance(features, Tensor)
        action = self._units[0].to_policy(x["action"]).to(features.dtype)
        joint = self.joint.run(params, torch.cat([features, action], -1), ctx, f"{prefix}joint.")
        assert isinstance(joint, Tensor)
        return self.head.run(params, joint, ctx, f"{prefix}head.")


def box_units(name: str, action_space: gym.Space) -> ActionUnits:
    """Action units of a bounded Box: its bounds are at -1 and 1.

    Raises:
        SpaceError: the algorithm `name` can't act in this space.
    """
    if isinstance(action_space, gym.spaces.Box):
        low, high = action_space.low.reshape(-1).tolist(), action_space.high.reshape(-1).tolist()
        units = ActionUnits(action_space.shape, low, high)
        if units.bounded and units.centre.numel():
            return units
    raise SpaceError(
        f"{name} acts in a Box with finite bounds, the task has {action_space}: use PPO or A2C, or give the actions "
        "bounds (gymnasium.wrappers.RescaleAction)"
    )


def critic_network(settings: Any, observation_space: gym.Space, units: ActionUnits) -> Critic:
    """Build a critic with the settings' network or encoder, hidden layers and activation."""
    actions = gym.spaces.Box(-1.0, 1.0, units.shape)
    check_mask(observation_space, actions)
    body, features = build_body(
        settings.network, observation_space, (), settings.activation, "torch", whitens(settings)
    )
    body, features = with_memory(settings, body, features, actions)
    joint = MLP(
        features + units.centre.numel(), settings.hidden_sizes, activation=settings.activation, initialiser="torch"
    )
    return Critic(body, joint, ValueHead(settings.hidden_sizes[-1], initialiser="torch"), units)


def critic_ensemble(settings: Any, observation_space: gym.Space, units: ActionUnits, count: int) -> Ensemble:
    """Build an ensemble of `count` critics (see `critic_network`)."""
    return Ensemble(lambda: critic_network(settings, observation_space, units), count)
