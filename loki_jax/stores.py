"""Folders in object stores (gs://, s3:// and what else fsspec reads), and their copies on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loki_jax.downloads import cache_dir
from loki_jax.io import atomic_path, remove, stale_siblings


class StoreError(OSError):
    """A store cannot be reached, or refuses; the message names the URL."""


def is_url(path: str | os.PathLike) -> bool:
    return "://" in str(path)


class Folder(NamedTuple):
    """A folder of a store.

    Attributes:
      files: path below `root` -> what fsspec knows of the file ("size", and a hash or a time).
    """

    url: str
    filesystem: Any
    root: str
    files: dict[str, dict[str, Any]]


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise
    except ImportError as error:
        raise StoreError(f'{url}: {error}. Install what reads it: pip install "loki_jax[cloud]".') from error
    except Exception as error:  # each store's client raises types of its own
        raise StoreError(f"{url}: cannot be reached ({type(error).__name__}: {error})") from error


def open_folder(url: str) -> Folder:
    """What is at `url`; no files where nothing is. Credentials are those of the store's own client.

    Raises:
      StoreError: the store cannot be reached.
    """
    import fsspec

    with _reaching(url):
        filesystem, root = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()
        root = root.rstrip("/")
        found = filesystem.find(root, detail=True)
        files = {name.removeprefix(f"{root}/"): info for name, info in found.items() if name != root}
    return Folder(url, filesystem, root, files)


def download(folder: Folder, names: Iterable[str], target: Path) -> None:
    """Copy files of a store to `target`; each appears complete or not at all. Raises StoreError."""
    for name in names:
        with _reaching(f"{folder.url}/{name}"), atomic_path(target / name) as partial:
            folder.filesystem.get_file(f"{folder.root}/{name}", str(partial))
            if partial.stat().st_size != folder.files[name]["size"]:
                raise StoreError(f"{folder.url}/{name}: has changed while it was copied")


def upload(folder: Folder, names: list[str], source: Path) -> None:
    """Copy files below `source` to the same paths of a store. Raises StoreError."""
    for name in names:
        with _reaching(f"{folder.url}/{name}"):
            folder.filesystem.put_file(str(source / name), f"{folder.root}/{name}")


def local_copy(url: str) -> Path:
    """A folder of a store, copied once into the user's cache; again where a file there has changed.

    Several processes of a machine share the copy.

    Raises:
      StoreError: the store cannot be reached.
      FileNotFoundError: nothing is at `url`.
    """
    import fcntl  # not on Windows

    folder = open_folder(url)
    if not folder.files:
        raise FileNotFoundError(f"{url}: nothing is there")
    marks = [
        (name, info["size"], *(str(info.get(key)) for key in ("ETag", "etag", "md5Hash", "mtime")))
        for name, info in sorted(folder.files.items())
    ]
    key = hashlib.sha256(repr((url, marks)).encode()).hexdigest()[:16]
    target = cache_dir() / "copies" / f"{Path(folder.root).name}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or the process ends
        for left in stale_siblings(target):
            remove(left)
        if not target.is_dir():
            with atomic_path(target) as partial:
                download(folder, list(folder.files), partial)
    return target
