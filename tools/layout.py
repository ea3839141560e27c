"""Write docs/layout.md, one line per module from its docstring; with --check only say if it is up to date."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "layout.md"
HEAD = """# Layout

One line per module, from its docstring. Made by `make docs`; who may import whom is in `tests/test_architecture.py`.
"""


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, as Markdown on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    first = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].split('.')[-1]}`", first).replace("``", "`")
    return first.replace("|", "\\|")


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for folder in sorted({path.parent for path in (ROOT / "rsedge").rglob("*.py")}):
        lines += [f"## {folder.relative_to(ROOT)}/", ""]
        about = folder / "__init__.py"
        if folder.name != "rsedge" and about.exists() and (text := summary(about)):
            lines += [text, ""]
        lines += ["| module | what it does |", "| --- | --- |"]
        modules = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
        lines += [f"| `{path.name}` | {summary(path)} |" for path in modules]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/layout.md is not what the modules say: run 'make docs'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
