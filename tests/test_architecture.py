"""Who may import whom; a new arrow fails here and must be argued for."""

from __future__ import annotations

import ast
from pathlib import Path

import rsedge

ROOT = Path(rsedge.__file__).parent
TRAINING_SIDE = {"torch", "transformers", "accelerate", "safetensors", "onnx", "huggingface_hub"}
# Part → the parts it may import. Modules beside the parts (errors, bundle, pixels …) are the ground all stand on.
ALLOWED = {
    "cli": {"cli", "evaluation", "training", "export", "datasets", "metrics", "runtime", "base"},
    "evaluation": {"evaluation", "training", "datasets", "metrics", "runtime", "base"},
    "training": {"training", "datasets", "metrics", "runtime", "base"},
    "datasets": {"datasets", "runtime", "base"},
    "metrics": {"metrics", "base"},
    "export": {"export", "training", "runtime", "base"},
    "runtime": {"runtime", "base"},
    "base": {"base"},
}
EXPORT_ON_RUNTIME = {"verify.py"}


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "base"


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere, types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files() -> list[tuple[str, Path]]:
    return [(part_of(".".join(("rsedge", *path.relative_to(ROOT).parts))), path) for path in ROOT.rglob("*.py")]


def test_arrows_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for part, path in files()
        if path.parent != ROOT or path.name not in ("__init__.py", "__main__.py")
        for module in imports(path)
        if module.startswith("rsedge.") and part_of(module) not in ALLOWED[part]
    ]
    assert wrong == []


def test_only_verify_runs_what_export_wrote():
    wrong = [
        f"{path.name} imports {module}"
        for part, path in files()
        if part == "export" and path.name not in EXPORT_ON_RUNTIME
        for module in imports(path)
        if part_of(module) == "runtime" and module.startswith("rsedge.runtime.") and "tokenizer" not in module
    ]
    assert wrong == []


def test_the_runtime_side_never_names_torch():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for part, path in files()
        if part in ("runtime", "datasets", "metrics", "base") or path.name == "main.py"
        for module in imports(path)
        if module.split(".")[0] in TRAINING_SIDE
    ]
    assert wrong == []


def test_only_the_command_line_knows_click():
    knowing = {part for part, path in files() for module in imports(path) if module.split(".")[0] == "click"}
    assert knowing == {"cli"}


def test_files_stay_small():
    long = {path.name: n for _, path in files() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 450}
    assert long == {}
