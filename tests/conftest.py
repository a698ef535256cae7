"""Where the tests find shared reference data; each fixture skips where its data is missing."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs shared/{name} beside the checkout, which is not there")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the reference vectors of the public implementations."""
    return _shared("golden")


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder with real clips and portraits (never committed)."""
    return _shared("real")


@pytest.fixture(scope="session")
def ict_head_path() -> Path:
    """The ICT-FaceKit arrays (never committed)."""
    return _shared("heads/ict_head5k.npz")
