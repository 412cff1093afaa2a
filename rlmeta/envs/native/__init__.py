"""Native environments: batched torch functions that step any number of environments at once."""

from rlmeta.envs.native.acrobot import Acrobot
from rlmeta.envs.native.bandit import Bandit
from rlmeta.envs.native.base import NativeEnv, NativeWorld, Physics, Redraw
from rlmeta.envs.native.cartpole import CartPole
from rlmeta.envs.native.catch import Catch
from rlmeta.envs.native.deep_sea import DeepSea
from rlmeta.envs.native.minatar import Asterix, Breakout, SpaceInvaders
from rlmeta.envs.native.mountain_car import MountainCar, MountainCarContinuous
from rlmeta.envs.native.navigation import Navigation
from rlmeta.envs.native.pendulum import Pendulum
from rlmeta.envs.native.point_reach import PointReach
from rlmeta.envs.native.repeat_previous import RepeatPrevious
from rlmeta.envs.native.t_maze import TMaze
from rlmeta.envs.native.tabular import CliffWalking, FrozenLake, GridWorld, Tables, Tabular, TabularMDP
from rlmeta.envs.native.trials import TrialWorld

NATIVE: dict[str, NativeEnv] = {
    "CartPole-v1": CartPole(),
    "MountainCar-v0": MountainCar(),
    "MountainCarContinuous-v0": MountainCarContinuous(),
    "Acrobot-v1": Acrobot(),
    "Pendulum-v1": Pendulum(),
    "FrozenLake-v1": FrozenLake(),
    "FrozenLake8x8-v1": FrozenLake(map_name="8x8", max_episode_steps=200),
    "CliffWalking-v1": CliffWalking(),
    "GridWorld-v0": GridWorld(),
    "Bandit-v0": Bandit(),
    "Navigation-v0": Navigation(),
    "DeepSea-v0": DeepSea(),
    "Catch-v0": Catch(),
    "TMaze-v0": TMaze(),
    "RepeatPrevious-v0": RepeatPrevious(),
    "PointReach-v0": PointReach(),
    "MinAtar/Asterix-v0": Asterix(minimal_actions=False),
    "MinAtar/Asterix-v1": Asterix(),
    "MinAtar/Breakout-v0": Breakout(minimal_actions=False),
    "MinAtar/Breakout-v1": Breakout(),
    "MinAtar/SpaceInvaders-v0": SpaceInvaders(minimal_actions=False),
    "MinAtar/SpaceInvaders-v1": SpaceInvaders(),
}
"""Native environments by the gymnasium id that they replace, or by an id of their own."""

__all__ = [
    "NATIVE",
    "Acrobot",
    "Asterix",
    "Bandit",
    "Breakout",
    "CartPole",
    "Catch",
    "CliffWalking",
    "DeepSea",
    "FrozenLake",
    "GridWorld",
    "MountainCar",
    "MountainCarContinuous",
    "NativeEnv",
    "NativeWorld",
    "Navigation",
    "Pendulum",
    "Physics",
    "PointReach",
    "Redraw",
    "RepeatPrevious",
    "SpaceInvaders",
    "TMaze",
    "Tables",
    "Tabular",
    "TabularMDP",
    "TrialWorld",
]
