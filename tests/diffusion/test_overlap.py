"""Windows that share frames agree on them, whatever the network makes of each window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.diffusion.overlap import blend_windows, join_windows
from loki_jax.diffusion.sampler import SOLVERS, sample_latents
from loki_jax.diffusion.schedule import make_schedule

CLIPS, WINDOW, SHARED, STEPS = 2, 6, 2, 5


def estimates(windows):
    return jax.random.normal(jax.random.key(0), (CLIPS * windows, WINDOW, 2, 2, 1))


def test_shared_frames_are_mixed_by_a_ramp():
    x0, earlier = estimates(3), jnp.full((CLIPS, SHARED, 2, 2, 1), 9.0)
    out, last = blend_windows(x0, earlier, jnp.array(False), 3)
    x0, out = (np.asarray(x).reshape(CLIPS, 3, WINDOW, 2, 2, 1) for x in (x0, out))
    for j, weight in enumerate((1 / 4, 3 / 4)):
        np.testing.assert_allclose(out[:, 0, j], (1 - weight) * 9 + weight * x0[:, 0, j], atol=1e-6)
        for k in (1, 2):
            mixed = (1 - weight) * x0[:, k - 1, 4 + j] + weight * x0[:, k, j]
            np.testing.assert_allclose(out[:, k, j], mixed, atol=1e-6)
            np.testing.assert_array_equal(out[:, k - 1, 4 + j], out[:, k, j])
    np.testing.assert_array_equal(out[:, :, 2:4], x0[:, :, 2:4])  # what is not shared stays
    np.testing.assert_array_equal(last, x0[:, 2, 4:])


def test_the_first_window_of_a_clip_is_left_alone():
    x0 = estimates(1)
    out, _ = blend_windows(x0, jnp.full((CLIPS, SHARED, 2, 2, 1), jnp.nan), jnp.array(True), 1)
    np.testing.assert_array_equal(out, x0)


def test_no_shared_frames_no_change():
    x0 = estimates(3)
    out, last = blend_windows(x0, jnp.zeros((CLIPS, 0, 2, 2, 1)), jnp.array(False), 3)
    np.testing.assert_array_equal(out, x0)
    assert last.shape == (CLIPS, 0, 2, 2, 1)
    assert join_windows(x0, 3, 0).shape == (CLIPS, 18, 2, 2, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_windows_sampled_one_after_another_join_without_a_step(solver):
    """The network draws another brightness in each window. Without shared frames that is a step."""

    def sample(windows, offsets, shared, earlier, first):
        offsets = jnp.tile(jnp.asarray(offsets, jnp.float32), CLIPS)
        return sample_latents(
            lambda x, t, offset: jnp.broadcast_to(offset[:, None, None, None, None], x.shape),
            jnp.ones((CLIPS * windows, WINDOW, 2, 2, 1)), make_schedule(), conditional=offsets,
            guidance=1.0, solver=solver, steps=STEPS, prediction="x0",
            blend=lambda x0, before: blend_windows(x0, before, jnp.array(first), windows), blended=earlier,
        )  # fmt: skip

    for shared, largest in ((0, 1.0), (2, 1 / 2), (3, 1 / 3)):
        earlier, rows = jnp.zeros((STEPS, CLIPS, shared, 2, 2, 1)), []
        # Two windows together, then one.
        for offsets, first in (([0, 1], True), ([2], False)):
            latents, earlier = sample(len(offsets), offsets, shared, earlier, first)
            row = join_windows(latents, len(offsets), shared)
            rows.append(row if offsets == [2] else row[:, : row.shape[1] - shared])
        clip = np.concatenate(rows, axis=1)
        assert clip.shape[1] == 3 * WINDOW - 2 * shared
        steps = np.abs(np.diff(clip, axis=1))
        np.testing.assert_allclose(steps.max(), largest, atol=1e-5)
        np.testing.assert_allclose(clip[:, -1] - clip[:, 0], 2, atol=1e-5)
