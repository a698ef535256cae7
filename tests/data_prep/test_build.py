"""Clips to shards, with stand-ins for the landmark networks: known points instead of found ones."""

from __future__ import annotations

import dataclasses
import functools
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep import build
from data_prep.dataset import clips as dataset_clips
from data_prep.dataset.clips import build_dataset, load_any_head
from data_prep.dataset.manifest import choose_splits, clip_names, find_clips
from data_prep.dataset.options import BuildOptions
from data_prep.dataset.summary import format_summary
from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import HeadAssetError, save_head
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.rotation import geodesic_angle, matrix_from_rotvec
from loki_jax.face.skinning import make_identity, mesh_render_mask, world_vertices
from loki_jax.face.types import Coefficients
from loki_jax.fitting import clips as face_track
from loki_jax.fitting.clips import clip_crop_box, fit_image, fit_video
from loki_jax.fitting.fit import make_camera
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.problem import FitError
from loki_jax.fitting.tracking import Track, steady_run
from loki_jax.video.reader import MediaError, read_video
from loki_jax.video.writer import write_video
from tests.data_prep.fake_fit import tree
from tests.fitting.known_face import (
    HEIGHT,
    RATE,
    WIDTH,
    KnownFace,
    N,
    frames_showing,
    true_coefficients,
    true_points,
)
from tests.video.live_frames import LiveFrames


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def true(head) -> Coefficients:
    return true_coefficients(head)


@pytest.fixture(scope="module")
def points(head, true) -> np.ndarray:
    return true_points(head, true)


@pytest.fixture(scope="module")
def networks(points) -> KnownFace:
    return KnownFace(points)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with two good clips (one at 50 fps, one with a late start) and four useless ones."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "good.mp4", frames_showing(range(N)), RATE, synthetic=False)
    write_video(folder / "fast.mp4", frames_showing(np.repeat(range(N), 2)), 2 * RATE, synthetic=False)
    write_video(folder / "late.mp4", frames_showing([-1] * 5 + [*range(N)]), RATE, synthetic=False)
    write_video(folder / "nobody.mp4", frames_showing([-1] * N), RATE, synthetic=False)
    write_video(folder / "short.mp4", frames_showing(range(6)), RATE, synthetic=False)
    whole = (folder / "good.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("not a video, not looked at")
    return folder


SETTINGS = BuildOptions(size=32, overlay=32, validation=0.5, workers=0)


@pytest.fixture(scope="module")
def built(clips, head, networks, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "shards"
    lines = []
    summary = build_dataset(find_clips([str(clips)]), head, out, lambda: networks, SETTINGS, log=lines.append)
    return out, summary, lines


def test_good_clips_are_built_and_bad_ones_listed(built):
    out, summary, lines = built
    assert [row["clip"] for row in summary["clips"]] == ["fast", "good", "late"]
    assert [row["frames"] for row in summary["clips"]] == [N, N, N]
    reasons = {entry["clip"]: entry["reason"] for entry in summary["rejected"]}
    assert set(reasons) == {"empty", "nobody", "short", "truncated"}
    assert "0 bytes" in reasons["empty"] and "no face found" in reasons["nobody"]
    assert "visible for 6 frames" in reasons["short"] and "truncated.mp4" in reasons["truncated"]
    assert all(entry["reason"].count("\n") == 0 for entry in summary["rejected"])
    assert len(lines) == 8 and sum("s left" in line for line in lines) == 3
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    table = format_summary(summary)
    assert table.count("\n") == 7 and "rejected" in table


def test_dataset_holds_the_fitted_clips(built, head, true):
    out, summary, _ = built
    dataset = open_dataset(out)
    assert dataset.metadata.image_size == 32 and dataset.metadata.image_format == "png"
    assert sum(dataset.metadata.records.values()) == 3 * N
    for clip in dataset.clips:
        assert clip.fps == RATE and clip.length == N and clip.identity == clip.clip_id
        frames = dataset.read_clip(clip)
        rot = np.stack([frame.coefficients.rot for frame in frames])
        angle = geodesic_angle(
            matrix_from_rotvec(jnp.asarray(rot)), matrix_from_rotvec(jnp.asarray(true.rot))
        )
        assert np.degrees(angle).max() < 0.7
        assert (np.stack([frame.crop for frame in frames]) == frames[0].crop).all()
        grey = np.array([frame.image[16, 16].mean() for frame in frames])
        np.testing.assert_allclose(grey, 8 * np.arange(1, N + 1), atol=3)
        # The box reaches beyond the image: white there.
        assert frames[0].crop[1] < -1 and (frames[0].image[0] > 250).all()
        assert clip.fit_quality < 0.5 and min(frame.confidence for frame in frames) > 0.8
    assert all(row["error_percent"] < 1 for row in summary["clips"])


def test_overlay_shows_crop_and_mesh(built):
    out, _, _ = built
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["fast.mp4", "good.mp4", "late.mp4"]
    video = read_video(out / "overlays" / "good.mp4")
    assert video.frames.shape == (N, 32, 64, 3) and video.fps == RATE
    plain, drawn = video.frames[:, 8:24, 8:24].astype(float), video.frames[:, 8:24, 40:56].astype(float)
    assert plain.std(axis=(1, 2)).max() < 8 and drawn.std(axis=(1, 2)).min() > 10


def test_nothing_usable_leaves_nothing_behind(clips, head, networks, tmp_path):
    with pytest.raises(DatasetError, match="(?s)all 2 clips were rejected:.*empty.mp4.*nobody.mp4"):
        build_dataset(
            [clips / "empty.mp4", clips / "nobody.mp4"],
            head,
            tmp_path / "out",
            lambda: networks,
            SETTINGS,
            log=len,
        )
    assert list(tmp_path.iterdir()) == []


def test_badly_fitting_clip_is_rejected(clips, head, points, tmp_path):
    garbled = KnownFace(
        points + 4 * np.random.default_rng(0).standard_normal(points.shape).astype(np.float32)
    )
    with pytest.raises(DatasetError, match=r"the head fits badly, median error .*`--max-error`"):
        build_dataset([clips / "good.mp4"], head, tmp_path / "out", lambda: garbled, SETTINGS, log=len)


def test_small_head_is_rejected(clips, head, networks, tmp_path):
    settings = dataclasses.replace(SETTINGS, min_face=300.0)
    with pytest.raises(DatasetError, match=r"good.mp4: the head is \d\d pixels large.*`--min-face`"):
        build_dataset([clips / "good.mp4"], head, tmp_path / "out", lambda: networks, settings, log=len)


@pytest.mark.parametrize("photometric, times", [(False, 6), pytest.param(True, 1, marks=pytest.mark.slow)])
def test_a_clip_is_never_in_memory_as_a_whole(photometric, times, head, networks, tmp_path, monkeypatch):
    """Landmarks in a first pass, overlay and crops in others."""
    path = tmp_path / "long.mp4"
    write_video(path, frames_showing(np.repeat(range(N), times)), RATE, synthetic=False)
    live = LiveFrames(monkeypatch, kept_bytes=4 * HEIGHT * WIDTH * 3)
    settings = dataclasses.replace(SETTINGS, photometric=photometric)
    summary = build_dataset([path], head, tmp_path / "out", lambda: networks, settings, log=len)
    assert summary["records"] == {"train": times * N}
    assert live.decoded > 3 * times * N and live.peak <= 8
    grey = [frame.image[16, 16].mean() for frame in dataset_frames(tmp_path / "out")]
    np.testing.assert_allclose(grey, 8 * np.repeat(np.arange(1, N + 1), times), atol=3)


def dataset_frames(path):
    dataset = open_dataset(path)
    return dataset.read_clip(dataset.clips[0])


def test_only_the_wanted_seconds_are_used(clips, head, networks, tmp_path):
    settings = dataclasses.replace(SETTINGS, max_seconds=Fraction(10, 25), min_frames=4)
    summary = build_dataset([clips / "fast.mp4"], head, tmp_path / "out", lambda: networks, settings, log=len)
    assert [row["frames"] for row in summary["clips"]] == [10]


@pytest.mark.slow  # each process imports and compiles everything
def test_fits_do_not_depend_on_the_number_of_processes(clips, head, points, tmp_path):
    contents = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        make = functools.partial(KnownFace, points)
        options = dataclasses.replace(SETTINGS, workers=workers)
        build_dataset(find_clips([str(clips)]), head, out, make, options, log=len)
        contents.append(tree(out))
        assert not list(tmp_path.glob("*.work"))
    assert contents[0] == contents[1]


def test_fit_video_keeps_every_frame(clips, head, networks, true):
    fitted = fit_video(clips / "late.mp4", head, landmarker=networks)
    assert fitted.fps == RATE and len(fitted.frames) == len(fitted.fit.coefficients.rot) == N + 5
    assert (fitted.fit.confidence[:5] == 0).all() and (fitted.fit.confidence[5:] > 0.8).all()
    assert all(np.isfinite(field).all() for field in fitted.fit.coefficients)
    # Before its first appearance the head rests where it appears.
    assert np.abs(fitted.fit.coefficients.tra[:5] - true.tra[0]).max() < 0.05


def test_fit_image(head, networks, true):
    fitted = fit_image(frames_showing([10])[0], head, landmarker=networks)
    assert len(fitted.frames) == 1 and fitted.crop.shape == (4,)
    angle = geodesic_angle(
        matrix_from_rotvec(jnp.asarray(fitted.fit.coefficients.rot[0])), matrix_from_rotvec(true.rot[10])
    )
    assert np.degrees(angle) < 1.5
    with pytest.raises(LandmarkError, match="blank.png: no face"):
        fit_image(frames_showing([-1])[0], head, landmarker=networks, name="blank.png")


def test_crop_box_holds_the_head_in_all_frames(head, true):
    camera = make_camera((HEIGHT, WIDTH))
    box = clip_crop_box(head, true, camera, factor=1.2)
    world = world_vertices(head, make_identity(head, jnp.asarray(true.betas)), true)
    pixels = np.asarray(project(camera_from_world(world, camera), camera))[
        :, np.asarray(mesh_render_mask(head))
    ]
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    np.testing.assert_allclose(box[2:] - box[:2], 1.2 * (high - low).max(), rtol=1e-5)
    np.testing.assert_allclose((box[2:] + box[:2]) / 2, (low + high) / 2, atol=1e-3)


def track_of(centres, score) -> Track:
    spread = np.stack([np.cos(np.arange(478)), np.sin(np.arange(478)), np.zeros(478)], 1) * 20
    points = np.asarray(centres, np.float32)[:, None] + spread
    return Track(points, np.ones((len(points), 478)), np.asarray(score, np.float32), 1)


@pytest.mark.parametrize(
    ("gone", "jump_at", "run"),
    [([], None, (0, 20)), ([0, 1, 19], None, (2, 19)), ([5, 6], None, (0, 20)), ([5, 6, 7], None, (8, 20)),
     ([], 12, (0, 12)), (range(20), None, (0, 0))],
)  # fmt: skip
def test_steady_run(gone, jump_at, run):
    centres = np.tile([100.0, 100.0, 0.0], (20, 1))
    if jump_at is not None:
        centres[jump_at:, 0] += 60
    score = np.ones(20)
    score[list(gone)] = 0.1
    assert steady_run(track_of(centres, score)) == run


def test_names_of_equal_files_are_told_apart(tmp_path):
    paths = [
        tmp_path / "a" / "x.mp4",
        tmp_path / "b" / "x.mp4",
        tmp_path / "b" / "y.mp4",
        tmp_path / "b" / "y.mov",
    ]
    names = clip_names(paths)
    assert names[:2] == ["a--x", "b--x"] and len(set(names)) == 4


def test_every_kind_of_video_in_a_folder_is_found(tmp_path):
    names = ["a.mp4", "b.MOV", "c.gif", "d.flv", "e.webm", "f.avi"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_clips([str(tmp_path)])] == names


def test_splits_follow_the_identity():
    names = [f"person{i}" for i in range(8)]
    splits = choose_splits(names, 0.02)
    assert list(splits.values()).count("validation") == 1
    assert choose_splits(names[::-1], 0.02) == splits
    assert set(choose_splits(names, 0.0).values()) == {"train"}
    assert set(choose_splits(names[:3], 0.001).values()) == {"train"}


def test_head_sources(tmp_path, head, ict_path):
    assert load_any_head("builtin").name == head.name
    save_head(tmp_path / "head.npz", head)
    assert load_any_head(str(tmp_path / "head.npz")).n_expression == head.n_expression
    assert load_any_head(str(ict_path)).name == "ict"
    with pytest.raises(HeadAssetError, match="nothing.npz"):
        load_any_head(str(tmp_path / "nothing.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(HeadAssetError, match="text.npz"):
        load_any_head(str(tmp_path / "text.npz"))


def test_program_reports_bad_input(tmp_path, clips, capsys):
    common = ["--head", "builtin", "--out", str(tmp_path / "out")]
    assert build.main(["--clips", str(tmp_path / "gone"), *common]) == 1
    assert "gone: no such file or folder" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    assert build.main(["--clips", str(tmp_path / "bare"), *common]) == 1
    assert "no videos there" in capsys.readouterr().err
    assert build.main(["--clips", str(clips), "--head", "no.npz", "--out", str(tmp_path / "out")]) == 1
    assert "no.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main(["--clips", str(clips), *common, "--size", "0"])
    with pytest.raises(MediaError):
        find_clips([str(tmp_path / "bare")])
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, clips, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "fetch_models", lambda wheel: {})
    monkeypatch.setattr(dataset_clips, "build_dataset", interrupted)
    out = tmp_path / "out"
    assert build.main(["--clips", str(clips), "--head", "builtin", "--out", str(out)]) == 130
    assert f"kept in {out}.work. Run the same command again" in capsys.readouterr().err


def test_head_without_landmarks_is_refused_at_once(clips, head, networks, tmp_path):
    bare = jax.tree_util.tree_map(lambda x: x, head)
    object.__setattr__(bare, "landmarks", {})
    with pytest.raises(FitError, match="no 'mediapipe478' landmarks"):
        build_dataset([clips / "good.mp4"], bare, tmp_path / "out", lambda: networks, SETTINGS)


def test_array_without_rate_is_refused(head, networks):
    with pytest.raises(ValueError, match="pass fps"):
        fit_video(frames_showing(range(4)), head, landmarker=networks)


def test_default_networks_are_loaded_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(face_track, "fetch_models", lambda: {})
    monkeypatch.setattr(
        face_track, "Landmarker", lambda models: loaded.append(models) or KnownFace(np.empty((0, 478, 3)))
    )
    face_track.default_landmarker.cache_clear()
    assert face_track.default_landmarker() is face_track.default_landmarker() and len(loaded) == 1
    face_track.default_landmarker.cache_clear()
