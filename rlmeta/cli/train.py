"""The command `rlmeta train AGENT TASK`: train an agent with many seeds and settings at once."""

from __future__ import annotations

from rlmeta.cli.arguments import USAGE, names_before_flags
from rlmeta.errors import SettingError


def train(arguments: list[str]) -> int:
    """Run `rlmeta train AGENT TASK`; returns the exit status."""
    from rlmeta.cli.options import AGENT_AND_TASK

    names, rest = names_before_flags(arguments)
    if len(names) != 2 and not {"-h", "--help"} & set(rest):
        raise SettingError(
            f"rlmeta train takes an agent and a task first, got {' '.join(names) or 'none'}: rlmeta train AGENT TASK"
        )
    if not names:
        print(USAGE.split("\n\n")[0], "", AGENT_AND_TASK, sep="\n")
        return 0
    from rlmeta.cli.groups import run_groups
    from rlmeta.cli.plan import code_of, from_flags
    from rlmeta.cli.plan_folder import begin
    from rlmeta.runs.user_code import allowed_here

    code = code_of(rest)
    with allowed_here(code):
        plan = from_flags(names[0], names[1] if len(names) > 1 else "TASK", rest)
        folder = plan.folder()
        begin(plan, folder)
        header = "" if plan.options.quiet else plan.header(folder)
        return run_groups(plan, folder, plan.resume_flags(code), header=header)
