"""The commands `rlmeta list` and `rlmeta bench`."""

from __future__ import annotations

from pathlib import Path

from rlmeta.cli.results import console
from rlmeta.cli.terminal import say
from rlmeta.errors import SettingError, unknown_name


def show_list(arguments: list[str]) -> int:
    """Run `rlmeta list [KIND ...]` or `rlmeta list runs FOLDER`; returns the exit status."""
    from rlmeta.cli.listing import TABLES, runs_table

    if {"-h", "--help"} & set(arguments):
        say(f"usage: rlmeta list [{'|'.join(TABLES)} [FOLDER]]")
        return 0
    if len(arguments) == 2 and arguments[0] == "runs" and arguments[1] not in TABLES:
        folder = Path(arguments[1])
        if not folder.is_dir():
            raise SettingError(f"{folder} is not a folder: give one with runs in it, rlmeta list runs FOLDER")
        console().print(runs_table(folder))
        return 0
    for kind in arguments:
        if kind not in TABLES:
            raise unknown_name("kind of name", kind, TABLES)
    for kind in arguments or TABLES:
        console().print(TABLES[kind]())
    return 0


def bench(arguments: list[str]) -> int:
    """Run `rlmeta bench NAME`; returns the exit status."""
    from rlmeta.bench import agents as benchmarks

    return benchmarks.main(arguments)
