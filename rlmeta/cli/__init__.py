"""The command line: `rlmeta COMMAND`."""

__all__: list[str] = []
