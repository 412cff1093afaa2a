"""Lifelong learning methods: one file per method, usable with any learner and combinable."""

from rlmeta.learning.method import Method, method_classes
from rlmeta.lifelong.agem import AGEM
from rlmeta.lifelong.der import DER
from rlmeta.lifelong.er_ace import ERACE
from rlmeta.lifelong.ewc import EWC
from rlmeta.lifelong.gem import GEM
from rlmeta.lifelong.generative_replay import GenerativeReplay
from rlmeta.lifelong.hat import HAT
from rlmeta.lifelong.l2 import L2
from rlmeta.lifelong.lwf import LwF
from rlmeta.lifelong.mas import MAS
from rlmeta.lifelong.packnet import PackNet
from rlmeta.lifelong.replay import Replay
from rlmeta.lifelong.rwalk import RWalk
from rlmeta.lifelong.si import SI

__all__ = [
    "AGEM",
    "DER",
    "ERACE",
    "EWC",
    "GEM",
    "HAT",
    "L2",
    "MAS",
    "SI",
    "GenerativeReplay",
    "LwF",
    "Method",
    "PackNet",
    "RWalk",
    "Replay",
]

ALL = method_classes(globals())
"""Class of every lifelong method that can be named on the command line (`--lifelong NAME`)."""
