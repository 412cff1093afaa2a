"""Usage text of the command line, and the split of arguments into names and flags."""

from __future__ import annotations

from pathlib import Path

from rlmeta.errors import SettingError

USAGE = """usage: rlmeta COMMAND ...

  train AGENT TASK [flags]   train an agent, many seeds at once
  eval RUN [flags]           play fresh episodes with a run's learners
  resume RUN [flags]         resume a run that was interrupted or killed
  adapt RUN [flags]          follow a meta-learner as it adapts to held-out tasks
  record RUN [flags]         write demonstrations: whole episodes of one of its learners
  watch RUN [flags]          film one of its learners as it plays, or show it in a window
  check TASK [flags]         check an environment, one line a finding
  list [agents|tasks|families|streams|methods|runs [FOLDER]]
                             what can be named, and the runs in a folder
  bench NAME [flags]         measure speed and scores

  rlmeta train ppo CartPole-v1 --seeds 16 --steps 100k
  rlmeta train ppo CartPole-v1 --learning-rate 1e-4,3e-4,1e-3 --seeds 8     (24 learners at once)
  rlmeta train ppo mypkg:MyEnv-v0 --env.size 7
  rlmeta COMMAND --help, rlmeta train AGENT --help, rlmeta --version"""


class Answered(SystemExit):
    """The end of a command that `--help` has answered; any other SystemExit is the user's code's."""


def names_before_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into the leading names and the flags after them."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return arguments[:count], arguments[count:]


def one_folder(arguments: list[str], command: str) -> tuple[Path, list[str]]:
    """Parse the run folder that a command takes; returns it and the flags after it.

    Raises:
        SettingError: none or several names are given.
    """
    names, rest = names_before_flags(arguments)
    if len(names) != 1 and not {"-h", "--help"} & set(rest):
        raise SettingError(
            f"rlmeta {command} takes one run folder, got {' '.join(names) or 'none'}: rlmeta {command} RUN"
        )
    return Path(names[0] if names else "RUN"), rest
