"""Atari and MiniGrid, prepared for agents as is usual: `atari:Pong-v5`, `minigrid:DoorKey-5x5-v0`.

Their settings are `Atari` and `MiniGrid`: `rl.task("atari:Pong-v5", settings={"frame_stack": 2})`, on the command line
`--env.frame-stack 2`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from rlmeta.data.spaces import FrameStack
from rlmeta.envs.gymnasium import failures
from rlmeta.errors import MissingExtraError, SettingError, require_choice, require_count, unknown_name

ATARI = "atari:"
"""Prefix of the names of Atari's games by the protocol."""
MINIGRID = "minigrid:"
"""Prefix of the names of MiniGrid's tasks by the protocol."""

_NAMESPACES = {
    "ALE/": ("ale_py", "atari"),
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
}
"""Beginning of the ids that a package registers when it is imported, the package, and the extra that installs it."""

_MINIGRID_HIGH = (10, 5, 2)
"""Largest numbers of a MiniGrid cell: object, colour, state."""


@dataclass(frozen=True)
class Atari:
    """Atari protocol (Mnih et al., 2015; Machado et al., 2018): the game as an agent sees and plays it.

    Observations are the last `frame_stack` frames `[frame_stack, screen_size, screen_size]` in bytes, each the brighter
    of the last two of `frame_skip` emulated ones. Rewards are the game's, as they are; PPO's `normalise_reward` scales
    them in training alone.
    """

    frame_skip: int = 4
    """Emulated frames for which an action is repeated."""
    frame_stack: int = 4
    """Frames in an observation."""
    screen_size: int = 84
    """Rows and columns to which frames are resized."""
    sticky: float = 0.25
    """Probability, in every emulated frame, that the emulator repeats its last action."""
    noop_max: int = 0
    """Largest number of idle steps at an episode's start; above 0 in the protocol without sticky actions alone."""
    terminal_on_life_loss: bool = False
    """Whether an episode of training ends with a life and the next begins a new game; evaluation plays whole games."""
    full_action_space: bool = False
    """Whether there are all 18 actions instead of those that matter in the game."""
    max_episode_steps: int = 27_000
    """Time limit in steps: by default 30 minutes of the game."""

    def __post_init__(self) -> None:
        for name in ("frame_skip", "frame_stack", "screen_size", "max_episode_steps"):
            require_count(name, getattr(self, name))
        if not 0 <= self.sticky <= 1 or self.noop_max < 0:
            raise SettingError(
                f"sticky={self.sticky}, noop_max={self.noop_max}: expected a probability, and a count from 0 on"
            )

    def make(self, identifier: str, render_mode: str | None = None) -> gym.Env[Any, Any]:
        """Create an environment by its id in gymnasium's registry; to draw it is the game's own picture in colours."""
        from gymnasium import wrappers

        env = gym.make(
            identifier,
            frameskip=1,
            repeat_action_probability=self.sticky,
            full_action_space=self.full_action_space,
            max_num_frames_per_episode=None,
            render_mode=render_mode,
            disable_env_checker=True,
        )
        env = wrappers.AtariPreprocessing(
            env,
            noop_max=self.noop_max,
            frame_skip=self.frame_skip,
            screen_size=self.screen_size,
            terminal_on_life_loss=self.terminal_on_life_loss,
        )
        stacked = wrappers.FrameStackObservation(env, self.frame_stack)
        shape = stacked.observation_space.shape
        stacked.observation_space = FrameStack(0, 255, shape, np.uint8)
        return wrappers.TimeLimit(stacked, self.max_episode_steps)


@dataclass(frozen=True)
class MiniGrid:
    """MiniGrid's observations without the text of the mission, which no encoder reads as it is."""

    observation: Literal["image", "flat"] = "image"
    """What is seen: the cells in front of the agent `[7, 7, 3]` (object, colour and state of each), or "flat",
    minigrid's FlatObsWrapper, these and the mission's letters in one vector."""
    max_episode_steps: int | None = None
    """Time limit in steps; None for the task's own."""

    def __post_init__(self) -> None:
        require_choice("observation", self.observation, Literal["image", "flat"])
        if self.max_episode_steps is not None:
            require_count("max_episode_steps", self.max_episode_steps)

    def make(self, identifier: str, render_mode: str | None = None) -> gym.Env[Any, Any]:
        """Create an environment by its id in gymnasium's registry."""
        from minigrid.wrappers import FlatObsWrapper, ImgObsWrapper

        limit = {} if self.max_episode_steps is None else {"max_steps": self.max_episode_steps}
        env = gym.make(identifier, render_mode=render_mode, disable_env_checker=True, **limit)
        wrapper: Any = ImgObsWrapper if self.observation == "image" else FlatObsWrapper
        wrapped = wrapper(env)
        high = wrapped.observation_space.high.reshape(-1).copy()
        seen: Any = env.observation_space
        cells = seen["image"].low.size
        high[:cells] = np.resize(_MINIGRID_HIGH, cells)
        high[cells:] = 1  # letters
        # bytes are divided by the bound that their space declares, and minigrid declares 255
        wrapped.observation_space = gym.spaces.Box(0, high.reshape(wrapped.observation_space.shape), dtype=np.uint8)
        # its episodes are cut at the limit by the environment itself
        return gym.wrappers.TimeLimit(wrapped, env.unwrapped.max_steps)  # type: ignore[attr-defined]


_PROTOCOLS: Mapping[str, tuple[type[Atari] | type[MiniGrid], str]] = {
    ATARI: (Atari, "ALE/"),
    MINIGRID: (MiniGrid, "MiniGrid-"),
}
"""Settings of a protocol, and the beginning of the ids of its environments, by prefix."""


@dataclass(frozen=True)
class Maker:
    """Function that makes an environment by a protocol; a worker process gets a copy."""

    settings: Atari | MiniGrid
    identifier: str
    render_mode: str | None = None

    def __call__(self) -> gym.Env[Any, Any]:
        """Create an environment."""
        import_registering(self.identifier, self.identifier)
        return self.settings.make(self.identifier, self.render_mode)


def is_protocol(name: str) -> bool:
    """Whether a task's name has the prefix of a protocol."""
    return name.startswith(tuple(_PROTOCOLS))


def maker(name: str, settings: Mapping[str, Any], render_mode: str | None = None) -> Maker:
    """Return the function that makes environments by a name with the prefix of a protocol.

    Args:
        name: such as `atari:Pong-v5`; the beginning of the id may be given, too.
        settings: fields of the protocol's class.
        render_mode: gymnasium's, of environments that are to be drawn.

    Raises:
        MissingExtraError: a package is not installed.
        UnknownNameError: there is no such environment.
        SettingError: there is no such setting, or its value is out of range.
    """
    prefix = next(prefix for prefix in _PROTOCOLS if name.startswith(prefix))
    cls, beginning = _PROTOCOLS[prefix]
    identifier = name.removeprefix(prefix)
    if not identifier.startswith(tuple(_NAMESPACES)):
        identifier = beginning + identifier
    import_registering(identifier, name)
    if identifier not in gym.registry:
        known = [prefix + spec.removeprefix(beginning) for spec in gym.registry if spec.startswith(beginning)]
        raise unknown_name("environment", name, known)
    fields = [field.name for field in dataclasses.fields(cls)]
    for setting in settings:
        if setting not in fields:
            raise SettingError(str(unknown_name(f"setting of {name}", setting, fields)))
    with failures.converting(f"environment {name!r}"):
        return Maker(cls(**settings), identifier, render_mode)


def import_registering(identifier: str, name: str) -> None:
    """Import the package that registers an id with gymnasium when it is imported, if it is a known one.

    Args:
        identifier: a gymnasium id.
        name: of the task, for the error.

    Raises:
        MissingExtraError: the package can't be imported.
    """
    for beginning, (package, extra) in _NAMESPACES.items():
        if identifier.startswith(beginning):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingExtraError(
                    f"task {name!r} needs {package}, which can't be imported ({error}): pip install 'rlmeta[{extra}]'"
                ) from error
