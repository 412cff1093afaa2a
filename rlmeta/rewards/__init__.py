"""What changes the reward an agent learns from: shaping, intrinsic rewards. Evaluation never sees it."""

from rlmeta.rewards.counts import EpisodicCounts
from rlmeta.rewards.reward import Reward, distinct, first_memory, relabel
from rlmeta.rewards.shaping import PotentialShaping

__all__ = ["EpisodicCounts", "PotentialShaping", "Reward", "distinct", "first_memory", "relabel"]
