"""Settings of an agent of one's own that a run folder would give back as others are refused before training."""

from __future__ import annotations

import enum
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlmeta as rl
from rlmeta.errors import SettingError

ROOT = Path(rl.__file__).parents[1]


class Colour(enum.IntEnum):
    RED = 1


@dataclass(frozen=True)
class Part:
    """Settings within settings."""

    x: int = 1


def function(x: float) -> float:
    return x


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type]:
    """The template of an agent of one's own."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "agents/my_agent.py", folder / "read_back_agent.py")
    sys.path.insert(0, str(folder))
    import read_back_agent

    yield read_back_agent.MyAgent
    sys.path.remove(str(folder))
    sys.modules.pop("read_back_agent")


def own(base: type, hint: Any, default: Any) -> type:
    """The template with one more setting."""
    fields = [("extra", hint, field(default_factory=lambda: default) if isinstance(default, dict | list) else default)]
    return make_dataclass("Own", fields, bases=(base,), frozen=True, namespace={"__module__": __name__})


def train(cls: type, value: Any, folder: Path) -> rl.Run:
    settings = cls(extra=value, num_envs=2, num_steps=4, hidden_sizes=(4,))
    return rl.train(settings, "CartPole-v1", steps=8, final_episodes=1, eval_every=64, out=folder, threads=1)


CHANGED = [
    (dict, {"a": 1, "b": None}),
    (dict, {"a": (1, 2)}),
    (dict, {"a": {"b": [1, {"c": (1,)}]}}),
    (Any, [1, 2]),
    (Any, Colour.RED),
    (tuple[Any, ...], (Colour.RED, 2)),
    (bool | None, None),
    (str, "<a>"),
]


@pytest.mark.parametrize(("hint", "value"), CHANGED, ids=[repr(value) for _, value in CHANGED])
def test_what_would_come_back_changed_is_refused_by_name(hint: Any, value: Any, base: type, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^Own: .*extra is .*"):
        train(own(base, hint, True), value, tmp_path / "run")
    assert not (tmp_path / "run").exists()


KEPT = [
    (str, "we\"ird, \n\t'x' \\ \u00e9 \u2028 \x07 #="),
    (str, "none"),
    (dict, {"a": [1, {"b": 0.5}]}),
    (list[int], [1, 2]),
    (tuple[float, ...], (1, 2.5, math.inf)),
    (float, math.inf),
    (int | None, None),
    (Any, 2**70),
]


@pytest.mark.parametrize(("hint", "value"), KEPT, ids=[repr(value) for _, value in KEPT])
def test_what_comes_back_as_it_is_is_taken(hint: Any, value: Any, base: type, tmp_path: Path) -> None:
    cls = own(base, hint, None)
    train(cls, value, tmp_path / "run")
    again = rl.load(tmp_path / "run", agent=cls).experiment.variants[0].extra
    assert type(again) is type(value) and repr(again) == repr(value)


GIVEN = [
    (Any, function, other := (lambda x: x)),
    (Callable[[float], float], function, other),
    (Any, Part, Colour),
    (Part, Part(5), Part(6)),
    (tuple[tuple[int, int], ...], ((1, 2),), ((1, 3),)),
    (Any, (1, None, 2), (1, 2)),
]


@pytest.mark.parametrize(("hint", "value", "changed"), GIVEN, ids=[repr(value)[:20] for _, value, _ in GIVEN])
def test_what_is_only_described_is_asked_for_again(
    hint: Any, value: Any, changed: Any, base: type, tmp_path: Path
) -> None:
    cls = own(base, hint, None)
    train(cls, value, tmp_path / "run")
    with pytest.raises(SettingError, match=r"had the extra <.*>, which a configuration only describes: pass it again"):
        rl.load(tmp_path / "run", agent=cls)
    with pytest.raises(SettingError, match=r"had extra = '<.*>', this one has .*: give the same"):
        rl.load(tmp_path / "run", agent=cls, own={"extra": changed})
    assert rl.resume(tmp_path / "run", agent=cls, own={"extra": value}).experiment.variants[0].extra == value


def test_numbers_of_numpy_are_taken_for_plain_ones(tmp_path: Path) -> None:
    rates = np.logspace(-4, -2, 2)
    run = rl.train(
        rl.A2C(num_envs=2, num_steps=np.int64(8), hidden_sizes=[4], learning_rate=list(rates)),
        "CartPole-v1",
        steps=16,
        final_episodes=1,
        out=tmp_path / "run",
    )
    again = rl.load(tmp_path / "run")
    assert again.experiment.labels == run.experiment.labels or len(again.experiment.labels) == 2
