"""What comes with rlmeta, by its name on the command line: learners and lifelong methods."""

from __future__ import annotations

from rlmeta import agents, imitation, lifelong, meta, supervised
from rlmeta.errors import unknown_name
from rlmeta.learning.method import Method
from rlmeta.learning.settings import name_of

AGENTS: dict[str, type] = {name_of(cls): cls for cls in (*agents.ALL, *imitation.ALL, *supervised.ALL, *meta.ALL)}
"""The settings class of every agent, supervised learner, imitator and meta-learner."""

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in lifelong.ALL}
"""Every lifelong method."""


def agent_class(name: str) -> type:
    """The settings class of an agent's command-line name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in AGENTS:
        raise unknown_name("agent", name, AGENTS)
    return AGENTS[name]
