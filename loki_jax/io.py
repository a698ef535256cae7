"""Files that appear complete or not at all, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, at which the `with` block writes a file or makes a folder.

    When the block ends without error, the file or folder is renamed to `path`, where it replaces a file or an
    empty folder. Otherwise it is removed. The temporary path has the suffix of `path` and a name that no
    other writer uses. Parent folders are made.

    Args:
      durable: the content is on the disk before it gets its name, so that `path` is complete even after a
        loss of power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            _fsync(path.parent)
    finally:
        remove(partial)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all it contains, is on the disk."""
    for entry in path.rglob("*"):
        _fsync(entry)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or, as far as possible, a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def stale_siblings(path: Path, kind: str = "partial") -> list[Path]:
    """Temporary files or folders of `path` whose writers were killed; `kind` is part of their names."""
    # Version 0.1.0 wrote names without the random part and without the suffix.
    pattern = re.compile(re.escape(f".{path.name}.") + rf"(\d+)\.([0-9a-f]{{8}}\.)?{kind}(\..*)?")
    if not path.absolute().parent.is_dir():
        return []
    entries = sorted(path.absolute().parent.iterdir())
    return [entry for entry in entries if (m := pattern.fullmatch(entry.name)) and not _is_running(int(m[1]))]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    return True


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically; arrays, their scalars and other sequences become lists and numbers."""
    text = json.dumps(value, indent=1, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v))
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
