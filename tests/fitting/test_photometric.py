"""The photometric estimator: coefficients of clean and of degraded frames, and where it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.rotation import matrix_from_rotvec
from loki_jax.face.skinning import expression_offsets, make_identity, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.photometric import fit_photometric, fit_photometric_clips, start_pose
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import synth_clip

EVERY, SIZE = 3, 64


@pytest.fixture(scope="module")
def head():
    return jax.tree.map(jnp.asarray, builtin_head())


def spoil(frames, seed):
    """Blur of one pixel, other colours and noise, as a small network's frames have them."""
    generator = np.random.default_rng(seed)
    image = frames.astype(np.float64)
    weights = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    for axis in (1, 2):
        padded = np.pad(image, [(3, 3) if a == axis else (0, 0) for a in range(4)], mode="edge")
        image = sum(
            w * np.take(padded, np.arange(SIZE) + k, axis) for k, w in enumerate(weights / weights.sum())
        )
    image = image * [0.92, 0.96, 0.90] + [10, 6, 12] + generator.normal(0, 6, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted(head):
    """Two clips and their fits: the first clean, the second spoiled."""
    clips = [synth_clip(head, seed, 40 + seed, 24, SIZE) for seed in (3, 8)]
    frames = [clips[0].frames[::EVERY], spoil(clips[1].frames[::EVERY], 0)]
    stack = lambda *items: jax.tree.map(lambda *x: np.stack(x), *items)
    coefficients, residual = fit_photometric_clips(
        np.stack(frames),
        head,
        np.stack([clip.coefficients.betas[0] for clip in clips]),
        stack(*(clip.appearance for clip in clips)),
        stack(*(clip.camera for clip in clips)),
        np.stack([clip.crop for clip in clips]),
    )
    truth = [Coefficients(*(field[::EVERY] for field in clip.coefficients)) for clip in clips]
    found = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), coefficients) for i in range(2)]
    return found, truth, residual


# Degrees allowed: clean frames; blurred, tinted, noisy ones.
@pytest.mark.parametrize("clip, allowed", [(0, 0.8), (1, 2.0)])
def test_pose_is_read_back(fitted, clip, allowed):
    found, truth, _ = fitted
    result = head_pose_follow(found[clip].rot, truth[clip].rot, found[clip].neck, truth[clip].neck)
    still = [np.repeat(field[:1], len(field), 0) for field in (truth[clip].rot, truth[clip].neck)]
    static = head_pose_follow(still[0], truth[clip].rot, still[1], truth[clip].neck)
    assert static.degrees > 6
    assert result.degrees < min(allowed, 0.25 * static.degrees)
    assert result.absolute_degrees < 1.5 * allowed


# Share of the neutral face's error that may be left. A blur of one pixel and noise of 6 grey levels at 64
# pixels hide lids and lips: there an expression is read back in part only. The aim is 0.6 there too;
# strict, so that the mark has to go when the estimator gets there.
MISSED = pytest.param(
    1, 0.6, marks=pytest.mark.xfail(strict=True, reason="the estimator misses 0.6 on spoiled frames")
)


@pytest.mark.parametrize("clip, allowed", [(0, 0.6), (1, 0.85), MISSED])
def test_expression_is_read_back(head, fitted, clip, allowed):
    found, truth, _ = fitted
    identity = make_identity(head, truth[clip].betas[:1])
    offsets = lambda c: np.asarray(expression_offsets(head, identity, c))
    expected = offsets(truth[clip])
    error = np.abs(offsets(found[clip]) - expected).mean()
    assert error < allowed * np.abs(expected).mean()


def test_residual_tells_clean_from_spoiled(fitted):
    _, _, residual = fitted
    assert residual.shape == (2, 24 // EVERY)
    # In units of local contrast.
    assert np.median(residual[0]) < 0.5 * residual[1].min()


def test_coefficients_stay_within_the_heads_bounds(head, fitted):
    low, high = np.asarray(head.expression_bounds).T
    for found in fitted[0]:
        assert (found.expression >= low - 1e-5).all() and (found.expression <= high + 1e-5).all()


@pytest.mark.parametrize("turn", [[0.0, 0.0, 0.0], [0.3, -0.6, 0.2]])
def test_start_faces_the_camera_and_fills_the_crop(head, turn):
    extrinsics = np.eye(4, dtype=np.float32)
    extrinsics[:3, :3] = matrix_from_rotvec(jnp.array(turn))
    extrinsics[:3, 3] = [0.05, -0.02, 0.9]
    camera = Camera(jnp.array([1300.0, 1250.0, 250.0, 260.0]), jnp.asarray(extrinsics))
    crop = jnp.array([90.0, 60.0, 410.0, 380.0])
    identity = make_identity(head, jnp.zeros(head.n_shape))
    rot, tra = jax.jit(start_pose)(head, identity, camera, crop)
    zero = jnp.zeros(3)
    neutral = Coefficients(jnp.zeros(head.n_shape), jnp.zeros(head.n_expression), rot, tra, zero, zero, zero)
    points = camera_from_world(world_vertices(head, identity, neutral), camera)
    box = crop_box(project(points, camera)[np.asarray(mesh_render_mask(head))])
    np.testing.assert_allclose(box, crop, atol=1.0)
    # The face looks along the camera's -z: its up is the image's up.
    facing = extrinsics[:3, :3] @ np.diag([1, -1, -1]) @ np.asarray(matrix_from_rotvec(rot))
    np.testing.assert_allclose(facing, np.diag([1, -1, -1]), atol=1e-5)


def test_wrong_shapes_are_named(head):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    known = (
        head,
        np.zeros(head.n_shape),
        sample_appearance(0, head),
        Camera(np.ones(4), np.eye(4)),
        np.zeros(4),
    )
    with pytest.raises(ValueError, match=r"frames have shape \(1, 4, 32, 48, 3\)"):
        fit_photometric(frames, *known)
    with pytest.raises(ValueError, match=r"frames have shape \(32, 48, 3\)"):
        fit_photometric(frames[0], *known)
