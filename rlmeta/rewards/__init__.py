"""What changes the reward an agent learns from: shaping, intrinsic rewards. Evaluation never sees it."""

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
