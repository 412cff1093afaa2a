"""The house: every folder imports only from those above it, none holds everything, no function is long."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlmeta"
UPPER = ["errors", "functional", "nn", "engine", "data", "envs", "learning", "rewards", "agents", "supervised"]
ORDER = [*UPPER, "lifelong", "meta", "imitation", "offline", "runs", "report", "api", "compat", "bench", "cli"]
"""From the top down; `rlmeta` itself names things of all of them."""
LARGEST, LARGEST_ENVS = 0.15, 0.20
"""Part of the package's lines that a folder may have."""
LONGEST = 45
"""Lines of a function, without its docstring."""

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
"""By name, without `rlmeta.`"""
NODES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def folder(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str, at_start: bool = False) -> Iterator[str]:
    """The modules of rlmeta that a module imports, anywhere or only when it is imported itself."""
    tree = NODES[module]
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlmeta":
            package = (node.module or "").removeprefix("rlmeta").removeprefix(".")
            for alias in node.names:
                names = (f"{package}.{alias.name}".strip("."), package, f"{package}.__init__")
                yield from [name for name in names if name in MODULES][:1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("rlmeta.") for alias in node.names if alias.name.startswith("rlmeta."))


def test_every_folder_has_its_place() -> None:
    assert {folder(name) for name in MODULES} - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) in ORDER])
def test_no_import_runs_back_up(name: str) -> None:
    """Those for types alone count, too."""
    place = ORDER.index(folder(name))
    assert [found for found in imports(name) if ORDER.index(folder(found)) > place] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: set(imports(name, at_start=True)) - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_folder_holds_everything() -> None:
    lines = Counter[str]()
    for name, path in MODULES.items():
        lines[folder(name)] += len(path.read_text().splitlines())
    limits = {name: LARGEST_ENVS if name == "envs" else LARGEST for name in lines}
    parts = {name: count / lines.total() for name, count in lines.items()}
    assert {name: f"{part:.1%}" for name, part in parts.items() if part > limits[name]} == {}


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_long(name: str) -> None:
    long = []
    for node in ast.walk(NODES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            signature = (node.args.kwonlyargs or node.args.args or [node])[-1].lineno - node.lineno
            if (node.end_lineno or 0) - first.lineno + 1 + signature > LONGEST:
                long.append(node.name)
    assert long == []
