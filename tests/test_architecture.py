"""Who may import whom: rooms in layers, arrows one way, no circle. A new arrow fails here and must be argued for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rsedge

ROOT = Path(rsedge.__file__).parent
TRAINING_SIDE = {"torch", "transformers", "accelerate", "safetensors", "onnx", "huggingface_hub"}

# Room → the rooms it may import, besides its own. ``ground`` is the modules beside the rooms: errors, bundle, pixels …
# A package of runtime, export or training is a room; ``verbs`` are the modules at their top, which users call.
_TRAINING = {"training/verbs", "training/models", "training/data", "training/rsdix", "training/tuning"}
_EXPORT = {"export/verbs", "export/models", "export/graphs"}
_BELOW_RUN = {"runtime/outputs", "runtime/decoding", "runtime/scenes", "runtime/engines", "ground"}
_RUNTIME = {
    *_BELOW_RUN,
    "runtime/verbs",
    "runtime/run",
    "runtime/search",
    "runtime/diagnostics",
    "runtime/demo",
    "runtime/sandbox",
}
ALLOWED = {
    "ground": set(),
    "runtime/scenes": {"ground"},
    "runtime/engines": {"ground"},
    "runtime/sandbox": {"ground"},
    "runtime/demo": {"ground"},
    "runtime/outputs": {"runtime/scenes", "ground"},
    "runtime/decoding": {"runtime/engines", "ground"},
    "runtime/run": _BELOW_RUN,
    "runtime/search": _BELOW_RUN,
    "runtime/verbs": {"runtime/run", "runtime/search", *_BELOW_RUN},
    "runtime/diagnostics": _RUNTIME - {"runtime/diagnostics"},
    "metrics": {"ground"},
    "datasets": {"runtime/scenes", "ground"},
    "training": {*_TRAINING, "datasets", "metrics", "runtime/decoding", "runtime/outputs", "ground"},
    # Only what verifies an export runs what it wrote.
    "export": {*_EXPORT, "training/models", "runtime/verbs", "runtime/decoding", "runtime/engines", "ground"},
    "evaluation": {*_TRAINING, "datasets", "metrics", "runtime/verbs", "runtime/decoding", "ground"},
    "cli": {*_TRAINING, *_EXPORT, *_RUNTIME, "evaluation", "datasets", "metrics"},
}
# rsedge/__init__.py names the public classes, which load on first use; Scene.open is the one import inside a function
# that leads back, because users know a scene by its class.
LAZY = {("rsedge.runtime.scenes.scene", "rsedge.runtime.scenes.opening")}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; packages by theirs."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("rsedge", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, known: dict[str, Path]) -> str:
    parts = module.split(".")
    if len(parts) < 2 or parts[1] not in {room.split("/")[0] for room in ALLOWED}:
        return "ground"
    if parts[1] not in ("runtime", "export", "training"):
        return parts[1]
    package = ".".join(parts[:3])
    inner = len(parts) > 2 and package in known and known[package].name == "__init__.py"
    return f"{parts[1]}/{parts[2]}" if inner else f"{parts[1]}/verbs"


def allowed(room: str) -> set[str]:
    return ALLOWED[room] if room in ALLOWED else ALLOWED[room.split("/")[0]]


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Every module a file imports anywhere: at its top, for types alone, inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else str(node.module) for name in names}
    return found


def arrows() -> dict[str, set[str]]:
    """Module → the modules of rsedge that it imports; the public names of rsedge left out."""
    known = modules()
    return {
        name: {other for other in imports(path, known) if other in known and other != name}
        for name, path in known.items()
        if name not in ("rsedge", "rsedge.__main__")
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that lead back to themselves (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph.get(name, ()):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def back_up(graph: dict[str, set[str]]) -> list[str]:
    """Arrows between rooms that are not allowed."""
    known = modules()
    return sorted(
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if (to := room_of(other, known)) != (room := room_of(name, known)) and to not in allowed(room)
    )


def test_arrows_between_rooms_point_one_way():
    assert back_up(arrows()) == []


def test_there_is_no_circle():
    graph = arrows()
    for name, other in LAZY:
        assert other in graph[name], f"{name} imports {other} no more: take it out of LAZY"
        graph[name].discard(other)
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [("rsedge.runtime.scenes.tiles", "rsedge.runtime.captioner"), ("rsedge.errors", "rsedge.cli.main")],
)
def test_a_planted_arrow_is_found(name, other):
    graph = arrows()
    graph[name] = {*graph[name], other}
    assert f"{name} imports {other}" in back_up(graph)


def test_a_planted_circle_is_found():
    graph = arrows()
    graph["rsedge.errors"] = {"rsedge.bundle"}
    assert any({"rsedge.errors", "rsedge.bundle"} <= set(group) for group in circles(graph))


def test_the_runtime_shows_its_verbs():
    entries = [path for path in (ROOT / "runtime").iterdir() if path.name != "__pycache__"]
    assert sum(path.is_file() for path in entries) <= 8
    assert sum(path.is_dir() for path in entries) <= 9


def test_the_runtime_side_never_names_torch():
    known = modules()
    wrong = [
        f"{name} imports {module}"
        for name, path in known.items()
        if room_of(name, known).split("/")[0] in ("runtime", "datasets", "metrics", "ground") or path.name == "main.py"
        for module in imports(path, known)
        if module.split(".")[0] in TRAINING_SIDE
    ]
    assert wrong == []


def test_only_the_command_line_knows_click():
    known = modules()
    knowing = {
        room_of(name, known) for name, path in known.items() if any(
            module.split(".")[0] == "click" for module in imports(path, known)
        )
    }  # fmt: skip
    assert knowing == {"cli"}
