"""Draw docs/architecture.svg: the rooms of rsedge and their imports; with --check only say if it is up to date."""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

# The rooms from top to bottom; a row imports rows below it only. A folder without a place of its own, such as
# training/data, is part of the nearest room above it.
ROWS: tuple[tuple[tuple[str, int], ...], ...] = (
    (("cli", 2),),
    (("evaluation", 0), ("export", 1), ("runtime/diagnostics", 4)),
    (("training", 0), ("runtime", 2), ("runtime/demo", 3), ("runtime/sandbox", 4)),
    (("datasets", 0), ("metrics", 1), ("runtime/run", 3), ("runtime/search", 4)),
    (("runtime/decoding", 2), ("runtime/outputs", 3)),
    (("runtime/engines", 2), ("runtime/scenes", 3)),
    (("", 0),),
)
"""(folder below rsedge/, column)"""
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room, _ in rooms}
COLUMN_OF = {room: column for rooms in ROWS for room, column in rooms}
LAST = len(ROWS) - 1
TORCH = {"training", "export", "evaluation"}

WIDTH, HEIGHT, COLUMN, ROW, LEFT, TOP = 246, 94, 290, 146, 30, 62  # px
FONT = "font-family='Helvetica,Arial,sans-serif'"


def room_of(folder: str) -> str:
    """The room that holds a folder of ``rsedge/``."""
    while folder not in ROW_OF:
        folder = folder.rpartition("/")[0]
    return folder


def edges() -> set[tuple[str, str]]:
    """(room, room it imports), wherever the import stands; rsedge's own ``__init__`` and ``__main__`` are left out."""
    package = ROOT / "rsedge"
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    rooms = {name: room_of(path.parent.relative_to(package).as_posix().strip(".")) for name, path in modules.items()}
    found = set()
    for name, path in modules.items():
        if name in ("rsedge", "rsedge.__main__"):
            continue
        for imported in imports(path):
            target = imported if imported in modules else imported.rpartition(".")[0]
            if target in modules and target != "rsedge" and rooms[target] != rooms[name]:
                found.add((rooms[name], rooms[target]))
    return found


def imports(path: Path) -> Iterator[str]:
    """Every name a file imports, types included, as ``module`` or ``module.name``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not point down."""
    return {(tail, head) for tail, head in found if ROW_OF[tail] >= ROW_OF[head]}


def essential(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows down that no chain of other arrows down replaces."""
    down = found - upward(found)
    below: dict[str, set[str]] = {room: {head for tail, head in down if tail == room} for room in ROW_OF}
    reach: dict[str, set[str]] = {}
    for room in sorted(ROW_OF, key=lambda name: -ROW_OF[name]):
        reach[room] = below[room].union(*(reach[other] for other in below[room]))
    return {(tail, head) for tail, head in down if not any(head in reach[other] for other in below[tail])}


def corner(room: str) -> tuple[int, int]:
    """Left and top of a room's box."""
    return LEFT + COLUMN_OF[room] * COLUMN, TOP + ROW_OF[room] * ROW


def box(room: str) -> Iterator[str]:
    """A room: its name, the sentence of its package, the folders in it."""
    left, top = corner(room)
    ground = room == ""
    folder = ROOT / "rsedge" / room
    about = (
        "The ground: errors, bundle, manifest, pixels, texts and the other modules beside the rooms"
        if ground
        else (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "")
    )
    first = about.split("\n\n")[0].replace("\n", " ").replace("`", "").rstrip(".")
    inside = [path.parent.name for path in sorted(folder.glob("*/__init__.py"))]
    inside = [] if ground else [name for name in inside if f"{room}/{name}" not in ROW_OF]
    colour = "#eeeeee" if ground else "#fdebd0" if room in TORCH else "#dcebf7"
    if ground:
        left, width = LEFT, 4 * COLUMN + WIDTH
    else:
        width = WIDTH
    yield f"<rect x='{left}' y='{top}' width='{width}' height='{HEIGHT}' rx='8' fill='{colour}' stroke='#44546a'/>"
    name = "rsedge/" + room + ("/" if room else "")
    yield f"<text x='{left + 10}' y='{top + 20}' font-size='14' font-weight='bold'>{escape(name)}</text>"
    lines = textwrap.wrap(first, 150 if ground else 34, max_lines=2 if inside else 3, placeholder=" …")
    for number, line in enumerate(lines):
        yield f"<text x='{left + 10}' y='{top + 37 + 15 * number}' font-size='11.5'>{escape(line)}</text>"
    if inside:
        text = escape(" · ".join(f"{name}/" for name in inside))
        yield f"<text x='{left + 10}' y='{top + HEIGHT - 10}' font-size='11.5' fill='#555555'>{text}</text>"


def arrow(tail: str, head: str) -> str:
    """An arrow down: a curve to the next row; to a lower row down the gap beside the box first."""
    (left, top), (other_left, other_top) = corner(tail), corner(head)
    y, end_y = top + HEIGHT, other_top - 6
    side = COLUMN_OF[head] - COLUMN_OF[tail]
    x, end_x = left + WIDTH // 2 + 14 * side, other_left + WIDTH // 2 - 14 * side
    if head == "":
        path = f"M{x} {y} L{x} {end_y}"
    elif ROW_OF[head] == ROW_OF[tail] + 1:
        path = f"M{x} {y} C{x} {y + 30}, {end_x} {end_y - 30}, {end_x} {end_y}"
    else:
        gap = left + WIDTH + (COLUMN - WIDTH) // 2
        down = f"M{left + WIDTH - 20} {y} C{left + WIDTH - 20} {y + 24}, {gap} {y + 6}, {gap} {y + 44}"
        path = f"{down} L{gap} {end_y - 50} C{gap} {end_y - 12}, {end_x + 14} {end_y - 34}, {end_x + 14} {end_y}"
    return f"<path d='{path}' fill='none' stroke='#44546a' stroke-width='1.5' marker-end='url(#arrow)'/>"


def fault(tail: str, head: str) -> str:
    """An arrow that does not point down."""
    (left, top), (other_left, other_top) = corner(tail), corner(head)
    x, y, end_x, end_y = left + WIDTH, top + 30, other_left + WIDTH + 6, other_top + HEIGHT - 24
    path = f"M{x} {y} C{x + 40} {y}, {end_x + 40} {end_y}, {end_x} {end_y}"
    return (
        f"<path d='{path}' fill='none' stroke='#c0392b' stroke-width='1.5' stroke-dasharray='6 4' "
        "marker-end='url(#fault)'/>"
    )


def picture() -> str:
    """The whole SVG."""
    found = edges()
    up = upward(found)
    down = essential(found)
    # Every room may import the ground, so the arrows of the lowest rooms stand for all.
    down = {(tail, head) for tail, head in down if head or ROW_OF[tail] == LAST - 1}
    width, height = 3 * LEFT + 4 * COLUMN + WIDTH, TOP + LAST * ROW + HEIGHT + 30
    legend = "An arrow is an import; one that other arrows imply is left out. Rooms in blue work without torch."
    if up:
        legend += " Red: imports against the order."
    markers = (
        f"<marker id='{name}' viewBox='0 0 10 10' refX='5' refY='5' markerWidth='7' markerHeight='7' "
        f"orient='auto'><path d='M0 0 L10 5 L0 10 z' fill='{colour}'/></marker>"
        for name, colour in (("arrow", "#44546a"), ("fault", "#c0392b"))
    )
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"{FONT} fill='#1b2631'>",
        "<title>The rooms of rsedge and their imports</title>",
        f"<defs>{''.join(markers)}</defs>",
        "<rect width='100%' height='100%' fill='white'/>",
        f"<text x='{LEFT}' y='34' font-size='13'>{escape(legend)}</text>",
        *(arrow(tail, head) for tail, head in sorted(down)),
        *(line for room in ROW_OF for line in box(room)),
        *(fault(tail, head) for tail, head in sorted(up)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    drawn = picture()
    if not options.check:
        PICTURE.write_text(drawn, encoding="utf-8")
        return 0
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == drawn:
        return 0
    print("docs/architecture.svg is not what the imports say: run 'make docs'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
