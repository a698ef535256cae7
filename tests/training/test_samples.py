"""Fixed pairs of held-out windows, and what is drawn of them."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np

from loki_jax.data.reader import open_dataset
from loki_jax.data.windows import make_dataset
from loki_jax.data.writer import write_dataset
from loki_jax.face.builtin import builtin_head
from loki_jax.training.samples import can_follow, make_pairs, sample_frames, sample_sheet
from loki_jax.training.sharding import make_mesh
from tests.training.tiny_run import ROOT, SIZE, noise_clips


def test_pairs_are_of_one_person_and_then_of_two(tmp_path):
    head = builtin_head()
    clips = [dataclasses.replace(clip, split="validation") for clip in noise_clips(head)]
    # Two clips of one person follow each other.
    clips[1] = dataclasses.replace(clips[1], identity=clips[0].identity)
    write_dataset(tmp_path / "shards", head, clips, SIZE)
    dataset = open_dataset(tmp_path / "shards")
    batch = make_dataset(tmp_path / "shards", 2, 4, split="validation", one_pass=True)[0]
    mesh = make_mesh(1, 1, jax.devices()[:1])
    pairs = make_pairs(batch, 3, head, dataset, "relative", mesh)
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
    assert make_pairs(batch._replace(frames=None), 3, head, dataset, "relative", mesh) is None
    assert not can_follow(head, dataset, pairs)  # noise has no appearance to read back

    sampled = np.random.default_rng(0).integers(0, 255, pairs.driver.shape, dtype=np.uint8)
    frames = sample_frames(pairs, sampled)
    assert len(frames) == 2 and frames[0].shape == (3 * SIZE, 6 * SIZE, 3)
    np.testing.assert_array_equal(frames[1][2 * SIZE :, 4 * SIZE : 5 * SIZE], sampled[4, 1])
    sheet = sample_sheet(pairs, sampled)
    assert sheet.shape == (12 * SIZE, 3 * SIZE, 3)
    np.testing.assert_array_equal(sheet[SIZE : 2 * SIZE, :SIZE], pairs.reference[0])


ON_EIGHT_DEVICES = """
import jax, json, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.training.tiny_run import tiny_config
from loki_jax.planning.collectives import parse_collectives
from loki_jax.training import samples
from loki_jax.training.sharding import global_batch, make_mesh, put_global

mesh = make_mesh(4, 2)
images = np.random.default_rng(0).integers(0, 255, (64, 2, 16, 16, 3), dtype=np.uint8)
rows = np.array([1, 60, 33])
batch = global_batch(images, mesh)
taken = samples.take_rows(batch, rows, mesh)
pick = jax.jit(lambda x: x[rows], out_shardings=NamedSharding(mesh, PartitionSpec()))
exchanged = sum(c.bytes for c in parse_collectives(pick.lower(batch).compile().as_text(), 8))

# A sampler that marks its pair and counts how many each device holds.
held = []
def count(config, networks, params, head, reference, *_):
    held.append(len(reference))
    return reference
samples.driver_input = lambda config, head, coefficients, *_: coefficients
samples.portrait_keys_values = count
samples.initial_noise = lambda networks, key, n, t: np.zeros((n, t))
samples.sample_windows = lambda config, networks, params, seen, *_, **options: (seen[:, None], None)
samples.decode_latents = lambda networks, params, latents: latents
n = 6
empty = np.zeros((n, 2))
pairs = samples.Pairs((), np.arange(n, dtype=np.uint8)[:, None], *[empty] * (len(samples.Pairs._fields) - 2))
sampled = samples.make_sampler(tiny_config("", sample__steps=1), None, mesh)({}, np.zeros(3), pairs)
print(json.dumps({
    "same": bool((taken == images[rows]).all()), "exchanged": exchanged, "row": images[0].nbytes,
    "sampled": sampled.ravel().tolist(), "held": held,
}))
"""


def test_only_the_wanted_rows_travel_and_no_device_draws_a_pair_of_another():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["exchanged"] <= 4 * 3 * found["row"]  # bytes may be summed as int32
    assert found["sampled"] == list(range(6)) and set(found["held"]) == {1}
