"""What changes the reward an agent learns from: shaping, intrinsic rewards. Evaluation never sees it."""

from rlmeta.rewards.counts import EpisodicCounts as EpisodicCounts
from rlmeta.rewards.reward import Reward as Reward
from rlmeta.rewards.reward import distinct as distinct
from rlmeta.rewards.reward import first_memory as first_memory
from rlmeta.rewards.reward import relabel as relabel
from rlmeta.rewards.shaping import PotentialShaping as PotentialShaping
