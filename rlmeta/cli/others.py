"""`rlmeta list` and `rlmeta bench`."""

from __future__ import annotations

from rlmeta.cli.results import console
from rlmeta.cli.terminal import say
from rlmeta.errors import unknown_name


def show_list(arguments: list[str]) -> int:
    """`rlmeta list [KIND]`."""
    from rlmeta.cli.listing import TABLES

    if {"-h", "--help"} & set(arguments):
        say(f"usage: rlmeta list [{'|'.join(TABLES)}]")
        return 0
    for kind in arguments:
        if kind not in TABLES:
            raise unknown_name("kind of name", kind, TABLES)
    for kind in arguments or TABLES:
        console().print(TABLES[kind]())
    return 0


def bench(arguments: list[str]) -> int:
    """`rlmeta bench NAME`."""
    from rlmeta.bench import agents as benchmarks

    return benchmarks.main(arguments)
