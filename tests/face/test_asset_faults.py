"""Damaged and hostile head files end in `HeadAssetError`, with memory bounded by their size."""

import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from loki_jax.face.asset import HeadAssetError, load_head, save_head
from loki_jax.face.flame import load_trusted_pickle
from loki_jax.face.ict import head_from_ict
from tests.data.clips import small_head

CORPUS = sorted((Path(__file__).parent / "faults").glob("*.npz"))


@pytest.fixture(scope="module")
def seed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("seed") / "head.npz"
    save_head(path, small_head())
    load_head(path)
    return path


def refuse(path: Path, reader=load_head) -> None:
    """The reader refuses the file by name and allocates less than 256 MB."""
    tracemalloc.start()
    try:
        with pytest.raises(HeadAssetError, match=path.name):
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < 256e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_files_that_once_raised_other_errors(path):
    assert len(CORPUS) == 9
    refuse(path)
    refuse(path, head_from_ict)


def npy(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def array_file(value) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(value))
    return file.getvalue()


CRAFTED = {
    "declared_huge": {"template.npy": npy("(4398046511104,3)", data=bytes(100))},
    "declared_negative": {"template.npy": npy("(-1,3)", data=bytes(100))},
    "zero_by_huge": {"template.npy": npy("(0,9223372036854775807)")},
    "objects": {"template.npy": npy("(1,)", "|O", b"\x80\x04N.")},
    "deep_header": {"template.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000},
    "deep_json": {"meta_json.npy": array_file("[" * 100000)},
    "text_faces": {"faces.npy": array_file(["a", "b"])},
    "complex_template": {"template.npy": array_file(np.zeros((7, 3), complex))},
    "scalar_template": {"template.npy": array_file(np.float32(1))},
    "bomb": {"template.npy": npy("(33554432,3)", data=bytes(3 << 27))},
    "bomb_of_extra_member": {"junk.npy": bytes(3 << 27)},
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_members(tmp_path, seed, name):
    with zipfile.ZipFile(seed) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    path = tmp_path / f"{name}.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in (members | CRAFTED[name]).items():
            archive.writestr(member, content)
    refuse(path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"joint_names": 7},
        {"expression_names": [[1], [2]]},
        {"lip_vertex": "x"},
        {"lip_vertex": 1e300},
        {"format_version": None},
    ],
    ids=str,
)
def test_wrong_metadata(tmp_path, seed, change):
    with np.load(seed) as stored:
        arrays = dict(stored)
    arrays["meta_json"] = np.asarray(json.dumps(json.loads(str(arrays["meta_json"])) | change))
    path = tmp_path / "head.npz"
    np.savez(path, **arrays)
    refuse(path)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A copy with a few bytes changed, removed or repeated."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data)))
        match rng.integers(3):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                del data[at : at + int(rng.integers(1, 9))]
            case _:
                data[at:at] = data[at : at + int(rng.integers(1, 9))]
    return bytes(data)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_files_load_or_are_refused(tmp_path, seed, count):
    """Half of the mutations hit the zip file, half a member of it."""
    content = seed.read_bytes()
    with zipfile.ZipFile(seed) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    path = tmp_path / "mutated.npz"
    refused = 0
    for number in range(count):
        rng = np.random.default_rng([7, number])
        if number % 2:
            path.write_bytes(mutated(content, rng))
        else:
            victim = sorted(members)[rng.integers(len(members))]
            with zipfile.ZipFile(path, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, mutated(data, rng) if member == victim else data)
        try:
            load_head(path)
        except HeadAssetError:
            refused += 1
    assert refused > count / 4


def test_memo_index_of_a_pickle_is_bounded(tmp_path):
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 1 << 28) + b".")
    refuse(path, load_trusted_pickle)
