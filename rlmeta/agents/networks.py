"""The networks of agents: a body from observations to features (the default, or the user's), then a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from rlmeta.envs.spaces import to_tree
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree
from rlmeta.nn import (
    MLP,
    ActivationName,
    Block,
    CategoricalHead,
    Context,
    Encoder,
    Initialiser,
    MultiDiscreteHead,
    Params,
    QHead,
    Sequential,
    ValueHead,
    feature_axes,
    head_for,
    lift,
)


class Network(Block):
    """A body, then a head. Weights are named `body.*` and `head.*`."""

    def __init__(self, body: Block, head: Block, features: int) -> None:
        super().__init__()
        self.body, self.head, self.features = body, head, features
        self.masks, self.closes = isinstance(head, CategoricalHead | MultiDiscreteHead), isinstance(head, QHead)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Any:
        """Observations `[*L, ...]` to whatever the head gives.

        A Dict observation's `action_mask` `[*L, ..., A]` closes the actions where it is 0.
        """
        features = self.body.run(params, x, ctx, f"{prefix}body.")
        if self.masks and isinstance(x, dict) and "action_mask" in x:
            return self.head.run(params, features, ctx, f"{prefix}head.", x["action_mask"])  # type: ignore[call-arg]
        if self.closes and isinstance(x, dict) and "action_mask" in x:
            values = self.head.run(params, features, ctx, f"{prefix}head.")
            return values.masked_fill(x["action_mask"] == 0, -torch.inf)
        return self.head.run(params, features, ctx, f"{prefix}head.")


class PerTask(Block):
    """Features of a body in the place of the task at hand, zeros in those of the others, `[*L, ..., K * D]`.

    So the layer that follows is one of its own for every task, as lifelong learning wants it: a new task begins with
    an undecided policy, and does not write into the last layer of an old one. The task is the one-hot vector of K
    entries at the end of the observation.
    """

    def __init__(self, body: Block, tasks: int) -> None:
        super().__init__()
        self.body, self.tasks = body, tasks

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Any:
        """Observations `[*L, ..., D]` to features."""
        features = self.body.run(params, x, ctx, f"{prefix}body.")
        assert isinstance(x, torch.Tensor)
        task = x[..., -self.tasks :].to(features.dtype)
        return (task.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)


def _per_task(body: Block, features: int, observation_space: gym.Space, tasks: int) -> tuple[Block, int]:
    """A body for heads of `tasks` tasks, and its number of features; the body itself where there are none."""
    if not tasks:
        return body, features
    low, high = getattr(observation_space, "low", np.empty(0)), getattr(observation_space, "high", np.empty(0))
    if low.ndim != 1 or len(low) < tasks or (low[-tasks:] != 0).any() or (high[-tasks:] != 1).any():
        raise SettingError(
            f"task_heads is {tasks}, but observations of {observation_space} do not end with a one-hot vector of "
            f"{tasks} tasks: train on a stream with observe_identity and as many tasks, or leave task_heads 0"
        )
    return PerTask(body, tasks), features * tasks


def build_body(
    network: Callable[[gym.Space], nn.Module] | None,
    observation_space: gym.Space,
    hidden_sizes: tuple[int, ...],
    activation: ActivationName,
    initialiser: Initialiser,
) -> tuple[Block, int]:
    """The body and its number of features: the user's network, or an encoder and a multi-layer perceptron."""
    if network is None:
        encoder = Encoder(observation_space)
        if not hidden_sizes:
            return encoder, encoder.features
        mlp = MLP(encoder.features, hidden_sizes, activation=activation, initialiser=initialiser)
        return Sequential(encoder, mlp), hidden_sizes[-1]
    module = network(observation_space)
    if not isinstance(module, nn.Module):
        raise SettingError(
            f"network= gave a {type(module).__name__}, expected a function from an observation space to an nn.Module"
        )
    return lift(module, feature_axes(observation_space)), _features_of(module, observation_space)


def policy_network(
    settings: Any,
    observation_space: gym.Space,
    action_space: gym.Space,
    *,
    state_dependent: bool = False,
    tasks: int = 0,
) -> Network:
    """A network that gives the parameters of a distribution over actions; its last layer starts near 0.

    Args:
        settings: the agent's.
        observation_space: of one environment.
        action_space: of one environment.
        state_dependent: noise that depends on the features.
        tasks: so many last layers, see `PerTask`; 0 for one whatever the task.
    """
    body, features = build_body(
        settings.network, observation_space, settings.hidden_sizes, settings.activation, "orthogonal"
    )
    body, features = _per_task(body, features, observation_space, tasks)
    head = head_for(
        action_space,
        features,
        initial_scale=0.01,
        initial_log_std=settings.initial_log_std,
        state_dependent_noise=state_dependent,
    )
    return Network(body, head, features)


def value_network(settings: Any, observation_space: gym.Space, *, tasks: int = 0) -> Network:
    """A network that gives the value of an observation; `tasks` as in `policy_network`."""
    body, features = build_body(
        settings.network, observation_space, settings.hidden_sizes, settings.activation, "orthogonal"
    )
    body, features = _per_task(body, features, observation_space, tasks)
    return Network(body, ValueHead(features), features)


def q_network(settings: Any, observation_space: gym.Space, action_space: gym.Space) -> Network:
    """A network that gives the value of every action; masked ones are minus infinity."""
    if not isinstance(action_space, gym.spaces.Discrete):
        raise SpaceError(f"a value for every action needs Discrete actions, the task has {action_space}")
    body, features = build_body(
        settings.network, observation_space, settings.hidden_sizes, settings.activation, "torch"
    )
    return Network(body, QHead(features, int(action_space.n)), features)


def _features_of(module: nn.Module, observation_space: gym.Space) -> int:
    """Run the user's network once on a batch of two observations, to learn its width and to fail early."""
    two = gym.vector.utils.batch_space(observation_space, 2).sample()
    observation: Tree = to_tree(observation_space, two, (2,), "the task")
    training = module.training
    try:
        with torch.no_grad():
            features = module.eval()(observation)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in tree.leaves(observation))
        bytes_ = any(leaf.dtype == torch.uint8 for leaf in tree.leaves(observation))
        hint = ". Bytes come as they are: begin with x.float() / 255" if bytes_ else ""
        raise SettingError(f"network= fails for two observations, {shapes}: {error}{hint}") from error
    module.train(training)
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or features.shape[0] != 2:
        given = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise SettingError(f"network= must give features [B, D] for B observations; for B = 2 it gave {given}")
    return int(features.shape[1])
