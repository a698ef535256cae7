"""Fits of other programs in, and out again: files of their true layouts, made here."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_prep import export, import_fits
from data_prep.importers.fits import find_fits, read_fit
from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import save_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.rotation import matrix_from_rotvec
from loki_jax.face.skinning import make_identity, skin, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.video.reader import MediaError
from loki_jax.video.writer import write_video
from tests.data.clips import small_head

N, WIDTH, HEIGHT = 6, 80, 64
N_SHAPE, VERTICES = 150, 9


def flame_like(n_expression=65, blink=True, n_shape=N_SHAPE):
    """A head of a few vertices with FLAME's joints and axes."""
    rng = np.random.default_rng(5)
    head = small_head(n_shape, n_expression, VERTICES, name="flame")
    names = [f"flame_expression_{i:03d}" for i in range(n_expression)]
    if blink:
        names[-1] = "blink"
    weights = rng.uniform(0.1, 1, (VERTICES, 5))
    return dataclasses.replace(
        head,
        template=(0.08 * head.template).astype(np.float32),
        shape_basis=(0.001 * head.shape_basis).astype(np.float32),
        expression_basis=(0.001 * head.expression_basis).astype(np.float32),
        joint_regressor=rng.dirichlet(np.ones(VERTICES), 5).astype(np.float32),
        parents=(-1, 0, 1, 1, 1),
        skinning_weights=(weights / weights.sum(1, keepdims=True)).astype(np.float32),
        joint_names=("root", "neck", "jaw", "left_eye", "right_eye"),
        expression_names=tuple(names),
    )


def loki_arrays(seed=0, n=N, cameras=1, jaw=True):
    rng = np.random.default_rng(seed)
    arrays = {
        "shape": rng.normal(size=N_SHAPE),
        "expr": rng.normal(size=(n, 65)),
        "rot": 0.2 * rng.normal(size=(n, 3)),
        "tra": np.array([0.0, 0.0, -1.5]) + 0.01 * rng.normal(size=(n, 3)),
        "eye_rot": 0.1 * rng.normal(size=(n, 3)),
        "neck_rot": 0.1 * rng.normal(size=(n, 3)),
        "fx": np.full((cameras, 1), 300.0) + np.arange(cameras)[:, None],
        "fy": np.full((cameras, 1), 310.0),
        "cx": np.full((cameras, 1), WIDTH / 2),
        "cy": np.full((cameras, 1), HEIGHT / 2),
        "extr": np.tile(np.eye(4), (cameras, 1, 1)),
    }
    if jaw:
        arrays["jaw_rot"] = 0.1 * rng.normal(size=(n, 3))
    return {key: value.astype(np.float32) for key, value in arrays.items()}


def pictures(n=N, size=(WIDTH, HEIGHT)):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return [
        np.stack([x * 3 % 256, y * 4 % 256, np.full_like(x, 20 * i)], -1).astype(np.uint8) for i in range(n)
    ]


def write_loki(folder, arrays=None, frames=None):
    """person/fit.npz with person/images/cam0/*.png"""
    (folder / "images" / "cam0").mkdir(parents=True)
    np.savez(folder / "fit.npz", **(loki_arrays() if arrays is None else arrays))
    for index, frame in enumerate(pictures() if frames is None else frames):
        Image.fromarray(frame).save(folder / "images" / "cam0" / f"{index:05d}.png")
    return folder / "fit.npz"


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "flame.npz"
    save_head(path, flame_like())
    return path


def run(head_file, out, *arguments):
    return import_fits.main([
        "--head", str(head_file), "--out", str(out), "--size", "24", "--workers", "0", "--validation", "0",
        *map(str, arguments),
    ])  # fmt: skip


def coefficients_of(dataset, clip):
    frames = dataset.read_clip(clip)
    stacked = (np.stack(values) for values in zip(*(frame.coefficients for frame in frames), strict=True))
    return Coefficients(*stacked), frames


# --- Loki / CAP4D ------------------------------------------------------------------------------------


def test_public_fit_becomes_records(head_file, tmp_path):
    arrays = loki_arrays()
    write_loki(tmp_path / "ann", arrays)
    assert run(head_file, tmp_path / "out", "--fits", tmp_path, "--licence", "CC0") == 0
    dataset = open_dataset(tmp_path / "out")
    (clip,) = dataset.clips
    assert (clip.clip_id, clip.identity, clip.length, clip.licence) == ("ann", "ann", N, "CC0")
    assert clip.fit_quality is None
    found, frames = coefficients_of(dataset, clip)
    pairs = {
        "expression": "expr",
        "rot": "rot",
        "tra": "tra",
        "neck": "neck_rot",
        "jaw": "jaw_rot",
        "eyes": "eye_rot",
    }
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(getattr(found, ours), arrays[theirs])
    np.testing.assert_array_equal(found.betas, np.tile(arrays["shape"], (N, 1)))
    np.testing.assert_array_equal(frames[0].camera.intrinsics, [300, 310, WIDTH / 2, HEIGHT / 2])
    # The crop's middle shows that pixel of the picture, and the frames are in order.
    x0, y0, x1, y1 = frames[0].crop
    assert [int(frame.image[12, 12, 2]) // 20 for frame in frames] == list(range(N))
    middle = frames[0].image[11:13, 11:13, :2].astype(float).mean((0, 1))
    np.testing.assert_allclose(middle, [(x0 + x1) / 2 * 3 - 1.5, (y0 + y1) / 2 * 4 - 2], atol=6)


@pytest.mark.parametrize("cropped", [False, True])
def test_round_trip_through_export(head_file, tmp_path, cropped):
    arrays = loki_arrays(3)
    write_loki(tmp_path / "in" / "ann", arrays)
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "in") == 0
    frames = ["--frames"] if cropped else []
    assert export.main([str(tmp_path / "out"), "--out", str(tmp_path / "fits"), *frames]) == 0
    with np.load(tmp_path / "fits" / "ann" / "fit.npz") as file:
        again = {key: file[key] for key in file.files}
    assert again.keys() == arrays.keys()
    for key, value in arrays.items():
        assert again[key].shape == value.shape and again[key].dtype == np.float32
        if not cropped or key not in ("fx", "fy", "cx", "cy"):
            np.testing.assert_array_equal(again[key], value, err_msg=key)
    if cropped:  # with its pictures it can be read again; a point keeps its place in the crop
        dataset = open_dataset(tmp_path / "out")
        x0, y0, x1, _ = dataset.read_clip(dataset.clips[0])[0].crop
        scale = 24 / (x1 - x0)
        np.testing.assert_allclose(again["fx"], 300 * scale, rtol=1e-6)
        np.testing.assert_allclose(again["cy"], (HEIGHT / 2 - y0) * scale, rtol=1e-6)
        assert run(head_file, tmp_path / "second", "--fits", tmp_path / "fits") == 0
        box = open_dataset(tmp_path / "second").read("train", [0])[0].crop
        np.testing.assert_allclose(box, [0, 0, 24, 24], atol=1e-3)
    capture = export.main([str(tmp_path / "out"), "--out", str(tmp_path / "fits")])
    assert capture == 1  # never over something that is there


def test_video_beside_the_fit_is_resampled_with_it(head_file, tmp_path):
    arrays = loki_arrays(n=12, jaw=False)
    (tmp_path / "bob").mkdir()
    np.savez(tmp_path / "bob" / "fit.npz", **arrays)
    write_video(tmp_path / "bob" / "video.mp4", pictures(12), Fraction(50), synthetic=False)
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "bob" / "fit.npz") == 0
    dataset = open_dataset(tmp_path / "out")
    found, _ = coefficients_of(dataset, dataset.clips[0])
    np.testing.assert_array_equal(found.rot, arrays["rot"][::2])
    assert (found.jaw == 0).all() and dataset.clips[0].fps == 25


def test_neck_can_be_dropped_and_cameras_chosen(head_file, tmp_path):
    write_loki(tmp_path / "ann", loki_arrays(cameras=3))
    (tmp_path / "ann" / "images" / "cam0").rename(tmp_path / "ann" / "images" / "cam2")
    assert run(head_file, tmp_path / "out", "--fits", tmp_path, "--neck", "drop", "--camera", 2) == 0
    dataset = open_dataset(tmp_path / "out")
    found, frames = coefficients_of(dataset, dataset.clips[0])
    assert (found.neck == 0).all() and frames[0].camera.intrinsics[0] == 302


def test_official_boxes_are_whole_numbers_and_differ(head_file, tmp_path):
    write_loki(tmp_path / "ann")
    assert run(head_file, tmp_path / "out", "--fits", tmp_path, "--official-crops") == 0
    boxes = np.stack([frame.crop for frame in open_dataset(tmp_path / "out").read("train", range(N))])
    assert (boxes == np.round(boxes)).all() and (boxes != boxes[0]).any()


def test_blink_needs_its_axis(tmp_path):
    write_loki(tmp_path / "ann")
    with_blink = read_fit(tmp_path / "ann" / "fit.npz", flame_like())
    without = read_fit(tmp_path / "ann" / "fit.npz", flame_like(blink=False))
    assert with_blink.notes == () and "blink (65th expression axis" in without.notes[0]
    np.testing.assert_array_equal(
        without.coefficients.expression[:, :64], with_blink.coefficients.expression[:, :64]
    )
    assert (without.coefficients.expression[:, 64] == 0).all()
    more = read_fit(tmp_path / "ann" / "fit.npz", flame_like(n_expression=81))
    np.testing.assert_array_equal(
        more.coefficients.expression[:, 80], with_blink.coefficients.expression[:, 64]
    )
    assert (more.coefficients.expression[:, 64:80] == 0).all()
    with pytest.raises(DatasetError, match="uses 64 expression axes of FLAME and a blink, the head has 49"):
        read_fit(tmp_path / "ann" / "fit.npz", flame_like(n_expression=50))
    with pytest.raises(DatasetError, match="uses 150 shape axes, the head has 100.*--n-shape 150"):
        read_fit(tmp_path / "ann" / "fit.npz", flame_like(n_shape=100))


# --- VHAP / GaussianAvatars ----------------------------------------------------------------------------


def vhap_arrays(n=N):
    rng = np.random.default_rng(8)
    return {
        "shape": 0.5 * rng.normal(size=N_SHAPE),
        "expr": rng.normal(size=(n, 64)),
        "rotation": 0.3 * rng.normal(size=(n, 3)),
        "translation": 0.05 * rng.normal(size=(n, 3)),
        "neck_pose": 0.1 * rng.normal(size=(n, 3)),
        "jaw_pose": 0.1 * rng.normal(size=(n, 3)),
        "eyes_pose": np.tile(0.1 * rng.normal(size=(n, 3)), (1, 2)),
        "static_offset": np.zeros((1, VERTICES, 3)),
    }


def camera_to_world():
    """An OpenGL camera 1.5 m in front of the head, slightly turned."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(matrix_from_rotvec(jnp.array([0.05, 0.1, -0.03])))
    matrix[:3, 3] = matrix[:3, :3] @ [0.0, 0.02, 1.5]
    return matrix


FAULTS = Path(__file__).with_name("faults")


@pytest.mark.parametrize("path", sorted(FAULTS.rglob("*.*")), ids=lambda path: path.parent.name + path.suffix)
def test_mutated_fits_are_refused(path):
    """Files as a fuzzer changed them; each made a foreign exception in version 0.1.0."""
    with pytest.raises(DatasetError, match=r"(fit|flame_param).npz: not a readable .npz file"):
        read_fit(path, flame_like())


@pytest.mark.parametrize("change", [
    lambda content: content["frames"][0].update(timestep_index=2**70),
    lambda content: content["frames"][0].update(transform_matrix=[[]]),
    lambda content: content["frames"].__setitem__(0, None),
    lambda content: content.update(fl_x={}),
])  # fmt: skip
def test_a_vhap_fit_with_other_values_is_refused(tmp_path, change):
    write_vhap(tmp_path / "carl", vhap_arrays(), per_frame=False)
    path = tmp_path / "carl" / "transforms.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="transforms.json"):
        read_fit(path, flame_like())


def write_vhap(folder, arrays, per_frame):
    (folder / "images").mkdir(parents=True)
    frames = []
    for index, picture in enumerate(pictures()):
        Image.fromarray(picture).save(folder / "images" / f"{index:05d}_00.png")
        entry = {"file_path": f"images/{index:05d}_00.png", "timestep_index": index, "camera_index": 0,
                 "transform_matrix": camera_to_world().tolist()}  # fmt: skip
        if per_frame:
            (folder / "flame_param").mkdir(exist_ok=True)
            entry["flame_param_path"] = f"flame_param/{index:05d}.npz"
            part = {
                k: v if k in ("shape", "static_offset") else v[index : index + 1] for k, v in arrays.items()
            }
            np.savez(folder / entry["flame_param_path"], **part)
        frames.append(entry)
    if not per_frame:
        np.savez(folder / "flame_param.npz", **arrays)
    intrinsics = {"fl_x": 300.0, "fl_y": 310.0, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
    # Their order in the file means nothing.
    (folder / "transforms.json").write_text(json.dumps(intrinsics | {"frames": frames[::-1]}))


@pytest.mark.parametrize("per_frame", [False, True])
def test_vhap_fit_gives_the_same_mesh_in_the_picture(head_file, tmp_path, per_frame):
    head, arrays = flame_like(), vhap_arrays()
    write_vhap(tmp_path / "carl", arrays, per_frame)
    assert find_fits([str(tmp_path)]) == [tmp_path / "carl" / "transforms.json"]
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "carl") == 0
    dataset = open_dataset(tmp_path / "out")
    found, frames = coefficients_of(dataset, dataset.clips[0])
    identity = make_identity(head, jnp.asarray(arrays["shape"], jnp.float32))
    ours = camera_from_world(
        world_vertices(head, identity, found), Camera(*map(np.asarray, frames[0].camera))
    )
    ours = np.asarray(project(ours, frames[0].camera))
    # What VHAP does: all five joints in one chain, then the translation, then an OpenGL camera.
    rotations = np.stack(
        [*(arrays[key] for key in ("rotation", "neck_pose", "jaw_pose")),
         *np.split(arrays["eyes_pose"], 2, 1)],
        axis=1,
    )  # fmt: skip
    expression = np.concatenate([arrays["expr"], np.zeros((N, 1))], axis=1)
    mesh = skin(
        head,
        identity,
        jnp.asarray(expression, jnp.float32),
        matrix_from_rotvec(jnp.asarray(rotations, jnp.float32)),
    )
    world = np.asarray(mesh, np.float64) + arrays["translation"][:, None]
    view = np.linalg.inv(camera_to_world())
    seen = world @ view[:3, :3].T + view[:3, 3]
    theirs = np.stack(
        [WIDTH / 2 + 300 * seen[..., 0] / -seen[..., 2], HEIGHT / 2 - 310 * seen[..., 1] / -seen[..., 2]], -1
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert [int(frame.image[12, 12, 2]) // 20 for frame in frames] == list(range(N))


def test_static_offsets_are_named(tmp_path, head_file, capsys):
    arrays = vhap_arrays()
    arrays["static_offset"][0, 3, 1] = 0.0021
    write_vhap(tmp_path / "carl", arrays, False)
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "carl") == 0
    assert "note: carl: static vertex offsets of up to 2.1 mm are dropped" in capsys.readouterr().out


# --- what is wrong -------------------------------------------------------------------------------------


def without(key):
    return {k: v for k, v in loki_arrays().items() if k != key}


def changed(**values):
    return loki_arrays() | values


BAD_FITS = {
    "no expr": (without("expr"), "lacks expr; it holds"),
    "rot of other length": (changed(rot=np.zeros((N - 1, 3))), r"rot has shape \(5, 3\), expected \(6, 3\)"),
    "flat focal length": (changed(fx=np.zeros(1)), r"fx has shape \(1,\), expected \(1, 1\)"),
    "no camera": (changed(extr=np.eye(4)), r"extr has shape \(4, 4\)"),
    "not finite": (changed(tra=np.full((N, 3), np.nan)), "tra holds values that are not finite"),
    "text": (changed(shape=np.array(["a"] * 150)), "shape holds values that are not finite numbers"),
    "no frames": (loki_arrays(n=0), "holds no frames"),
    "behind the camera": (changed(tra=np.full((N, 3), 5.0)), "head's box|behind the camera"),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fits_are_rejected_by_name(head_file, tmp_path, case, capsys):
    arrays, message = BAD_FITS[case]
    write_loki(tmp_path / "in" / "bad", arrays)
    write_loki(tmp_path / "in" / "good")
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "in") == 0
    assert [clip.clip_id for clip in open_dataset(tmp_path / "out").clips] == ["good"]
    output = capsys.readouterr().out
    assert "bad/fit.npz" in output
    import re

    assert re.search(message, output), output


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("hello")
    elif how == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif how == "objects":
        np.savez(path, **(loki_arrays() | {"expr": np.array([{}], object)}))
    elif how == "flipped bytes":
        data = bytearray(path.read_bytes())
        data[200:260] = bytes(60)
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "npy", "objects", "flipped bytes"])
def test_corrupt_files_are_rejected_by_name(tmp_path, how):
    path = write_loki(tmp_path / "bad")
    spoil(path, how)
    with pytest.raises(DatasetError, match=r"fit.npz: (not a readable .npz file|lacks|.* not finite)"):
        read_fit(path, flame_like())


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (pictures(N - 1), "the fit has 6 frames, .* has 5"),
        (pictures(N + 2), "the fit has 6 frames, .* has 8"),
        ([*pictures(N - 1), pictures(1, (40, 40))[0]], "picture 5 in .* is 40x40, the first is 80x64"),
        (pictures(N, (8, 8)), "% of the head's box .* lie in the 8x8 pictures"),
    ],
)
def test_pictures_of_another_fit_are_rejected(head_file, tmp_path, frames, message, capsys):
    write_loki(tmp_path / "in" / "bad", frames=frames)
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "in") == 1
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(head_file, tmp_path, capsys):
    path = write_loki(tmp_path / "ann")
    with pytest.raises(MediaError, match="no such folder or video"):
        read_fit(path, flame_like(), frames=tmp_path / "none")
    for picture in (tmp_path / "ann" / "images" / "cam0").iterdir():
        picture.unlink()
    with pytest.raises(MediaError, match="no pictures beside it; looked for"):
        read_fit(path, flame_like())
    with pytest.raises(DatasetError, match="has 1 cameras, number 4"):
        read_fit(path, flame_like(), camera=4)
    for source, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path / "ann" / "images", "neither fit.npz"),
    ):
        with pytest.raises(DatasetError, match=message):
            find_fits([str(source)])
    (tmp_path / "vhap").mkdir()
    np.savez(tmp_path / "vhap" / "flame_param.npz", **vhap_arrays())
    with pytest.raises(DatasetError, match="needs the transforms.json"):
        read_fit(tmp_path / "vhap" / "flame_param.npz", flame_like())
    (tmp_path / "vhap" / "transforms.json").write_text('{"frames": [{"file_path": "a.png"}]}')
    with pytest.raises(DatasetError, match="not a readable transforms.json of VHAP .KeyError"):
        read_fit(tmp_path / "vhap" / "flame_param.npz", flame_like())
    assert (
        run(head_file, tmp_path / "out", "--fits", path, "--frames", tmp_path, "--identities", "no.csv") == 1
    )
    assert "no.csv: not a readable CSV file" in capsys.readouterr().err


def test_export_refuses_what_the_layout_cannot_hold(head_file, tmp_path, capsys):
    write_loki(tmp_path / "in" / "ann")
    assert run(head_file, tmp_path / "out", "--fits", tmp_path / "in", "--official-crops") == 0
    assert export.main([str(tmp_path / "out"), "--out", str(tmp_path / "fits"), "--frames"]) == 1
    assert "camera changes from frame to frame" in capsys.readouterr().err
    assert export.main([str(tmp_path / "out"), "--out", str(tmp_path / "fits"), "--clips", "eve"]) == 1
    assert "has no clip 'eve'" in capsys.readouterr().err
    assert export.main([str(tmp_path / "none"), "--out", str(tmp_path / "fits")]) == 1
    assert not (tmp_path / "fits").exists()
