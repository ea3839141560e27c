"""Write docs/cli.md from the commands' own --help; with --check only say whether it is up to date."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import click

from rsedge.cli.main import COMMANDS, cli

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = "100"


def reference() -> str:
    """The whole page."""
    parts = [
        "# Command line\n\nGenerated from `--help` by `make docs`.\n",
        *(section(name) for name in ("", *commands())),
    ]
    return "\n".join(parts)


def commands() -> list[str]:
    """Every command, and after a group those within it."""
    names = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        names.append(name)
        if isinstance(command, click.Group):
            names += [f"{name} {inner}" for inner in command.commands]
    return names


def section(name: str) -> str:
    """One command, as a user sees its help on a terminal of ``WIDTH`` columns."""
    command = [sys.executable, "-m", "rsedge", *name.split(), "--help"]
    environment = {**os.environ, "COLUMNS": WIDTH}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=TARGET.parents[1])
    return f"## rsedge {name}".rstrip() + f"\n\n```text\n{text.stdout.rstrip()}\n```\n"


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = reference()
    if not options.check:
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == page:
        return 0
    print(f"{TARGET} is out of date: run 'make docs'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
