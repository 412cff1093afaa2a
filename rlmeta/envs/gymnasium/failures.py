"""Exceptions of a user's environment: each becomes one sentence with the environment's name and where it was raised."""

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
    """The error that says what failed, with which exception, and where; raise it from `error`.

    Args:
        what: the environment, and its row, in words.
        error: what it raised, of any class: simulators in compiled code raise what no `except Exception` catches.
    """
    return EnvironmentFailedError(f"{what} failed with {type(error).__name__}: {_text(error)} ({_place(error)})")


@contextmanager
def telling(what: str | Callable[[], str]) -> Iterator[None]:
    """Within, what an environment raises is raised as an `EnvironmentFailedError`; Ctrl-C passes.

    Args:
        what: the environment in words, or what gives them once something was raised.
    """
    try:
        yield
    except (RlmetaError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise failed(what if isinstance(what, str) else what(), error) from error


def made(said: str, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` returns.

    Args:
        said: what is made, in words.
        settings: its keyword arguments, for the message where they are wrong.
        make: makes an environment, or imports what does.

    Raises:
        MissingExtraError: it needs a package that is not installed.
        SettingError: it does not take the settings.
        EnvironmentFailedError: it raised something else.
    """
    with telling(said):
        try:
            return make()
        except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
            raise MissingExtraError(f"{said} needs a package that is not installed: {error}") from error
        except TypeError as error:
            if not settings or isinstance(error, RlmetaError) or "argument" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise SettingError(f"{said} cannot be made with {settings}: {reason}") from error


def close(env: Any, name: str) -> None:
    """Close an environment; a warning says so where its `close()` raises, for what it was needed for is done.

    Args:
        env: an environment, or a VectorEnv.
        name: in words.
    """
    try:
        env.close()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # the same words and the same line whatever the environment, so that it is said once
        text = f"{failed(f'close() of {name}', error)}: what it holds may stay until this process ends"
        warnings.warn(text, RuntimeWarning, stacklevel=1)


def _text(error: BaseException) -> str:
    """The exception's message on one line; the user's own may have none that can be shown."""
    try:
        return " ".join(str(error).split())
    except Exception:
        return "(which can't be shown)"


def _place(error: BaseException) -> str:
    """Where an exception was raised; of the user's own files the innermost."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_ADAPTER)]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    if not frames:
        return "in compiled code"
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}, in {last.name}"
