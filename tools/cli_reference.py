"""Write docs/cli.md from the commands' own --help; with --check only say whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import click

from rsedge.cli.main import COMMANDS, cli

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100


def reference() -> str:
    """The whole page."""
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n", section("rsedge", cli)]
    group = click.Context(cli, info_name="rsedge")
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        parts.append(section(f"rsedge {name}", command))
    return "\n".join(parts)


def section(title: str, command: click.Command) -> str:
    """One command."""
    context = click.Context(command, info_name=title, terminal_width=WIDTH, max_content_width=WIDTH)
    text = command.get_help(context).rstrip()
    return f"## {title}\n\n```text\n{text}\n```\n"


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
