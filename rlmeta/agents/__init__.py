"""Agents: one file a reinforcement-learning algorithm."""

from rlmeta.agents.a2c import A2C as A2C
from rlmeta.agents.agent import Agent as Agent
from rlmeta.agents.agent import NetworkFactory as NetworkFactory
from rlmeta.agents.dqn import DQN as DQN
from rlmeta.agents.ppo import PPO as PPO
from rlmeta.agents.reinforce import REINFORCE as REINFORCE
from rlmeta.agents.sac import SAC as SAC
from rlmeta.agents.td3 import TD3 as TD3
from rlmeta.learning.settings import settings_classes

ALL = settings_classes(globals())
"""The settings class of every agent that can be named on the command line."""
