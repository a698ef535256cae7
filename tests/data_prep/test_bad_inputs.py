"""Sixty inputs that are wrong or unusual, all in one batch with good clips: nothing stops the batch."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset.clips import build_dataset, fit_clip
from data_prep.dataset.options import BuildOptions
from loki_jax.data.reader import open_dataset
from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.clips import fit_image
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.video.reader import MediaError
from tests.data_prep.bad_inputs import CASES, SPEECH, turned_right, video
from tests.fitting.known_face import HEIGHT, WIDTH, KnownFace, N, true_coefficients, true_points

GOOD = ("a first good one", "the last good one")


@pytest.fixture(scope="module")
def known():
    head = builtin_head()
    return head, KnownFace(true_points(head, true_coefficients(head)))


@pytest.fixture(scope="module")
def batch(tmp_path_factory, known):
    """(clip names by case, rows of accepted clips, reasons of rejected ones, lines of progress, dataset)."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = {GOOD[0]: video("good1.mp4", SPEECH)(folder)}
    for name, (make, _) in CASES.items():
        paths[name] = make(folder)
    paths[GOOD[1]] = video("good2.mp4", SPEECH[::-1])(folder)
    head, networks = known
    settings = BuildOptions(size=32, overlay=0, validation=0.1, workers=0)
    out, lines = tmp_path_factory.mktemp("out") / "shards", []
    summary = build_dataset(list(paths.values()), head, out, lambda: networks, settings, log=lines.append)
    manifest = json.loads((out / "manifest.json").read_text())
    by_file = {entry["file"]: entry["clip"] for entry in manifest["clips"] + manifest["rejected"]}
    names = {case: by_file[path.name] for case, path in paths.items()}
    accepted = {row["clip"]: row for row in summary["clips"]}
    rejected = {row["clip"]: row["reason"] for row in summary["rejected"]}
    return names, accepted, rejected, lines, open_dataset(out), manifest


def test_there_are_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_each_is_built_or_rejected_by_name(batch, case):
    names, accepted, rejected, _, _, manifest = batch
    expected = CASES[case][1]
    if expected is None:
        assert names[case] in accepted, rejected.get(names[case])
        assert accepted[names[case]]["frames"] >= N
        return
    reason = rejected[names[case]]
    assert re.search(expected, reason), reason
    assert "\n" not in reason and len(reason) < 500
    entry = next(entry for entry in manifest["rejected"] if entry["clip"] == names[case])
    assert entry["file"] in reason and "transient" not in entry  # no surprise inside the program


def test_the_rest_of_the_batch_goes_on(batch):
    names, accepted, rejected, lines, dataset, _ = batch
    assert set(names) == {*CASES, *GOOD}
    assert len(accepted) + len(rejected) == len(names)
    for good in GOOD:
        assert accepted[names[good]]["frames"] == N
    assert {clip.clip_id for clip in dataset.clips} == set(accepted)
    assert sum("rejected: " in line for line in lines) == len(rejected)


def test_resampled_clips_keep_their_time(batch):
    names, accepted, _, _, _, _ = batch
    frames = {case: accepted[names[case]]["frames"] for case, (_, reason) in CASES.items() if reason is None}
    assert frames["50 frames a second"] == N and frames["one frame a second"] == 50
    assert frames["29.97 frames a second"] == 17  # 20 frames at 30000/1001 are 0.667 s
    assert frames["pauses of a screen recording"] >= 19  # 0.74 s and the last picture
    facts = {case: accepted[names[case]]["video"] for case in frames}
    assert facts["variable frame rate"]["variable_rate"] is False  # 12 ms late is less than half a frame
    assert facts["pauses of a screen recording"]["variable_rate"] is True
    assert facts["29.97 frames a second"]["fps"] == "30000/1001"
    assert facts["10-bit"]["pixel_format"] == "yuv420p10le"


# --- more than one face ------------------------------------------------------------------------------


class TwoFaces(KnownFace):
    """Somebody else of nearly the same size stands beside the known face."""

    def detect(self, image):
        faces = super().detect(image)
        return faces + [face._replace(box=face.box * 0.9 + 200) for face in faces]


def test_of_two_faces_the_larger_is_taken_and_others_by_number(tmp_path, known):
    head, networks = known
    networks = TwoFaces(networks.points)
    path = video("two.mp4")(tmp_path)
    settings = BuildOptions(size=32, overlay=0)
    assert fit_clip(path, head, networks, settings).track.faces == 2
    with pytest.raises(LandmarkError, match=r"two.mp4: no face number 2: 2 faces .*`--face INDEX`"):
        fit_clip(path, head, networks, BuildOptions(size=32, overlay=0, face=2))
    grey = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    with pytest.raises(LandmarkError, match=r"two.png: 2 faces .*Choose one with `--face INDEX`"):
        fit_image(grey, head, landmarker=networks, name="two.png")


# --- portraits ---------------------------------------------------------------------------------------

GREY = 40  # what `KnownFace` takes for its frame 4
RGB = (GREY, GREY, GREY)
PORTRAITS = {
    "turned by EXIF": lambda path: Image.new("RGB", (HEIGHT, WIDTH), RGB).save(path, exif=turned_right()),
    "grayscale": lambda path: Image.new("L", (WIDTH, HEIGHT), GREY).save(path),
    "16-bit": lambda path: Image.fromarray(np.full((HEIGHT, WIDTH), GREY * 257, np.uint16)).save(path),
    "palette": lambda path: Image.new("RGB", (WIDTH, HEIGHT), RGB).quantize(4).save(path),
    "alpha": lambda path: Image.new("RGBA", (WIDTH, HEIGHT), (GREY, GREY, GREY, 255)).save(path),
    "CMYK": lambda path: Image.new("RGB", (WIDTH, HEIGHT), RGB).convert("CMYK").save(path),
}
_SUFFIX = {"turned by EXIF": ".jpg", "CMYK": ".jpg"}


@pytest.mark.parametrize("case", PORTRAITS)
def test_unusual_portraits_are_read(tmp_path, known, case):
    head, networks = known
    path = tmp_path / f"portrait{_SUFFIX.get(case, '.png')}"
    PORTRAITS[case](path)
    fitted = fit_image(path, head, landmarker=networks)
    assert fitted.frames[0].shape == (HEIGHT, WIDTH, 3) and abs(int(fitted.frames[0].mean()) - GREY) <= 1


BAD_PORTRAITS = {
    "zero bytes": (b"", r"empty \(0 bytes\)"),
    "text": (b"hello", "not a readable picture"),
    "half": (None, "not a readable picture, or truncated"),
    "animation without end": (b"GIF89a" + bytes(20), "not a readable picture"),
}


@pytest.mark.parametrize("case", BAD_PORTRAITS)
def test_bad_portraits_are_errors(tmp_path, known, case):
    data, message = BAD_PORTRAITS[case]
    path = tmp_path / "portrait.png"
    if data is None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        data = path.read_bytes()[:3000]
    path.write_bytes(data)
    head, networks = known
    with pytest.raises(MediaError, match=message):
        fit_image(path, head, landmarker=networks)
