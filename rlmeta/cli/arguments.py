"""The arguments of a command: names first, then flags; the usage."""

from __future__ import annotations

from pathlib import Path

from rlmeta.errors import SettingError

USAGE = """usage: rlmeta COMMAND ...

  train AGENT TASK [flags]   train an agent, many seeds at once
  eval RUN [flags]           play fresh episodes with a run's learners
  resume RUN [flags]         go on with a run that was interrupted or killed
  adapt RUN [flags]          follow a meta-learner as it adapts to held-out tasks
  record RUN [flags]         write demonstrations: whole episodes of one of its learners
  list [agents|tasks|families|streams|methods|runs]
                             what can be named
  bench NAME [flags]         measure speed and scores

  rlmeta train ppo CartPole-v1 --seeds 16 --steps 100k
  rlmeta train ppo CartPole-v1 --learning-rate 1e-4,3e-4,1e-3 --seeds 8     (24 learners at once)
  rlmeta train ppo mypkg:MyEnv-v0 --env.size 7
  rlmeta COMMAND --help, rlmeta train AGENT --help, rlmeta --version"""


def names_before_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The names at the start of the arguments, and the flags after them."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return arguments[:count], arguments[count:]


def one_folder(arguments: list[str], command: str) -> tuple[Path, list[str]]:
    """The run folder that a command is given, and the flags after it."""
    names, rest = names_before_flags(arguments)
    if len(names) != 1 and not {"-h", "--help"} & set(rest):
        raise SettingError(
            f"rlmeta {command} takes one run folder, got {' '.join(names) or 'none'}: rlmeta {command} RUN"
        )
    return Path(names[0] if names else "RUN"), rest
