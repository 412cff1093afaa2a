"""Few-shot regression tasks: sinusoids (Finn et al., 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.task_families import Split, check_sizes, support_and_query, task_keys
from rlmeta.functional import random
from rlmeta.functional.tree import Tree


@dataclass(frozen=True)
class Sinusoid:
    """Sinusoid regression: y = amplitude · sin(x − phase).

    The amplitude is uniform in [0.1, 5], the phase in [0, π] and x in [−5, 5].

    The mean squared error of predicting 0 is 4.25, that of the best prediction without adaptation, −1.62 cos x, 3.01.

    Source: Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, section 5.1.
    """

    shots: int = 10
    """Number of support points."""
    queries: int = 10
    """Number of query points."""

    def __post_init__(self) -> None:
        check_sizes("Sinusoid", self)

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of x."""
        return gym.spaces.Box(-5.0, 5.0, (1,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of y."""
        return gym.spaces.Box(-5.0, 5.0, (1,), np.float32)

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """Draw K = `count` sinusoids with support and query points."""
        keys, points = task_keys(key, counter, count, split), self.shots + self.queries
        draw = random.uniform(keys, "sinusoid", 0, (points + 2, 1))
        amplitude, phase = 0.1 + 4.9 * draw[..., :1, :], math.pi * draw[..., 1:2, :]
        x = 10.0 * draw[..., 2:, :] - 5.0
        return support_and_query(x, amplitude * torch.sin(x - phase), self.shots)
