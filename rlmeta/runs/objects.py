"""Import objects by name, `package.module:Name`, from user code or rlmeta."""

from __future__ import annotations

import importlib
import types
from typing import Any

from rlmeta.envs import trusted, user_modules
from rlmeta.errors import SettingError, did_you_mean


def load_object(text: str) -> Any:
    """Import the object that `package.module:Name` names.

    Raises:
        SettingError: there is no such module, or no such name in it; or a file names user code that is not allowed.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise SettingError(f"got {text!r}, expected package.module:Name")
    trusted.check_module(module, for_id=False)
    source = load_module(module)
    if not hasattr(source, name):
        known = [candidate for candidate in vars(source) if not candidate.startswith("_")]
        raise SettingError(f"{module} has no {name!r}{did_you_mean(name, known)}")
    loaded = getattr(source, name)
    trusted.check_object(loaded, text)
    return loaded


def load_module(name: str) -> types.ModuleType:
    """Import a module of the user's, also from the current folder; an error inside it is passed on as it is.

    Raises:
        SettingError: there is no such module, or it ends the program; or a file names it, and it is neither rlmeta's
            nor a known extra.
    """
    trusted.check_module(name)
    if not trusted.from_file():
        user_modules.allow(name)
    try:
        return importlib.import_module(name)
    except SystemExit as stop:
        raise SettingError(
            f"the module {name!r} ends the program while it is imported (SystemExit: {stop.code}): put what it does as "
            'a program under `if __name__ == "__main__":`'
        ) from stop
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module exists, but a module that it imports does not
        raise SettingError(f"no module {name!r} can be imported: run where it lies, or install it") from None
