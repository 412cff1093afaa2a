"""Lifelong learning methods: one file per method, usable with any learner and combinable."""

from rlmeta.learning.method import Method, method_classes
from rlmeta.lifelong.agem import AGEM
from rlmeta.lifelong.ewc import EWC
from rlmeta.lifelong.gem import GEM
from rlmeta.lifelong.generative_replay import GenerativeReplay
from rlmeta.lifelong.hat import HAT
from rlmeta.lifelong.packnet import PackNet
from rlmeta.lifelong.replay import Replay

__all__ = ["AGEM", "EWC", "GEM", "HAT", "GenerativeReplay", "Method", "PackNet", "Replay"]

ALL = method_classes(globals())
"""Class of every lifelong method that can be named on the command line (`--lifelong NAME`)."""
