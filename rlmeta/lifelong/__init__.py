"""Lifelong methods: one file a method, composable on any learner."""

from rlmeta.learning.method import Method
from rlmeta.lifelong.agem import AGEM
from rlmeta.lifelong.ewc import EWC
from rlmeta.lifelong.gem import GEM
from rlmeta.lifelong.packnet import PackNet
from rlmeta.lifelong.replay import Replay

ALL: tuple[type[Method], ...] = (EWC, GEM, AGEM, PackNet, Replay)
"""Every method that can be named on the command line (`--lifelong NAME`)."""

__all__ = ["AGEM", "ALL", "EWC", "GEM", "Method", "PackNet", "Replay"]
