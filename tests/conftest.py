"""What every test can use."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(path: str) -> Path:
    """A file or folder of real data kept beside the repository; the test is skipped where it is not there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"real data {path} is not beside this checkout (expected at ../shared/data/{path})")
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BLIP captioner in Hugging Face layout, 32 px."""
    from tests.models import make_blip

    return make_blip(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=1)


@pytest.fixture(scope="session")
def bundle_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That captioner as an fp32 bundle."""
    from rsedge.export.convert import export

    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "tiny.rsedge").path
