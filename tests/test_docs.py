"""Documentation that cannot drift: the command reference, the layout in the README, the figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import rsedge
from rsedge.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


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
