"""Exceptions of user environments, converted to one-sentence errors with the environment's name and the source line."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym

from rlmeta.errors import EnvironmentFailedError, MissingExtraError, RlmetaError, SettingError

_ADAPTER = str(Path(__file__).parent)


def failed(what: str, error: BaseException) -> EnvironmentFailedError:
    """Create the error that names a failed environment, its exception and source line; raise it from `error`.

    Args:
        what: description of the environment and its row.
        error: the exception, of any class: simulators in compiled code may raise one that is no `Exception`.
    """
    return EnvironmentFailedError(f"{what} failed with {type(error).__name__}: {_text(error)} ({_place(error)})")


@contextmanager
def converting(what: str | Callable[[], str]) -> Iterator[None]:
    """Context that converts exceptions of an environment to `EnvironmentFailedError`, except Ctrl-C.

    Args:
        what: description of the environment, or a function that returns it when an exception occurs.
    """
    try:
        yield
    except (RlmetaError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise failed(what if isinstance(what, str) else what(), error) from error


def construct(what: str, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """Call a constructor of an environment, with errors that name the environment.

    Args:
        what: description of the environment.
        settings: its keyword arguments, for the error message.
        make: function without arguments that creates the environment, or imports its module.

    Returns:
        The result of `make`.

    Raises:
        MissingExtraError: the environment needs a package that is not installed.
        SettingError: the environment does not accept the settings.
        EnvironmentFailedError: another exception.
    """
    with converting(what):
        try:
            return make()
        except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
            raise MissingExtraError(f"{what} needs a package that is not installed: {error}") from error
        except TypeError as error:
            if not settings or isinstance(error, RlmetaError) or "argument" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise SettingError(f"{what} cannot be made with {settings}: {reason}") from error


def close(env: Any, name: str) -> None:
    """Close an environment; an exception of its `close()` becomes a warning, since its results are complete.

    Args:
        env: an environment, or a VectorEnv.
        name: description of the environment.
    """
    try:
        env.close()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # the same text and line for all environments, so that Python shows the warning once
        text = f"{failed(f'close() of {name}', error)}: what it holds may stay until this process ends"
        warnings.warn(text, RuntimeWarning, stacklevel=1)


def _text(error: BaseException) -> str:
    """Message of an exception on one line; that of a user's class may raise."""
    try:
        return " ".join(str(error).split())
    except Exception:
        return "(which can't be shown)"


def _place(error: BaseException) -> str:
    """Find the source line of an exception, the innermost in the user's own files."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_ADAPTER)]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    if not frames:
        return "in compiled code"
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}, in {last.name}"
