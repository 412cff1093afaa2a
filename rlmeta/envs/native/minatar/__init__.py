"""MinAtar (Young and Tian, 2019): games of Atari on a grid of 10 by 10 cells, by the rules of the minatar package."""

from rlmeta.envs.native.minatar.asterix import Asterix
from rlmeta.envs.native.minatar.breakout import Breakout
from rlmeta.envs.native.minatar.space_invaders import SpaceInvaders

__all__ = ["Asterix", "Breakout", "SpaceInvaders"]
