"""Reinforcement learning, meta-learning and lifelong learning in PyTorch, where learners are an axis."""

from __future__ import annotations

import importlib
import random
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # locks, worker processes and checkpoints use POSIX calls
    raise ImportError("rlmeta runs on Linux and macOS; on Windows use it within WSL")

if TYPE_CHECKING:
    from rlmeta.agents import (
        A2C,
        DQN,
        GAIL,
        IRL,
        PPO,
        REINFORCE,
        AdversarialReward,
        BehaviourCloning,
        Classifier,
        Regressor,
    )
    from rlmeta.envs.demonstrations import Demonstrations
    from rlmeta.envs.streams import TaskStream, stream
    from rlmeta.envs.task import Task, TaskFamily, family, task
    from rlmeta.errors import RlmetaError
    from rlmeta.lab.experiment import Budget
    from rlmeta.lab.presets import preset
    from rlmeta.lab.record import record
    from rlmeta.lab.run import Run, load
    from rlmeta.lab.train import resume, train
    from rlmeta.lifelong import AGEM, EWC, GEM, PackNet, Replay
    from rlmeta.meta import MAML, LearnedOptimizer
    from rlmeta.rewards import EpisodicCounts, PotentialShaping

_WHERE = {
    "A2C": "rlmeta.agents",
    "record": "rlmeta.lab.record",
    "Demonstrations": "rlmeta.envs.demonstrations",
    "PotentialShaping": "rlmeta.rewards",
    "EpisodicCounts": "rlmeta.rewards",
    "IRL": "rlmeta.agents",
    "GAIL": "rlmeta.agents",
    "BehaviourCloning": "rlmeta.agents",
    "AdversarialReward": "rlmeta.agents",
    "Classifier": "rlmeta.agents",
    "DQN": "rlmeta.agents",
    "PPO": "rlmeta.agents",
    "REINFORCE": "rlmeta.agents",
    "Regressor": "rlmeta.agents",
    "MAML": "rlmeta.meta",
    "LearnedOptimizer": "rlmeta.meta",
    "Task": "rlmeta.envs.task",
    "TaskFamily": "rlmeta.envs.task",
    "TaskStream": "rlmeta.envs.streams",
    "family": "rlmeta.envs.task",
    "stream": "rlmeta.envs.streams",
    "task": "rlmeta.envs.task",
    "RlmetaError": "rlmeta.errors",
    "Budget": "rlmeta.lab.experiment",
    "preset": "rlmeta.lab.presets",
    "Run": "rlmeta.lab.run",
    "load": "rlmeta.lab.run",
    "resume": "rlmeta.lab.train",
    "train": "rlmeta.lab.train",
    "AGEM": "rlmeta.lifelong",
    "EWC": "rlmeta.lifelong",
    "GEM": "rlmeta.lifelong",
    "PackNet": "rlmeta.lifelong",
    "Replay": "rlmeta.lifelong",
}
"""Imported when first used: `import rlmeta` alone loads neither torch nor an environment."""

__all__ = [
    "A2C",
    "AGEM",
    "DQN",
    "EWC",
    "GAIL",
    "GEM",
    "IRL",
    "MAML",
    "PPO",
    "REINFORCE",
    "AdversarialReward",
    "BehaviourCloning",
    "Budget",
    "Classifier",
    "Demonstrations",
    "EpisodicCounts",
    "LearnedOptimizer",
    "PackNet",
    "PotentialShaping",
    "Regressor",
    "Replay",
    "RlmetaError",
    "Run",
    "Task",
    "TaskFamily",
    "TaskStream",
    "family",
    "load",
    "preset",
    "record",
    "resume",
    "stream",
    "task",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rlmeta' has no attribute {name!r}")
    numbers = random.getstate()  # a package that is imported along the way draws from Python's own generator
    value = getattr(importlib.import_module(_WHERE[name]), name)
    random.setstate(numbers)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
