"""Environments and problems: tasks, families of tasks, and streams of tasks."""

from rlmeta.envs import user_modules  # lets worker processes import the user's modules

__all__ = [
    "families",
    "few_shot",
    "gymnasium",
    "minimisation",
    "native",
    "regression",
    "streams",
    "task",
    "task_families",
    "user_modules",
    "world",
]
