"""Offline reinforcement learning from recorded steps alone, with a module per algorithm."""

from rlmeta.learning.settings import settings_classes
from rlmeta.offline.cql import CQL
from rlmeta.offline.decision_transformer import DecisionTransformer
from rlmeta.offline.iql import IQL
from rlmeta.offline.td3_bc import TD3BC

__all__ = ["CQL", "IQL", "TD3BC", "DecisionTransformer"]

ALL = settings_classes(globals())
"""Settings class of every offline algorithm, by its name on the command line."""
