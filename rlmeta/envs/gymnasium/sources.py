"""Sources of environments: gymnasium ids, EnvPool names, and functions that return an environment or a VectorEnv."""

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
from rlmeta.envs.gymnasium import failures, protocols
from rlmeta.envs.gymnasium.rows import MaskSource, Template, first_reset, has_own_mask, with_mask
from rlmeta.errors import MissingExtraError, SettingError, SpaceError, nearest_names, unknown_name

ENVPOOL = "envpool:"
"""Prefix of EnvPool names."""


def has_prefix(name: str) -> bool:
    """Whether a name's part before the colon is no module of the user's but a prefix of rlmeta's."""
    return name.startswith(ENVPOOL) or protocols.is_protocol(name)


_OURS = ("num_envs", "batch_size", "seed", "env_type")
"""Arguments of EnvPool that the user cannot set."""


_IN_EVALUATION: dict[str, dict[str, Any]] = {
    protocols.ATARI: {"terminal_on_life_loss": False},
    ENVPOOL: {"episodic_life": False, "reward_clip": False},
}
"""Settings that change what an episode or a reward is to help training, and their values in evaluation, by prefix."""


def evaluation_settings(make: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with which a source is evaluated: whole episodes and the environment's own rewards.

    Args:
        make: the source, as for `resolve`.
        settings: those of training.
    """
    whole = [values for prefix, values in _IN_EVALUATION.items() if isinstance(make, str) and make.startswith(prefix)]
    return {name: values.get(name, value) for values in whole for name, value in settings.items()} or settings


@dataclass(frozen=True)
class VectorSource:
    """VectorEnv, with a constructor if its environments take seeds only on construction."""

    env: VectorEnv[Any, Any, Any]
    name: str
    remake: Callable[[Sequence[int]], VectorEnv[Any, Any, Any]] | None = None
    """Constructor from a seed for each environment, None if `reset` takes seeds."""


def resolve(make: Any, settings: dict[str, Any], rows: int, render_mode: str | None = None) -> Template | VectorSource:
    """Resolve a source to a template of single environments or a VectorEnv.

    Args:
        make: a gymnasium id, `envpool:NAME`, `atari:NAME`, `minigrid:NAME`, an EnvSpec, a VectorEnv, or a function that
            returns an environment or a VectorEnv.
        settings: its keyword arguments.
        rows: number of environments, passed to a function with a parameter `num_envs`. One that also has a parameter
            `seed` gets a list of seeds, and is called again for other seeds.
        render_mode: gymnasium's, of single environments that are to be drawn, which is passed to a function with such a
            parameter; None for environments that are not.

    Raises:
        UnknownNameError: the id is not registered.
        MissingExtraError: the environment needs a package that is not installed.
        EnvironmentFailedError: user code raised; the message has the exception and source line.
        SettingError, SpaceError: any other source that cannot be used, such as an instance of a single environment
            or an environment of several agents.
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
    if isinstance(make, str) and protocols.is_protocol(make):
        factory, what = protocols.maker(make, settings, render_mode), f"environment {make!r}"
        return _template(failures.construct(what, settings, factory), factory, what)
    drawn = {} if render_mode is None else {"render_mode": render_mode}
    if isinstance(make, str | EnvSpec):
        return _registered(make, settings | drawn)
    if not callable(make):
        raise SettingError(f"got {type(make).__name__}, expected a gymnasium id, an EnvSpec, a VectorEnv or a function")
    return _from_function(make, settings | (drawn if has_parameter(make, "render_mode") else {}), rows)


def is_envpool(env: Any) -> bool:
    """Whether an environment is of EnvPool, which ignores the seed of `reset`."""
    return any(cls.__module__.partition(".")[0] == "envpool" for cls in type(env).__mro__)


def vector_name(env: VectorEnv[Any, Any, Any]) -> str:
    """Description of a VectorEnv, with its id or class."""
    return f"vector environment {_id_of(env)!r}"


def _id_of(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> str:
    return env.spec.id if isinstance(env.spec, EnvSpec) else type(env.unwrapped).__name__


# ------------------------------------------------------------------------------------------------- gymnasium's registry


def _registered(make: str | EnvSpec, settings: dict[str, Any]) -> Template:
    what = f"environment {(make if isinstance(make, str) else make.id)!r}"
    spec = _spec(make, what) if isinstance(make, str) else make
    # gymnasium's checker warns at every step about what is an error here
    factory = partial(gym.make, spec, disable_env_checker=True, **settings)
    return _template(failures.construct(what, settings, factory), factory, what)


def _spec(identifier: str, what: str) -> EnvSpec:
    """Look up the registered spec of an id, `package.module:MyEnv-v0` or `MyEnv-v0`, after importing its module."""
    module, colon, registered = identifier.rpartition(":")
    if colon:
        failures.construct(what, {}, partial(importlib.import_module, module))
    protocols.import_registering(registered, identifier)
    try:
        return gym.spec(registered)
    except gym.error.UnregisteredEnv as error:
        known = [str(spec_id) for spec_id in gym.registry]
        # without the module, which would count as likeness
        near = [f"{module}{colon}{match}" for match in nearest_names(registered, known)]
        raise unknown_name("gymnasium environment", identifier, near or known) from error
    except gym.error.Error as error:
        raise SettingError(f"{what} cannot be made: {error}") from error


# ------------------------------------------------------------------------------------------------------------- EnvPool


def _envpool(name: str, settings: dict[str, Any], rows: int) -> VectorSource:
    try:
        import envpool
    except ImportError as error:
        raise MissingExtraError(
            f"task {name!r} needs envpool, which can't be imported ({error}): pip install 'rlmeta[envpool]'"
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
            warnings.filterwarnings("ignore", r".*precision lowered by casting")  # of bounds, at every construction
            env: VectorEnv[Any, Any, Any] = failures.construct(f"environment {name!r}", settings, maker)
            _ = env.observation_space, env.action_space
        return env

    env, what = make(range(rows)), f"vector environment {name!r}"
    _check_envpool(env, what, make)
    return VectorSource(env, what, make)


def _check_envpool(env: VectorEnv[Any, Any, Any], what: str, remake: Any) -> None:
    """Refuse an EnvPool of several agents, with partial steps, or that cannot be constructed again with other seeds.

    EnvPool ignores the seeds of `reset`, so that all runs would begin in the same states.
    """
    if not is_envpool(env.unwrapped):
        return
    config: dict[str, Any] = dict(env.unwrapped.config)  # type: ignore[attr-defined]
    if remake is None:
        raise SettingError(
            f"{what} is EnvPool's, which takes its seeds only when it is made: name the task {ENVPOOL}NAME, or give a "
            "function with the parameters num_envs and seed that hands both on"
        )
    if config["max_num_players"] > 1:
        raise SettingError(f"{what} is of several agents ({config['max_num_players']}): only single ones are supported")
    if config["batch_size"] not in (0, env.num_envs):
        raise SettingError(
            f"{what} steps {config['batch_size']} of its {env.num_envs} environments at a time: set no batch_size"
        )


# ------------------------------------------------------------------------------------------------ the user's functions


def _from_function(make: Callable[..., Any], settings: dict[str, Any], rows: int) -> Template | VectorSource:
    what = f"the function {getattr(make, '__qualname__', type(make).__name__)}"
    remake = None
    if has_parameter(make, "num_envs"):
        settings = {"num_envs": rows, **settings}
        if has_parameter(make, "seed"):
            remake = partial(_seeded, make, settings, what)
    factory = partial(make, **settings) if settings else make
    result = failures.construct(what, settings, factory) if remake is None else remake(range(rows))
    if isinstance(result, VectorEnv):
        _check_envpool(result, vector_name(result), remake)
        return VectorSource(result, vector_name(result), remake)
    if not isinstance(result, gym.Env):
        raise SettingError(
            f"{what} returned {_type_name(result)}, expected a gymnasium.Env or VectorEnv{_instead_of(result)}"
        )
    return _template(result, factory, f"environment {_id_of(result)!r}")


def _seeded(make: Callable[..., Any], settings: dict[str, Any], what: str, seeds: Sequence[int]) -> Any:
    return failures.construct(what, settings, partial(make, **settings, seed=list(seeds)))


def _type_name(value: Any) -> str:
    """Name of a class, or of the class of a value."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def is_multi_agent(value: Any) -> bool:
    """Whether a value has PettingZoo's interface of environments with several agents."""
    return hasattr(value, "possible_agents") or (hasattr(value, "agents") and hasattr(value, "observe"))


def _instead_of(result: Any) -> str:
    """Give advice, for an error message, on a known kind of object that is no gymnasium environment."""
    if is_envpool(result):
        return ": create it with envpool.make_gymnasium"
    if is_multi_agent(result):
        return ": environments of several agents, such as PettingZoo's, are not supported"
    kind = type(result)
    if kind.__module__.startswith("rlmeta."):
        return f"; pass a {kind.__name__} as it is, without the function around it"
    if hasattr(result, "reset") and hasattr(result, "step"):
        return ": let its class extend gymnasium.Env"
    return ""


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


# -------------------------------------------------------------------------------------------------- single environments


def _template(first: gym.Env[Any, Any], make: Callable[[], gym.Env[Any, Any]], name: str) -> Template:
    """Build a template from a first environment, which is closed: inspection may reset it, and rows must be alike."""
    try:
        _check_form(first, name)
        mask: MaskSource = None
        if not has_own_mask(first.observation_space):
            if first.has_wrapper_attr("action_masks"):
                mask = "method"
            elif isinstance(first.action_space, spaces.Discrete | spaces.MultiDiscrete):
                with failures.converting(name):
                    mask = "info" if "action_mask" in first_reset(first, 0, name)[1] else None
        limit = first.spec.max_episode_steps if isinstance(first.spec, EnvSpec) else None
        if limit is None and first.has_wrapper_attr("_max_episode_steps"):  # of a TimeLimit in the user's function
            limit = first.get_wrapper_attr("_max_episode_steps")
        shown = with_mask(first, mask)
        Layout(shown.observation_space), Layout(shown.action_space, "action")
        return Template(make, name, shown.observation_space, shown.action_space, mask, limit)
    finally:
        failures.close(first, name)


def _check_form(env: gym.Env[Any, Any], name: str) -> None:
    """Refuse an environment without gymnasium's interface, or whose episodes cannot be seeded."""
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
    except ValueError:  # written in C, without a signature
        return True
    return True
