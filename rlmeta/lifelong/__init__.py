"""Lifelong methods: one file a method, composable on any learner."""

from rlmeta.learning.method import Method

ALL: tuple[type[Method], ...] = ()
"""Every method that can be named on the command line (`--lifelong NAME`)."""
