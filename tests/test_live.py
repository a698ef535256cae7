"""The live program, with a file in place of the camera."""

import json
import re
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

import loki_jax.fitting.clips
from loki_jax.face.builtin import builtin_head
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.live import main
from loki_jax.video import read_image, write_video
from tests.fitting.known_face import RATE, KnownFace, N, frames_showing, true_coefficients, true_points
from tests.video.test_page import parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A portrait and a clip of grey frames, which `KnownFace` reads."""
    folder = tmp_path_factory.mktemp("live")
    Image.fromarray(frames_showing([0])[0]).save(folder / "portrait.png")
    write_video(folder / "clip.mp4", frames_showing([0] * 20 + [*range(N)] * 2), RATE)
    return folder


@pytest.fixture
def networks(monkeypatch):
    """Known landmarks, and a renderer that answers with the head's yaw as a grey value."""
    head = builtin_head()
    known = KnownFace(true_points(head, true_coefficients(head)))
    monkeypatch.setattr(loki_jax.fitting.clips, "default_landmarker", lambda *_: known)

    def prepare(self, portrait, relight=False, grid=None):
        def render(target):
            level = 100 + 200 * (np.asarray(target.rot)[0, 1] - portrait.coefficients.rot[1])
            return np.full((1, 48, 64, 3), np.clip(level, 0, 255), np.uint8)

        return render

    monkeypatch.setattr(GeometryPipeline, "prepare", prepare)


def run(folder, *options):
    return main(["--reference", str(folder / "portrait.png"), *(str(option) for option in options)])


def test_a_file_moves_the_portrait_on_the_page(folder, networks, capsys):
    seen = []

    def browse():
        for _ in range(900):
            if (found := re.search(r"open (\S+) in", capsys.readouterr().out)) is not None:
                break
            time.sleep(0.1)
        with urllib.request.urlopen(found[1] + "stream") as stream:
            pictures = parts(stream)
            for picture in pictures:
                note = json.load(urllib.request.urlopen(found[1] + "status"))["note"]
                seen.append((float(np.asarray(picture).mean()), note))
                if len(seen) == 24:
                    return

    browser = threading.Thread(target=browse)
    browser.start()
    assert run(folder, "--video", folder / "clip.mp4", "--port", 0, "--loop", "--seconds", 4) == 0
    browser.join()
    levels = [level for level, _ in seen]
    assert np.ptp(levels) > 30  # 0.4 radians to either side are 80 grey levels
    assert "learning" in " ".join(note for _, note in seen)
    assert "following" in seen[-1][1] and "ms from frame to picture" in seen[-1][1]
    said = capsys.readouterr().out
    assert "frames came" in said and "95 % below" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--video", "{folder}/none.mp4"), "none.mp4: no such video"),
        (("--video", "{folder}/portrait.png", "--size", 8), "--size 8"),
        (("--video", "{folder}/clip.mp4", "--set", "smyle=1"), "no slider 'smyle'"),
        (("--video", "{folder}/clip.mp4", "--pose", "-1"), "pose is -1.0"),
        (("--video", "{folder}/clip.mp4", "--reference", "{folder}/none.png"), "none.png: no such image"),
        (("--video", "{folder}/clip.mp4", "--head", "{folder}/none.npz"), "none.npz"),
        (("--video", "{folder}/clip.mp4", "--out", "virtual"), "pyvirtualcam"),
        (("--video", "{folder}/clip.mp4", "--out", "window"), "--out window needs"),
    ],
)
def test_bad_options_are_one_clear_error(folder, networks, options, message, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "pyvirtualcam", None)
    assert run(folder, *(str(option).format(folder=folder) for option in options)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_real_clip_moves_a_real_portrait(real_clips, landmarker, tmp_path, capsys):
    """The real renderer and networks: every frame is shown or dropped, and the portrait moves."""
    portrait = real_clips / "a_ref01_photo_astronaut.png"
    clip = real_clips / "a_drv02_woman_turns.mp4"
    assert read_image(portrait).shape == (512, 512, 3)
    options = ["--reference", str(portrait), "--video", str(clip), "--port", "0", "--seconds", "6"]
    assert main(options) == 0
    came, shown, dropped = map(
        int, re.findall(r"(\d+) frames came, (\d+) were shown, (\d+)", capsys.readouterr().out)[0]
    )
    assert came >= shown + dropped - 1 and shown > 12
