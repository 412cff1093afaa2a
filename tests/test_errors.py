"""Messages that suggest a name, and that no terminal obeys."""

from __future__ import annotations

import pytest

from rlmeta.errors import CheckpointError, RlmetaError, RunExistsError, nearest_names, printable, unknown_name
from rlmeta.runs.shipped import AGENTS


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("pop", ["ppo", "a2c"], ["ppo"]),  # two letters exchanged
        ("gravty", ["gravity", "length"], ["gravity"]),
        ("cartpole-v1", ["CartPole-v0", "CartPole-v1", "Acrobot-v1"], ["CartPole-v1", "CartPole-v0"]),
        ("CartPole-v9", ["CartPole-v0", "CartPole-v1"], ["CartPole-v1", "CartPole-v0"]),  # the newest first
        ("lunarlander", ["LunarLander-v3", "Lunar"], ["LunarLander-v3"]),
        ("boundary", ["boundaries", "train_id"], ["boundaries"]),
        ("ddpg", ["a2c", "ppo"], []),
        ("trpo", ["ppo", "dqn"], []),
        ("tasks", ["streams"], []),
        ("moon", ["the-moon-lander"], ["the-moon-lander"]),
        ("abcdefgh", ["badcefgh", "zzzzefgh"], ["badcefgh"]),  # two exchanges are two slips
        ("env", ["environment"], []),  # too short to say that it is a part
        ("", ["a"], []),
    ],
)
def test_only_what_is_really_near_is_suggested(name: str, known: list[str], expected: list[str]) -> None:
    assert nearest_names(name, known) == expected


@pytest.mark.parametrize("name", ["alphazero", "dreamer", "muzero"])
def test_an_agent_that_is_none_of_ours_is_told_which_there_are(name: str) -> None:
    said = str(unknown_name("agent", name, AGENTS))
    assert said == f"unknown agent {name!r}: expected one of {', '.join(sorted(AGENTS))}"


def test_many_names_are_left_to_what_lists_them() -> None:
    many = [f"name-{i}" for i in range(999)]
    assert str(unknown_name("thing", "zz", many)).endswith("`rlmeta list` shows what can be named")
    assert str(unknown_name("thing", "zz", many, "the manual")).endswith("the manual shows what can be named")
    assert str(unknown_name("thing", "zz", [])).endswith("there is none")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\x00\x07\x08\x7f", "a\\rb\\x00\\x07\\x08\\x7f"),
        ("\x9b2J", "\\x9b2J"),  # what some terminals take for an ESC and [
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("a\u2028b", "a\\u2028b"),
        ("run-\udcff", "run-\\udcff"),  # a byte of a folder's name that is no UTF-8
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("größe 手 𝛼 │ 1e-3 [bold]", "größe 手 𝛼 │ 1e-3 [bold]"),
    ],
)
def test_no_terminal_obeys_what_is_printed(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    for kind in (RlmetaError, CheckpointError, RunExistsError):
        assert str(kind(f"{text}: give another")) == f"{shown}: give another"
    shown.encode()
