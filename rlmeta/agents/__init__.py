"""Reinforcement-learning agents: one file per algorithm."""

from rlmeta.agents.a2c import A2C
from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.ddpg import DDPG
from rlmeta.agents.dqn import DQN
from rlmeta.agents.impala import IMPALA
from rlmeta.agents.ppg import PPG
from rlmeta.agents.ppo import PPO
from rlmeta.agents.rainbow import Rainbow
from rlmeta.agents.reinforce import REINFORCE
from rlmeta.agents.sac import SAC
from rlmeta.agents.td3 import TD3
from rlmeta.agents.trpo import TRPO
from rlmeta.learning.settings import settings_classes

__all__ = [
    "A2C",
    "DDPG",
    "DQN",
    "IMPALA",
    "PPG",
    "PPO",
    "REINFORCE",
    "SAC",
    "TD3",
    "TRPO",
    "Agent",
    "NetworkFactory",
    "Rainbow",
]

ALL = settings_classes(globals())
"""Settings class of every agent that can be named on the command line."""
