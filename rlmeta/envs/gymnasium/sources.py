"""What environments are made from: gymnasium's ids, EnvPool's names, functions that make one environment or many."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from rlmeta.data.spaces import Layout
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.rows import MaskSource, Template, first_of, has_own_mask, with_mask
from rlmeta.errors import MissingExtraError, SettingError, SpaceError, nearest_names, unknown_name

ENVPOOL = "envpool:"
"""What the names of EnvPool's environments begin with, as tasks."""

_OURS = ("num_envs", "batch_size", "seed", "env_type")
"""Arguments of EnvPool's that are not the user's to choose."""


@dataclass(frozen=True)
class VectorSource:
    """A VectorEnv, and how to make it again where its environments take their seeds only when they are made."""

    env: VectorEnv[Any, Any, Any]
    name: str
    remake: Callable[[Sequence[int]], VectorEnv[Any, Any, Any]] | None = None
    """From one seed for each environment."""


def resolve(make: Any, settings: dict[str, Any], rows: int) -> Template | VectorSource:
    """The template of single environments, or the VectorEnv, that `make` stands for.

    Args:
        make: a gymnasium id, `envpool:NAME`, an EnvSpec, a VectorEnv, or a function that makes an environment or a
            VectorEnv.
        settings: its keyword arguments.
        rows: how many are wanted; told to a function that has a parameter `num_envs`. One that also has a parameter
            `seed` is told a seed for each, and called again for others.

    Raises:
        UnknownNameError: the id is not registered.
        MissingExtraError: the environment needs a package that is not installed.
        EnvironmentFailedError: the user's own code raised; the message says what, and where.
        SettingError, SpaceError: anything else that cannot be made, a single environment, one of several agents.
    """
    if isinstance(make, VectorEnv):
        if settings:
            raise SettingError(f"a VectorEnv is made already and takes no settings, got {settings}")
        _check_envpool(make, vector_name(make), None)
        return VectorSource(make, vector_name(make))
    if isinstance(make, gym.Env):
        raise SettingError(f"got the environment {make}; give a function that makes one, for every row needs its own")
    if isinstance(make, str) and make.startswith(ENVPOOL):
        return _envpool(make, settings, rows)
    if isinstance(make, str | EnvSpec):
        return _registered(make, settings)
    if not callable(make):
        raise SettingError(f"got {type(make).__name__}, expected a gymnasium id, an EnvSpec, a VectorEnv or a function")
    return _from_function(make, settings, rows)


def is_envpool(env: Any) -> bool:
    """Whether an environment is one of EnvPool's, which ignore the seed that `reset` is given."""
    return any(cls.__module__.partition(".")[0] == "envpool" for cls in type(env).__mro__)


def vector_name(env: VectorEnv[Any, Any, Any]) -> str:
    """A VectorEnv's id, or its class, in words."""
    return f"vector environment {_id_of(env)!r}"


def _id_of(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> str:
    return env.spec.id if isinstance(env.spec, EnvSpec) else type(env.unwrapped).__name__


# ------------------------------------------------------------------------------------------------- gymnasium's registry


def _registered(make: str | EnvSpec, settings: dict[str, Any]) -> Template:
    said = f"environment {(make if isinstance(make, str) else make.id)!r}"
    spec = _spec(make, said) if isinstance(make, str) else make
    # gymnasium's checker warns at every step about what is an error here
    factory = partial(gym.make, spec, disable_env_checker=True, **settings)
    return _template(failures.made(said, settings, factory), factory, said)


def _spec(identifier: str, said: str) -> EnvSpec:
    """What `package.module:MyEnv-v0` or `MyEnv-v0` is registered as, after its module is imported."""
    module, colon, registered = identifier.rpartition(":")
    if colon:
        failures.made(said, {}, partial(importlib.import_module, module))
    try:
        return gym.spec(registered)
    except gym.error.UnregisteredEnv as error:
        known = [str(one) for one in gym.registry]
        near = [f"{module}{colon}{one}" for one in nearest_names(registered, known)]  # the module makes nothing alike
        raise unknown_name("gymnasium environment", identifier, near or known) from error
    except gym.error.Error as error:
        raise SettingError(f"{said} cannot be made: {error}") from error


# ------------------------------------------------------------------------------------------------------------- EnvPool


def _envpool(name: str, settings: dict[str, Any], rows: int) -> VectorSource:
    try:
        import envpool
    except ImportError as error:
        raise MissingExtraError(
            f"task {name!r} needs envpool, which can't be imported ({error}): install it"
        ) from error
    identifier, known = name.removeprefix(ENVPOOL), envpool.list_all_envs()
    if identifier not in known:
        raise unknown_name("EnvPool environment", identifier, known, "envpool.list_all_envs()")
    for setting in _OURS:
        if setting in settings:
            raise SettingError(
                f"{setting} is no setting of {name!r}: it follows from num_envs and seeds of the learner"
            )

    def make(seeds: Sequence[int]) -> VectorEnv[Any, Any, Any]:
        maker = partial(envpool.make_gymnasium, identifier, num_envs=rows, seed=list(seeds), **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*precision lowered by casting")  # of bounds, at every make
            made: VectorEnv[Any, Any, Any] = failures.made(f"environment {name!r}", settings, maker)
            _ = made.observation_space, made.action_space
        return made

    made, said = make(range(rows)), f"vector environment {name!r}"
    _check_envpool(made, said, make)
    return VectorSource(made, said, make)


def _check_envpool(env: VectorEnv[Any, Any, Any], said: str, remake: Any) -> None:
    """Refuse an EnvPool of several agents, one that steps a part of its environments, or one that can't be made again.

    It would ignore the seeds, so that all runs began in the same states.
    """
    if not is_envpool(env.unwrapped):
        return
    config: dict[str, Any] = dict(env.unwrapped.config)  # type: ignore[attr-defined]
    if remake is None:
        raise SettingError(
            f"{said} is EnvPool's, which takes its seeds only when it is made: name the task {ENVPOOL}NAME, or give a "
            "function with the parameters num_envs and seed that hands both on"
        )
    if config["max_num_players"] > 1:
        raise SettingError(f"{said} is of several agents ({config['max_num_players']}): only single ones are supported")
    if config["batch_size"] not in (0, env.num_envs):
        raise SettingError(
            f"{said} steps {config['batch_size']} of its {env.num_envs} environments at a time: set no batch_size"
        )


# ------------------------------------------------------------------------------------------------ the user's functions


def _from_function(make: Callable[..., Any], settings: dict[str, Any], rows: int) -> Template | VectorSource:
    said = f"the function {getattr(make, '__qualname__', type(make).__name__)}"
    remake = None
    if has_parameter(make, "num_envs"):
        settings = {"num_envs": rows, **settings}
        if has_parameter(make, "seed"):
            remake = partial(_seeded, make, settings, said)
    factory = partial(make, **settings) if settings else make
    made = failures.made(said, settings, factory) if remake is None else remake(range(rows))
    if isinstance(made, VectorEnv):
        _check_envpool(made, vector_name(made), remake)
        return VectorSource(made, vector_name(made), remake)
    if not isinstance(made, gym.Env):
        raise SettingError(f"{said} returned {told(made)}, expected a gymnasium.Env or VectorEnv{_instead_of(made)}")
    return _template(made, factory, f"environment {_id_of(made)!r}")


def _seeded(make: Callable[..., Any], settings: dict[str, Any], said: str, seeds: Sequence[int]) -> Any:
    return failures.made(said, settings, partial(make, **settings, seed=list(seeds)))


def told(value: Any) -> str:
    """A value that was given for an environment, in a few words."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def several_agents(value: Any) -> bool:
    """Whether it is an environment of several agents by PettingZoo's interface."""
    return hasattr(value, "possible_agents") or (hasattr(value, "agents") and hasattr(value, "observe"))


def _instead_of(made: Any) -> str:
    """What to do where it is something else that rlmeta or others know."""
    if is_envpool(made):
        return ": make it by envpool.make_gymnasium"
    if several_agents(made):
        return ": environments of several agents, such as PettingZoo's, are not supported"
    kind = type(made)
    if kind.__module__.startswith("rlmeta."):
        return f"; a {kind.__name__} is given as it is, without the function around it"
    if hasattr(made, "reset") and hasattr(made, "step"):
        return ": let its class extend gymnasium.Env"
    return ""


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be told something by this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


# -------------------------------------------------------------------------------------------------- single environments


def _template(first: gym.Env[Any, Any], make: Callable[[], gym.Env[Any, Any]], name: str) -> Template:
    """Look at a first environment, which is thrown away: looking may reset it, and rows must all be alike."""
    try:
        _check_form(first, name)
        mask: MaskSource = None
        if not has_own_mask(first.observation_space):
            if first.has_wrapper_attr("action_masks"):
                mask = "method"
            elif isinstance(first.action_space, spaces.Discrete | spaces.MultiDiscrete):
                with failures.telling(name):
                    mask = "info" if "action_mask" in first_of(first, 0, name)[1] else None
        limit = first.spec.max_episode_steps if isinstance(first.spec, EnvSpec) else None
        if limit is None and first.has_wrapper_attr("_max_episode_steps"):  # a TimeLimit that its maker wrapped around
            limit = first.get_wrapper_attr("_max_episode_steps")
        shown = with_mask(first, mask)
        Layout(shown.observation_space), Layout(shown.action_space, "action")
        return Template(make, name, shown.observation_space, shown.action_space, mask, limit)
    finally:
        failures.close(first, name)


def _check_form(env: gym.Env[Any, Any], name: str) -> None:
    """Refuse an environment that does not have gymnasium's form, or whose episodes can't be seeded."""
    for space in ("observation_space", "action_space"):
        if not isinstance(getattr(env, space, None), gym.Space):
            raise SpaceError(f"{name} has no {space}: set it in its __init__ to one of gymnasium.spaces")
    layer: Any = env
    while layer is not None:
        if not _takes(layer.reset, "seed"):
            raise SpaceError(
                f"{name}: the reset() of {type(layer).__name__} takes no seed, so no run could be repeated; declare "
                "reset(self, *, seed=None, options=None) and begin it with super().reset(seed=seed)"
            )
        layer = layer.env if isinstance(layer, gym.Wrapper) else None


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        inspect.signature(function).bind_partial(**{keyword: None})
    except TypeError:
        return False
    except ValueError:  # written in C, and says nothing of its parameters
        return True
    return True
