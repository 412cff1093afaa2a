"""Reward shaping, exploration bonuses and learned rewards of agents; evaluation scores the task's own reward."""

from rlmeta.rewards.counts import EpisodicCounts
from rlmeta.rewards.reward import (
    Reward,
    SeparateReward,
    bind_rewards,
    check_memory,
    check_rewards,
    relabel,
    separate_rewards,
    total_reward,
)
from rlmeta.rewards.rnd import RND
from rlmeta.rewards.shaping import PotentialShaping

__all__ = [
    "RND",
    "EpisodicCounts",
    "PotentialShaping",
    "Reward",
    "SeparateReward",
    "bind_rewards",
    "check_memory",
    "check_rewards",
    "relabel",
    "separate_rewards",
    "total_reward",
]
