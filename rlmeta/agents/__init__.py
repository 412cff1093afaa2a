"""Agents: one file an algorithm."""

from rlmeta.agents.a2c import A2C
from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.dqn import DQN
from rlmeta.agents.ppo import PPO
from rlmeta.agents.reinforce import REINFORCE

ALL: tuple[type, ...] = (REINFORCE, A2C, PPO, DQN)
"""The settings class of every agent."""

__all__ = ["A2C", "ALL", "DQN", "PPO", "REINFORCE", "Agent", "NetworkFactory"]
