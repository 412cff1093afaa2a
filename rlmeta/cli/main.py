"""The command line: `rlmeta train | eval | resume | record | watch | adapt | check | list | bench`."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from rlmeta.cli.adapt import adapt
from rlmeta.cli.arguments import USAGE, Answered
from rlmeta.cli.check import check
from rlmeta.cli.evaluate import evaluate
from rlmeta.cli.others import bench, show_list
from rlmeta.cli.record import record
from rlmeta.cli.resume import resume
from rlmeta.cli.terminal import say
from rlmeta.cli.train import train
from rlmeta.cli.watch import watch
from rlmeta.errors import RlmetaError, unknown_name


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line: run a command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit status: 0, 2 after a usage error, 1 after any other error, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("RLMETA_DEBUG") == "1"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {message}", error=True)
            return _dispatch(arguments)
    except RlmetaError as error:
        if debug:
            raise
        return _complain(" ".join(str(error).split()), 2)
    except SystemExit as stop:
        if isinstance(stop, Answered) or arguments[:1] == ["bench"]:  # after a help
            return stop.code if isinstance(stop.code, int) else 2
        return _complain(f"code that the command called ended the program (SystemExit: {stop.code})", 1)
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return 130
    except BrokenPipeError:  # `rlmeta list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
        place = f"{last.filename}:{last.lineno}, in {last.name}"
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return _complain(f"{message} ({place}); RLMETA_DEBUG=1 shows the traceback", 1)


def _complain(message: str, status: int) -> int:
    say(f"error: {message}", error=True)
    return status


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "eval": evaluate,
        "resume": resume,
        "record": record,
        "watch": watch,
        "adapt": adapt,
        "check": check,
        "list": show_list,
        "bench": bench,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("rlmeta"))
        return 0
    if arguments[0] not in commands:
        raise unknown_name("command", arguments[0], commands)
    return commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
