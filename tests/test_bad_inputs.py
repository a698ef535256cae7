"""What people give `animate` by mistake, and runs that are broken off: one clear error, and no file left."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import loki_jax.fitting.clips
from loki_jax.animate import main
from loki_jax.face.builtin import builtin_head
from loki_jax.geometry.pipeline import GeometryPipeline
from tests.data_prep.bad_inputs import CASES, picture, raw, sound_only, video
from tests.fitting.known_face import KnownFace, frames_showing, true_coefficients, true_points

# Those of `CASES` that no program can use.
DRIVERS = {
    name: CASES[name]
    for name in (
        "zero bytes", "one byte", "random bytes", "text called mp4", "web page called mp4", "json called mov",
        "zip called mp4", "pdf called mkv", "zeros", "folder called mp4", "broken link", "audio only",
        "audio with a cover picture", "first half", "first tenth", "last half", "half of a Matroska file",
        "header zeroed", "index zeroed", "pictures zeroed", "size changes on the way", "no face", "white",
    )
}  # fmt: skip


def npz(name, **arrays):
    def make(folder):
        np.savez(folder / name, **arrays)
        return folder / name

    return make


def another_head(name):
    """A motion file whose head is not the built-in one."""
    meta = {"kind": "loki_jax motion", "format_version": 1, "head_sha256": "0", "head": "flame"}
    return npz(name, meta_json=np.asarray(json.dumps(meta)))


def of_another_version(name):
    return npz(name, meta_json=np.asarray(json.dumps({"kind": "loki_jax motion", "format_version": 99})))


def mixed_sizes(folder):
    (folder / "mixed").mkdir()
    for index, side in enumerate((32, 48)):
        Image.new("RGB", (side, side)).save(folder / "mixed" / f"{index}.png")
    return folder / "mixed"


def absent(name):
    return lambda folder: folder / name


def half_png(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:3000])
    return folder / "half.png"


# By the option that takes the file.
INPUTS = [
    *(("--driver", name, make, expected) for name, (make, expected) in DRIVERS.items()),
    ("--driver", "folder of pictures of two sizes", mixed_sizes, "size"),
    ("--driver", "text called npz", raw("text.npz", b"text"), "not a readable motion file"),
    ("--driver", "other arrays", npz("other.npz", a=np.zeros(3)), "not a motion file"),
    ("--driver", "motion of another head", another_head("flame.npz"), "a motion of the head 'flame'"),
    ("--driver", "motion of another version", of_another_version("new.npz"), "motion format 99"),
    ("--reference", "no such file", absent("none.png"), "no such image file"),
    ("--reference", "zero bytes", raw("empty.png", b""), r"empty \(0 bytes\)"),
    ("--reference", "text", raw("text.jpg", b"text"), "not a readable picture"),
    ("--reference", "half a picture", half_png, "not a readable picture, or truncated"),
    ("--reference", "GIF without end", raw("end.gif", b"GIF89a" + bytes(20)), "not a readable picture"),
    ("--reference", "video", video("video.mp4"), "not a readable picture"),
    ("--reference", "sound", sound_only("sound.m4a"), "not a readable picture"),
    ("--reference", "nobody", picture("black.png"), "no face found"),
    ("--reference", "one pixel", picture("pixel.png", size=(1, 1)), "no face found"),
    ("--sliders", "text", raw("text.json", b"smile"), "not a readable JSON"),
    ("--sliders", "list", raw("list.json", b"[1]"), "expected an object"),
    ("--sliders", "word", raw("word.json", b'{"smile": "much"}'), "expected a number or keyframes"),
    ("--sliders", "times that fall", raw("fall.json", b'{"smile": [[1, 0], [0, 1]]}'), "do not rise"),
    ("--sliders", "not a number", raw("nan.json", b'{"smile": NaN}'), "expected a number"),
    ("--sliders", "unknown name", raw("name.json", b'{"smyle": 1}'), "no slider 'smyle'"),
    ("--head", "no such file", absent("none.npz"), "none.npz"),
    ("--head", "text", raw("head.npz", b"text"), "head.npz"),
    ("--audio", "video without sound", video("mute.mp4"), "has no sound"),
]  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    head = builtin_head()
    return KnownFace(true_points(head, true_coefficients(head)))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A portrait and a driver that the stand-in of the networks reads."""
    folder = tmp_path_factory.mktemp("good")
    Image.fromarray(frames_showing([3])[0]).save(folder / "portrait.png")
    video("driver.mp4")(folder)
    return {"--reference": folder / "portrait.png", "--driver": folder / "driver.mp4"}


def test_there_are_forty():
    assert len(INPUTS) >= 40


@pytest.mark.parametrize(
    ("option", "make", "expected"),
    [pytest.param(o, m, e, id=f"{o[2:]}: {name}") for o, name, m, e in INPUTS],
)
def test_one_clear_error_and_nothing_written(
    tmp_path, networks, good, monkeypatch, capsys, option, make, expected
):
    monkeypatch.setattr(loki_jax.fitting.clips, "default_landmarker", lambda *_: networks)
    monkeypatch.setattr(GeometryPipeline, "windows", lambda *_, **__: pytest.fail("the input was accepted"))
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = good | {option: path, "--out": tmp_path / "out.mp4"}
    assert main([str(part) for pair in options.items() for part in pair]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(error) == 1 and error[0].startswith("error: ") and len(error[0]) < 500
    assert re.search(expected, error[0]) and (path.name in error[0] or option == "--sliders"), error[0]
    assert sorted(tmp_path.rglob("*")) == before


# --- broken off --------------------------------------------------------------------------------------

# The program, with an animation that never ends; it says when frames are being written.
_ENDLESS = """
import signal
import sys
import numpy as np
from loki_jax.animate import main
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import Window

def windows(*_, **__):
    while True:
        yield Window(np.zeros((4, 32, 32, 3), np.uint8), np.zeros((4, 8, 8, 3), np.uint8))
        print("writing", flush=True)

GeometryPipeline.windows = windows
# Python does not listen to it where the tests run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_file(tmp_path, stop):
    from tests.synthetic.synthetic_clips import write_clips

    clip = write_clips(tmp_path / "shards", identities=1, frames=2)[0]
    before = sorted(tmp_path.iterdir())
    options = ["--reference", clip, "--driver", clip, "--out", str(tmp_path / "out.mp4")]
    options += ["--dump", str(tmp_path / "dump")]
    root = str(Path(__file__).resolve().parents[1])
    running = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, *options], cwd=root, env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        while len(partial := [path for path in tmp_path.iterdir() if path not in before]) < 2:
            assert running.stdout.readline(), "it ended"
        assert all(path.name.startswith(".") for path in partial)
        running.send_signal(stop)
        assert running.wait(60) == 128 + stop
    finally:
        running.kill()
    assert sorted(tmp_path.iterdir()) == before
