"""Supervised learning, with a module per learner."""

from rlmeta.learning.settings import settings_classes
from rlmeta.supervised.classifier import Classifier
from rlmeta.supervised.regressor import Regressor

__all__ = ["Classifier", "Regressor"]

ALL = settings_classes(globals())
"""Settings class of every supervised learner, by its name on the command line."""
