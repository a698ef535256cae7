"""FLAME pickles: every published flavour is read, everything else refused without being run."""

import os
import pickle
import subprocess

import numpy as np
import pytest
import scipy.sparse

from loki_jax.face.asset import HeadAssetError, load_head, save_head
from loki_jax.face.flame import head_from_flame, load_trusted_pickle
from tests.face.golden_flame import LIP_VERTEX, flame_dict, head_of, read, write_pickle


@pytest.fixture(scope="module")
def model(golden):
    return read(golden, "flame_model")


@pytest.fixture(scope="module")
def content(model):
    return flame_dict(model)


def assert_same_head(found, expected):
    for field in ("template", "faces", "shape_basis", "expression_basis", "pose_correctives"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    for field in ("joint_regressor", "parents", "skinning_weights"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert found.joint_names == expected.joint_names and found.lip_vertex == expected.lip_vertex


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_numpy_pickles_of_every_protocol(tmp_path, model, content, protocol):
    path = write_pickle(tmp_path / "flame.pkl", content, protocol)
    head = head_from_flame(path, lip_vertex=LIP_VERTEX)
    assert_same_head(head, head_of(model))
    assert "sha256" in head.provenance and "non-commercial" in head.licence
    save_head(tmp_path / "head.npz", head)
    assert_same_head(load_head(tmp_path / "head.npz"), head)


def python2_pickle(content):
    """The bytes Python 2 with chumpy and an old SciPy would have written: protocol 2, old names, str data.

    Assembled opcode by opcode, since no Python 3 library writes them.
    """
    out = bytearray(b"\x80\x02")

    def text(value):
        raw = value.encode("latin1")
        out.extend(b"U" + bytes([len(raw)]) + raw)

    def name(module, attribute):
        out.extend(b"c" + f"{module}\n{attribute}\n".encode())

    def integer(value):
        out.extend(b"J" + int(value).to_bytes(4, "little", signed=True))

    def array(value):
        value = np.asarray(value)
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        name("numpy.core.multiarray", "_reconstruct")
        out.extend(b"(")
        name("numpy", "ndarray")
        out.extend(b"K\x00\x85U\x01btR(K\x01(")
        for n in value.shape:
            integer(n)
        out.extend(b"t")
        name("numpy", "dtype")
        code = value.dtype.str[1:].encode()
        out.extend(
            b"(U"
            + bytes([len(code)])
            + code
            + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        out.extend(b"\x88" if order == "F" else b"\x89")
        raw = value.tobytes(order)
        out.extend(b"T" + len(raw).to_bytes(4, "little") + raw + b"tb")  # a Python 2 str

    def chumpy(value):
        name("chumpy.ch", "Ch")
        out.extend(b")\x81}(")
        text("x")
        array(np.asarray(value, np.float64))
        text("_dirty_vars")
        name("__builtin__", "set")
        out.extend(b"]\x85R")
        text("_itr")
        out.extend(b"N")
        text("_depends_on_deps")
        out.extend(b"}")
        out.extend(b"ub")

    def select(value):
        flat = np.asarray(value, np.float64).ravel()
        name("chumpy.reordering", "Select")
        out.extend(b")\x81}(")
        text("a")
        chumpy(flat[::-1].copy())
        text("idxs")
        array(np.arange(flat.size)[::-1].copy())
        text("preferred_shape")
        out.extend(b"(")
        for n in np.shape(value):
            integer(n)
        out.extend(b"tub")

    def sparse(value):
        matrix = scipy.sparse.csc_matrix(value)
        name("scipy.sparse.csc", "csc_matrix")
        out.extend(b")\x81}(")
        for key, part in (("indptr", matrix.indptr), ("indices", matrix.indices), ("data", matrix.data)):
            text(key)
            array(part)
        text("_shape")
        integer(matrix.shape[0])
        integer(matrix.shape[1])
        out.extend(b"\x86")
        text("maxprint")
        integer(50)
        out.extend(b"ub")

    writers = {
        "v_template": chumpy,
        "shapedirs": chumpy,
        "posedirs": select,
        "weights": chumpy,
        "J_regressor": sparse,
    }
    out.extend(b"}(")
    for key, value in content.items():
        text(key)
        if isinstance(value, str):
            text(value)
        else:
            writers.get(key, array)(value)
    out.extend(b"u.")
    return bytes(out)


def test_python2_pickle_with_chumpy_and_old_scipy(tmp_path, model, content):
    path = tmp_path / "generic_model.pkl"
    path.write_bytes(python2_pickle(content))
    assert b"chumpy.ch" in path.read_bytes() and b"scipy.sparse.csc\n" in path.read_bytes()
    assert_same_head(head_from_flame(path, lip_vertex=LIP_VERTEX), head_of(model))


@pytest.mark.parametrize("layout", ["csc", "csr", "coo", "dense"])
def test_any_sparse_layout(tmp_path, model, content, layout):
    dense = model["model/J_regressor"].astype(np.float64)
    regressor = dense if layout == "dense" else getattr(scipy.sparse, f"{layout}_matrix")(dense)
    path = write_pickle(tmp_path / "flame.pkl", content | {"J_regressor": regressor})
    np.testing.assert_array_equal(head_from_flame(path, lip_vertex=LIP_VERTEX).joint_regressor, dense)


def test_true_size(tmp_path):
    """FLAME's own sizes: 5,023 vertices, 9,976 faces, lip vertex 3533."""
    rng = np.random.default_rng(0)
    weights = rng.random((5023, 5))
    regressor = scipy.sparse.random(5, 5023, 0.01, format="csc", rng=rng)
    content = {
        "v_template": rng.normal(size=(5023, 3)) * 0.1,
        "f": rng.integers(0, 5023, (9976, 3)).astype(np.uint32),
        "shapedirs": rng.normal(size=(5023, 3, 400)).astype(np.float32),
        "posedirs": rng.normal(size=(5023, 3, 36)).astype(np.float32),
        "J_regressor": regressor,
        "weights": weights / weights.sum(1, keepdims=True),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.uint32),
    }
    head = head_from_flame(write_pickle(tmp_path / "flame.pkl", content), n_shape=300, n_expression=100)
    assert head.template.shape == (5023, 3) and head.faces.shape == (9976, 3) and head.lip_vertex == 3533
    np.testing.assert_array_equal(head.shape_basis[299], content["shapedirs"][:, :, 299])
    np.testing.assert_array_equal(head.expression_basis[0], content["shapedirs"][:, :, 300])
    np.testing.assert_array_equal(head.pose_correctives[35], content["posedirs"][:, :, 35])
    np.testing.assert_array_equal(head.render_mask, head.skinning_weights[:, 0] < 0.5)


def test_blink_takes_the_last_axis(tmp_path, golden, content):
    blink = read(golden, "flame_io")["in/blink"]
    path = write_pickle(tmp_path / "flame.pkl", content)
    np.save(tmp_path / "blink.npy", blink[None])
    head = head_from_flame(path, blink=tmp_path / "blink.npy", lip_vertex=LIP_VERTEX)
    np.testing.assert_array_equal(head.expression_basis[64], blink)
    np.testing.assert_array_equal(
        head.expression_basis[63], content["shapedirs"][:, :, 363].astype(np.float32)
    )
    assert head.expression_names[-1] == "blink" and head.n_expression == 65
    np.save(tmp_path / "short.npy", blink[:-1])
    with pytest.raises(HeadAssetError, match=r"short\.npy.*\(502, 3\)"):
        head_from_flame(path, blink=tmp_path / "short.npy", lip_vertex=LIP_VERTEX)


def test_landmarks_and_mask(tmp_path, content):
    path = write_pickle(tmp_path / "flame.pkl", content)
    bary = np.full((51, 3), 1 / 3)
    np.savez(tmp_path / "ibug.npz", lmk_face_idx=np.arange(51), lmk_b_coords=bary)
    write_pickle(tmp_path / "masks.pkl", {"face": np.array([5, 7]), "scalp": np.array([9])})
    head = head_from_flame(
        path,
        lip_vertex=LIP_VERTEX,
        landmarks=tmp_path / "ibug.npz",
        mask=tmp_path / "masks.pkl",
        mask_region="scalp",
    )
    marks = head.landmarks["ibug68"]
    assert (marks.face[:17] == -1).all() and marks.face[17:].tolist() == list(range(51))
    assert np.flatnonzero(head.render_mask).tolist() == [9]
    np.savez(tmp_path / "mp.npz", lmk_face_idx=[4, 6], lmk_b_coords=bary[:2], landmark_indices=[1, 473])
    marks = head_from_flame(path, lip_vertex=LIP_VERTEX, landmarks=tmp_path / "mp.npz").landmarks[
        "mediapipe478"
    ]
    assert (
        marks.face.shape == (478,)
        and marks.face[1] == 4
        and marks.face[473] == 6
        and (marks.face >= 0).sum() == 2
    )
    with pytest.raises(HeadAssetError, match="no region 'nose'"):
        head_from_flame(path, lip_vertex=LIP_VERTEX, mask=tmp_path / "masks.pkl", mask_region="nose")
    np.savez(tmp_path / "far.npz", lmk_face_idx=np.arange(51) + 10_000, lmk_b_coords=bary)
    with pytest.raises(HeadAssetError, match=r"far\.npz.*do not fit"):
        head_from_flame(path, lip_vertex=LIP_VERTEX, landmarks=tmp_path / "far.npz")


class _Shell:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_malicious_pickles_do_nothing(tmp_path, content):
    mark = tmp_path / "executed"
    command = f"touch {mark}"
    attacks = {
        "os": _Shell(os.system, command),
        "subprocess": _Shell(subprocess.call, ["touch", str(mark)]),
        "eval": _Shell(eval, f"open({str(mark)!r}, 'w')"),
        "numpy": _Shell(np.save, str(mark), 0),
        "getattr": _Shell(getattr, "text", "upper"),
    }
    for name, attack in attacks.items():
        for protocol in (0, 2, 5):
            path = write_pickle(tmp_path / f"{name}.pkl", content | {"extra": attack}, protocol)
            with pytest.raises(HeadAssetError, match=rf"{name}\.pkl: unsafe pickle, it asks to load \S+"):
                head_from_flame(path)
    # The nested-attribute trick of protocol 4, and rebuilding an arbitrary class through copyreg.
    (tmp_path / "nested.pkl").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0elib._npyio.sys\x93.")
    (tmp_path / "rebuild.pkl").write_bytes(
        b"ccopy_reg\n_reconstructor\n(c__builtin__\nset\nc__builtin__\nobject\nNtR."
    )
    (tmp_path / "codec.pkl").write_bytes(b"c_codecs\nencode\n(VA\nVrot13\ntR.")
    for name in ("nested", "rebuild", "codec"):
        with pytest.raises(HeadAssetError, match=rf"{name}\.pkl"):
            load_trusted_pickle(tmp_path / f"{name}.pkl")
    assert not list(tmp_path.glob("executed*"))
    # The same bytes do run under plain pickle, so that the test is known to be able to fail.
    pickle.loads(pickle.dumps(attacks["os"]))
    assert mark.exists()


def test_damaged_files_are_named(tmp_path, content):
    whole = write_pickle(tmp_path / "flame.pkl", content).read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.pkl"
        path.write_bytes(whole[:length])
        with pytest.raises(HeadAssetError, match=r"cut\.pkl: not a readable pickle .*[Dd]ownload"):
            head_from_flame(path)
    (tmp_path / "text.pkl").write_text("<html>Please log in</html>")
    with pytest.raises(HeadAssetError, match=r"text\.pkl: not a readable pickle"):
        head_from_flame(tmp_path / "text.pkl")
    with pytest.raises(HeadAssetError, match=r"none\.pkl: no such file"):
        head_from_flame(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"shapedirs": np.zeros((502, 3, 100))},
            r"shapedirs has shape \(502, 3, 100\), FLAME's is \(502, 3, 400\)",
        ),
        ({"posedirs": np.zeros((502, 3, 27))}, "posedirs has shape"),
        ({"weights": np.zeros((500, 5))}, "weights has shape"),
        ({"J_regressor": np.zeros((4, 502))}, "J_regressor has shape"),
        ({"kintree_table": np.array([[-1, 0, 0, 1, 1], range(5)])}, "joint parents are"),
        ({"f": np.full((1000, 3), 502)}, "faces index vertices"),
        ({"v_template": np.full((502, 3), np.nan)}, "not finite"),
        ({"v_template": [object]}, "unsafe|not a readable FLAME model"),
        ({"weights": "none"}, "weights"),
    ],
)
def test_wrong_contents_are_named(tmp_path, content, change, message):
    path = write_pickle(tmp_path / "flame.pkl", content | change)
    with pytest.raises(HeadAssetError, match=rf"flame\.pkl.*({message})"):
        head_from_flame(path, lip_vertex=LIP_VERTEX)


def test_other_refusals(tmp_path, content):
    path = write_pickle(tmp_path / "flame.pkl", content)
    with pytest.raises(HeadAssetError, match="no lip vertex 3533 among 502"):
        head_from_flame(path)
    with pytest.raises(HeadAssetError, match="301 shape"):
        head_from_flame(path, n_shape=301, lip_vertex=-1)
    less = {key: value for key, value in content.items() if key != "posedirs"}
    with pytest.raises(HeadAssetError, match="not a FLAME model, it lacks posedirs"):
        head_from_flame(write_pickle(tmp_path / "less.pkl", less))
    with pytest.raises(HeadAssetError, match="not a FLAME model"):
        head_from_flame(write_pickle(tmp_path / "list.pkl", [1, 2]))
