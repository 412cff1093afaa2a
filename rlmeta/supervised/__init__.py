"""Supervised learning: one file a learner of labelled samples."""

from rlmeta.learning.settings import settings_classes
from rlmeta.supervised.classifier import Classifier
from rlmeta.supervised.regressor import Regressor

__all__ = ["Classifier", "Regressor"]

ALL = settings_classes(globals())
"""The settings class of every supervised learner that can be named on the command line."""
