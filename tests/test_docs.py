"""Documentation that cannot drift: the command reference, the picture of the house, the layout, the figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import rsedge
from rsedge.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")


def test_the_command_reference_is_what_help_says():
    result = subprocess.run([sys.executable, "tools/cli_reference.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"rsedge {name}" not in readme] == []


def test_the_layout_is_what_the_modules_say():
    result = subprocess.run([sys.executable, "tools/layout.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `\w+\.py` \|  \|$", page, re.MULTILINE) == [], "a module without a docstring"


def test_the_picture_of_the_house_is_what_the_imports_say():
    result = subprocess.run([sys.executable, "tools/architecture.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0


def test_every_room_is_in_the_picture():
    """A new folder below rsedge/runtime needs a place among the rows of tools/architecture.py."""
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (ROOT / "rsedge").rglob("__init__.py") if path.parent.name != "rsedge"]
    assert [room for room in rooms if f"{room}/" not in picture] == []


def test_the_functions_that_the_pages_name_exist():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "rsedge").rglob("*.py"))
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = {name.split(".")[-1] for name in re.findall(r"([A-Za-z_][\w.]*)\(\)", text)}
    assert named
    assert [name for name in sorted(named) if not re.search(rf"\b(def|class) {name}\b", code)] == []


def test_the_files_that_the_pages_name_exist():
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`((?:rsedge|tests|docs|tools|bench)/[\w./-]+)`", text))
    assert named
    assert [path for path in sorted(named) if "NAME" not in path and not (ROOT / path).exists()] == []


def test_every_part_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = {path.parent.name for path in (ROOT / "rsedge").rglob("__init__.py")} - {"rsedge"}
    assert [part for part in parts if f"  {part}/" not in readme] == []


def test_figures_in_the_readme_are_what_the_benchmarks_wrote():
    result = subprocess.run([sys.executable, "tools/readme_figures.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0


def test_public_names_exist():
    for name in rsedge.__all__:
        assert getattr(rsedge, name)
    assert set(rsedge.__all__) <= set(dir(rsedge))


def test_the_results_page_is_what_the_benchmark_wrote():
    result = subprocess.run([sys.executable, "tools/results.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0
