"""Choice of the policy head of an action space."""

from __future__ import annotations

from typing import TypeAlias, get_args

import gymnasium as gym
import numpy as np

from rlmeta.errors import SettingError, SpaceError
from rlmeta.nn.heads.discrete import BernoulliHead, CategoricalHead, MultiDiscreteHead
from rlmeta.nn.heads.gaussian import GaussianHead, TanhGaussianHead
from rlmeta.nn.heads.noise import StateDependentNoiseHead, TanhStateDependentNoiseHead
from rlmeta.nn.units import ActionBounds

PolicyHead: TypeAlias = (
    CategoricalHead
    | MultiDiscreteHead
    | BernoulliHead
    | GaussianHead
    | TanhGaussianHead
    | StateDependentNoiseHead
    | TanhStateDependentNoiseHead
)
"""What `head_for` returns; an object with the methods described in `rlmeta.nn.heads` can take its place."""


def head_for(
    action_space: gym.Space,
    features: int,
    initial_scale: float = 0.01,
    initial_log_std: float = 0.0,
    action_bounds: ActionBounds = "scale",
    state_dependent_noise: bool = False,
) -> PolicyHead:
    """Build the policy head of an action space.

    Args:
        action_space: of a single environment.
        features: D, the number of input features.
        initial_scale: gain of the orthogonal initial weights.
        initial_log_std: initial log standard deviation of a Box's head, in the policy's units.
        action_bounds: for a Box: "scale" measures actions by the bounds (`ActionUnits`), "squash" keeps them within
            by a tanh (`TanhGaussianHead`), "clip" ignores the bounds.
        state_dependent_noise: for a Box: `StateDependentNoiseHead`, or squashed `TanhStateDependentNoiseHead`.

    Returns:
        `CategoricalHead`, `MultiDiscreteHead`, `BernoulliHead`, or for a Box `GaussianHead` unless the
        options choose another.

    Raises:
        SpaceError: the space has no head.
        SettingError: an option for a Box with another space, or squashing into infinite bounds.
    """
    spaces, squash = gym.spaces, action_bounds == "squash"
    if action_bounds not in get_args(ActionBounds):
        raise SettingError(f"action_bounds is {action_bounds!r}, expected one of {', '.join(get_args(ActionBounds))}")
    if (squash or state_dependent_noise) and not isinstance(action_space, spaces.Box):
        raise SettingError(
            f'action_bounds="squash" and state-dependent noise are options for a Box, the action space is '
            f"{action_space}: leave them out"
        )
    if isinstance(action_space, spaces.Discrete):
        return CategoricalHead(features, int(action_space.n), initial_scale)
    if isinstance(action_space, spaces.MultiDiscrete):
        return MultiDiscreteHead(
            features, action_space.nvec.reshape(-1).tolist(), initial_scale, action_space.nvec.shape
        )
    shape = action_space.shape or ()
    count = int(np.prod(shape))
    if isinstance(action_space, spaces.MultiBinary):
        return BernoulliHead(features, count, initial_scale, shape)
    if isinstance(action_space, spaces.Box) and count > 0 and np.issubdtype(action_space.dtype, np.floating):
        noisy = TanhStateDependentNoiseHead if squash else StateDependentNoiseHead
        plain = TanhGaussianHead if squash else GaussianHead
        known = action_bounds != "clip"
        low, high = ((bound.reshape(-1).tolist() if known else None) for bound in (action_space.low, action_space.high))
        kind = noisy if state_dependent_noise else plain
        return kind(features, count, initial_scale, initial_log_std, low, high, shape=shape)
    raise SpaceError(
        f"action space {action_space} has no policy head: expected Discrete, MultiDiscrete, MultiBinary or a Box of "
        "floats; wrap the environment in gymnasium.wrappers.TransformAction to make it one"
    )
