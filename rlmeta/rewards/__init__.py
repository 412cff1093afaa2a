"""What changes the reward an agent learns from: shaping, intrinsic rewards. Evaluation never sees it."""

from rlmeta.rewards.counts import EpisodicCounts
from rlmeta.rewards.reward import Apart, Reward, apart_of, bound, distinct, first_memory, relabel, together
from rlmeta.rewards.rnd import RND
from rlmeta.rewards.shaping import PotentialShaping

__all__ = [
    "RND",
    "Apart",
    "EpisodicCounts",
    "PotentialShaping",
    "Reward",
    "apart_of",
    "bound",
    "distinct",
    "first_memory",
    "relabel",
    "together",
]
