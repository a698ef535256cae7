"""The animate program on clips of a dataset, with a tiny model of random parameters."""

import os
from fractions import Fraction

import jax
import numpy as np
import pytest
from PIL import Image

from loki_jax.animate import main
from loki_jax.face.builtin import builtin_head
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.pipeline import LokiPipeline, retarget_clip
from loki_jax.sources import load_driving_clip, load_portrait, split_clip_source
from loki_jax.training.model_file import save_model_file
from loki_jax.video import is_tagged_synthetic, read_video
from tests.random_model import random_model
from tests.synthetic.synthetic_clips import write_clips

FRAMES = 5  # the tiny window has 2: three windows, the last one cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("animate")


@pytest.fixture(scope="module")
def clips(folder):
    return write_clips(folder / "shards", frames=FRAMES)


@pytest.fixture(scope="module")
def model(folder):
    path = folder / "random.safetensors"
    save_model_file(path, random_model())
    return path


def run(model, reference, driver, out, *options):
    return main(
        [
            "--checkpoint",
            str(model),
            "--reference",
            reference,
            "--driver",
            driver,
            "--out",
            str(out),
            *options,
        ]
    )


def test_writes_video_and_panel(folder, clips, model):
    out = folder / "out.mp4"
    options = ("--steps", "3", "--solver", "dpm++", "--overlap", "1", "--windows-at-once", "2")
    assert run(model, clips[0], clips[1], out, *options) == 0
    video, panel = read_video(out), read_video(folder / "out_panel.mp4")
    assert video.frames.shape == (FRAMES, 64, 64, 3) and panel.frames.shape[:2] == (FRAMES, 256)
    assert video.fps == panel.fps == Fraction(25)
    assert is_tagged_synthetic(out) and is_tagged_synthetic(folder / "out_panel.mp4")
    # The panel shows reference and driver; H.264 is lossy.
    head = builtin_head()
    reference = load_portrait(clips[0], head, 256).image
    shown = panel.frames[:, :, :256].astype(float)
    assert np.abs(shown - reference).mean() < 6
    driver = load_driving_clip(clips[1], head, 64).frames
    middle = panel.frames[:, 2:256:4, 262:516:4].astype(float)
    assert np.abs(middle - driver).mean() < 15


def test_without_a_checkpoint_the_portrait_itself_is_moved(folder, clips, capsys):
    out = folder / "moved.mp4"
    assert main(["--reference", clips[0], "--driver", clips[1], "--out", str(out)]) == 0
    video = read_video(out)
    assert video.frames.shape == (FRAMES, 512, 512, 3) and video.fps == Fraction(25)
    assert is_tagged_synthetic(out) and (folder / "moved_panel.mp4").is_file()
    # Frame 0 of a relative animation has the portrait's pose: only the expression is another.
    reference = load_portrait(clips[0], builtin_head(), 512).image
    assert np.abs(video.frames[0].astype(float) - reference).mean() < 12
    for option in (["--steps", "2"], ["--solver", "ddim"], ["--overlap", "1"]):
        assert main(["--reference", clips[0], "--driver", clips[1], "--out", str(out), *option]) == 1
        assert option[0] in capsys.readouterr().err


def test_same_seed_same_video(folder, clips, model):
    first, second, other = (folder / f"{name}.mp4" for name in ("first", "second", "other"))
    run(model, clips[0], clips[1], first, "--steps", "2", "--seed", "3")
    run(model, clips[0], clips[1], second, "--steps", "2", "--seed", "3")
    run(model, clips[0], clips[1], other, "--steps", "2", "--seed", "4")
    frames = [read_video(path).frames for path in (first, second, other)]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0] != frames[2]).mean() > 0.1


def test_frames_share_their_noise_so_that_a_still_head_stands_still(clips, model):
    pipeline, head = LokiPipeline.from_checkpoint(model), builtin_head()
    portrait, clip = load_portrait(clips[0], head, 64), load_driving_clip(clips[1], head, 64)
    still = clip._replace(
        coefficients=jax.tree.map(lambda x: np.repeat(x[:1], FRAMES, axis=0), clip.coefficients)
    )
    frames = pipeline(portrait, still, steps=2).astype(int)
    assert frames[0].std() > 10
    assert np.abs(np.diff(frames, axis=0)).mean() < 0.05 * frames[0].std()


def test_retargeting_follows_the_driver_from_the_references_pose(clips):
    head = builtin_head()
    reference, driver = load_portrait(clips[0], head, 64), load_driving_clip(clips[1], head, 64)
    moved = jax.tree.map(np.asarray, retarget_clip(head, driver, reference))
    target = driver.coefficients
    assert head_pose_follow(moved.rot, target.rot, moved.neck, target.neck).degrees < 0.01
    np.testing.assert_allclose(moved.betas[2], reference.coefficients.betas)
    np.testing.assert_allclose(moved.expression, target.expression)
    np.testing.assert_allclose(moved.tra[0], reference.coefficients.tra, atol=1e-6)


def test_clip_sources(tmp_path):
    assert split_clip_source(f"{tmp_path}:clip") == (tmp_path, "clip")
    assert split_clip_source("C:portrait.png") is None
    assert split_clip_source("portrait.png") is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": "{folder}/none.png"}, "none.png"),
        ({"driver": "{folder}/empty.mp4"}, "empty.mp4"),
        ({"driver": "{folder}/shards:nobody"}, "no clip 'nobody'"),
        ({"model": "{folder}/shards"}, "not a workdir"),
    ],
)
def test_bad_input_is_one_clear_error(folder, clips, model, change, message, capsys):
    (folder / "empty.mp4").touch()
    arguments = {"model": model, "reference": clips[0], "driver": clips[1], "out": folder / "bad.mp4"}
    arguments |= {key: value.format(folder=folder) for key, value in change.items()}
    assert run(**arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(folder.glob("*bad*"))


def test_a_guidance_that_is_no_number_is_refused_before_any_work(folder, clips, model, capsys):
    out = folder / "nan.mp4"
    assert run(model, clips[0], str(folder / "none.mp4"), out, "--guidance", "nan") == 1
    assert "guidance is nan" in capsys.readouterr().err


def test_the_demo_model_says_that_it_knows_rendered_heads_only(folder, clips, capsys):
    Image.new("RGB", (96, 96), "white").save(folder / "white.png")
    said = "the demo model knows rendered heads only"
    assert run("demo", str(folder / "white.png"), clips[1], folder / "demo.mp4") == 1
    error = capsys.readouterr().err
    assert said in error and "--checkpoint geometry" in error
    # A clip of such heads is what it is for.
    assert run("demo", clips[0], f"{folder}/shards:nobody", folder / "demo.mp4") == 1
    assert said not in capsys.readouterr().err


def test_no_input_is_replaced_and_the_output_is_checked_first(tmp_path, clips, monkeypatch, capsys):
    monkeypatch.setattr(LokiPipeline, "from_checkpoint", lambda _: pytest.fail("work before the check"))
    (tmp_path / "folder.mp4").mkdir()
    for name in ("driver.mp4", "clip_panel.mp4", "portrait.mp4"):
        (tmp_path / name).write_bytes(b"the user's")
    (tmp_path / "link.mp4").symlink_to("driver.mp4")
    blocked = tmp_path / "blocked"
    blocked.mkdir(mode=0o500)
    cases = [
        ("driver.mp4", clips[0], "driver.mp4", "is the input"),
        ("portrait.mp4", tmp_path / "portrait.mp4", "driver.mp4", "is the input"),
        ("clip.mp4", clips[0], "clip_panel.mp4", "is the input"),
        ("driver.mp4", clips[0], "link.mp4", "is the input"),
        ("folder.mp4", clips[0], "driver.mp4", "is a folder"),
        ("out.avi", clips[0], "driver.mp4", "unknown kind"),
        ("none/out.mp4", clips[0], "driver.mp4", "does not exist"),
    ]
    if os.geteuid():  # no folder is closed to root
        cases.append(("blocked/out.mp4", clips[0], "driver.mp4", "cannot be written"))
    for out, reference, driver, message in cases:
        assert run("demo", str(reference), str(tmp_path / driver), tmp_path / out) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "driver.mp4").read_bytes() == b"the user's"
