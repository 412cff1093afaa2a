"""The public API: what each package's `__all__` names is there, is all there is, and says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlmeta as rl
from tests.markdown import ROOT

PACKAGES = sorted(".".join(path.relative_to(ROOT).parent.parts) for path in (ROOT / "rlmeta").rglob("__init__.py"))
WHOLE = ("rlmeta.functional", "rlmeta.compat")
"""Packages of which every module is public."""


def public(package: str) -> list[str]:
    named: list[str] = importlib.import_module(package).__all__
    return named


def value_of(package: str, name: str) -> Any:
    """A name of a package: an attribute, or a module that nothing has imported yet."""
    content = importlib.import_module(package)
    return getattr(content, name) if hasattr(content, name) else importlib.import_module(f"{package}.{name}")


def imported(package: str) -> set[str]:
    """The names that a package's `__init__` imports from its own modules for others to use."""
    tree = ast.parse((ROOT.joinpath(*package.split(".")) / "__init__.py").read_text())
    own = [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(package)]
    return {alias.name for node in own for alias in node.names if not alias.name.startswith("_")}


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_complete_sorted_and_there(package: str) -> None:
    named = public(package)
    assert len(set(named)) == len(named) and imported(package) <= set(named)
    for name in named:
        assert value_of(package, name) is not None
    if package in WHOLE:
        modules = {module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)}
        assert set(named) == modules
    here: dict[str, Any] = {}
    exec(f"from {package} import *", here)
    assert set(here) - {"__builtins__"} == set(named)


def documented_constants(module: types.ModuleType) -> set[str]:
    """Names of a module that a text follows, as it does where there is no docstring."""
    body = ast.parse(inspect.getsource(module)).body
    return {
        ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        for node, text in itertools.pairwise(body)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def where_defined(package: str, name: str) -> types.ModuleType:
    """The module that a constant or a type of a package comes from."""
    folder = ROOT.joinpath(*package.split("."))
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return importlib.import_module(node.module or "")
    return importlib.import_module(package)


def undocumented(package: str, name: str) -> Iterator[str]:
    value = value_of(package, name)
    if isinstance(value, types.ModuleType | types.FunctionType | type):
        if not inspect.getdoc(value):
            yield name
        methods = vars(value).items() if isinstance(value, type) else ()
        yield from (
            f"{name}.{method}"
            for method, function in methods
            if inspect.isfunction(function)
            and not method.startswith("_")
            and not inspect.getdoc(getattr(value, method))
        )
    elif package != "rlmeta" and name not in documented_constants(where_defined(package, name)):
        yield name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_says_what_it_is(package: str) -> None:
    assert [text for name in public(package) for text in undocumented(package, name)] == []


def test_the_packages_of_algorithms_are_the_top_levels_classes() -> None:
    for package in ("agents", "supervised", "imitation", "offline", "rewards", "lifelong", "meta"):
        classes = {name for name in public(f"rlmeta.{package}") if name[0].isupper()}
        assert classes <= set(rl.__all__)
        assert all(getattr(rl, name) is value_of(f"rlmeta.{package}", name) for name in classes)


def test_pieces_and_version_are_there_after_importing_the_package_alone() -> None:
    code = (
        "import rlmeta as rl\n"
        "print(rl.__version__, rl.functional.returns.__name__, rl.nn.MLP.__name__, rl.nn.categorical_fisher.__name__)\n"
        "from rlmeta.compat import torch as plain; import torch\n"
        "print(rl.compat.torch is plain, plain is not torch, plain.EWC.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split()[1:] == ["rlmeta.functional.returns", "MLP", "categorical_fisher"]
    assert first[0].isdigit() and second == "True True rlmeta.compat.torch.ewc"


def test_a_checkout_that_was_never_installed_has_a_version_too(tmp_path: Path) -> None:
    (tmp_path / "rlmeta").symlink_to(ROOT / "rlmeta")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import rlmeta; print(rlmeta.__version__)"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0+unknown\n"), done.stderr
