"""Files appear complete or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.io import atomic_path, file_sha256, stale_siblings, write_json


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_or_folder_appears_complete_or_not_at_all(tmp_path, durable):
    folder, file = tmp_path / "deep" / "folder", tmp_path / "deep" / "file.txt"
    with pytest.raises(ZeroDivisionError), atomic_path(folder, durable) as partial:
        partial.mkdir()
        (partial / "half").write_text("half")
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), atomic_path(file, durable) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(folder.parent.iterdir()) == []
    with atomic_path(folder, durable) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text("complete")
        assert not folder.exists() and partial.parent == folder.parent
    for text in ("first", "second"):  # a file is replaced
        with atomic_path(file, durable) as partial:
            partial.write_text(text)
            assert partial.suffix == ".txt"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["file.txt", "folder"]
    assert file.read_text() == "second" and (folder / "inner" / "file").read_text() == "complete"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_two_writers_of_one_path_use_different_names(tmp_path):
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"


def test_what_a_killed_writer_left_is_found(tmp_path):
    program = """
import os, signal, sys
from loki_jax.io import atomic_path
with atomic_path(sys.argv[1]) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[1]
    target = tmp_path / "model.ckpt"
    subprocess.run([sys.executable, "-c", program, str(target)], env=os.environ | {"PYTHONPATH": str(root)})
    (left,) = tmp_path.iterdir()
    assert not target.exists() and stale_siblings(target) == [left]
    with atomic_path(target) as running:
        running.write_text("of a running process")
        assert stale_siblings(target) == [left]
    assert stale_siblings(tmp_path / "model") == stale_siblings(tmp_path / "nowhere" / "model.ckpt") == []


def test_json(tmp_path):
    path = tmp_path / "a" / "plan.json"
    write_json(path, {"x": jnp.float32(1.5), "y": np.arange(3), "z": (1, 2)})
    assert json.loads(path.read_text()) == {"x": 1.5, "y": [0, 1, 2], "z": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 1.5
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
