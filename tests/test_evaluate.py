"""The evaluate program and the demo's rows, on rendered clips whose answer is known."""

import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from loki_jax.data.reader import open_dataset
from loki_jax.evaluate import main
from loki_jax.evaluation import EvaluationPair, evaluate_pairs, rendered_truth
from loki_jax.face.builtin import builtin_head
from loki_jax.pictures import PairPictures, format_table, write_report
from loki_jax.pipeline import retarget_clip
from loki_jax.sources import load_driving_clip, load_portrait
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.video import write_video
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
from tests.synthetic.synthetic_clips import write_clips
from tests.video.live_frames import LiveFrames

FRAMES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def clips(folder):
    return write_clips(folder / "shards", frames=FRAMES)


@pytest.fixture(scope="module")
def pair(folder, clips):
    """A perfect animation: what is generated is the truth."""
    head = builtin_head()
    reference, driver = load_portrait(clips[0], head, 64), load_driving_clip(clips[1], head, 64)
    appearance = sample_appearance(open_dataset(folder / "shards").clips[0].extra["identity_seed"], head)
    truth = rendered_truth(head, retarget_clip(head, driver, reference), reference, appearance, 64)
    return EvaluationPair(reference, appearance, driver, truth, truth)


@pytest.fixture(scope="module")
def rows(pair):
    """One pair whose generated frames are two levels too bright; the swapped ones are black."""
    brighter = np.minimum(pair.truth.astype(int) + 2, 255).astype(np.uint8)
    return evaluate_pairs(
        builtin_head(), [pair._replace(generated=brighter)], [np.zeros_like(pair.truth)], size=64
    )


def test_a_perfect_animation_follows(rows):
    generated, static, refit = (rows[key] for key in ("generated", "static", "refit"))
    assert refit["hpf"] < 0.25 * static["hpf"] and generated["hpf"] < 0.3 * static["hpf"]
    assert refit["hef"] < static["hef"] and generated["hef"] < static["hef"]
    # Two grey levels of 255, a little less where white clips.
    assert generated["psnr"] == pytest.approx(20 * np.log10(255 / 2), abs=0.5)
    assert refit["psnr"] > 28 and static["psnr"] < generated["psnr"]
    assert rows["generated_swapped_reference"]["psnr"] < 15


def test_rows_are_the_means_of_the_pairs(rows, pair):
    (entry,) = rows["pairs"]
    assert entry["reference"] == pair.reference.name and entry["driver"] == pair.driver.name
    assert entry["frames"] == FRAMES and 0 < entry["driver_yaw_sd"] < 40
    for row in ("generated", "static", "refit"):
        assert rows[row]["hpf"] == entry[row]["hpf"] == pytest.approx(np.mean(rows["per_frame"][row][0]))
    json.dumps(rows, allow_nan=False)


def test_table_and_report(rows, pair, tmp_path):
    table = format_table(rows)
    assert "re-fitted ground truth" in table and f"{rows['static']['hpf']:.2f}" in table
    pictures = PairPictures(
        "pair",
        pair.reference.image,
        np.stack(list(pair.driver.frames)),
        pair.truth,
        pair.generated,
        pair.truth,
    )
    write_report(tmp_path / "report.png", [pictures], rows, rows["per_frame"], {"loss": ([1, 2], [0.5, 0.4])})
    with Image.open(tmp_path / "report.png") as report:
        assert min(report.size) > 500
        # Not an empty sheet.
        assert np.asarray(report.convert("L")).std() > 10


def test_program_reads_a_video_back(folder, clips, pair, capsys):
    video, out = folder / "video.mp4", folder / "results"
    write_video(video, pair.truth, pair.driver.fps, crf=4)
    code = main(
        ["--video", str(video), "--driver", clips[1], "--reference", clips[0], "--truth", "render",
         "--neutral", "0", "--hef-size", "64", "--out", str(out)]
    )  # fmt: skip
    result = json.loads((out / "metrics.json").read_text())
    assert (
        code == 0
        and result["estimator"] == "photometric"
        and result["frames"] == FRAMES
        and result["track_rate"] == 1
    )
    assert result["hpf"] < 2 and result["psnr"] > 30 and result["ssim"] > 0.9
    # The video is the truth, so that the floor is what it scores but for coding; it is no self-comparison.
    floor = result["floor"]
    assert 0 < floor["hpf"] < 2 and abs(floor["hpf"] - result["hpf"]) < 0.5
    assert 0 < floor["hef"] < 2 * result["hef"] + 0.01
    with Image.open(out / "per_frame.png") as plot:
        assert plot.size[1] > 400
    printed = capsys.readouterr().out
    assert "HPF (degrees)" in printed and "floor" in printed


def test_a_clip_at_half_its_rate_is_every_second_frame(pair):
    driver = pair.driver.at_rate(Fraction(25, 2))
    assert driver.fps == Fraction(25, 2) and len(driver.frames) == FRAMES // 2
    np.testing.assert_array_equal(driver.coefficients.rot, pair.driver.coefficients.rot[::2])


@pytest.mark.slow
def test_videos_of_another_rate_are_compared_in_time(folder, clips, pair):
    half, out = folder / "half.mp4", folder / "half"
    whole = folder / "whole.mp4"
    write_video(half, pair.truth[::2], Fraction(25, 2), crf=4)
    write_video(whole, pair.truth, pair.driver.fps, crf=4)
    arguments = ["--video", half, "--driver", clips[1], "--reference", clips[0], "--truth", whole,
                 "--hef-size", "64", "--out", out, "--no-floor"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    result = json.loads((out / "metrics.json").read_text())
    assert "floor" not in result
    assert result["frames"] == FRAMES // 2 and result["hpf"] < 2 and result["psnr"] > 35


@pytest.mark.slow
def test_videos_are_never_in_memory_as_a_whole(folder, monkeypatch):
    """Video, driver, truth and floor, each read in pieces of four frames."""
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    monkeypatch.setattr("loki_jax.fitting.clips.default_landmarker", lambda: networks)
    video, driver, out = folder / "grey.mp4", folder / "grey_driver.mp4", folder / "grey"
    for path in (video, driver):
        write_video(path, frames_showing(np.repeat(range(N), 6)), RATE)
    live = LiveFrames(monkeypatch, kept_bytes=4 * HEIGHT * WIDTH * 3)
    arguments = ["--video", video, "--driver", driver, "--truth", driver, "--hef-size", "32", "--out", out]
    assert main([str(argument) for argument in arguments]) == 0
    result = json.loads((out / "metrics.json").read_text())
    assert result["frames"] == 6 * N and result["hpf"] < 0.1 and result["ssim"] > 0.99
    assert live.decoded > 3 * 6 * N and live.peak <= 24


@pytest.mark.parametrize(
    "options, message",
    [
        (["--video", "{folder}/none.mp4"], "none.mp4"),
        (["--reference", "portrait.png"], "not DATASET_FOLDER:CLIP_ID"),
        (["--reference", "{folder}/shards:nobody"], "no clip 'nobody'"),
        (["--truth", "render"], "--truth render needs --reference"),
        (["--head", "{folder}/none.npz"], "none.npz"),
    ],
)
def test_bad_input_is_one_clear_error(folder, clips, pair, options, message, capsys):
    video, out = folder / "short.mp4", folder / "nothing"
    write_video(video, pair.truth[:2], pair.driver.fps)
    arguments = ["--video", str(video), "--driver", clips[1], "--out", str(out)]
    arguments += [option.format(folder=folder) for option in options]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not out.exists()
