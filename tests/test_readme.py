"""README is short, its Python runs, and what it says and links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlmeta.agents import ALL as AGENTS
from rlmeta.imitation import ALL as IMITATORS
from rlmeta.lifelong import ALL as METHODS
from rlmeta.meta import ALL as META_LEARNERS
from rlmeta.offline import ALL as OFFLINE
from rlmeta.supervised import ALL as SUPERVISED
from tests.markdown import DOCUMENTS, ROOT, anchors, links, sections, small_blocks, table_rows

README = DOCUMENTS["README.md"]


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_python_blocks_run(tmp_path):
    assert small_blocks(README, "python")
    for block in small_blocks(README, "python"):
        run([sys.executable, "-c", block], tmp_path)


def test_it_has_under_1500_words():
    assert len(README.split()) < 1500


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md", "CONTRIBUTING.md", "runs/README.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in links(text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_algorithm_is_linked_to_its_file_and_its_page():
    linked = set(links(sections(README)["Algorithms"]))
    pages = {name: text for name, text in DOCUMENTS.items() if name.startswith("docs/algorithms/")}
    assert pages.keys() <= linked
    for settings in [*AGENTS, *IMITATORS, *OFFLINE, *META_LEARNERS, *SUPERVISED, *METHODS]:
        file = f"{settings.__module__.replace('.', '/')}.py"
        assert file in linked
        assert any(f"../../{file}" in links(text) for text in pages.values()), file


def test_what_is_where_is_there():
    rows = table_rows(sections(README)["What is where"])
    assert len(rows) > 10
    for folders, _, examples in (row.strip("|").split("|") for row in rows):
        names = re.findall(r"`([\w.]+)/?`", folders)
        assert all((ROOT / "rlmeta" / name).exists() for name in names), folders
        for example in re.findall(r"`([\w/]+\.py)`", examples):
            assert any((ROOT / "rlmeta" / part / example).is_file() for part in [*names, ""]), example
    packages = {path.parent.name for path in (ROOT / "rlmeta").glob("*/__init__.py")}
    assert packages == set(re.findall(r"`(\w+)/`", "".join(row.split("|")[1] for row in rows)))


def test_the_extras_it_names_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = README[README.index('".[all]"') : README.index("and `bench`.") + 12]
    assert {*re.findall(r"`(\w+)`", said), "all", "dev"} == set(project["optional-dependencies"])


def test_the_two_commands_are_the_makefiles_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
