"""Result tables: what they say in a terminal of 80 columns."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from rlmeta.report.tables import EQUAL_TASKS, UNDEFINED, result_table


def row(**changes: Any) -> dict[str, Any]:
    return {
        "agent": "ppo",
        "task": "CartPole-v1",
        "setting": "",
        "score": "return",
        "seeds": 5,
        "iqm": 1176.84,
        "low": 109.25,
        "high": 1210.8,
        "scores": [1.0, 2.0, 3.0, 4.0, 5.0],
        "episodes": 64,
        "steps": 100_352,
        "seconds": 1195.14,
        "steps_per_second": 13_090,
    } | changes


def rendered(rows: list[dict[str, Any]], width: int = 80) -> list[str]:
    """The lines with something in them, without the space between columns."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result_table(rows))
    lines = console.export_text().splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and "──" not in line]


def test_one_setting_has_its_interval_and_its_costs() -> None:
    assert rendered([row()]) == [
        "ppo on CartPole-v1",
        "seeds IQM return [95 % interval] episodes steps seconds steps/s",
        "5 1,176.8 [109.2, 1,210.8] 64 100,352 1,195.1 13,090",
    ]


def test_what_settings_share_is_in_the_title() -> None:
    rows = [row(setting="learning_rate=0.001, gamma=0.9"), row(setting="learning_rate=0.1, gamma=0.9", iqm=3.0)]
    assert rendered(rows) == [
        "ppo on CartPole-v1",
        "5 seeds, 64 episodes, 100,352 steps, 1,195.1 seconds, 13,090 steps/s",
        "setting IQM return [95 % interval]",
        "learning_rate=0.001 1,176.8 [109.2, 1,210.8]",
        "gamma=0.9",
        "learning_rate=0.1 3.0 [109.2, 1,210.8]",
        "gamma=0.9",
    ]


def test_up_to_three_seeds_are_shown_one_by_one() -> None:
    assert rendered([row(seeds=3, iqm=2.0, scores=[1.0, 2.0, 3.25])])[1:] == [
        "seeds mean return (each seed) episodes steps seconds steps/s",
        "3 2.0 (1.0, 2.0, 3.2) 64 100,352 1,195.1 13,090",
    ]
    assert rendered([row(seeds=1, iqm=7.0, scores=[7.0])])[1].startswith("seeds return ")
    assert rendered([row(seeds=1, iqm=7.0, scores=[7.0])])[2] == "1 7.0 64 100,352 1,195.1 13,090"
    mixed = rendered([row(), row(agent="a2c", seeds=2, scores=[1.0, 2.0], iqm=1.5)])
    assert mixed[0] == "CartPole-v1"
    assert mixed[2:] == [
        "agent seeds IQM return [95 % interval] or mean (each seed)",
        "ppo 5 1,176.8 [109.2, 1,210.8]",
        "a2c 2 1.5 (1.0, 2.0)",
    ]


def test_a_narrow_terminal_folds_names_and_never_numbers() -> None:
    rows = [row(setting="learning_rate=0.001"), row(setting="learning_rate=0.1")]
    lines = rendered(rows, width=40)
    assert sum("1,176.8 [109.2, 1,210.8]" in line for line in lines) == 2


def test_what_a_stream_did_has_an_interval_below_it() -> None:
    transfer = {f"{name}{end}": value for name in ("BWT", "FWT", "forgetting") for end, value in ENDS.items()}
    assert rendered([row(seeds=2, orders=3, scores=[0.5] * 6, steps=320, seconds=9.3, **transfer)]) == [
        "ppo on CartPole-v1",
        "2 seeds, 3 orders, 64 episodes, 320 steps, 9.3 seconds, 13,090 steps/s",
        "IQM return",
        "[95 % interval] BWT FWT forgetting",
        "1,176.8 -0.123 -0.123 -0.123",
        "[109.2, 1,210.8] [-0.2, 0.0123] [-0.2, 0.0123] [-0.2, 0.0123]",
        EQUAL_TASKS,
    ]
    few = rendered([row(seeds=2, scores=[1.0, 2.0], **transfer)])
    assert few[2:4] == ["mean return (each seed) BWT FWT forgetting", "1,176.8 (1.0, 2.0) -0.123 -0.123 -0.123"]
    born = rendered([row(seeds=2, scores=[1.0, 2.0], **{**transfer, "FWT": math.nan})], width=120)
    assert born[3:5] == ["1,176.8 (1.0, 2.0) -0.123 - -0.123", EQUAL_TASKS]
    assert " ".join(born[5:]) == UNDEFINED
    shared = rendered([row(setting="a=1", **transfer), row(setting="a=2", **transfer)], width=200)
    assert "-0.123 [-0.2, 0.0123] BWT, -0.123 [-0.2, 0.0123] FWT" in " ".join(shared)


ENDS = {"": -0.1234, "_low": -0.2, "_high": 0.01234}


def test_names_are_never_read_as_markup() -> None:
    assert rendered([row(setting="activation=[bold]"), row(setting="activation=[red]")])[3].startswith(
        "activation=[bold] "
    )


def test_names_are_never_obeyed_by_a_terminal() -> None:
    bad = "\x1b[2J\x07"
    for rows in ([row(agent=bad, task=bad, setting=bad)], [row(setting=bad), row(setting="b")]):
        lines = rendered(rows)
        assert all(line.isprintable() for line in lines)
        assert "\\x1b[2J\\x07" in "".join(lines)


def test_what_is_no_agent_has_evaluations_not_episodes() -> None:
    header = rendered([row(score="accuracy", agent="classifier", task="digits")])[1]
    assert "evaluations" in header and "episodes" not in header
