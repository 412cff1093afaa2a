"""Imitation: one file an algorithm that learns from expert demonstrations."""

from rlmeta.imitation.behaviour_cloning import BehaviourCloning
from rlmeta.imitation.gail import GAIL, AdversarialReward
from rlmeta.imitation.irl import IRL
from rlmeta.learning.settings import settings_classes

__all__ = ["GAIL", "IRL", "AdversarialReward", "BehaviourCloning"]

ALL = settings_classes(globals())
"""The settings class of every imitator that can be named on the command line."""
