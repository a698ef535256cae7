"""Where the tests find reference data; fixtures of data outside the repository skip where it is missing.

Nothing of the package is imported before a fixture needs it, so that pytest's options can act on its imports.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
ICT_HEAD = "heads/ict_head5k.npz"


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs shared/{name} beside the checkout, which is not there")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the reference vectors of the public implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def whole_golden() -> Path:
    """Folder with the complete set that `golden` was cut from."""
    return _shared("golden")


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder with real clips and portraits (never committed)."""
    return _shared("real")


@pytest.fixture(scope="session")
def ict_head_path() -> Path:
    """The ICT-FaceKit arrays (never committed)."""
    return _shared(ICT_HEAD)


@pytest.fixture(
    scope="session", params=["stand-in", "real"] if (SHARED / ICT_HEAD).exists() else ["stand-in"]
)
def ict_path(request, tmp_path_factory) -> Path:
    """The built-in head in the layout of the ICT-FaceKit arrays; where the real arrays are, these too."""
    if request.param == "real":
        return SHARED / ICT_HEAD
    from tests.face.ict_layout import builtin_in_ict_layout

    path = tmp_path_factory.mktemp("ict") / "ict.npz"
    np.savez(path, **builtin_in_ict_layout())
    return path


@pytest.fixture(scope="session")
def task_file() -> Path:
    """MediaPipe's face_landmarker.task (never committed)."""
    return _shared("models/face_landmarker.task")


@pytest.fixture(scope="session")
def landmarker():
    """The landmark networks, from the user's cache or fetched into it by pip."""
    pytest.importorskip("ai_edge_litert", reason="needs the prep extra (ai-edge-litert)")
    from loki_jax.fitting.landmarker import Landmarker
    from loki_jax.fitting.model_files import LandmarkError, fetch_models

    try:
        return Landmarker(fetch_models())
    except LandmarkError as error:
        pytest.skip(f"needs the landmark models: {error}")


@pytest.fixture(scope="module", autouse=True)
def few_programs_outlive_their_module():
    """Thousands of programs take gigabytes and more memory maps than Linux grants a process (65,530)."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and (not maps.exists() or maps.read_bytes().count(b"\n") > 20_000):
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def few_optimizations():
    """For tests that compile large programs for tiny runs, where compiling takes longer than running."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
