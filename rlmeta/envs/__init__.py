"""Environments, tasks, families and streams."""

from rlmeta.envs import own_folders  # a worker process finds the user's modules by it

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
