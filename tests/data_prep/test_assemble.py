"""The engine of builds: stopped, continued, extended, spread over processes, the dataset is the same."""

import json
import os
import re
import shutil
import signal
import time
import tracemalloc

import numpy as np
import pytest

from data_prep.dataset import clip_file
from data_prep.dataset.assemble import work_folder
from data_prep.dataset.clip_file import ClipData, load_clip, save_clip
from data_prep.dataset.latents import LatentEncoder
from data_prep.dataset.manifest import label_of, read_labels
from data_prep.dataset.workers import Died, WorkerError, run_parallel
from loki_jax.data import writer
from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import file_sha256
from tests.data_prep.fake_fit import SIZE, build_fake, tree, write_files
from tests.data_prep.work import make_killer, make_nothing, make_square

CONTENTS = {"a": "first", "b": "second clip", "c": "bad", "d": "the fourth", "e": "fifth, the last"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files, and the dataset that an undisturbed build makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    paths = write_files(folder / "clips", CONTENTS)
    build_fake(paths, folder / "out")
    return paths, folder / "out", tree(folder / "out")


def lines(path):
    return path.read_text().split() if path.exists() else []


def test_manifest_tells_what_made_it(whole):
    paths, out, _ = whole
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["clip"] for entry in manifest["clips"]] == ["a", "b", "d", "e"]
    assert [entry["clip"] for entry in manifest["rejected"]] == ["c"]
    assert manifest["rejected"][0]["reason"] == "{file}: bad"
    assert manifest["versions"]["jax"] and manifest["made_by"]["settings"] == {"size": SIZE}
    for name, entry in manifest["shards"].items():
        assert entry["sha256"] == file_sha256(out / name)
    for entry, path in zip(manifest["clips"], [paths[0], paths[1], paths[3], paths[4]], strict=True):
        assert entry["sha256"] == file_sha256(path) and entry["file"] == path.name
    dataset = open_dataset(out)
    table = [(row.clip_id, row.split, row.length, row.first_record) for row in dataset.clips]
    assert table == [(e["clip"], e["split"], e["frames"], e["first_record"]) for e in manifest["clips"]]
    assert (out / "overlays" / "a.mp4").read_bytes() == b"first"
    assert not work_folder(out).exists()


def test_interrupted_build_goes_on_where_it_stopped(whole, tmp_path):
    _, _, expected = whole
    contents = dict(CONTENTS, d="interrupt")
    paths, log = write_files(tmp_path / "clips", contents), tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        build_fake(paths, tmp_path / "out", fit_log=log)
    assert not (tmp_path / "out").exists() and lines(log) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    # What a killed writer leaves: a half-written work file, and a half-written dataset of a dead process.
    work = work_folder(tmp_path / "out")
    (work / ".0123.npz.999999999.partial").write_bytes(b"half")
    (tmp_path / ".out.999999999.partial").mkdir()
    (tmp_path / ".out.999999999.partial" / "loki-train").write_bytes(b"half")
    write_files(tmp_path / "clips", CONTENTS)
    build_fake(paths, tmp_path / "out", fit_log=log)
    assert lines(log)[4:] == ["d.mp4", "e.mp4"]  # nothing twice
    assert tree(tmp_path / "out") == {name: data for name, data in expected.items()} | {
        "summary.json": (tmp_path / "out" / "summary.json").read_bytes()  # it names the files' folder
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "log", "out"]


def test_pictures_of_a_clip_pass_through_one_at_a_time(tmp_path):
    """Into the work file and out of it: 400 pictures, of which a tenth would be too many."""
    size, count = 50_000, 400
    rng = np.random.default_rng(0)
    pictures = (rng.bytes(size) for _ in range(count))
    still = np.zeros((count, 3))
    coefficients = Coefficients(np.zeros((count, 4)), np.zeros((count, 6)), *[still] * 5)
    camera, box = Camera(np.array([900.0, 910.0, 250.0, 260.0]), np.eye(4)), np.array([1.0, 2, 30, 31])
    tracemalloc.start()
    try:
        save_clip(
            tmp_path, "key", ClipData(coefficients, camera, box, np.ones(count), pictures, {"frames": 1})
        )
        stored = load_clip(tmp_path, "key")
        assert stored is not None and stored.row == {"frames": 1}
        for _ in range(2):  # once for latents, once for records
            again = np.random.default_rng(0)
            assert all(picture == again.bytes(size) for picture in stored.images)
        assert tracemalloc.get_traced_memory()[1] < 40 * size
    finally:
        tracemalloc.stop()
    assert sum(len(picture) for picture in stored.images) == count * size


def test_damaged_work_file_is_made_anew(whole, tmp_path):
    paths, _, expected = whole
    write_files(tmp_path / "clips", {"x": "interrupt"})
    with pytest.raises(KeyboardInterrupt):
        build_fake([*paths, tmp_path / "clips" / "x.mp4"], tmp_path / "out")
    damaged = sorted(work_folder(tmp_path / "out").glob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(DatasetError, match="work file was damaged.*Run the same command again"):
        build_fake(paths, tmp_path / "out")
    build_fake(paths, tmp_path / "out")
    assert tree(tmp_path / "out") == expected


def test_complete_dataset_is_left_alone(whole, tmp_path):
    paths, out, expected = whole
    said, log = [], tmp_path / "log"
    before = (out / "metadata.json").stat().st_mtime_ns
    summary = build_fake(paths, out, fit_log=log, log=said.append)
    assert len(summary["clips"]) == 4 and said == [f"{out}: complete already, 4 clips; nothing to do"]
    assert (out / "metadata.json").stat().st_mtime_ns == before and tree(out) == expected
    assert lines(log) == [] and not work_folder(out).exists()


def test_more_clips_extend_the_dataset(whole, tmp_path):
    paths, _, expected = whole
    log = tmp_path / "log"
    build_fake([paths[1], paths[2], paths[4]], tmp_path / "out", fit_log=log)
    # One comes before, one in between: the order is that of the clips given.
    build_fake(paths, tmp_path / "out", fit_log=log)
    assert lines(log) == ["b.mp4", "c.mp4", "e.mp4", "a.mp4", "d.mp4"]
    assert tree(tmp_path / "out") == expected


def test_extending_never_loses_clips_unasked(whole, tmp_path):
    paths, out, expected = whole
    shutil.copytree(out, tmp_path / "out")
    with pytest.raises(DatasetError, match="holds 1 clips that are not among those given, such as 'b'"):
        build_fake([paths[0], *paths[2:]], tmp_path / "out")
    with pytest.raises(
        DatasetError, match="built with other settings .settings.size: 16 there, 32 asked for"
    ):
        build_fake(paths, tmp_path / "out", settings={"size": 32})
    assert tree(tmp_path / "out") == expected
    log = tmp_path / "log"
    build_fake([paths[0], *paths[2:]], tmp_path / "out", fit_log=log, overwrite=True)
    assert [clip.clip_id for clip in open_dataset(tmp_path / "out").clips] == ["a", "d", "e"]
    assert lines(log) == []  # their records were there


def test_labels_and_splits_may_change_without_new_fits(whole, tmp_path):
    paths, out, _ = whole
    shutil.copytree(out, tmp_path / "out")
    log = tmp_path / "log"
    labels = {path.name: {"identity": "one person", "licence": "CC0", "source": "here"} for path in paths}
    build_fake(paths, tmp_path / "out", fit_log=log, labels=labels, validation=0.0)
    assert lines(log) == []
    rows = open_dataset(tmp_path / "out").clips
    assert {(row.identity, row.licence, row.source, row.split) for row in rows} == {
        ("one person", "CC0", "here", "train")
    }


def test_other_folders_are_not_touched(whole, tmp_path):
    paths, _, _ = whole
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    for overwrite, message in ((False, "was not made by this program"), (True, "is not a dataset")):
        with pytest.raises(DatasetError, match=message):
            build_fake(paths, tmp_path / "thesis", overwrite=overwrite)
    assert tree(tmp_path / "thesis") == {"chapter.txt": b"years"}


def test_unforeseen_errors_cost_one_clip_and_are_tried_again(tmp_path):
    paths = write_files(tmp_path / "clips", {"a": "first", "b": "bug"})
    summary = build_fake(paths, tmp_path / "out")
    assert [row["clip"] for row in summary["clips"]] == ["a"]
    assert "TypeError: something unforeseen" in summary["rejected"][0]["reason"]
    log = tmp_path / "log"
    build_fake(paths, tmp_path / "out", fit_log=log)
    assert lines(log) == ["b.mp4"]


def test_same_content_is_used_once(tmp_path):
    paths = write_files(tmp_path / "clips", {"a": "first", "b": "second", "again": "first"})
    summary = build_fake(paths, tmp_path / "out")
    assert [row["clip"] for row in summary["clips"]] == ["a", "b"]
    assert "again.mp4: has the same content as a.mp4" in summary["rejected"][0]["reason"]
    said = []
    build_fake(paths, tmp_path / "out", log=said.append)
    assert "nothing to do" in said[-1]


def test_two_builds_of_one_dataset_exclude_each_other(whole, tmp_path):
    paths, _, _ = whole
    folder = work_folder(tmp_path / "out")
    folder.mkdir()
    with clip_file.locked(folder) as free:
        assert free
        with pytest.raises(DatasetError, match="is being built by another process"):
            build_fake(paths, tmp_path / "out")
        assert folder.exists()
    build_fake(paths, tmp_path / "out")


def test_a_replaced_dataset_comes_back_if_its_successor_never_arrived(whole, tmp_path):
    _, out, expected = whole
    # Killed between the two renames that put a new dataset in the place of an old one.
    shutil.copytree(out, tmp_path / ".out.999999999.old")
    shutil.copytree(out, tmp_path / ".out.999999999.partial")
    writer.recover(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and tree(tmp_path / "out") == expected
    shutil.copytree(out, tmp_path / ".out.999999999.old")
    shutil.copytree(out, tmp_path / f".out.{os.getpid()}.partial")  # of a running process
    writer.recover(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".out.{os.getpid()}.partial", "out"]


# --- processes ---------------------------------------------------------------------------------------


def test_result_does_not_depend_on_the_number_of_processes(whole, tmp_path):
    paths, _, expected = whole
    build_fake(paths, tmp_path / "out", workers=2)
    assert tree(tmp_path / "out") == expected


def test_items_are_spread_and_all_come_back():
    assert sorted(run_parallel(make_square, range(7), 2)) == [(i, i * i) for i in range(7)]
    assert list(run_parallel(make_square, range(3), 0)) == [(0, 0), (1, 1), (2, 4)]
    assert list(run_parallel(make_square, [], 2)) == []


def test_death_of_a_process_costs_one_item():
    results = dict(run_parallel(make_killer, ["a", "exit", "b", "kill", "c"], 2))
    assert {i: r for i, r in results.items() if isinstance(r, str)} == {0: "a", 2: "b", 4: "c"}
    assert results[1] == Died(3) and results[3] == Died(-signal.SIGKILL)
    assert "exit code 3" in str(results[1]) and "killed, perhaps for lack of memory" in str(results[3])


def test_processes_that_cannot_start_are_an_error(capfd):
    with pytest.raises(WorkerError, match="ended at its start"):
        list(run_parallel(make_nothing, [1, 2], 2))
    assert "cannot be made" in capfd.readouterr().err


def test_leaving_early_ends_the_processes(tmp_path):
    results = run_parallel(make_square, range(100), 2)
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 20


# --- latents -----------------------------------------------------------------------------------------


def fake_encoder(log):
    def encode(images):
        log.append(len(images))
        mean = images.reshape(len(images), 4, SIZE // 4, 4, SIZE // 4, 3).mean((2, 4)).astype(np.float32)
        import ml_dtypes

        return mean.astype(ml_dtypes.bfloat16), (-mean).astype(ml_dtypes.bfloat16)

    return LatentEncoder(encode, "f" * 64)


def test_latents_beside_and_instead_of_pictures(whole, tmp_path):
    paths, _, _ = whole
    log = []
    build_fake(paths, tmp_path / "both", encoder=fake_encoder(log))
    both = open_dataset(tmp_path / "both")
    assert both.metadata.latent_shape == (4, 4, 3) and both.metadata.image_format == "png"
    assert sum(log) == sum(both.metadata.records.values())
    latents_only = {"images": False, "latents": tmp_path / "sd"}
    build_fake(paths, tmp_path / "alone", encoder=fake_encoder([]), **latents_only)
    alone = open_dataset(tmp_path / "alone")
    assert alone.metadata.image_format is None
    for row in both.clips:
        for frame, other in zip(both.read_clip(row), alone.read_clip(row), strict=True):
            expected = frame.image.reshape(4, 4, 4, 4, 3).mean((1, 3))
            np.testing.assert_allclose(frame.latent_mean.astype(np.float32), expected, rtol=0.01)
            np.testing.assert_array_equal(frame.latent_mean, other.latent_mean)
            np.testing.assert_array_equal(frame.latent_logvar, other.latent_logvar)
    with pytest.raises(DatasetError, match="need pictures or latents"):
        build_fake(paths, tmp_path / "neither", **latents_only)


def test_the_seconds_of_each_clip_are_printed_and_kept(whole, tmp_path):
    paths, _, _ = whole
    out, said = tmp_path / "out", []
    build_fake(paths[:2], out, log=said.append)
    first = json.loads((out / "seconds.json").read_text())
    assert first.keys() == {"a", "b"} and all(0 <= seconds < 60 for seconds in first.values())
    assert len([line for line in said if re.search(r"error 1.50 %, \d+\.\d s; ", line)]) == 2
    (out / "seconds.json").write_text(json.dumps({"a": 12.5, "b": 0.25}))
    build_fake(paths, out)
    grown = json.loads((out / "seconds.json").read_text())
    assert grown.keys() == {"a", "b", "d", "e"} and (grown["a"], grown["b"]) == (12.5, 0.25)


def test_latents_are_kept_when_a_dataset_grows(whole, tmp_path):
    paths, _, _ = whole
    first, second = [], []
    build_fake(paths[:2], tmp_path / "grown", encoder=fake_encoder(first))
    build_fake(paths, tmp_path / "grown", encoder=fake_encoder(second))
    build_fake(paths, tmp_path / "fresh", encoder=fake_encoder([]))
    assert tree(tmp_path / "grown") == tree(tmp_path / "fresh")
    total = sum(open_dataset(tmp_path / "grown").metadata.records.values())
    assert sum(first) + sum(second) == total and second
    # Pictures that are there already only need their latents.
    log = tmp_path / "log"
    build_fake(paths, tmp_path / "plain")
    build_fake(paths, tmp_path / "plain", encoder=fake_encoder([]), fit_log=log, overwrite=True)
    assert lines(log) == [] and tree(tmp_path / "plain") == tree(tmp_path / "fresh")


# --- identities --------------------------------------------------------------------------------------


def test_identities_from_a_table(tmp_path):
    table = tmp_path / "who.csv"
    table.write_text("clip,identity,licence\na.mp4,Ann,CC0\nsub/b,Bob,\nc,Ann,\n")
    labels = read_labels(table)
    assert label_of(labels, tmp_path / "a.mp4")["licence"] == "CC0"
    assert label_of(labels, tmp_path / "sub" / "b.mp4")["identity"] == "Bob"
    assert label_of(labels, tmp_path / "other" / "b.mp4") is None
    assert label_of(labels, tmp_path / "x" / "c.mov")["identity"] == "Ann"
    paths = write_files(tmp_path / "clips", {"a": "1", "z": "2"})
    with pytest.raises(DatasetError, match=r"z.mp4: has no row in the table of identities"):
        build_fake(paths, tmp_path / "out", labels=labels)
    for text, message in {
        "file,who\n": "must name clip and identity",
        "clip,identity\na,\n": "line 2 lacks",
        "clip,identity\na,Ann\na,Bob\n": "line 3 gives 'a' a second identity",
    }.items():
        table.write_text(text)
        with pytest.raises(DatasetError, match=message):
            read_labels(table)
    with pytest.raises(DatasetError, match="not a readable CSV"):
        read_labels(tmp_path / "none.csv")


def test_one_identity_is_never_in_both_splits(tmp_path):
    paths = write_files(tmp_path / "clips", {f"clip{i}": f"content {i}" for i in range(24)})
    labels = {path.stem: {"identity": f"person {i % 8}"} for i, path in enumerate(paths)}
    build_fake(paths, tmp_path / "out", labels=labels)
    splits = {}
    for row in open_dataset(tmp_path / "out").clips:
        splits.setdefault(row.identity, set()).add(row.split)
    assert len(splits) == 8 and all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "validation"}


def test_work_files_can_be_kept(whole, tmp_path):
    paths, _, expected = whole
    build_fake(paths, tmp_path / "out", keep_work=True)
    names = {path.suffix for path in work_folder(tmp_path / "out").iterdir()}
    assert {".npz", ".json", ".mp4"} <= names
    log = tmp_path / "log"
    build_fake(paths, tmp_path / "other")
    shutil.rmtree(tmp_path / "out")
    build_fake(paths, tmp_path / "out", fit_log=log)
    assert lines(log) == [] and tree(tmp_path / "out") == expected
