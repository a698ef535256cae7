"""The animate program on clips of a dataset, with a tiny model of random parameters."""

import json
import os
from fractions import Fraction

import jax
import numpy as np
import pytest
from PIL import Image

from loki_jax.animate import main
from loki_jax.evaluation import Reading
from loki_jax.face.builtin import builtin_head
from loki_jax.face.controls import Controls
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.motion import main as save_motion
from loki_jax.pipeline import LokiPipeline, Window, retarget_clip
from loki_jax.sources import combine_drivers, load_driving_clip, load_portrait, split_clip_source
from loki_jax.training.model_file import save_model_file
from loki_jax.video import LazyFrames, is_tagged_synthetic, read_image, read_video, write_video
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
    options = ("--steps", "3", "--solver", "dpm++", "--overlap", "1", "--windows-at-once", "2", "--panel",
               "--guidance-source", "1.5", "--guided-steps", "0", "0.7")  # fmt: skip
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
    assert is_tagged_synthetic(out) and not (folder / "moved_panel.mp4").exists()
    # The neutral frame has the portrait's pose: only the expression is another.
    reference = load_portrait(clips[0], builtin_head(), 512).image
    neutral = load_driving_clip(clips[1], builtin_head(), 64).with_neutral(builtin_head()).neutral
    assert np.abs(video.frames[neutral].astype(float) - reference).mean() < 12
    for option in (["--steps", "2"], ["--solver", "ddim"], ["--overlap", "1"], ["--guidance-motion", "1"]):
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
    wrong = {
        ("--guidance-history", "nan"): "guidance is (2.0, 2.5, nan)",
        ("--guidance", "2", "--guidance-source", "2"): "exclude each other",
        ("--guided-steps", "0.5", "0.2"): "guided_steps is (0.5, 0.2)",
    }
    for given, message in wrong.items():
        assert run(model, clips[0], str(folder / "none.mp4"), out, *given) == 1
        assert message in capsys.readouterr().err


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
        assert run("demo", str(reference), str(tmp_path / driver), tmp_path / out, "--panel") == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "driver.mp4").read_bytes() == b"the user's"


# --- controls, motions and kinds of output ---------------------------------------------------------


def animate(reference, out, *options):
    return main(["--reference", reference, "--out", str(out), *(str(option) for option in options)])


def test_a_still_driver_gives_back_the_portraits_pose(clips):
    """In relative mode, whatever frame is the neutral one: to 0.1 degree."""
    head = builtin_head()
    portrait, clip = load_portrait(clips[0], head, 64), load_driving_clip(clips[1], head, 64)
    still = clip._replace(
        coefficients=jax.tree.map(lambda x: np.repeat(x[2:3], FRAMES, axis=0), clip.coefficients)
    ).with_neutral(head)
    moved = retarget_clip(head, still, portrait, controls=Controls())
    own = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], FRAMES, axis=0), portrait.coefficients)
    pose = head_pose_follow(moved.rot, own.rot, moved.neck, own.neck)
    assert pose.absolute_degrees < 0.1
    np.testing.assert_allclose(moved.tra, own.tra, atol=1e-5)


def test_any_neutral_frame_follows_the_driver_equally(clips):
    head = builtin_head()
    portrait, clip = load_portrait(clips[0], head, 64), load_driving_clip(clips[1], head, 64)
    for neutral in (None, 0, 3):
        chosen = clip.with_neutral(head, neutral)
        moved = retarget_clip(head, chosen, portrait)
        target = clip.coefficients
        assert head_pose_follow(moved.rot, target.rot, moved.neck, target.neck).degrees < 0.01
        np.testing.assert_allclose(moved.tra[chosen.neutral], portrait.coefficients.tra, atol=1e-6)


def test_a_motion_file_drives_as_its_clip_does(folder, clips):
    head, path = builtin_head(), folder / "motion.npz"
    assert save_motion(["save", "--driver", clips[1], "--out", str(path)]) == 0
    portrait = load_portrait(clips[0], head, 64)
    clip = load_driving_clip(clips[1], head, 64).with_neutral(head)
    motion = load_driving_clip(str(path), head, 64).with_neutral(head)
    assert motion.neutral == clip.neutral and motion.fps == clip.fps
    expected, found = retarget_clip(head, clip, portrait), retarget_clip(head, motion, portrait)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.asarray(motion.frames[0]).max() == 0  # no face


def test_pose_of_another_driver(clips):
    head = builtin_head()
    face, pose = (load_driving_clip(clip, head, 64) for clip in clips)
    both = combine_drivers(face, pose)
    np.testing.assert_array_equal(both.coefficients.rot, pose.coefficients.rot)
    np.testing.assert_array_equal(both.coefficients.expression, face.coefficients.expression)
    assert len(combine_drivers(face.cut(0, 3), pose).valid) == 3
    still = combine_drivers(face.cut(1, 2), pose)  # one frame lasts as long as the other clip
    np.testing.assert_array_equal(
        still.coefficients.jaw, np.repeat(face.coefficients.jaw[1:2], FRAMES, axis=0)
    )


def test_sliders_alone_make_a_picture_or_a_video(folder, clips):
    (folder / "s.json").write_text('{"smile": [[0, 0], [0.2, 1]]}')
    assert animate(clips[0], folder / "smile.gif", "--sliders", folder / "s.json", "--fps", 10) == 0
    assert animate(clips[0], folder / "still.png", "--set", "smile=1") == 0
    assert animate(clips[0], folder / "same.png", "--set", "smile=0") == 0
    reference = load_portrait(clips[0], builtin_head(), 512).image.astype(int)
    frames, still = LazyFrames(folder / "smile.gif"), read_image(folder / "still.png").astype(int)
    assert len(frames) == 3 and frames.fps == 10 and is_tagged_synthetic(folder / "still.png")
    change = np.abs(still - reference).max(-1)
    assert change.max() > 40 and (change > 8).mean() < 0.2
    assert np.abs(frames[2].astype(int) - still).mean() < 3  # 256 colours
    same = read_image(folder / "same.png").astype(float)
    assert 10 * np.log10(255**2 / np.mean((same - reference) ** 2)) > 45


@pytest.mark.parametrize(
    "options, message",
    [
        (["--set", "smyle=1"], "no slider 'smyle'"),
        (["--set", "smile"], "write NAME=NUMBER"),
        (["--sliders", "{folder}/none.json"], "none.json: not a readable JSON"),
        (["--audio", "{folder}/none.wav"], "none.wav: no such video or audio file"),
        (["--audio", "{folder}/text.wav"], "text.wav: not a readable file of sound"),
        (["--audio", "{folder}/mute.mp4"], "mute.mp4: has no sound"),
        (["--audio", "{folder}/text.wav", "--no-audio"], "contradict"),
        (["--fps", "fast"], "--fps fast"),
        (["--fps", "0"], "--fps 0"),
        (["--neutral", "99"], "no frame 99"),
        (["--neutral", "-1"], "no frame -1"),
        (["--driver", "{folder}/none.npz"], "none.npz: no such motion file"),
        (["--driver", "{folder}/text.npz"], "text.npz: not a readable motion file"),
        (["--driver", "{folder}/nothing"], "nothing: a folder without pictures"),
        (["--pose-driver", "{folder}/none.mp4"], "none.mp4: no such video"),
        (["--face", "left", "right", "--panel"], "--panel is of one face"),
        (["--face", "all", "0"], "--face all already names"),
        (["--driver", "{clip}", "{clip}", "{clip}"], "3 drivers for 1 faces"),
        (["--driver-face", "0", "1"], "2 --driver-face for 1 faces"),
        (["--out", "{folder}/bad.png", "--audio", "{folder}/mute.mp4"], "cannot have sound"),
        (["--out", "{folder}/bad.png"], "one file for several frames"),
        (["--out", "{folder}"], "folder with files in it"),
        (["--out", "{folder}/bad_%d.png"], "unknown pattern"),
        (["--dump", "{folder}/shards"], "shards: exists already"),
        (["--dump", "{folder}/none/dump"], "does not exist"),
        (["--dump", "{folder}/dump_2", "--out", "{folder}/bad_%03d.png"], "--dump reads the result back"),
        (["--dump", "{folder}/dump_2", "--face", "left", "right"], "--dump is of one face"),
    ],
)
def test_bad_options_are_one_clear_error(folder, clips, options, message, capsys):
    for name in ("text.wav", "text.npz"):
        (folder / name).write_text("no such thing")
    (folder / "nothing").mkdir(exist_ok=True)
    if not (folder / "mute.mp4").exists():
        write_video(folder / "mute.mp4", np.zeros((2, 16, 16, 3), np.uint8), Fraction(25))
    before = sorted(folder.iterdir())
    options = [option.format(folder=folder, clip=clips[1]) for option in options]
    arguments = ["--reference", clips[0], "--driver", clips[1], "--out", str(folder / "bad.mp4"), *options]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()
    error = [line for line in error if "it/s" not in line and "frame/s" not in line and line]
    assert error[-1].startswith("error: ") and message in error[-1]
    assert sorted(folder.iterdir()) == before


def test_controls_out_of_range_and_nothing_to_do_are_said(folder, clips, capsys):
    assert animate(clips[0], folder / "bad.mp4") == 1
    assert "nothing moves the portrait" in capsys.readouterr().err
    assert animate(clips[0], folder / "bad.mp4", "--set", "smile=1") == 1
    assert "Name it .png, or give keyframes" in capsys.readouterr().err
    assert animate(clips[0], folder / "bad.png", "--neutral", 1, "--set", "smile=1") == 1
    assert "need a --driver" in capsys.readouterr().err
    assert animate(clips[0], folder / "bad.png", "--pose", "-1") == 1
    assert capsys.readouterr().err == "error: pose is -1.0, expected 0 or more\n"


def test_a_dump_has_motions_maps_and_scores(folder, clips, monkeypatch):
    head, out, dump = builtin_head(), folder / "dumped.mp4", folder / "dump"
    portrait = load_portrait(clips[0], head, 64)
    clip = load_driving_clip(clips[1], head, 64).with_neutral(head)
    moved = retarget_clip(head, clip, portrait, controls=Controls(pose=0.5))

    def read(frames, _, known):
        """What a perfect estimator would find; tests/test_evaluate.py is about the real one."""
        assert len(frames) == FRAMES and known[0].name == portrait.name
        return Reading(moved, np.ones(FRAMES, bool), portrait.camera)

    monkeypatch.setattr("loki_jax.dump.read_animation", read)
    assert animate(clips[0], out, "--driver", clips[1], "--dump", dump, "--pose", 0.5) == 0
    driver, wanted = (load_driving_clip(str(dump / f"{name}.npz"), head, 64) for name in ("driver", "wanted"))
    np.testing.assert_allclose(driver.coefficients.rot, clip.coefficients.rot)
    np.testing.assert_allclose(wanted.coefficients.rot, moved.rot, atol=1e-6)
    maps = LazyFrames(dump / "maps")
    assert len(maps) == FRAMES and maps[0].shape == (128, 128, 3) and maps[0].std() > 10
    scores = json.loads((dump / "scores.json").read_text())
    assert scores["wanted"]["hpf"] < 0.01 and scores["wanted"]["hef"] < 1e-3
    assert scores["driver"]["hpf"] > 1  # half of its turn was asked for
    assert sorted(path.name for path in dump.iterdir()) == ["driver.npz", "maps", "scores.json", "wanted.npz"]


def test_a_signed_result_carries_its_credentials(folder, clips, capsys):
    c2pa = pytest.importorskip("c2pa", reason="needs the sign extra (c2pa-python)")
    pytest.importorskip("cryptography", reason="needs the sign extra (cryptography)")
    from tests.video.certificates import write_certificates

    key, chain, _ = write_certificates(folder)
    out = folder / "signed.png"
    assert animate(clips[0], out, "--set", "smile=0", "--sign", key, "--cert", chain) == 0
    assert is_tagged_synthetic(out)
    with c2pa.Reader(out) as reader:
        assert reader.get_validation_state() == "Valid" and "compositeSynthetic" in reader.json()
    for options, message in [
        (("--sign", key), "--sign and --cert go together"),
        (("--sign", folder / "none.pem", "--cert", chain), "none.pem: not a readable private key"),
    ]:
        assert animate(clips[0], folder / "bad.png", "--set", "smile=0", *options) == 1
        assert message in capsys.readouterr().err
    options = ("--driver", clips[1], "--sign", key, "--cert", chain)
    assert animate(clips[0], folder / "bad.webm", *options) == 1
    assert "bad.webm: cannot be signed" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_no_file(folder, clips, monkeypatch, stop):
    def windows(*_, **__):
        yield Window(np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8))
        raise stop(143)

    monkeypatch.setattr(GeometryPipeline, "windows", windows)
    before = sorted(folder.iterdir())
    for name in ("cut.mp4", "cut.webm", "cut.gif", "cut_%03d.png", "cut"):
        options = ["--driver", clips[1]] + ["--dump", folder / "cut_dump"] * ("%" not in name)
        if stop is KeyboardInterrupt:
            assert animate(clips[0], folder / name, *options) == 130
        else:
            with pytest.raises(SystemExit):
                animate(clips[0], folder / name, *options)
        assert sorted(folder.iterdir()) == before
