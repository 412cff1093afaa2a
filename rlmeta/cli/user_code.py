"""Flags that name user code for commands on a run folder, which never loads any by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class UserCode:
    """Your own code that the run used: a run folder names it but never loads it by itself."""

    code: str = ""
    """Modules that the folder may name and so import, package.module, joined by commas."""
    agent: str | None = None
    """The agent's settings class, package.module:Name."""
    network: str | None = None
    """The network factory, package.module:Name."""
    env: str | None = None
    """The environment's factory, or the stream or family, package.module:name."""
    lifelong: str = ""
    """The lifelong methods, package.module:MyMethod, joined by commas."""
    rewards: str = "none"
    """For a resume: the rewards, package.module:Name, joined by +."""
    demonstrations: str | None = None
    """For a resume: the file of demonstrations, if it was moved."""

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Allow a run folder to load the user code that these flags name, also from the current folder."""
        from rlmeta.runs.user_code import allowed_here, names_in, user_names

        texts = (self.agent, self.network, self.env, self.lifelong, self.rewards)
        with allowed_here(names_in(self.code), [name for text in texts for name in user_names(text)]):
            yield

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Load the user code that the flags name, as arguments of `load` and `resume` for the run in a folder."""
        from rlmeta.runs import user_code

        rewards = tuple(user_code.rewards_named(self.rewards))  # a class takes the settings that the run had
        own: dict[str, Any] = {"rewards": rewards} if rewards else {}
        if self.demonstrations is not None:
            own["demonstrations"] = self.demonstrations
        return {
            "agent": user_code.user_agent(self.agent),
            "network": user_code.user_network(self.network),
            "env": user_code.user_env(folder, self.env),
            "lifelong": user_code.user_methods(folder, self.lifelong),
            "own": own,
        }

    def words(self) -> str:
        """Format the flags that differ from their defaults, for a hint."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items())
