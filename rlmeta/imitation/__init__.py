"""Imitation learning from expert demonstrations, with a module per algorithm."""

from rlmeta.imitation.behaviour_cloning import BehaviourCloning
from rlmeta.imitation.gail import GAIL, AdversarialReward
from rlmeta.imitation.irl import IRL
from rlmeta.learning.settings import settings_classes

__all__ = ["GAIL", "IRL", "AdversarialReward", "BehaviourCloning"]

ALL = settings_classes(globals())
"""Settings class of every imitation algorithm, by its name on the command line."""
