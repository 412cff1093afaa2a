"""Export a trained network as an ordinary `nn.Module`, for `torch.export`, ONNX, or use without a run."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree
from rlmeta.learning.state import Params
from rlmeta.nn import Block, Context, bare
from rlmeta.supervised.learner import Supervised

ACTION = "action"
"""Name of the module that maps observations to actions for `env.step`, as `run.act(..., deterministic=True)` does."""


class TrainedModule(nn.Module):
    """One of a trained learner's networks as a module on batches of observations; always in evaluation mode.

    Observations are the environment's, with a batch axis in front: a tensor `[B, *shape]`, a dictionary of them for
    Dict, a tuple for Tuple. Observation normalisation is part of the module, as are action masks in an observation.

    Args:
        learner: the learner, bound to its problem's spaces; of a meta-learner the inner one.
        p: the effective parameters of one learner; copied.
        name: name of a network, or `ACTION`.

    Raises:
        UnknownNameError: the learner has no such network.
        SettingError: the learner is recurrent, or none of its networks takes observations.
    """

    def __init__(self, learner: Any, p: Params, name: str) -> None:
        super().__init__()
        known = names_of(learner)
        if name not in known:
            raise unknown_name("network", name, known)
        needed = {part: p[part] for part in ("weights", "buffers", "normalisers", "hyper")}
        if hasattr(learner, "initial_memory") and learner.initial_memory(needed, (1,)):
            raise SettingError(
                f"the learner is recurrent, it keeps a memory between steps, so {name!r} is not a function of the "
                "observation alone: use run.act(observation, memory)"
            )
        self.name, self._learner = name, _without_training(learner)
        self._networks = None if isinstance(learner, Supervised) else dict(bare(learner.networks))
        self._names = dict[str, str]()
        for path, leaf in tree.flatten(needed).items():
            self._names[path] = path.replace("/", "__").replace(".", "__")
            value = leaf.detach().clone()
            if path.startswith("weights/"):
                self.register_parameter(self._names[path], nn.Parameter(value))
            else:
                self.register_buffer(self._names[path], value)

    def forward(self, observation: Any) -> Any:
        """Network output for observations `[B, ...]`.

        Returns:
            For `ACTION` the policy's mode as an action of the environment `[B, ...]`; else the network's output `[B,
            ...]`: logits, action values, a state value, a prediction, or a distribution's parameters, before any tanh,
            scaling or clipping makes them an action: `{"mean": [B, A], "log_std": [B, A]}` if there are several.
        """
        p = tree.unflatten({path: getattr(self, name) for path, name in self._names.items()})
        p = {"buffers": {}, "normalisers": {}, "hyper": {}, **p}
        learner, seen = self._learner, observed(self._learner.observation_space, observation)
        if isinstance(learner, Supervised):
            return learner.prediction(p, {"observation": seen})
        if self.name != ACTION:
            assert self._networks is not None
            return _plain(network_output(learner, self._networks, p, self.name, seen))
        key = torch.zeros((), dtype=torch.int64, device=next(self.parameters()).device)
        action, _ = learner.act(p, seen, {}, key, True)
        return to_env_action(learner.action_space, action)


def _without_training(learner: Any) -> Any:
    """Copy of a learner without what only training needs, some of which cannot be pickled, and all of which is large.

    Those are recorded programs, methods and rewards, demonstrations, and functions that build a user's networks.
    """
    copied = copy.copy(learner)
    copied.settings = copy.copy(learner.settings)
    fields = {field.name for field in dataclasses.fields(copied.settings)}
    for name, nothing in _ONLY_TRAINING.items():
        if name in vars(copied):
            setattr(copied, name, nothing)
        if name in fields:
            object.__setattr__(copied.settings, name, nothing)  # they are frozen, and not checked again
    return copied


_ONLY_TRAINING: dict[str, Any] = {
    "capture": None,
    "streams": None,
    "pretrain": None,
    "network": None,
    "demonstrations": None,
    "methods": (),
    "rewards": (),
}
"""Attributes of a learner and its settings that no forward pass uses, and what they are then."""


def names_of(learner: Any) -> list[str]:
    """Names of the modules that a learner can be exported as: `ACTION` first if it acts, then its networks.

    Raises:
        SettingError: none of its networks takes observations.
    """
    if isinstance(learner, Supervised):
        return list(learner.networks())
    if not learner.acts:
        raise SettingError(f"{type(learner).__name__} has no network of observations: its parameters are in run.state")
    networks = bare(learner.networks)
    of_observations = [name for name in networks if name not in learner.beside_observations]
    return [*dict.fromkeys([ACTION, learner.acting_network or next(iter(networks)), *of_observations])]


def network_output(learner: Any, networks: dict[str, Block], p: Params, name: str, observation: Tree) -> Any:
    """Output of one of an agent's networks for observations `[*L, B, ...]`."""
    ctx = Context()
    if name == "value" and getattr(learner.settings, "share_network", False):
        policy: Any = networks["policy"]
        features = policy.placed(learner.forward(policy.body, "policy.body", p, observation, ctx), observation)
        return networks["value"].run({**p["weights"], **p["buffers"]}, features, ctx, "value.")
    block = networks[name] if name in networks else next(iter(networks.values()))  # a copy, such as an average
    return learner.forward(block, name, p, observation, ctx)


def _plain(output: Any) -> Any:
    """Unwrap a dictionary with a single tensor; several stay a dictionary."""
    return next(iter(output.values())) if isinstance(output, dict) and len(output) == 1 else output


def observed(space: gym.Space, value: Any) -> Tree:
    """Convert an environment's observations `[B, ...]` to those of a learner.

    Boxes become float32 (uint8 stays), Discrete values start at 0, Tuples become dictionaries with the keys "0", "1".
    """
    if isinstance(space, gym.spaces.Dict):
        return {name: observed(part, value[name]) for name, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return {str(i): observed(part, value[i]) for i, part in enumerate(space.spaces)}
    if isinstance(space, gym.spaces.Box):
        return value if space.dtype == np.uint8 else value.to(torch.float32)
    start = torch.as_tensor(getattr(space, "start", 0), device=value.device)
    return value.to(torch.int64) - start


def to_env_action(space: gym.Space, action: Tensor) -> Tensor:
    """Convert policy actions `[B, ...]` to environment actions, of the space's dtype.

    Those of a Box are clipped to its bounds, discrete ones count from `start`.
    """
    if isinstance(space, gym.spaces.Box):
        low, high = (torch.as_tensor(bound, device=action.device) for bound in (space.low, space.high))
        if space.dtype.kind in "iu":
            return action.clamp(low.to(action), high.to(action)).round().to(low.dtype)
        return action.to(low.dtype).clamp(low, high)
    action = action + torch.as_tensor(getattr(space, "start", 0), device=action.device)
    return action.to(getattr(torch, np.dtype(space.dtype).name))
