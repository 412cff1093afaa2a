"""Damage to the files of a run, and forged ones: what reading them comes to, beside the whole file."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import tomli_w

import rlmeta as rl
from rlmeta import api
from rlmeta.cli import plan_folder
from rlmeta.cli.plan import from_flags
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.runs.files import sealed_lines
from tests.runs.forging import accept_config
from tests.runs.forked import ENDED, REFUSED, forked
from tests.runs.write_faults import fingerprint, resumed

EQUAL, CHANGED = "equal", "changed"
"""The value that the whole file gives, or another; other verdicts are those of `forked`."""
RUN = 30
"""Bytes that are written twice, in a damage of that kind."""


# ------------------------------------------------------------------------------------------------------- bytes


def _bit(data: bytearray, chance: random.Random) -> bytes:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def _byte(data: bytearray, chance: random.Random) -> bytes:
    data[chance.randrange(len(data))] = chance.randrange(256)
    return data


def _zeros(data: bytearray, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    count = min(64, len(data) - at)
    data[at : at + count] = bytes(count)
    return data


def _twice(data: bytearray, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + data[max(0, at - RUN) : at] + data[at:]


BYTES: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "bit": _bit,
    "byte": _byte,
    "zeros": _zeros,
    "twice": _twice,
    "truncated": lambda data, chance: data[: chance.randrange(len(data) + 1)],
    "emptied": lambda data, chance: b"",
    "longer": lambda data, chance: data + chance.randbytes(40),
    "random": lambda data, chance: chance.randbytes(max(1, len(data))),
}
"""What may become of the bytes of a file."""
PLACES: dict[str, Callable[[Path], object]] = {"deleted": lambda path: None, "folder": os.mkdir, "pipe": os.mkfifo}
"""What may be in a file's place."""
WEIGHTS = {"bit": 5, "byte": 2, "truncated": 3, "zeros": 2}
KINDS = [kind for kind in (*BYTES, *PLACES) for _ in range(WEIGHTS.get(kind, 1))]
NEED_BYTES = ("bit", "byte", "zeros")


def damage(path: Path, kind: str, chance: random.Random) -> None:
    """Damage a file in a way that `KINDS` names; one without bytes is made longer where that needs some."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind in PLACES:
        PLACES[kind](path)
    else:
        path.write_bytes(BYTES[kind if data or kind not in NEED_BYTES else "longer"](data, chance))


# ------------------------------------------------------------------------------------------------------- the verdicts


def loaded(folder: Path) -> dict[str, Any]:
    """What a run is to somebody who loads it; without a summary, one that has not ended."""
    run = api.load(folder)
    said = {"state": fingerprint(run.state), "fresh": repr(run.evaluate(2).returns.tolist())}
    if run.evaluation is not None:
        rows = [
            {name: value for name, value in row.items() if name != "task" and "second" not in name}
            for row in run.summary()
        ]
        said |= {"returns": repr(run.evaluation.returns.tolist()), "summary": repr(rows)}
    return said


def planned(folder: Path) -> dict[str, Any]:
    """What a plan of several runs is to a command that goes on with it."""
    plan = plan_folder.from_folder(folder)
    plan.check()
    return {
        "plan": repr((plan.agent, plan.task, plan.env, plan.lifelong, plan.texts)),
        "groups": repr(plan.groups),
        "seeds": repr(plan.seeds),
    }


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {"load": loaded, "resume": resumed}


def read_demonstrations(path: Path) -> dict[str, Any]:
    """What a file of demonstrations is to somebody who learns from it."""
    found = Demonstrations.load(path)
    task = gym.make("CartPole-v1")
    found.check(task.observation_space, task.action_space)
    return {
        "numbers": fingerprint({name: getattr(found, name) for name in ("observation", "action", "reward", "lengths")}),
        "returns": repr(found.returns.tolist()),
        "spaces": repr((found.observation_space, found.action_space)),
        "about": repr(found.about),
    }


def verdict(read: Callable[[Path], dict[str, Any]], path: Path, expected: dict[str, Any]) -> tuple[str, str]:
    """What reading comes to, and a few words on it."""
    outcome = forked(lambda: read(path), patience=60.0)
    if outcome.kind != ENDED:
        return outcome.kind, str(outcome.said)
    differing = [name for name, value in outcome.said.items() if value != expected[name] and name != "files"]
    return (CHANGED, ", ".join(differing)) if differing else (EQUAL, "")


class Account:
    """Verdicts, counted, and the cases that came to none of the allowed ones."""

    def __init__(self, allowed: Iterable[str] = (EQUAL, REFUSED)) -> None:
        self.allowed = frozenset(allowed)
        self.counts = Counter[str]()
        self.failed: list[str] = []

    def add(self, case: str, found: tuple[str, str]) -> None:
        """Count the verdict of a case."""
        self.counts[found[0]] += 1
        if found[0] not in self.allowed:
            self.failed.append(f"{case}: {': '.join(found)}")

    def __str__(self) -> str:
        said = f"{self.counts.total()} cases, {dict(self.counts)}, {len(self.failed)} failed"
        return "\n".join([said, *self.failed])


def whole_outcome(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """What the whole file gives."""
    outcome = forked(lambda: read(path))
    assert outcome.kind == ENDED, outcome
    found: dict[str, Any] = outcome.said
    return found


# ------------------------------------------------------------------------------------------------------- run folders


def files_of(folder: Path) -> list[str]:
    """The files of a run's folder; those that a reader depends on most stand there more than once."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = folder / "state" / "manifest.json"
    newest = list(json.loads(manifest.read_bytes())["files"]) if manifest.exists() else []
    often = ["config.toml", "config.toml", "metrics.jsonl", "summary.json", *(f"state/{name}" for name in newest[:1])]
    return [*names, *(name for name in often if name in names)]


def damaged_runs(reader: str, whole: Path, folder: Path, cases: int, seed: str) -> Account:
    """Damage a file of a copy of a run at random, and read it.

    Args:
        reader: `load`, `resume` or `plan`.
        whole: the folder of a run that has ended, or has not for a resume, or of a plan; only copied.
        folder: where the copies go.
        cases: how many.
        seed: of the choices.
    """
    chance, read, account = random.Random(seed), {**READERS, "plan": planned}[reader], Account()
    shutil.copytree(whole, folder)
    expected = whole_outcome(read, folder)
    shutil.rmtree(folder)
    for _ in range(cases):
        shutil.copytree(whole, folder)
        name, kind = chance.choice(files_of(folder)), chance.choice(KINDS)
        damage(folder / name, kind, chance)
        account.add(f"{reader} after {name} was damaged ({kind})", verdict(read, folder, expected))
        shutil.rmtree(folder)
    return account


LEFT_OUT = "left out"
WRONG: tuple[Any, ...] = (
    LEFT_OUT, -1, 0, 10**12, 10**19, -(10**19), 2**63, 1.5, float("nan"), float("inf"), "x", "", "../../etc",
    True, [], {}, [[1]], ["a"],
)  # fmt: skip
"""What may stand in the place of an entry of a configuration."""


def entries(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of a table, tables and those in lists included."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, child in value.items():
            yield from entries(child, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, child in enumerate(value):
            yield from entries(child, (*path, number))


def replaced(table: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The table with another entry there."""
    changed: Any = copy.deepcopy(table)
    place = changed
    for step in path[:-1]:
        place = place[step]
    if value is LEFT_OUT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def forged_runs(reader: str, whole: Path, folder: Path, cases: int, seed: str, allowed: Iterable[str]) -> Account:
    """Replace an entry of the `config.toml` of a copy of a run, with checksums that agree, and read it.

    Args:
        reader, whole, folder, cases, seed: as for `damaged_runs`.
        allowed: verdicts.
    """
    chance, read, account = random.Random(seed), READERS[reader], Account(allowed)
    config = tomllib.loads((whole / "config.toml").read_text())
    longer = [("budget", "steps")] if reader == "resume" else []  # which takes its time
    ways = [path for path in entries(config) if path not in longer]
    forgeries = [(path, value) for path in ways for value in WRONG]
    shutil.copytree(whole, folder)
    expected = whole_outcome(read, folder)
    shutil.rmtree(folder)
    for path, value in chance.sample(forgeries, min(cases, len(forgeries))):
        shutil.copytree(whole, folder)
        (folder / "config.toml").write_text(tomli_w.dumps(replaced(config, path, value)))
        accept_config(folder)
        case = f"{reader} with {'.'.join(map(str, path))} = {value!r}"
        account.add(case, verdict(read, folder, expected))
        shutil.rmtree(folder)
    return account


# ------------------------------------------------------------------------------------------------------- plans

TEXTS = (
    "", " ", ",", "x", "-1", "0", "nan", "inf", "1e400", "9" * 30, "1,2", "1-3", "x,x", "../..", "[", "=", "\x07",
    "none", "1x2", "a:b", "a b=c",
)  # fmt: skip
"""What may stand in the place of a flag's text."""


def plan_of_groups(folder: Path) -> Path:
    """The folder of two runs that have not begun."""
    small = "--steps 32 --num-envs 2 --num-steps 16 --batch-size 32 --quiet"
    flags = [*small.split(), "--hidden-sizes", "8,9", "--env.gravity", "9"]
    plan_folder.begin(from_flags("ppo", "CartPole-v1", flags), folder)
    return folder


def forged_plans(whole: Path, folder: Path, cases: int, seed: str) -> Account:
    """Replace an entry of the plan in a copy of a folder, with a checksum that agrees, and read it.

    Args:
        whole: of a plan, only copied.
        folder: where the copies go.
        cases: how many.
        seed: of the choices.
    """
    chance, account = random.Random(seed), Account((EQUAL, REFUSED, CHANGED))
    expected = whole_outcome(planned, whole)
    content = tomllib.loads((whole / "plan.toml").read_text())
    del content["sha256"]
    forgeries = [(path, value) for path in entries(content) for value in (*WRONG, *TEXTS)]
    for path, value in chance.sample(forgeries, min(cases, len(forgeries))):
        shutil.copytree(whole, folder)
        forged = tomli_w.dumps(replaced(content, path, value)).encode()
        (folder / "plan.toml").write_bytes(sealed_lines(forged))
        account.add(f"plan with {'.'.join(map(str, path))} = {value!r}", verdict(planned, folder, expected))
        shutil.rmtree(folder)
    return account


# ------------------------------------------------------------------------------------------------------- demonstrations

_BOX = {"kind": "Box", "shape": [4], "dtype": "float32", "low": "-1", "high": "1"}
SPACES: tuple[Any, ...] = (
    {**_BOX, "shape": [10**12]}, {**_BOX, "shape": [10**9]}, {**_BOX, "shape": [-4]}, {**_BOX, "dtype": "object"},
    {**_BOX, "dtype": "O", "low": ["-1"] * 4}, {**_BOX, "low": "nan"}, {"kind": "Discrete", "n": -1, "start": 0},
    {"kind": "Discrete", "n": 2**70, "start": 0}, {"kind": "Discrete", "n": 2, "start": 10**30},
    {"kind": "MultiDiscrete", "nvec": [10**30], "start": [0]}, {"kind": "MultiBinary", "n": 10**10},
    {"kind": "MultiBinary", "n": -3}, {"kind": "Dict", "spaces": {}}, {"kind": "Tuple", "spaces": []},
    {"kind": "Dict", "spaces": []}, {"kind": "Text"}, {"kind": ["Box"]},
)  # fmt: skip
"""What a header may say of a space."""
OTHERS: tuple[Any, ...] = (None, 1, [], {}, "x", True, -1, 1e308)
SHAPES: tuple[list[int], ...] = ([10**12], [0], [-1], [2**62, 2**62], [1], [])
OFFSETS: tuple[list[int], ...] = ([0, 10**15], [10**15, 0], [-5, 5], [0, 0])
TYPES = ("F64", "I8", "BOOL", "X", "F8_E4M3", "BF16")
LENGTHS = (2**63 - 1, 2**40, 10**8, 0, 7)


def _split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", whole[:8])
    header: dict[str, Any] = json.loads(whole[8 : 8 + length])
    return header, whole[8 + length :]


def _joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _with_said(header: dict[str, Any], said: str, body: bytes) -> bytes:
    return _joined({**header, "__metadata__": {"demonstrations": said}}, body)


def forged_files(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of demonstrations whose header says something else of its tensors, or of what they mean."""
    header, body = _split(whole)
    said = json.loads(header["__metadata__"]["demonstrations"])
    for name in (name for name in header if name != "__metadata__"):
        for key, values in (("shape", SHAPES), ("data_offsets", OFFSETS), ("dtype", TYPES)):
            for value in values:
                yield f"{name} of {key} {value}", _joined({**header, name: {**header[name], key: value}}, body)
        yield f"no {name}", _joined({other: entry for other, entry in header.items() if other != name}, body)
    for length in LENGTHS:
        yield f"a header of {length} bytes", struct.pack("<Q", length) + whole[8:]
    for name in said:
        for value in (LEFT_OUT, *OTHERS, *(SPACES if name.endswith("_space") else ())):
            yield f"{name} = {value}", _with_said(header, json.dumps(replaced(said, (name,), value)), body)
    deep: dict[str, Any] = {"kind": "Tuple", "spaces": []}
    for _ in range(300):
        deep = {"kind": "Tuple", "spaces": [deep]}
    for text in ("[" * 100_000, "[]", "5", json.dumps({**said, "observation_space": deep})):
        yield f"a header of {text[:8]}", _with_said(header, text, body)


def demonstrations(path: Path) -> Path:
    """A little file of demonstrations."""
    settings = rl.PPO(num_envs=2, num_steps=8, batch_size=16, hidden_sizes=(4,))
    run = rl.train(settings, "CartPole-v1", steps=16, threads=1)
    return rl.record(run, episodes=6).save(path)


def damaged_demonstrations(path: Path, damages: int, forgeries: int | None, seed: str) -> Account:
    """Damage a file of demonstrations at random, forge its header, and read it.

    Args:
        path: of the file, which is written over.
        damages: how many.
        forgeries: how many; None for all.
        seed: of the choices.
    """
    chance, account, whole = random.Random(seed), Account(), path.read_bytes()
    expected = whole_outcome(read_demonstrations, path)
    for _ in range(damages):
        path.write_bytes(whole)
        kind = chance.choice([kind for kind in KINDS if kind in BYTES])
        damage(path, kind, chance)
        account.add(f"damaged ({kind})", verdict(read_demonstrations, path, expected))
    forged = list(forged_files(whole))
    for case, content in forged if forgeries is None else chance.sample(forged, forgeries):
        path.write_bytes(content)
        account.add(case, verdict(read_demonstrations, path, expected))
    return account
