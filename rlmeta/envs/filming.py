"""Filming: the pictures of recorded episodes, of native environments and gymnasium's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from rlmeta.envs.episodes import Episode
from rlmeta.envs.gymnasium.pictures import Stage
from rlmeta.envs.native import NativeEnv
from rlmeta.envs.native.drawing import Picture
from rlmeta.envs.task import Task


class Camera(Protocol):
    """Source of the pictures of episodes."""

    fps: int
    """Pictures a second at the environment's own speed."""

    def frames(self, episode: Episode) -> Iterator[Picture | None]:
        """Pictures `[height, width, 3]` of an episode, its start and one after each step; None where a window shows
        them."""
        ...

    def close(self) -> None:
        """Release what draws."""
        ...


class NativeCamera:
    """Draws the states of a native environment."""

    def __init__(self, env: NativeEnv) -> None:
        self._draw, self.fps = env.drawing()

    def frames(self, episode: Episode) -> Iterator[Picture | None]:
        """Pictures of the recorded states."""
        physics: Any = episode.start.get("physics", {})
        for state in (episode.start["env"], *(step.successor for step in episode.steps)):
            yield self._draw(state, physics)

    def close(self) -> None:
        """Release nothing."""


def camera(task: Task, live: bool, fps: int = 0) -> Camera:
    """Camera for the environments of a task.

    Args:
        task: the task.
        live: whether gymnasium's environments draw in a window of their own; native ones always give arrays.
        fps: pictures a second in such a window; 0 for the environment's own.

    Raises:
        SettingError: the environment cannot be drawn.
        MissingExtraError: a package that draws is not installed.
    """
    if isinstance(task.source, NativeEnv):
        return NativeCamera(task.source)
    return Stage(task.source, dict(task.settings), task.max_episode_steps, live, fps)
