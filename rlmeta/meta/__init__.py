"""Meta-learning: the meta-parameters, the inner algorithm and the estimator of the meta-gradient are three slots.

`adapt` is the inner loop, `estimators` the third slot, and each further file a method: a choice of the three.
"""

from rlmeta.learning.settings import settings_classes
from rlmeta.meta.learned_optimizer import LearnedOptimizer
from rlmeta.meta.maml import MAML
from rlmeta.meta.meta_sgd import MetaSGD
from rlmeta.meta.protonet import ProtoNet

__all__ = ["MAML", "LearnedOptimizer", "MetaSGD", "ProtoNet"]

ALL = settings_classes(globals())
"""The settings class of every meta-learner that can be named on the command line."""
