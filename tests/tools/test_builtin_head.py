"""The shipped arrays of the built-in head are those that its generator makes."""

import numpy as np

from loki_jax.face import builtin
from loki_jax.face.asset import load_head, read_npz
from tools.builtin_head import generate


def test_generator_makes_the_shipped_file(tmp_path):
    path = tmp_path / "again.npz"
    assert generate.main(["--out", str(path)]) == 0
    made, shipped = read_npz(path), read_npz(builtin.FILE)
    assert made.keys() == shipped.keys()
    for name, value in shipped.items():
        if name in ("mesh_phi", "mesh_v"):  # not rounded: math libraries may differ in the last bit
            np.testing.assert_allclose(made[name], value, rtol=0, atol=1e-12)
        else:
            assert made[name].dtype == value.dtype
            np.testing.assert_array_equal(made[name], value)


def test_file_is_small_and_is_a_head_asset():
    assert builtin.FILE.stat().st_size < 500_000
    head, mesh = load_head(builtin.FILE), builtin.builtin_mesh()
    np.testing.assert_array_equal(head.faces, mesh.faces)
    np.testing.assert_array_equal(head.template, mesh.vertices.astype(np.float32))
    assert all(len(value) == len(head.template) for name, value in vars(mesh).items() if name != "faces")
