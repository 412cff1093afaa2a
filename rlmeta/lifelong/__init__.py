"""Lifelong methods: one file a method, composable on any learner."""

from rlmeta.learning.method import Method as Method
from rlmeta.learning.method import method_classes
from rlmeta.lifelong.agem import AGEM as AGEM
from rlmeta.lifelong.ewc import EWC as EWC
from rlmeta.lifelong.gem import GEM as GEM
from rlmeta.lifelong.packnet import PackNet as PackNet
from rlmeta.lifelong.replay import Replay as Replay

ALL = method_classes(globals())
"""Every method that can be named on the command line (`--lifelong NAME`)."""
