"""The command line: `rlmeta COMMAND`."""
