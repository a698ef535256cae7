"""Workdirs in a bucket: Orbax writes checkpoints there itself, everything else is written here and copied.

The other files of a run (config, curves, samples) are small, some grow line by line, which no object store
allows, and their writers want files. So each process has a folder on its own machine in place of the workdir,
which names the bucket, and process 0 copies what is new to it.
"""

from __future__ import annotations

from pathlib import Path

import jax
from etils import epath

from loki_jax.downloads import cache_dir
from loki_jax.io import remove
from loki_jax.stores import Folder, download, is_url, open_folder, upload
from loki_jax.training.config import CheckpointError

_BUCKET = "bucket.txt"
_BY_ORBAX = ("checkpoints/", "frozen/")


def open_workdir(given: str) -> Path:
    """The folder to use as workdir: `given`, or for a URL one on this machine with the bucket's small files.

    Raises:
      CheckpointError: a URL that Orbax cannot write to.
      StoreError: the bucket cannot be reached.
    """
    if not is_url(given):
        return Path(given)
    if not given.startswith("gs://"):
        raise CheckpointError(
            f"{given}: checkpoints can be written to folders and to gs://. "
            "Mount the bucket, and give the folder."
        )
    bucket = open_folder(given.rstrip("/"))
    workdir = cache_dir() / "workdirs" / f"{bucket.root.replace('/', '_')}-{jax.process_index()}"
    if "config.json" not in bucket.files:
        remove(workdir)  # of a run that is no longer there
    size = lambda name: (workdir / name).stat().st_size if (workdir / name).is_file() else -1
    # What this machine wrote after the last copy is longer.
    download(bucket, [name for name in _small(bucket) if size(name) < bucket.files[name]["size"]], workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _BUCKET).write_text(bucket.url)
    return workdir


def _small(bucket: Folder) -> list[str]:
    return [name for name in bucket.files if not name.startswith(_BY_ORBAX)]


def stored_at(workdir: Path) -> epath.Path:
    """Where checkpoints and frozen parameters are: the workdir, or its bucket."""
    link = workdir / _BUCKET
    return epath.Path(link.read_text() if link.is_file() else workdir.absolute())


def copy_to_bucket(workdir: Path) -> None:
    """Copy the files that are new or have grown; only from process 0, and only where there is a bucket.

    Raises:
      StoreError: the bucket cannot be written.
    """
    link = workdir / _BUCKET
    if jax.process_index() != 0 or not link.is_file():
        return
    bucket = open_folder(link.read_text())
    files = [path for path in workdir.rglob("*") if path.is_file() and path != link]
    names = {path.relative_to(workdir).as_posix(): path.stat().st_size for path in files}
    changed = [
        name for name, size in names.items()
        if not name.startswith(".") and (name not in bucket.files or size != bucket.files[name]["size"])
    ]  # fmt: skip
    upload(bucket, changed, workdir)
