"""Reinforcement learning, meta-learning and lifelong learning in PyTorch, where learners are an axis."""

import sys


def _leave_current_folder() -> None:
    """Drop the current folder from `sys.path` under `python -m rlmeta`.

    Python would search it before the standard library, and it may contain anybody's `random.py`. So nothing but the
    built-in `sys` is imported before.
    """
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path:  # "-m" while the module that is to be run is searched for
        return
    for flag, following in zip(sys.orig_argv[1:], [*sys.orig_argv[2:], ""]):
        others, is_module_flag, module = flag[1:].partition("m")
        if flag[:1] == "-" and is_module_flag and not others.strip("bBdEiIOPqsSuvx"):
            if (module or following).partition(".")[0] == "rlmeta":
                here = sys.path.pop(0)
                if __file__ == f"{here}/rlmeta/__init__.py":  # rlmeta itself is here
                    sys.path.append(here)
            return


_leave_current_folder()

import ast  # noqa: E402
import importlib  # noqa: E402
import random  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if sys.platform == "win32":  # locks, worker processes and checkpoints use POSIX calls
    raise ImportError("rlmeta runs on Linux and macOS; on Windows use it within WSL")

if TYPE_CHECKING:
    from rlmeta import agents as agents
    from rlmeta import compat as compat
    from rlmeta import data as data
    from rlmeta import envs as envs
    from rlmeta import functional as functional
    from rlmeta import imitation as imitation
    from rlmeta import learning as learning
    from rlmeta import lifelong as lifelong
    from rlmeta import meta as meta
    from rlmeta import nn as nn
    from rlmeta import offline as offline
    from rlmeta import rewards as rewards
    from rlmeta import supervised as supervised
    from rlmeta.agents import *  # noqa: F403
    from rlmeta.api import load as load
    from rlmeta.api import resume as resume
    from rlmeta.api import train as train
    from rlmeta.data.demonstrations import Demonstrations as Demonstrations
    from rlmeta.envs.streams import TaskStream as TaskStream
    from rlmeta.envs.streams import stream as stream
    from rlmeta.envs.task import Task as Task
    from rlmeta.envs.task import TaskFamily as TaskFamily
    from rlmeta.envs.task import family as family
    from rlmeta.envs.task import task as task
    from rlmeta.envs.task import trials as trials
    from rlmeta.errors import RlmetaError as RlmetaError
    from rlmeta.imitation import *  # noqa: F403
    from rlmeta.learning.populations import PBT as PBT
    from rlmeta.lifelong import *  # noqa: F403
    from rlmeta.meta import *  # noqa: F403
    from rlmeta.offline import *  # noqa: F403
    from rlmeta.report.watch import watch as watch
    from rlmeta.rewards import *  # noqa: F403
    from rlmeta.runs.experiment import Budget as Budget
    from rlmeta.runs.presets import preset as preset
    from rlmeta.runs.record_demonstrations import record as record
    from rlmeta.runs.run import Run as Run
    from rlmeta.supervised import *  # noqa: F403

    __version__: str

_WHERE = {
    "Budget": "runs.experiment",
    "Demonstrations": "data.demonstrations",
    "PBT": "learning.populations",
    "RlmetaError": "errors",
    "Run": "runs.run",
    "Task": "envs.task",
    "TaskFamily": "envs.task",
    "TaskStream": "envs.streams",
    "family": "envs.task",
    "load": "api",
    "preset": "runs.presets",
    "record": "runs.record_demonstrations",
    "resume": "api",
    "stream": "envs.streams",
    "task": "envs.task",
    "train": "api",
    "trials": "envs.task",
    "watch": "report.watch",
}
"""Modules of names that are imported on first use: `import rlmeta` alone imports neither torch nor environments."""

_PACKAGES = ("agents", "supervised", "imitation", "offline", "rewards", "lifelong", "meta")
"""Packages whose classes are also `rlmeta.NAME`: a new algorithm is a module in one of them and a name in `__all__`."""

_PARTS = (*_PACKAGES, "compat", "data", "envs", "functional", "learning", "nn")
"""Packages that are `rlmeta.NAME` without an import of their own."""


def _classes_of(package: str) -> list[str]:
    """Classes in a package's `__all__`, read without importing it."""
    body = ast.parse((Path(__file__).parent / package / "__init__.py").read_text()).body
    named = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return [name for value in named for name in ast.literal_eval(value) if name[0].isupper()]


_WHERE |= {name: package for package in _PACKAGES for name in _classes_of(package)}
__all__ = sorted([*_WHERE, *_PARTS])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("rlmeta")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in {*_WHERE, *_PARTS, "__version__"}:
        raise AttributeError(f"module 'rlmeta' has no attribute {name!r}")
    numbers = random.getstate()  # an imported package draws from Python's own generator
    if name == "__version__":
        value: Any = _version()
    elif name in _PARTS:
        value = importlib.import_module(f"rlmeta.{name}")
    else:
        value = getattr(importlib.import_module(f"rlmeta.{_WHERE[name]}"), name)
    random.setstate(numbers)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
