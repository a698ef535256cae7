"""The input pipeline: what a batch holds, and that its order depends on the seed alone."""

import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loki_jax.data.pipeline import iterate, make_dataset, make_validation_dataset, window_slots
from loki_jax.data.records import DatasetError, open_dataset, write_dataset
from tests.data.clips import SIZE, make_clip, small_head

# Training clips of 23, 8, 3 (too short for a window of 4) and 13 frames; two held-out identities.
TRAIN, VALIDATION = {0: 23, 1: 8, 2: 3, 3: 13}, {4: 9, 5: 6}
T = 4
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
            batch["clip_index"], batch["frame_index"], batch["reference_index"], strict=True
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
    assert shapes["frames"] == ((3, T, SIZE, SIZE, 3), "uint8") and shapes["reference"] == (
        (3, SIZE, SIZE, 3),
        "uint8",
    )
    assert shapes["latent_mean"] == ((3, T, 2, 2, 4), "bfloat16")
    assert shapes["reference_latent_logvar"] == ((3, 2, 2, 4), "bfloat16")
    assert shapes["crop"] == ((3, T, 4), "float32") and shapes["confidence"] == ((3, T), "float32")
    assert shapes["camera"].extrinsics == ((3, T, 4, 4), "float32")
    assert shapes["coefficients"].expression == ((3, T, 6), "float32")
    assert shapes["reference_coefficients"].shape == ((3, 4), "float32")
    for b in range(3):
        clip = dataset.clips[batch["clip_index"][b]]
        start = batch["frame_index"][b, 0]
        np.testing.assert_array_equal(batch["frame_index"][b], np.arange(start, start + T))
        frames = dataset.read_clip(clip, start, start + T)
        reference = dataset.read_clip(clip)[batch["reference_index"][b]]
        assert_equal(batch["frames"][b], np.stack([f.image for f in frames]))
        assert_equal(batch["latent_mean"][b], np.stack([f.latent_mean for f in frames]))
        assert_equal(batch["reference"][b], reference.image)
        assert_equal(batch["reference_latent_mean"][b], reference.latent_mean)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(f.coefficients for f in frames))
        assert_equal(jax.tree.map(lambda leaf, b=b: leaf[b], batch["coefficients"]), stacked)
        assert_equal(
            jax.tree.map(lambda leaf, b=b: leaf[b], batch["reference_coefficients"]), reference.coefficients
        )
        np.testing.assert_allclose(batch["confidence"][b], [f.confidence for f in frames])


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


def test_worker_processes_keep_the_order(shards, tmp_path):
    # In a program of its own: Grain's workers need parsed absl flags and a main guard.
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys
from absl import app
from loki_jax.data.pipeline import iterate, make_dataset

def main(argv):
    iterator = iterate(make_dataset(argv[1], 4, 3, seed=11), workers=2, threads=1, prefetch=1)
    for _ in range(5):
        batch = next(iterator)
        indices = batch["clip_index"], batch["frame_index"][:, 0], batch["reference_index"]
        print(*(index.tolist() for index in indices))
    iterator.close()

if __name__ == "__main__":
    app.run(main)
"""
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(program), str(shards)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    expected = [
        f"{b['clip_index'].tolist()} {b['frame_index'][:, 0].tolist()} {b['reference_index'].tolist()}"
        for b in take(make_dataset(shards, T, 3, seed=11), 5)
    ]
    assert done.stdout.splitlines() == expected


def test_validation_is_one_pass_and_always_the_same(shards):
    dataset = make_validation_dataset(shards, T, 2)
    found = windows(take(dataset, len(dataset)))
    # Clips of 9 and 6 frames: windows 0 and 4 of the one, 0 of the other; the fourth place is filled up.
    assert [window[:2] for window in found] == [(4, 0), (5, 0), (4, 4), (4, 0)]
    assert found == windows(take(make_validation_dataset(shards, T, 2), 2))
    halves = [make_validation_dataset(shards, T, 2, 0, index, 2) for index in range(2)]
    assert [windows([half[0]])[0] for half in halves] == found[:2]
    assert len(make_validation_dataset(shards, T, 2, split="train")) == 5


def test_images_can_be_left_out(shards, tmp_path):
    batch = make_dataset(shards, T, 2, seed=0, with_images=False)[0]
    assert "frames" not in batch and "reference" not in batch and "latent_mean" in batch
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 8)], SIZE)
    assert "latent_mean" not in make_dataset(tmp_path / "d", T, 2, seed=0)[0]
    with pytest.raises(DatasetError, match="holds no latents"):
        make_dataset(tmp_path / "d", T, 2, seed=0, with_images=False)


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
        make_validation_dataset(tmp_path / "d", T, 2)


def test_a_clip_table_of_another_dataset_is_noticed(tmp_path):
    write_dataset(tmp_path / "a", small_head(), [make_clip(0, 8), make_clip(1, 9)], SIZE)
    write_dataset(tmp_path / "b", small_head(), [make_clip(1, 9), make_clip(0, 8)], SIZE)
    (tmp_path / "a" / "clips.json").write_bytes((tmp_path / "b" / "clips.json").read_bytes())
    dataset = make_dataset(tmp_path / "a", T, 1, seed=0)
    with pytest.raises(DatasetError, match="does not fit the shards"):
        take(dataset, 8)
