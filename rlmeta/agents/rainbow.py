"""Rainbow (Hessel et al., 2018): deep Q-networks with all six extensions.

Double Q-learning, n-step targets, a dueling and noisy network, prioritised replay, and a categorical distribution of
returns; the agent is `DQNAgent`, and each extension is a setting of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlmeta.agents.dqn import DQN
from rlmeta.learning.settings import PerLearner


@dataclass(frozen=True)
class Rainbow(DQN):
    """Settings of Rainbow: those of DQN, which says what each is, with the paper's defaults.

    A gradient step comes every four environment steps, as in the paper. The memory of a million frames of Atari, and
    the 20,000 steps before the first gradient step, are a tenth of it, as in smaller studies (Obando-Ceron and Castro,
    2021).
    """

    gradient_steps: int = 4
    batch_size: int = 32
    capacity: int = 100_000
    learning_starts: int = 2_000
    learning_rate: PerLearner = 6.25e-5
    adam_epsilon: float = 1.5e-4
    n_steps: int = 3
    dueling: bool = True
    distribution: Literal["none", "categorical", "quantile"] = "categorical"
    prioritised: bool = True
    noisy: bool = True
    target_every: int = 2_000
    epsilon_start: PerLearner = 0.0
    epsilon_end: PerLearner = 0.0
    hidden_sizes: tuple[int, ...] = (256,)
    head_sizes: tuple[int, ...] = (256,)
