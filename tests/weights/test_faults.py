"""Damaged and hostile files: each ends in WeightsError, and none takes much memory."""

import resource
import zipfile
from pathlib import Path

import pytest

from loki_jax.weights import sources
from loki_jax.weights.tensors import WeightsError

FAULTS = sorted((Path(__file__).parent / "faults").iterdir())


def read_all(path):
    tensors = sources.open_file(path)
    for name in tensors.infos:
        tensors.read(name)


@pytest.mark.parametrize("path", FAULTS, ids=lambda path: path.name)
def test_faulty_files_raise_weights_error(path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=path.name):
        read_all(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # kB


@pytest.mark.parametrize("name", ["byteorder", "data.pkl", "data/0"])
def test_compressed_records_are_not_unpacked(tmp_path, name):
    """Zeros compress a thousandfold."""
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(Path(__file__).parent / "faults" / "huge_stride0_2e33.ckpt") as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in (records | {"archive/byteorder": b"little"}).items():
            if entry == f"archive/{name}":
                archive.writestr(entry, bytes(1 << 20), zipfile.ZIP_DEFLATED)
            else:
                archive.writestr(entry, data)
    message = f"bomb.ckpt: damaged or cut short.*record archive/{name} is compressed.*SHA-256"
    with pytest.raises(WeightsError, match=message):
        read_all(path)
