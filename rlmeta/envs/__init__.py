"""Environments, tasks, families and streams."""

from rlmeta.envs import own_folders as own_folders  # a worker process finds the user's modules by it
