"""Environments and problems: tasks, families of tasks, and streams of tasks."""

from rlmeta.envs import own_folders  # lets worker processes import the user's modules

__all__ = [
    "families",
    "few_shot",
    "gymnasium",
    "minimisation",
    "native",
    "own_folders",
    "regression",
    "streams",
    "task",
    "task_families",
    "world",
]
