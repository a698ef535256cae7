"""The driver map against the public implementation and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax import driver
from loki_jax.raster import rasterize


def load(golden, name):
    with np.load(golden / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("size", [64, 128])
def test_golden_driver_maps(golden, size):
    given = load(golden, f"driver_map_{size}_inputs")
    fragments = load(golden, f"driver_map_{size}_fragments")
    encoded = load(golden, f"driver_map_{size}_posenc42")["spatial_cond_0_42"]
    n_frames = fragments["mask"].shape[0]
    vertices = given["driver_verts"].reshape(n_frames, -1, 3)
    offsets = given["driver_deform"].reshape(vertices.shape)
    faces = given["faces"]
    canonical = driver.canonical_positions(given["template_verts"])
    np.testing.assert_allclose(canonical, given["props"], atol=1e-6)
    mask = np.zeros(vertices.shape[1], bool)
    mask[given["head_vertex_ids"]] = True
    mask[-200:] = True  # the inner mouth always shows
    np.testing.assert_array_equal(mask[faces].any(-1), given["face_mask"])

    found = jax.tree.map(np.asarray, rasterize(vertices, faces, size))
    sure = fragments["unambiguous"]
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found.face[sure], fragments["pix_to_face_local"][sure])
    seen = sure & (found.face >= 0)
    np.testing.assert_allclose(found.bary[seen], fragments["bary"][seen], atol=1e-4)
    np.testing.assert_allclose(found.depth[seen], fragments["zbuf"][seen], rtol=1e-6)

    shown = driver.clear_hidden_faces(found, faces, mask)
    np.testing.assert_array_equal(np.asarray(shown.face >= 0)[sure], fragments["mask"][sure])
    image = np.asarray(driver.encode_fragments(shown, faces, canonical, offsets))
    assert image.shape == (n_frames, size, size, 45)
    encoded = load(golden, f"driver_map_{size}_posenc42")["spatial_cond_0_42"]
    expected = encoded.reshape(n_frames, size, size, 42)
    np.testing.assert_allclose(image[sure][:, :42], expected[sure], atol=1e-4)  # 2e-3 would be allowed
    deform = fragments["deform_map"].reshape(n_frames, size, size, 3)
    np.testing.assert_allclose(image[sure][:, 42:], deform[sure], atol=1e-4)
    assert (image[~np.asarray(shown.face >= 0)] == 0).all()


def test_golden_encoding_of_points(golden):
    with np.load(golden / "raster_conventions.npz") as file:
        points, expected = file["posenc/in"], file["posenc/out"]
    np.testing.assert_allclose(driver.positional_encoding(points), expected, atol=2e-6)
