"""Agents and supervised learners: one file an algorithm."""

from rlmeta.agents.a2c import A2C
from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.behaviour_cloning import BehaviourCloning
from rlmeta.agents.classifier import Classifier
from rlmeta.agents.dqn import DQN
from rlmeta.agents.gail import GAIL, AdversarialReward
from rlmeta.agents.irl import IRL
from rlmeta.agents.ppo import PPO
from rlmeta.agents.regressor import Regressor
from rlmeta.agents.reinforce import REINFORCE

ALL: tuple[type, ...] = (REINFORCE, A2C, PPO, DQN, BehaviourCloning, GAIL, IRL, Classifier, Regressor)
"""The settings class of every learner that can be named on the command line."""

__all__ = [
    "A2C",
    "ALL",
    "DQN",
    "GAIL",
    "IRL",
    "PPO",
    "REINFORCE",
    "AdversarialReward",
    "Agent",
    "BehaviourCloning",
    "Classifier",
    "NetworkFactory",
    "Regressor",
]
