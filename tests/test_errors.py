"""Messages that suggest a name."""

from __future__ import annotations

import pytest

from rlmeta.errors import nearest_names, unknown_name
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
        ("sac", ["a2c", "ppo"], []),
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


@pytest.mark.parametrize("name", ["sac", "td3", "trpo", "rainbow"])
def test_an_agent_that_is_none_of_ours_is_told_which_there_are(name: str) -> None:
    said = str(unknown_name("agent", name, AGENTS))
    assert said == f"unknown agent {name!r}: expected one of {', '.join(sorted(AGENTS))}"


def test_many_names_are_left_to_what_lists_them() -> None:
    many = [f"name-{i}" for i in range(999)]
    assert str(unknown_name("thing", "zz", many)).endswith("`rlmeta list` shows what can be named")
    assert str(unknown_name("thing", "zz", many, "the manual")).endswith("the manual shows what can be named")
    assert str(unknown_name("thing", "zz", [])).endswith("there is none")
