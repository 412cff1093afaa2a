"""Pictures of gymnasium environments: an episode is played again from its seed and actions, and rendered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rlmeta.data.spaces import Layout
from rlmeta.envs.episodes import Episode
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.rows import Template, first_reset
from rlmeta.envs.gymnasium.sources import resolve
from rlmeta.envs.native.drawing import Picture
from rlmeta.errors import EnvironmentFailedError, SettingError, SpaceError
from rlmeta.functional import tree


class Stage:
    """Single environment in which episodes are played again and drawn: as arrays, or in gymnasium's own window.

    Args:
        make: as for `GymnasiumWorld`.
        settings: as there.
        max_episode_steps: as there.
        live: draw in gymnasium's own window, its render mode "human", instead of arrays.
        fps: pictures a second in a window; 0 for the environment's own.

    Raises:
        SettingError: the environment cannot be drawn in this mode, or is a VectorEnv.
    """

    def __init__(
        self, make: Any, settings: dict[str, Any], max_episode_steps: int | None, live: bool, fps: int = 0
    ) -> None:
        self._mode = "human" if live else "rgb_array"
        source = resolve(make, settings, 1, self._mode)
        if not isinstance(source, Template):
            source.env.close()
            raise SettingError(
                f"{source.name} is a vector environment, which can't be drawn: give the name of its single one by "
                "task=, on the command line --task"
            )
        template = source if max_episode_steps is None else source.limited(max_episode_steps)
        self.name = template.name
        self._env = template.environment()
        self._actions = Layout(template.action_space, "action")
        try:
            self._check_mode()
        except BaseException:
            self.close()
            raise
        self.fps = fps or int(self._env.metadata.get("render_fps") or 30)
        self._env.unwrapped.metadata = {**self._env.unwrapped.metadata, "render_fps": self.fps}

    def _check_mode(self) -> None:
        if self._env.render_mode != self._mode:
            modes = ", ".join(self._env.metadata.get("render_modes") or []) or "none"
            raise SettingError(
                f"{self.name} has the render mode {self._env.render_mode!r} and knows {modes}, to be drawn it needs "
                f"{self._mode!r}: let the function that makes it have a parameter render_mode, and hand it on"
            )

    def frames(self, episode: Episode) -> Iterator[Picture | None]:
        """Play an episode again, with a picture of its start and after each step; None where a window shows it.

        Raises:
            EnvironmentFailedError: the environment raised, or gave other rewards than before.
        """
        steps = episode.steps
        with failures.converting(self.name):
            first_reset(self._env, int(episode.start["seed"]), self.name)
            yield self._picture()
            stacked = tree.map(lambda *leaves: torch.stack(leaves), *(step.action for step in steps))
            stored = self._actions.to_stored_actions(stacked, (len(steps),))
            for t, action in enumerate(self._actions.rows(self._actions.to_env_actions(stored))):
                _, reward, terminated, truncated, _ = self._env.step(action)
                same = np.float32(reward).tobytes() == steps[t].reward.cpu().numpy().tobytes()
                if not same or bool(terminated or truncated) != bool(steps[t].ended):
                    raise EnvironmentFailedError(
                        f"{self.name} went on otherwise after {t} steps when an episode was played again to be drawn: "
                        "its episodes do not follow from their seeds, which `rlmeta check` looks into"
                    )
                yield self._picture()

    def _picture(self) -> Picture | None:
        picture: Any = self._env.render()
        if self._mode == "human":
            return None
        if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[-1] != 3:
            shape = f"of shape {picture.shape}" if isinstance(picture, np.ndarray) else f"a {type(picture).__name__}"
            raise SpaceError(f"{self.name} gave a picture {shape} from render(), expected [height, width, 3]")
        return np.asarray(picture, np.uint8)

    def close(self) -> None:
        """Close the environment."""
        failures.close(self._env, self.name)
