"""Imitation: one file an algorithm that learns from expert demonstrations."""

from rlmeta.imitation.behaviour_cloning import BehaviourCloning as BehaviourCloning
from rlmeta.imitation.gail import GAIL as GAIL
from rlmeta.imitation.gail import AdversarialReward as AdversarialReward
from rlmeta.imitation.irl import IRL as IRL
from rlmeta.learning.settings import settings_classes

ALL = settings_classes(globals())
"""The settings class of every imitator that can be named on the command line."""
