"""Fixed pairs of held-out windows, and what is drawn of them."""

import dataclasses

import jax
import numpy as np

from benchmarks.tiny_run import SIZE, noise_clips
from loki_jax.data.reader import open_dataset
from loki_jax.data.windows import make_dataset
from loki_jax.data.writer import write_dataset
from loki_jax.face.builtin import builtin_head
from loki_jax.training.samples import can_follow, make_pairs, sample_frames, sample_sheet


def test_pairs_are_of_one_person_and_then_of_two(tmp_path):
    head = builtin_head()
    clips = [dataclasses.replace(clip, split="validation") for clip in noise_clips(head)]
    # Two clips of one person follow each other.
    clips[1] = dataclasses.replace(clips[1], identity=clips[0].identity)
    write_dataset(tmp_path / "shards", head, clips, SIZE)
    dataset = open_dataset(tmp_path / "shards")
    batch = make_dataset(tmp_path / "shards", 2, 4, split="validation", one_pass=True)[0]
    pairs = make_pairs(batch, 3, head, dataset, "relative")
    assert pairs.names == (
        "clip0 < clip0", "clip1 < clip1", "clip2 < clip2", "clip2 < clip0", "clip2 < clip1", "clip0 < clip2",
    )  # fmt: skip
    # One person: as recorded. Two: the reference's shape, from the reference's pose on.
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[:3], b[:3]), pairs.coefficients, batch.coefficients
    )
    np.testing.assert_array_equal(pairs.coefficients.betas[3, 0], pairs.reference_coefficients.betas[3])
    np.testing.assert_array_equal(pairs.coefficients.expression[3:], pairs.driver_coefficients.expression[3:])
    np.testing.assert_allclose(pairs.coefficients.tra[3, 0], pairs.reference_coefficients.tra[3], atol=1e-6)
    np.testing.assert_array_equal(pairs.driver[3], batch.frames[0])
    np.testing.assert_array_equal(pairs.reference[3], batch.reference[2])
    assert make_pairs(batch._replace(frames=None), 3, head, dataset, "relative") is None
    assert not can_follow(head, dataset, pairs)  # noise has no appearance to read back

    sampled = np.random.default_rng(0).integers(0, 255, pairs.driver.shape, dtype=np.uint8)
    frames = sample_frames(pairs, sampled)
    assert len(frames) == 2 and frames[0].shape == (3 * SIZE, 6 * SIZE, 3)
    np.testing.assert_array_equal(frames[1][2 * SIZE :, 4 * SIZE : 5 * SIZE], sampled[4, 1])
    sheet = sample_sheet(pairs, sampled)
    assert sheet.shape == (12 * SIZE, 3 * SIZE, 3)
    np.testing.assert_array_equal(sheet[SIZE : 2 * SIZE, :SIZE], pairs.reference[0])
