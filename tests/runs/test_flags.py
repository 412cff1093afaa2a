from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlmeta.cli import flags
from rlmeta.errors import SettingError
from rlmeta.learning.settings import PerLearner, per_learner_names
from rlmeta.runs import grammar, objects
from rlmeta.runs.experiment import Budget
from rlmeta.runs.shipped import AGENTS


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample. With a second sentence."""

    rate: PerLearner = 0.1
    """How
    fast."""
    count: int = 3
    """How many."""
    width: float = 0.5
    on: bool = False
    """Whether."""
    sizes: tuple[int, ...] = (64, 64)
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    label: str = "a"


@pytest.mark.parametrize(
    ("text", "value"),
    [("100k", 100_000), ("1M", 1_000_000), ("1e6", 1_000_000), ("1_000_000", 1_000_000), ("1.5k", 1500), ("-3", -3)],
)
def test_whole_numbers(text: str, value: int) -> None:
    read = grammar.whole(text)
    assert read == value
    assert isinstance(read, int)


@pytest.mark.parametrize("text", ["", "k", "1.5", "1kk", "nan", "inf", "1,000", "2 3", "0x10", "1m"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError):
        grammar.whole(text)


@pytest.mark.parametrize(
    ("text", "value"), [("action+reward", ("action", "reward")), ("start", ("start",)), ("none", ())]
)
def test_names_are_joined_by_a_plus(text: str, value: tuple[str, ...]) -> None:
    assert grammar.values(AGENTS["ppo"], "sees", text) == [value]
    assert grammar.text_of(value) == text
    with pytest.raises(SettingError, match="action, reward, start joined by"):
        grammar.values(AGENTS["ppo"], "sees", "colour")


def test_numbers() -> None:
    assert grammar.number("3e-4") == 3e-4
    assert grammar.number("2.5M") == 2_500_000
    assert grammar.number("inf") == math.inf
    assert grammar.number("0.1k") == 100.0  # in decimal, not 0.1 * 1000 in binary
    with pytest.raises(ValueError):
        grammar.number("nan")


@given(st.floats(allow_nan=False))
def test_a_float_is_read_back_bit_for_bit(value: float) -> None:
    assert grammar.values(Sample, "width", grammar.text_of(value)) == [value]


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 4096), max_size=3).map(tuple),
    st.booleans(),
    st.none() | st.integers(),
)
def test_texts_are_read_back(rate: list[float], sizes: tuple[int, ...], on: bool, limit: int | None) -> None:
    for name, value in {"rate": rate, "sizes": sizes, "on": on, "limit": limit}.items():
        expected = value if isinstance(value, list) else [value]
        assert grammar.values(Sample, name, grammar.text_of(value)) == expected


@pytest.mark.parametrize("cls", [*AGENTS.values(), Budget])
def test_defaults_of_every_settings_class_are_read_back(cls: type) -> None:
    texts = {f.name: grammar.text_of(f.default) for f in dataclasses.fields(cls)}
    assert grammar.build(cls, texts) == cls()
    assert set(grammar.docs(cls)) == {f.name for f in dataclasses.fields(cls)}, "every setting is documented"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rate", "x", "--rate is 'x', expected a number"),
        ("count", "1.5", "--count is '1.5', expected a whole number"),
        ("count", "1,,2", "--count is '', expected a whole number"),
        ("on", "yes", "--on is 'yes', expected true or false"),
        ("mode", "quick", "--mode is 'quick', expected one of fast, slow"),
        ("sizes", "64y64", "--sizes is '64y64', expected whole numbers joined by x, such as 64x64, or none"),
        ("count", "3,3", "--count compares '3' with itself: give each value once"),
        (
            "sizes",
            "64,64",
            "--sizes compares '64' with itself: give each value once; layers are joined by x, such as 64x64",
        ),
    ],
)
def test_wrong_values_are_named(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        grammar.values(Sample, name, text)
    assert str(caught.value) == message


def test_text_is_not_split() -> None:
    assert grammar.values(Sample, "label", "a,b") == ["a,b"]


def test_combinations_split_static_values_and_keep_lists_per_learner() -> None:
    texts = {"rate": "0.1,0.2", "count": "1,2", "mode": "fast,slow", "sizes": "8x8"}
    made = grammar.combinations(Sample, texts, per_learner_names(Sample))
    assert [(one.count, one.mode) for one in made] == [(1, "fast"), (1, "slow"), (2, "fast"), (2, "slow")]
    assert all(one.rate == [0.1, 0.2] and one.sizes == (8, 8) for one in made)


def test_only_settings_compare() -> None:
    with pytest.raises(SettingError, match="--count is '1,2', expected one value"):
        grammar.build(Sample, {"count": "1,2"})


def read(*arguments: str, replaced: dict[str, Any] | None = None) -> dict[str, str]:
    return flags.read("prog", "What it does.", {"group": (Sample, replaced or {})}, arguments)["group"]


def test_flags_of_every_form() -> None:
    given_ = read("--rate", "-1e-3,2", "--count=1k", "--on", "--sizes", "8x8", "--limit", "-5", "--label", "x y")
    assert given_ == {
        "rate": "-1e-3,2",
        "count": "1k",
        "width": "0.5",
        "on": "true",
        "sizes": "8x8",
        "mode": "fast",
        "limit": "-5",
        "label": "x y",
    }


def test_switches() -> None:
    assert read("--no-on")["on"] == "false"
    assert read("--on", "false")["on"] == "false"
    assert read("--on", "true,false")["on"] == "true,false"
    assert read("--on", "--count", "5")["on"] == "true"


def test_defaults_are_replaced() -> None:
    assert read(replaced={"rate": [1e-3, 1e-4], "sizes": (8,)}) | {"rate": ""} == read("--sizes", "8") | {"rate": ""}
    assert read(replaced={"rate": [1e-3, 1e-4]})["rate"] == "0.001,0.0001"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuont", "3"], "unknown flag --cuont: did you mean --count?"),
        (["--xyz", "3"], "unknown flag --xyz: see `prog --help`"),
        (["--no-count"], "unknown flag --no-count: did you mean --count?"),
        (["--count"], "--count needs a value"),
        (["--count", "--on"], "--count needs a value"),
        (["--count", "1", "--count", "2"], "--count is given twice: values to compare are separated by commas"),
        (["3"], "unexpected '3': flags follow the names, see `prog --help`"),
        (["--on", "3"], "unexpected '3': flags follow the names, see `prog --help`"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        read(*arguments)
    assert str(caught.value) == message


def test_underscores_are_dashes() -> None:
    @dataclasses.dataclass
    class Async:
        """One."""

        async_: bool = False
        batch_size: int = 1

    found = flags.read("prog", "", {"group": (Async, {})}, ["--async", "--batch_size", "4"])
    assert found == {"group": {"async_": "true", "batch_size": "4"}}


def test_help_shows_docs_and_the_replaced_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read("--count", "4", "--help", replaced={"rate": 0.25})
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("What it does.", "A sample.", "--rate NUMBER[,...]", "How fast. (default: 0.25)", "--mode fast|slow"):
        assert part in shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("0.5", 0.5),
        ("1e3", 1e3),
        ("true", True),
        ("hello", "hello"),
        ('"7"', "7"),
        ("[1]", "[1]"),
    ],
)
def test_scalars_as_toml_reads_them(text: str, value: Any) -> None:
    read_ = grammar.scalar(text)
    assert read_ == value
    assert type(read_) is type(value)


def test_scalar_is_one_value() -> None:
    assert grammar.scalar("1\nother = 2") == "1\nother = 2"


def test_load_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flags_sample.py").write_text("class Thing: pass\n")
    (tmp_path / "flags_broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert objects.load_object("flags_sample:Thing").__name__ == "Thing"
    assert grammar.text_of(objects.load_object("flags_sample:Thing")) == "flags_sample:Thing"
    with pytest.raises(SettingError, match="flags_sample has no 'Thang': did you mean Thing"):
        objects.load_object("flags_sample:Thang")
    with pytest.raises(SettingError, match=r"no module 'no_such_flags\.part' can be imported"):
        objects.load_object("no_such_flags.part:Thing")
    with pytest.raises(SettingError, match=r"expected package\.module:Name"):
        objects.load_object("flags_sample")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        objects.load_object("flags_broken:Thing")
