"""The landmark fit: its parts against definitions, its results against known coefficients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.rotation import geodesic_angle, matrix_from_rotvec
from loki_jax.face.skinning import expression_offsets, landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Coefficients
from loki_jax.fitting import fit, solver
from loki_jax.fitting import problem as model
from loki_jax.fitting.fit import fit_landmarks, make_camera, pose_from_points
from loki_jax.fitting.problem import FitError, FitSettings

N = 16
SIZE = (480, 512)


@pytest.fixture(scope="module")
def head() -> HeadAsset:
    return builtin_head()


def motion(head: HeadAsset, n: int = N, seed: int = 3) -> Coefficients:
    """Speech-like motion: head turns to 35 degrees, jaw, blinks, smile, gaze; the neck at rest."""
    rng = np.random.default_rng(seed)
    time = np.arange(n) / 25
    expression = np.zeros((n, head.n_expression), np.float32)
    for name, value in {
        "eyeBlinkLeft": np.exp(-(((time - 0.3) / 0.08) ** 2)),
        "eyeBlinkRight": np.exp(-(((time - 0.3) / 0.08) ** 2)),
        "mouthSmileLeft": 0.3 + 0.3 * np.sin(6 * time),
        "mouthSmileRight": 0.3 + 0.3 * np.sin(6 * time),
        "browInnerUp": 0.4 + 0.4 * np.sin(9 * time),
    }.items():
        expression[:, head.expression_names.index(name)] = value
    zero = np.zeros_like(time)
    return Coefficients(
        betas=np.tile(0.7 * rng.standard_normal(head.n_shape), (n, 1)).astype(np.float32),
        expression=expression,
        rot=np.stack([0.1 * np.sin(5 * time), 0.6 * np.sin(4 * time), 0.1 * np.cos(7 * time)], 1).astype(
            np.float32
        ),
        tra=np.stack([0.01 * np.sin(3 * time), 0.02 + zero, -0.9 + 0.02 * np.cos(3 * time)], 1).astype(
            np.float32
        ),
        neck=np.zeros((n, 3), np.float32),
        jaw=np.stack([0.12 * np.abs(np.sin(11 * time)), zero, zero], 1).astype(np.float32),
        eyes=np.stack([0.15 * np.sin(8 * time), 0.25 * np.cos(5 * time), zero], 1).astype(np.float32),
    )


def project_landmarks(
    head: HeadAsset, coefficients: Coefficients, size: tuple[int, int] = SIZE
) -> np.ndarray:
    """(N, 478, 2) pixels, with the package's own functions and not the fit's."""
    camera = make_camera(size)
    world = world_vertices(head, make_identity(head, jnp.asarray(coefficients.betas)), coefficients)
    return np.array(
        project(camera_from_world(landmark_positions(head, world, "mediapipe478"), camera), camera)
    )


def pose_error(found: Coefficients, true: Coefficients) -> np.ndarray:
    return np.degrees(
        geodesic_angle(matrix_from_rotvec(jnp.asarray(found.rot)), matrix_from_rotvec(jnp.asarray(true.rot)))
    )


@pytest.fixture(scope="module")
def clip(head) -> tuple[Coefficients, np.ndarray]:
    """True coefficients and landmarks with 0.5 px noise; the face is about 200 px high."""
    true = motion(head)
    rng = np.random.default_rng(0)
    points = project_landmarks(head, true)
    return true, (points + 0.5 * rng.standard_normal(points.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(head, clip) -> fit.FitResult:
    return fit_landmarks(head, clip[1], np.ones((N, 478), np.float32), SIZE)


def test_recovers_pose_of_noisy_landmarks(fitted, clip):
    error = pose_error(fitted.coefficients, clip[0])
    assert np.median(error) < 0.6 and error.max() < 1.0
    relative = fitted.coefficients.tra / clip[0].tra[:, 2:]
    np.testing.assert_allclose(relative, clip[0].tra / clip[0].tra[:, 2:], atol=0.03)


def test_recovers_expression_jaw_and_gaze(head, fitted, clip):
    true = clip[0]
    offsets = jax.jit(lambda c: expression_offsets(head, make_identity(head, c.betas), c))
    found, wanted = (np.asarray(offsets(jax.tree.map(jnp.asarray, c))) for c in (fitted.coefficients, true))
    # HEF's numerator over that of a neutral face.
    assert np.abs(found - wanted).mean() < 0.25 * np.abs(wanted).mean()
    blink = head.expression_names.index("eyeBlinkLeft")
    assert np.corrcoef(fitted.coefficients.expression[:, blink], true.expression[:, blink])[0, 1] > 0.95
    assert np.corrcoef(fitted.coefficients.jaw[:, 0], true.jaw[:, 0])[0, 1] > 0.95
    gaze = np.degrees(np.linalg.norm(fitted.coefficients.eyes - true.eyes, axis=1))
    assert np.median(gaze) < 2.0


def test_one_shape_no_neck_and_bounds_kept(head, fitted):
    found = fitted.coefficients
    assert (found.betas == found.betas[0]).all() and (found.neck == 0).all()
    bounds = np.asarray(head.expression_bounds)
    assert (found.expression >= bounds[:, 0]).all() and (found.expression <= bounds[:, 1]).all()


def test_reported_error_is_the_reprojection_distance(head, fitted, clip):
    distance = np.linalg.norm(project_landmarks(head, fitted.coefficients) - clip[1], axis=-1)
    np.testing.assert_allclose(fitted.reprojection, distance, atol=2e-3)
    width = np.linalg.norm(clip[1][:, 33] - clip[1][:, 263], axis=-1)
    # Noise of 0.5 px in x and y is 0.63 px on average; a fit cannot be much better nor should it be worse.
    inner = fit.inner_face_error(fitted.reprojection, clip[1]) * width
    assert 0.45 < np.median(inner) < 0.8
    np.testing.assert_allclose(fitted.error * width, inner, rtol=1e-5)


def test_outliers_and_missing_frames(head, clip):
    true, points = clip
    rng = np.random.default_rng(1)
    points, confidence = points.copy(), np.ones((N, 478), np.float32)
    wrong = rng.random((N, 478)) < 0.08
    points[wrong] += 40 * rng.standard_normal((int(wrong.sum()), 2))
    confidence[[6, 7]] = 0
    points[[6, 7]] = np.nan
    found = fit_landmarks(head, points, confidence, SIZE)
    error = pose_error(found.coefficients, true)
    assert np.median(error) < 1.0
    # The gap is bridged, not believed.
    assert error[[6, 7]].max() < 4.0
    assert (found.confidence[[6, 7]] == 0).all() and np.isnan(found.error[[6, 7]]).all()
    assert (np.delete(found.confidence, [6, 7]) > 0.3).all()
    assert all(np.isfinite(field).all() for field in found.coefficients)


def test_missing_landmarks_of_the_head_are_skipped(head, clip):
    true, points = clip
    marks = head.landmarks["mediapipe478"]
    face = np.array(marks.face)
    face[100:300:2] = -1
    partial = dataclasses.replace(head, landmarks={"mediapipe478": dataclasses.replace(marks, face=face)})
    found = fit_landmarks(partial, points[:1], np.ones((1, 478), np.float32), SIZE)
    assert (
        np.isnan(found.reprojection[0, 100:300:2]).all()
        and np.isfinite(found.reprojection[0, 101:300:2]).all()
    )
    assert pose_error(found.coefficients, Coefficients(*(f[:1] for f in true)))[0] < 2.5


def test_smooth_motion_keeps_a_nod_and_loses_noise(head, clip):
    """A 3 Hz nod keeps 95 % of its amplitude."""
    time = np.arange(N) / 25
    true = jax.tree.map(np.zeros_like, motion(head))
    true.rot[:, 0] = 0.1 * np.sin(2 * np.pi * 3 * time)
    true.tra[:, 2] = -0.9
    rng = np.random.default_rng(2)
    points = project_landmarks(head, true) + 0.5 * rng.standard_normal((N, 478, 2))
    found = fit_landmarks(head, points, np.ones((N, 478), np.float32), SIZE).coefficients.rot[:, 0]
    assert np.polyfit(true.rot[:, 0], found, 1)[0] > 0.95


def test_pose_from_points_of_a_distant_object_is_exact():
    rng = np.random.default_rng(4)
    model = jnp.asarray(rng.standard_normal((30, 3)) * 0.05, jnp.float32)
    rot = jnp.asarray([[0.3, -0.5, 0.2], [-0.2, 0.6, -0.4]], jnp.float32)
    tra = jnp.asarray([[0.5, -0.2, -50.0], [0.0, 0.3, -50.0]], jnp.float32)
    camera = make_camera((480, 640), focal=40_000.0)
    world = jnp.einsum("bij,nj->bni", matrix_from_rotvec(rot), model) + tra[:, None]
    pixels = project(camera_from_world(world, camera), camera)
    found_rot, found_tra, scale = pose_from_points(
        model, pixels, jnp.ones((2, 30)), jnp.asarray(camera.intrinsics)
    )
    np.testing.assert_allclose(found_rot, rot, atol=3e-3)
    np.testing.assert_allclose(found_tra, tra, rtol=3e-3, atol=3e-3)
    np.testing.assert_allclose(scale, 40_000 / 50, rtol=3e-3)


def test_landmark_head_moves_like_the_whole_head(head):
    coefficients = motion(head, 3)
    indices = np.array([1, 13, 14, 33, 152, 234, 468, 473])
    small = model.landmark_head(head, indices)

    def positions(asset):
        return world_vertices(asset, make_identity(asset, jnp.asarray(coefficients.betas)), coefficients)

    whole = landmark_positions(head, positions(head), "mediapipe478")[:, indices]
    # Inside a face skinning weights are interpolated instead of positions: less than 0.1 mm.
    np.testing.assert_allclose(positions(small)[:, : len(indices)], whole, atol=1e-4)


def tiny_problem(head) -> tuple[model.Problem, model.Layout, np.ndarray, np.ndarray]:
    indices = np.array([1, 13, 14, 33, 61, 152, 263, 291, 468, 473])
    layout = model.Layout(head.n_expression, jaw=True, eyes=True)
    rng = np.random.default_rng(5)
    x = 0.1 * rng.standard_normal((4, layout.size)).astype(np.float32)
    x[:, layout.n_expression + 5] = -0.9
    problem = model.Problem(
        head=model.landmark_head(head, indices),
        camera=make_camera(SIZE),
        observed=250 + 40 * rng.standard_normal((4, len(indices), 2)).astype(np.float32),
        weight=np.ones((4, len(indices)), np.float32),
        sigma=np.ones((4, len(indices)), np.float32),
        real=np.array([1, 1, 1, 0], np.float32),
        shape_prior=np.ones(head.n_shape, np.float32),
        huber=np.float32(2),
        frame_mean=np.zeros_like(x),
        **fit.frame_terms(head, layout, FitSettings(), 1.0),
    )
    return problem, layout, 0.3 * rng.standard_normal(head.n_shape).astype(np.float32), x


@pytest.mark.parametrize("correctives", [False, True])
def test_jacobians_are_the_derivatives_of_the_residuals(head, correctives):
    if correctives:  # as FLAME has them
        offsets = 0.01 * np.random.default_rng(8).standard_normal((36, len(head.template), 3))
        head = dataclasses.replace(head, pose_correctives=offsets.astype(np.float32))
    problem, layout, shape, x = tiny_problem(head)
    linearise = jax.jit(lambda s, x: jax.vmap(model.frame_linearisation(problem, layout, s))(x))
    pixels, jac_s, jac_x = linearise(shape, x)
    direction = np.random.default_rng(6).standard_normal(len(shape) + layout.size).astype(np.float32)
    d_shape, d_x = direction[: len(shape)], np.tile(direction[len(shape) :], (4, 1))
    found, push = jax.jvp(lambda s, x: solver.residuals(problem, layout, s, x), (shape, x), (d_shape, d_x))
    np.testing.assert_allclose(pixels - problem.observed, found, atol=1e-3)
    predicted = np.einsum("nkcp,np->nkc", jac_x, d_x) + np.einsum("nkcs,s->nkc", jac_s, d_shape)
    np.testing.assert_allclose(predicted, push, rtol=1e-3, atol=2e-3 * np.abs(push).max())


def test_smoothing_is_the_gradient_of_the_second_difference(head):
    problem, layout, shape, x = tiny_problem(head)

    def roughness(x):
        bent = x[2:] - 2 * x[1:-1] + x[:-2]
        return 0.5 * jnp.sum(problem.smoothness * bent[:1] ** 2)  # the second of two touches padding

    np.testing.assert_allclose(
        solver._smoothing(problem, jnp.asarray(x)), jax.grad(roughness)(x), rtol=1e-4, atol=1e-2
    )


def test_inverse_of_positive_definite_matrices():
    rng = np.random.default_rng(7)
    factor = rng.standard_normal((3, 37, 37)).astype(np.float32)
    matrix = factor @ factor.transpose(0, 2, 1) + 5 * np.eye(37, dtype=np.float32)
    np.testing.assert_allclose(solver._inverse(jnp.asarray(matrix)), np.linalg.inv(matrix), atol=2e-5)


@pytest.mark.parametrize(("frames", "length"), [(1, 1), (2, 16), (16, 16), (17, 32), (250, 256), (257, 512)])
def test_padded_length(frames, length):
    assert model.padded_length(frames) == length


def test_clips_of_like_length_share_what_is_compiled(head, clip):
    """A new length within the same padding compiles nothing, in the fit and in what surrounds it."""

    def compiled():
        return [f._cache_size() for f in (solver.optimise, fit._project_landmarks, fit.pose_from_points)]

    fit_landmarks(head, clip[1], np.ones((N, 478), np.float32), SIZE)
    before = compiled()
    for length in (N - 1, N - 5):
        found = fit_landmarks(head, clip[1][:length], np.ones((length, 478), np.float32), SIZE)
        assert len(found.error) == len(found.coefficients.rot) == length
    assert compiled() == before


def test_focal_length_of_a_field_of_view():
    intrinsics = make_camera((300, 400), fov=90.0).intrinsics
    np.testing.assert_allclose(intrinsics, [200, 200, 200, 150], rtol=1e-6)


def test_bad_input(head):
    points, confidence = np.zeros((2, 478, 3), np.float32), np.ones((2, 478), np.float32)
    with pytest.raises(FitError, match="no 'mediapipe478' landmarks.*data_prep.head_asset"):
        fit_landmarks(dataclasses.replace(head, landmarks={}), points, confidence, SIZE)
    with pytest.raises(FitError, match=r"shape \(2, 68, 3\), expected \(N, 478"):
        fit_landmarks(head, points[:, :68], confidence, SIZE)
    with pytest.raises(FitError, match="confidence has shape"):
        fit_landmarks(head, points, confidence[:1], SIZE)
    with pytest.raises(FitError, match="no frame shows enough landmarks"):
        fit_landmarks(head, points, 0 * confidence, SIZE)
    with pytest.raises(FitError, match="no frame shows enough landmarks"):
        fit_landmarks(head, np.full_like(points, np.nan), confidence, SIZE)
