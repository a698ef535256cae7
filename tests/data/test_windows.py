"""The input pipeline: what a batch holds, and that its order depends on the seed alone."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loki_jax.data.iterator import iterate
from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.data.windows import make_dataset, window_slots
from loki_jax.data.writer import encode_image, write_dataset
from tests.data.clips import SIZE, make_clip, small_head

# Training clips of 23, 8, 3 (too short for a window of 4) and 13 frames; two held-out identities.
TRAIN, VALIDATION = {0: 23, 1: 8, 2: 3, 3: 13}, {4: 9, 5: 6}
T = 4
VALIDATION_PASS = {"split": "validation", "one_pass": True}
SLOTS = 23 // T + 8 // T + 13 // T


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shards"
    train = [make_clip(number, length, latents=True) for number, length in TRAIN.items()]
    held_out = [
        make_clip(number, length, "validation", latents=True) for number, length in VALIDATION.items()
    ]
    write_dataset(path, small_head(), [*train, *held_out], SIZE)
    return path


def windows(batches):
    """(clip, first frame, reference) of every window, in order."""
    return [
        (int(clip), int(frames[0]), int(reference))
        for batch in batches
        for clip, frames, reference in zip(
            batch.clip_index, batch.frame_index, batch.reference_index, strict=True
        )
    ]


def take(dataset, count):
    return [dataset[index] for index in range(count)]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_holds_what_the_records_hold(shards):
    dataset = open_dataset(shards)
    batch = make_dataset(shards, T, 3, seed=1)[0]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), batch)
    assert shapes.frames == ((3, T, SIZE, SIZE, 3), "uint8") and shapes.reference == (
        (3, SIZE, SIZE, 3),
        "uint8",
    )
    assert shapes.latent_mean == ((3, T, 2, 2, 4), "bfloat16")
    assert shapes.reference_latent_logvar == ((3, 2, 2, 4), "bfloat16")
    assert shapes.crop == ((3, T, 4), "float32") and shapes.confidence == ((3, T), "float32")
    assert shapes.camera.extrinsics == ((3, T, 4, 4), "float32")
    assert shapes.coefficients.expression == ((3, T, 6), "float32")
    assert shapes.reference_coefficients.betas == ((3, 4), "float32")
    for b in range(3):
        clip = dataset.clips[batch.clip_index[b]]
        start = int(batch.frame_index[b, 0])
        np.testing.assert_array_equal(batch.frame_index[b], np.arange(start, start + T))
        frames = dataset.read_clip(clip, start, start + T)
        reference = dataset.read_clip(clip)[batch.reference_index[b]]
        assert_equal(batch.frames[b], np.stack([f.image for f in frames]))
        assert_equal(batch.latent_mean[b], np.stack([f.latent_mean for f in frames]))
        assert_equal(batch.reference[b], reference.image)
        assert_equal(batch.reference_latent_mean[b], reference.latent_mean)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(f.coefficients for f in frames))
        assert_equal(jax.tree.map(lambda leaf, b=b: leaf[b], batch.coefficients), stacked)
        assert_equal(
            jax.tree.map(lambda leaf, b=b: leaf[b], batch.reference_coefficients), reference.coefficients
        )
        np.testing.assert_allclose(batch.confidence[b], [f.confidence for f in frames])


def test_window_slots_cover_all_starts_once(shards):
    slots = window_slots(open_dataset(shards).clips_of("train"), T)
    assert len(slots) == SLOTS
    for number, length in TRAIN.items():
        starts = [
            s
            for slot in slots
            if slot.clip.clip_id == f"clip{number}"
            for s in range(slot.first_start, slot.last_start + 1)
        ]
        assert starts == (list(range(length - T + 1)) if length >= T else [])


def test_epochs_visit_every_slot_and_draw_anew(shards):
    # A batch of SLOTS windows is exactly one epoch.
    epochs = [windows([batch]) for batch in take(make_dataset(shards, T, SLOTS, seed=5), 40)]
    for epoch in epochs:
        counts = {number: sum(clip == number for clip, *_ in epoch) for number in TRAIN}
        assert counts == {0: 5, 1: 2, 2: 0, 3: 3}
    assert len({tuple(epoch) for epoch in epochs}) == 40
    orders = {tuple(clip for clip, *_ in epoch) for epoch in epochs}
    assert len(orders) > 20  # shuffled anew
    for number, length in ((0, 23), (3, 13)):
        starts = {start for epoch in epochs for clip, start, _ in epoch if clip == number}
        references = {reference for epoch in epochs for clip, _, reference in epoch if clip == number}
        assert starts == set(range(length - T + 1)) and references == set(range(length))
    # The same window meets different references.
    same = {}
    for clip, start, reference in sum(epochs, []):
        same.setdefault((clip, start), set()).add(reference)
    assert np.mean([len(references) for references in same.values()]) > 3


def test_fixed_reference_belongs_to_the_window(shards):
    found = {}
    for clip, start, reference in windows(
        take(make_dataset(shards, T, SLOTS, seed=5, fixed_reference=True), 40)
    ):
        found.setdefault((clip, start), set()).add(reference)
    assert all(len(references) == 1 for references in found.values())
    assert len({next(iter(r)) for r in found.values()}) > 8  # and is not one frame for all


def test_the_seed_decides(shards):
    first = windows(take(make_dataset(shards, T, 2, seed=5), 12))
    assert first == windows(take(make_dataset(shards, T, 2, seed=5), 12))
    assert first != windows(take(make_dataset(shards, T, 2, seed=6), 12))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batches(shards, processes):
    # 8 does not divide the 10 windows of an epoch: batches run over epoch ends.
    whole = make_dataset(shards, T, 8, seed=9)
    parts = [make_dataset(shards, T, 8, 9, index, processes) for index in range(processes)]
    for k in range(6):
        mine = [windows([part[k]]) for part in parts]
        assert all(len(part) == 8 // processes for part in mine)
        assert sum(mine, []) == windows([whole[k]])  # row i meets the noise of row i


def test_iterator_resumes_exactly(shards):
    dataset = make_dataset(shards, T, 3, seed=2)
    iterator = iterate(dataset)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    fresh = iterate(make_dataset(shards, T, 3, seed=2, cache_bytes=10**6), threads=1, prefetch=1)
    fresh.set_state(state)
    for batch in expected:
        assert_equal(next(fresh), batch)


def test_iterator_is_saved_with_orbax(shards, tmp_path):
    iterator = iterate(make_dataset(shards, T, 3, seed=2))
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        saved = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
        manager.save(3, args=saved)
        manager.wait_until_finished()
        expected = next(iterator)
        fresh = iterate(make_dataset(shards, T, 3, seed=2))
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_equal(next(fresh), expected)


def test_the_cache_changes_nothing(shards):
    plain = make_dataset(shards, T, 4, seed=0)
    for cache_bytes in (20_000, 10**9):  # some frames, all frames
        cached = make_dataset(shards, T, 4, seed=0, cache_bytes=cache_bytes)
        for k in (0, 1, 2, 0, 5, 1):
            assert_equal(cached[k], plain[k])


def test_a_full_cache_needs_no_files(tmp_path):
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 8)], SIZE)
    dataset = make_dataset(tmp_path / "d", T, 2, seed=0, cache_bytes=10**9)
    for k in range(30):
        expected = dataset[k]
    shard = next((tmp_path / "d").glob("loki-train*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    assert_equal(dataset[29], expected)


READER = """
import json, multiprocessing, sys
import jax
from absl import app
from loki_jax.data.iterator import iterate
from loki_jax.data.windows import make_dataset

# stdin: a list of jobs, see read_in_a_program; a line of JSON for each job.
def main(argv):
    for job in json.load(sys.stdin):
        batches = make_dataset(job["path"], 4, 3, seed=11, max_corrupt_share=job["share"])
        said = []
        iterator = iterate(batches, job["workers"], threads=1, prefetch=1, report=said.append,
                           to_device=jax.device_put if job["device"] else None)
        if job["state"]:
            iterator.set_state(job["state"])
        rows, error = [], None
        try:
            for taken in range(job["count"]):
                if job["kill"] and taken == 2:
                    for worker in multiprocessing.active_children():
                        worker.kill()
                batch = jax.device_get(next(iterator))
                indices = [batch.clip_index, batch.frame_index, batch.reference_index]
                sums = [float(batch.frames.sum()), float(batch.latent_mean.sum())]
                rows.append([index.tolist() for index in indices] + sums)
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
        print(json.dumps({"rows": rows, "state": iterator.get_state(), "said": said, "error": error}))
        iterator.close()

if __name__ == "__main__":
    app.run(main)
"""


def read_in_a_program(tmp_path, jobs):
    """Results of jobs for READER: Grain's workers need a program with parsed absl flags and a main guard."""
    (tmp_path / "reader.py").write_text(READER)
    defaults = {"workers": 0, "count": 6, "state": None, "share": 0.0, "device": False, "kill": False}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "reader.py")],
        input=json.dumps([defaults | job for job in jobs], default=str),
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def spoil(path, record, split="train"):
    """Overwrite some bytes in the middle of a record, as a bad disk would."""
    dataset = open_dataset(path)
    raw = dataset.source(split)[record]
    file, _ = dataset.locate(split, record)
    data = (path / file).read_bytes()
    at = data.index(raw) + len(raw) // 2
    (path / file).write_bytes(data[:at] + b"spoilt" + data[at + 6 :])


@pytest.fixture(scope="module")
def spoilt(shards, tmp_path_factory):
    """The same dataset with two damaged records: frame 5 of clip 0 and frame 9 of clip 3."""
    path = tmp_path_factory.mktemp("spoilt") / "shards"
    shutil.copytree(shards, path)
    for record in SPOILT:
        spoil(path, record)
    return path


SPOILT = (5, 23 + 8 + 3 + 9)


def test_worker_counts_and_prefetch_change_nothing(shards, spoilt, tmp_path):
    """Batches, messages and state are the same for 0, 1, 2 and 4 workers, also over damaged records."""
    jobs = [{"path": shards}, {"path": shards, "workers": 2}]
    options = [{}, {"workers": 1}, {"workers": 2, "device": True}, {"workers": 4}, {"device": True}]
    jobs += [{"path": spoilt, "share": 0.05} | option for option in options]
    # The state of a run that sends ahead goes on with a worker, and the other way round.
    jobs += [{"path": spoilt, "share": 0.05, "count": 2, "device": True}]
    jobs += [{"path": shards, "workers": 1, "count": 500, "kill": True}]
    *results, half, killed = read_in_a_program(tmp_path, jobs)
    (sound, *others), damaged = results[:2], results[2:]
    assert others == [sound] and not sound["error"] and not sound["said"]
    assert all(result == damaged[0] for result in damaged) and not damaged[0]["error"]
    assert damaged[0]["rows"] != sound["rows"] and damaged[0]["said"]
    expected = take(make_dataset(shards, T, 3, seed=11), 6)
    assert [row[0] for row in sound["rows"]] == [batch.clip_index.tolist() for batch in expected]
    assert (
        killed["error"].startswith("DatasetError: ")
        and "a process that reads batches ended" in killed["error"]
    )
    assert killed["rows"][:6] == sound["rows"][: len(killed["rows"])]
    assert half["state"]["batches"] == 2
    rest = {"path": spoilt, "count": 4, "share": 0.05, "state": half["state"]}
    for result in read_in_a_program(tmp_path, [rest | {"workers": 1}, rest | {"device": True}]):
        assert result["rows"] == damaged[0]["rows"][2:]
        assert result["state"] == damaged[0]["state"]


def test_windows_of_a_damaged_record_are_replaced(shards, spoilt):
    said = []
    iterator = iterate(make_dataset(spoilt, T, 3, seed=2, max_corrupt_share=0.05), report=said.append)
    found, sound = [next(iterator) for _ in range(30)], make_dataset(shards, T, 3, seed=2)
    replaced = 0
    for k, batch in enumerate(found):
        for row in range(3):
            kept = windows([jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)])
            wanted = windows([jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], sound[k])])
            replaced += kept != wanted
            clip, start, reference = wanted[0]
            first = {0: 0, 1: 23, 3: 34}[clip]
            touched = {*range(first + start, first + start + T), first + reference} & set(SPOILT)
            assert bool(touched) == (kept != wanted)
    assert replaced > 3
    dataset = open_dataset(spoilt)
    # Each record is named once, with its file, its index there and its place in the clip.
    assert len(said) == 2 and iterator.get_state()["unreadable"] == [
        record for record in (SPOILT if "frame 5)" in said[0] else SPOILT[::-1])
    ]
    for record, position in zip(SPOILT, ("(clip 'clip0', frame 5)", "(clip 'clip3', frame 9)"), strict=True):
        file, index = dataset.locate("train", record)
        message = next(text for text in said if position in text)
        assert f"{spoilt / file} record {index} " in message and "hash mismatch" in message


def test_too_many_damaged_records_stop_the_run(spoilt, tmp_path):
    # 2 of 47 records: a share of 0.03 allows one.
    iterator = iterate(make_dataset(spoilt, T, 3, seed=2, max_corrupt_share=0.03), report=lambda text: None)
    with pytest.raises(
        DatasetError, match=r"(?s)record \d+ .*cannot be read.*makes 2 of 47 records.*=0.03 allows 1.*also"
    ):
        for _ in range(50):
            next(iterator)
    taken = iterator.get_state()["batches"]
    results = read_in_a_program(
        tmp_path, [{"path": spoilt, "workers": workers, "count": 50} for workers in (0, 1)]
    )
    assert results[0] == results[1] and results[0]["rows"] == results[0]["rows"][:taken]
    assert results[0]["error"].startswith("DatasetError: ") and "makes 1 of 47 records" in results[0]["error"]


def test_damaged_records_are_counted_over_a_resume(spoilt):
    read = lambda: iterate(
        make_dataset(spoilt, T, 3, seed=2, max_corrupt_share=0.03), report=lambda text: None
    )
    whole, taken = read(), 0
    with pytest.raises(DatasetError, match="makes 2 of 47"):
        while True:
            next(whole)
            taken += 1
            if len(whole.get_state()["unreadable"]) == 1 and taken > 3:
                resumed = read()
                resumed.set_state(whole.get_state())
                whole = resumed
    again = read()
    with pytest.raises(DatasetError, match="makes 2 of 47"):
        for _ in range(taken + 1):
            next(again)


def test_a_damaged_picture_is_a_damaged_record(tmp_path):
    """The record is whole, what it holds is not: a truncated JPEG, and one of another size."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = encode_image(noise, "jpeg")
    small = encode_image(np.zeros((8, 8, 3), np.uint8), "jpeg")
    good = [make_clip(0, 40, images=[picture] * 40)]
    write_dataset(
        tmp_path / "d",
        small_head(),
        [
            *good,
            make_clip(1, 4, images=[picture[:-300]] + [picture] * 3),
            make_clip(2, 4, images=[picture, small, picture, picture]),
        ],
        SIZE,
        image_format="jpeg",
    )
    said = []
    iterator = iterate(make_dataset(tmp_path / "d", T, 2, seed=0, max_corrupt_share=0.1), report=said.append)
    assert all((next(iterator).clip_index == 0).all() for _ in range(20))
    assert any(
        "(clip 'clip1', frame 0) cannot be read: OSError: image file is truncated" in text for text in said
    ), said
    assert any(
        "(clip 'clip2', frame 1) cannot be read: ValueError: image of shape (8, 8, 3)" in text
        for text in said
    ), said


def test_an_unreadable_shard_and_a_lost_one(tmp_path):
    clips = [make_clip(number, 8) for number in range(3)]
    write_dataset(tmp_path / "d", small_head(), clips, SIZE, shard_bytes=1)
    shard = sorted((tmp_path / "d").glob("loki-train*"))[1]
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data)))
    iterator = iterate(make_dataset(tmp_path / "d", T, 2, seed=0, max_corrupt_share=0.05))
    with pytest.raises(DatasetError, match=rf"{shard.name} record \d .*allows 1"):
        for _ in range(20):
            next(iterator)
    batches = make_dataset(tmp_path / "d", T, 2, seed=0, max_corrupt_share=1.0)
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard.name}: shard is gone"):
        take(batches, 20)
    # Nothing readable left: an error instead of drawing for ever.
    for other in sorted((tmp_path / "d").glob("loki-train*")):
        other.write_bytes(bytes(other.stat().st_size))
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(DatasetError, match="8 windows drawn in a row hold records that cannot be read"):
        make_dataset(tmp_path / "d", T, 2, seed=0, max_corrupt_share=1.0)[0]


def test_validation_replaces_damaged_windows_too(shards, spoilt):
    sound = make_dataset(shards, T, 2, split="train", one_pass=True)
    damaged = make_dataset(spoilt, T, 2, split="train", one_pass=True, max_corrupt_share=0.05)
    wanted, found = windows(take(sound, 5)), windows(list(iterate(damaged, report=lambda text: None)))
    assert len(found) == len(wanted) and found == windows(take(damaged, 5))
    assert 1 <= sum(a != b for a, b in zip(found, wanted, strict=True)) <= 5


def test_batches_are_sent_ahead_in_order(shards):
    """`to_device` runs ahead of the loop; the state counts what was taken, not what was sent."""
    sent = []

    def send(batch):
        sent.append(int(batch.clip_index[0]))
        return jax.device_put(batch)

    iterator = iterate(make_dataset(shards, T, 3, seed=2), to_device=send, device_batches=2)
    expected = take(make_dataset(shards, T, 3, seed=2), 8)
    for k in range(4):
        batch = next(iterator)
        assert isinstance(batch.frames, jax.Array)
        assert_equal(jax.device_get(batch), expected[k])
    deadline = time.monotonic() + 60
    while len(sent) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 6 <= len(sent) <= 7  # two wait on the device, one more may be on its way into the full queue
    state = iterator.get_state()
    assert state == {"batches": 4, "unreadable": []}
    fresh = iterate(make_dataset(shards, T, 3, seed=2), to_device=jax.device_put)
    fresh.set_state(state)
    assert_equal(jax.device_get(next(fresh)), expected[4])
    fresh.set_state({"batches": 1, "unreadable": []})  # back again, in the middle of reading
    assert_equal(jax.device_get(next(fresh)), expected[1])
    fresh.close()
    with pytest.raises(ValueError, match="closed"):
        next(fresh)


def test_validation_is_one_pass_and_always_the_same(shards):
    dataset = make_dataset(shards, T, 2, **VALIDATION_PASS)
    found = windows(take(dataset, len(dataset)))
    # Clips of 9 and 6 frames: windows 0 and 4 of the one, 0 of the other; the fourth place is filled up.
    assert [window[:2] for window in found] == [(4, 0), (5, 0), (4, 4), (4, 0)]
    assert found == windows(take(make_dataset(shards, T, 2, **VALIDATION_PASS), 2))
    halves = [make_dataset(shards, T, 2, 0, index, 2, **VALIDATION_PASS) for index in range(2)]
    assert [windows([half[0]])[0] for half in halves] == found[:2]
    assert len(make_dataset(shards, T, 2, split="train", one_pass=True)) == 5


def test_images_can_be_left_out(shards, tmp_path):
    batch = make_dataset(shards, T, 2, seed=0, with_images=False)[0]
    assert batch.frames is None and batch.reference is None and batch.latent_mean is not None
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 8)], SIZE)
    assert make_dataset(tmp_path / "d", T, 2, seed=0)[0].latent_mean is None
    with pytest.raises(DatasetError, match="holds no latents"):
        make_dataset(tmp_path / "d", T, 2, seed=0, with_images=False)


def test_larger_frames_are_reduced_by_area(shards, tmp_path):
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 8)], SIZE)
    stored = make_dataset(tmp_path / "d", T, 2, seed=0)[0]
    reduced = make_dataset(tmp_path / "d", T, 2, seed=0, image_size=SIZE // 2, cache_bytes=10**6)
    for _ in range(2):  # the second time from the cache
        batch = reduced[0]
        for found, images in ((batch.frames, stored.frames), (batch.reference, stored.reference)):
            # Each new pixel is the mean of the four that it covers.
            four = images.reshape(*images.shape[:-3], SIZE // 2, 2, SIZE // 2, 2, 3)
            np.testing.assert_array_equal(found, np.rint(four.mean(axis=(-4, -2))))
            assert found.dtype == np.uint8
    assert_equal(batch.crop, stored.crop)
    with pytest.raises(DatasetError, match=f"frames of {SIZE} pixels, the config wants {2 * SIZE}.*--size"):
        make_dataset(tmp_path / "d", T, 2, seed=0, image_size=2 * SIZE)
    # Latents cannot be resized.
    assert make_dataset(shards, T, 2, seed=0, image_size=SIZE)[0].latent_mean is not None
    with pytest.raises(
        DatasetError, match=f"latents of frames of {SIZE} pixels, the config wants {SIZE // 2}"
    ):
        make_dataset(shards, T, 2, seed=0, image_size=SIZE // 2)


def test_bad_requests_are_named(shards, tmp_path):
    with pytest.raises(DatasetError, match="none holds a window of 30"):
        make_dataset(shards, 30, 2, seed=0)
    with pytest.raises(DatasetError, match="no such dataset folder"):
        make_dataset(tmp_path / "nowhere", T, 2, seed=0)
    with pytest.raises(DatasetError, match="was made with the head"):
        make_dataset(shards, T, 2, seed=0, head_sha256="0" * 64)
    with pytest.raises(ValueError, match="cannot be shared evenly by 3"):
        make_dataset(shards, T, 4, 0, 0, 3)
    with pytest.raises(ValueError, match="not one of 2"):
        make_dataset(shards, T, 4, 0, 2, 2)
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 8)], SIZE)
    with pytest.raises(DatasetError, match="'validation' has 0 clips"):
        make_dataset(tmp_path / "d", T, 2, **VALIDATION_PASS)


def test_a_clip_table_of_another_dataset_is_noticed(tmp_path):
    write_dataset(tmp_path / "a", small_head(), [make_clip(0, 8), make_clip(1, 9)], SIZE)
    write_dataset(tmp_path / "b", small_head(), [make_clip(1, 9), make_clip(0, 8)], SIZE)
    (tmp_path / "a" / "clips.json").write_bytes((tmp_path / "b" / "clips.json").read_bytes())
    dataset = make_dataset(tmp_path / "a", T, 1, seed=0)
    with pytest.raises(DatasetError, match="does not fit the shards"):
        take(dataset, 8)
