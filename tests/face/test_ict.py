"""The ICT-FaceKit arrays as a head asset, on a small stand-in and, where present, the real ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.asset import HeadAssetError, load_head, save_head
from loki_jax.face.ict import head_from_ict
from loki_jax.face.skinning import expression_offsets, head_vertices, landmark_positions, make_identity
from loki_jax.face.types import Coefficients
from tests.face.ict_layout import REGIONS


def ball(centre, radius, rings=7, sectors=10):
    """A closed outward sphere; returns vertices and faces."""
    polar = np.linspace(0, np.pi, rings)[1:-1]
    azimuth = np.linspace(0, 2 * np.pi, sectors, endpoint=False)
    middle = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(azimuth),
            np.cos(polar)[:, None] + 0 * azimuth,
            np.sin(polar)[:, None] * np.sin(azimuth),
        ],
        -1,
    ).reshape(-1, 3)
    points = np.concatenate([middle, [[0, 1, 0], [0, -1, 0]]]) * radius + centre
    top, bottom = len(middle), len(middle) + 1
    faces = []
    for j in range(sectors):
        k = (j + 1) % sectors
        faces += [(top, k, j), (bottom, len(middle) - sectors + j, len(middle) - sectors + k)]
        for i in range(rings - 3):
            a, b = i * sectors + j, i * sectors + k
            faces += [(a, b, a + sectors), (b, b + sectors, a + sectors)]
    return points, np.array(faces)


def arrays():
    """A head in the layout of the real file: a big ball on a trunk, two eyes, a mouth."""
    parts = {
        "face": ball(np.array([0, 0, 2]), 10.0, 11, 16),
        "head_neck": ball(np.array([0, -14, -1]), 6.0, 9, 12),
        "mouth_socket": ball(np.array([0, -4, 8]), 2.0),
        "eyeball_l": ball(np.array([3, 3.5, 8]), 1.5),
        "eyeball_r": ball(np.array([-3, 3.5, 8]), 1.5),
    }
    points, faces, region = [], [], []
    for index, name in enumerate(REGIONS):
        faces.append(parts[name][1] + sum(map(len, points)))
        points.append(parts[name][0])
        region += [index] * len(points[-1])
    points = np.concatenate(points)
    rng = np.random.default_rng(0)
    return {
        "neutral": points.astype(np.float32),
        "faces": np.concatenate(faces).astype(np.int32),
        "region_id": np.array(region, np.int8),
        "region_names": np.array(REGIONS),
        "identity_modes": rng.normal(size=(6, *points.shape)).astype(np.float32) * 0.1,
        "expr_deltas": rng.normal(size=(5, *points.shape)).astype(np.float32) * 0.1,
        "expr_names": np.array(["jawOpen", "eyeBlink_L", "eyeBlink_R", "mouthPucker", "cheekRaiser_L"]),
        "landmarks68": rng.permutation(100)[:68].astype(np.int32),
        "meta": np.array("synthetic"),
        "license_text": np.array("MIT"),
    }


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "ict.npz", **arrays())
    return tmp_path / "ict.npz"


def rest(head, **changed):
    n = {"betas": head.n_shape, "expression": head.n_expression}
    return Coefficients(*(jnp.zeros(n.get(field, 3)) for field in Coefficients._fields))._replace(**changed)


def test_contents_and_units(path, tmp_path):
    given, head = arrays(), head_from_ict(path)
    np.testing.assert_allclose(head.template, given["neutral"] * 0.01, rtol=1e-6)
    np.testing.assert_allclose(head.shape_basis, given["identity_modes"] * 0.01, rtol=1e-6)
    np.testing.assert_allclose(head.expression_basis, given["expr_deltas"] * 0.01, rtol=1e-6)
    assert head.expression_names == tuple(given["expr_names"]) and head.licence == "MIT"
    np.testing.assert_array_equal(head.expression_bounds, np.tile([0, 1], (5, 1)))
    np.testing.assert_array_equal(head.inner_mouth, given["region_id"] == 2)
    assert head.joint("jaw") is None and head.lip_vertex == -1
    found = landmark_positions(head, jnp.asarray(head.template), "ibug68")
    np.testing.assert_allclose(found, given["neutral"][given["landmarks68"]] * 0.01, rtol=1e-5)
    dense = landmark_positions(head, jnp.asarray(head.template), "mediapipe478")
    np.testing.assert_array_equal(dense[4], found[30])  # the nose tip
    np.testing.assert_array_equal(dense[33], found[36])  # the right eye's outer corner
    assert (np.asarray(head.landmarks["mediapipe478"].face) >= 0).sum() == 70
    save_head(tmp_path / "head.npz", head)
    np.testing.assert_array_equal(load_head(tmp_path / "head.npz").joint_regressor, head.joint_regressor)


def test_neck_turns_the_head_on_still_shoulders(path):
    head = head_from_ict(path)
    identity = make_identity(head, jnp.zeros(head.n_shape))
    moved = np.asarray(head_vertices(head, identity, rest(head, neck=jnp.array([0.0, 0.4, 0.0]))))
    shift = np.linalg.norm(moved - head.template, axis=-1)
    weight = head.skinning_weights[:, 1]
    assert (
        shift[head.skinning_weights[:, 0] == 1].max() < 1e-7 and (head.skinning_weights[:, 0] == 1).sum() > 5
    )
    rigidly = np.flatnonzero(weight == 1)
    distances = lambda v: np.linalg.norm(v[rigidly[:40, None]] - v[rigidly[None, :40]], axis=-1)
    np.testing.assert_allclose(distances(moved), distances(head.template), atol=1e-6)
    assert shift[rigidly].max() > 0.01
    np.testing.assert_allclose(
        expression_offsets(head, identity, rest(head, neck=jnp.array([0.0, 0.4, 0.0]))), 0, atol=1e-7
    )


def test_eyes_turn_in_place(path):
    given, head = arrays(), head_from_ict(path)
    identity = make_identity(head, jnp.zeros(head.n_shape))
    moved = np.asarray(head_vertices(head, identity, rest(head, eyes=jnp.array([0.0, 0.5, 0.0]))))
    for region, centre, pupil in ((3, [3, 3.5, 8], 473), (4, [-3, 3.5, 8], 468)):
        own = given["region_id"] == region
        np.testing.assert_allclose(
            identity.joints[head.joint("left_eye" if region == 3 else "right_eye")],
            np.array(centre) * 0.01,
            atol=1e-5,
        )
        radius = np.linalg.norm(moved[own] - np.array(centre) * 0.01, axis=-1)
        np.testing.assert_allclose(radius, 0.015, atol=1e-5)
        ahead = landmark_positions(head, jnp.asarray(head.template), "mediapipe478")[pupil]
        np.testing.assert_allclose(ahead[:2], np.array(centre[:2]) * 0.01, atol=1e-6)
        assert ahead[2] > 0.01 * centre[2] + 0.0135
        turned = landmark_positions(head, jnp.asarray(moved), "mediapipe478")[pupil]
        assert turned[0] > ahead[0] + 0.005  # towards the subject's left
    others = given["region_id"] < 3
    np.testing.assert_allclose(moved[others], head.template[others], atol=1e-7)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"neutral": np.zeros((7, 3))}, "identity_modes has shape"),
        ({"landmarks68": np.full(68, 10**6)}, "landmarks68 names vertices that do not exist"),
        ({"region_names": np.array(list("abcde"))}, "lacks the regions"),
        ({"expr_deltas": None}, "not the ICT-FaceKit arrays, lacks expr_deltas"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    content = {key: value for key, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(HeadAssetError, match=rf"bad\.npz: .*{message}"):
        head_from_ict(tmp_path / "bad.npz")


def test_damaged_files_are_named(tmp_path, path):
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HeadAssetError, match=r"cut\.npz: not a readable"):
        head_from_ict(tmp_path / "cut.npz")
    with pytest.raises(HeadAssetError, match=r"none\.npz: no such file"):
        head_from_ict(tmp_path / "none.npz")


def test_the_real_arrays(ict_head_path):
    head = head_from_ict(ict_head_path)
    assert head.template.shape == (5020, 3) and head.faces.shape == (9972, 3)
    assert (head.n_shape, head.n_expression) == (100, 57) and "MIT" in head.licence
    face = head.landmarks["ibug68"].face
    points = np.asarray(landmark_positions(head, jnp.asarray(head.template), "ibug68"))
    assert face.shape == (68,) and points[45, 0] > 0.03 > -0.03 > points[36, 0]  # left eye at +x
    assert points[8, 1] < points[57, 1] < points[30, 1] < points[27, 1]  # chin, lip, nose tip, bridge
    assert points[30, 2] == points[:, 2].max()
    corners = head.faces[face]
    assert head.skinning_weights[corners.ravel(), 1].min() > 0.9  # landmarks all move with the head
    assert head.render_mask[corners].any(axis=1).all()
