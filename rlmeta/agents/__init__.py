"""Reinforcement-learning agents: one file per algorithm."""

from rlmeta.agents.a2c import A2C
from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.dqn import DQN
from rlmeta.agents.ppo import PPO
from rlmeta.agents.rainbow import Rainbow
from rlmeta.agents.reinforce import REINFORCE
from rlmeta.agents.sac import SAC
from rlmeta.agents.td3 import TD3
from rlmeta.learning.settings import settings_classes

__all__ = ["A2C", "DQN", "PPO", "REINFORCE", "SAC", "TD3", "Agent", "NetworkFactory", "Rainbow"]

ALL = settings_classes(globals())
"""Settings class of every agent that can be named on the command line."""
