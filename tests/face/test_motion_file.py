"""Motion files hold how a head moves, and nothing about whose it is."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from loki_jax.face.asset import read_npz, write_npz
from loki_jax.face.builtin import builtin_head
from loki_jax.face.motion_file import (
    Motion,
    MotionError,
    head_digest,
    read_motion,
    without_identity,
    write_motion,
)
from loki_jax.face.retarget import retarget, size_ratio
from tests.face.test_controls import CAMERA, motion

N = 6


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture
def saved(head, tmp_path):
    coefficients = motion(head, 4, N)
    betas = np.tile(coefficients.betas[:1], (N, 1))
    coefficients = without_identity(head, coefficients._replace(betas=betas), CAMERA)
    valid, cuts = np.array([True] * 5 + [False]), np.array([3])
    stored = Motion(coefficients, CAMERA, Fraction(30000, 1001), valid, cuts, 2)
    write_motion(tmp_path / "motion.npz", head, stored)
    return tmp_path / "motion.npz", stored


def test_a_motion_comes_back_exactly(head, saved):
    path, stored = saved
    read = read_motion(path, head)
    for a, b in zip(read.coefficients, stored.coefficients, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(read.camera.intrinsics, CAMERA.intrinsics)
    assert read.fps == Fraction(30000, 1001) and read.neutral == 2
    np.testing.assert_array_equal(read.valid, stored.valid)
    np.testing.assert_array_equal(read.cuts, [3])


def test_no_face_is_stored(head, saved):
    arrays = read_npz(saved[0])
    assert set(arrays) == {
        "camera_extrinsics", "camera_intrinsics", "coefficients_expression", "coefficients_eyes",
        "coefficients_jaw", "coefficients_neck", "coefficients_rot", "coefficients_tra", "cuts", "meta_json",
        "valid",
    }  # fmt: skip
    meta = json.loads(str(arrays["meta_json"]))
    assert set(meta) == {"kind", "format_version", "fps", "neutral", "head", "head_sha256"}


def test_without_identity_relative_motion_is_the_same(head):
    """The size of the driver's head, which scales the translation, is in the translation."""
    driver, own = motion(head, 4, N), motion(head, 5)
    driver = driver._replace(betas=np.tile(driver.betas[:1], (N, 1)))
    plain = without_identity(head, driver, CAMERA)
    direct = retarget(driver, own, scale=size_ratio(head, own.betas, driver.betas[0]))
    stored = retarget(plain, own, scale=size_ratio(head, own.betas, plain.betas[0]))
    for a, b in zip(direct, stored, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_digest_is_that_of_what_coefficients_mean(head):
    assert head_digest(head) == head_digest(dataclasses.replace(head, landmarks={}, licence="another"))
    basis = head.expression_basis.copy()
    basis[0, 0, 0] += 1e-4
    assert head_digest(head) != head_digest(dataclasses.replace(head, expression_basis=basis))


def test_bad_motions_give_one_clear_error(head, saved, tmp_path):
    path, _ = saved
    arrays = read_npz(path)

    def altered(name, **changes):
        meta = json.loads(str(arrays["meta_json"])) | changes.pop("meta", {})
        new = arrays | {"meta_json": np.asarray(json.dumps(meta))} | changes
        write_npz(tmp_path / name, {key: value for key, value in new.items() if value is not None})
        return tmp_path / name

    other = dataclasses.replace(head, name="other", expression_basis=head.expression_basis * 2)
    with pytest.raises(MotionError, match="motion of the head 'builtin'.*'other'"):
        read_motion(path, other)
    (tmp_path / "text.npz").write_text("no archive")
    nan = arrays["coefficients_rot"].copy()
    nan[1] = np.nan
    cases = [
        (tmp_path / "none.npz", "no such motion file"),
        (tmp_path / "text.npz", "not a readable motion file"),
        (altered("kind.npz", meta={"kind": "another"}), "not a motion file"),
        (altered("meta.npz", meta_json=None), "not a motion file"),
        (altered("version.npz", meta={"format_version": 9}), "motion format 9"),
        (altered("lacks.npz", coefficients_jaw=None), "not a readable motion file"),
        (altered("nan.npz", coefficients_rot=nan), "not finite"),
        (altered("short.npz", coefficients_rot=arrays["coefficients_rot"][:2]), "rot has shape"),
        (altered("neutral.npz", meta={"neutral": 99}), "out of range"),
        (altered("fps.npz", meta={"fps": [0, 1]}), "out of range"),
        (altered("empty.npz", valid=np.zeros(0, bool)), "expression has shape"),
    ]
    for bad, message in cases:
        with pytest.raises(MotionError, match=message) as error:
            read_motion(bad, head)
        assert str(bad) in str(error.value)
