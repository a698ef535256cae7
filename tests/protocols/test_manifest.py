"""Manifests: pairs are seeded and balanced, files come back as they were, inputs are what the list says."""

import collections
import json

import numpy as np
import pytest

from loki_jax.evaluation import image_scores
from loki_jax.face.builtin import builtin_head
from loki_jax.manifest import main
from loki_jax.protocols.inputs import (
    check_inputs,
    driver_file,
    one_per_identity,
    square_around,
    true_animation,
    truth_file,
)
from loki_jax.protocols.manifest import ManifestError, balanced_pairs, derangement, read_manifest
from loki_jax.video import LazyFrames, read_image, write_video
from tests.fitting.known_face import RATE, KnownFace, N, frames_showing, true_coefficients, true_points


@pytest.mark.parametrize("count", [2, 3, 10, 212])
def test_a_derangement_leaves_nothing_in_its_place(count):
    order = derangement(count, 5)
    assert sorted(order) == list(range(count)) and all(k != other for k, other in enumerate(order))
    assert order == derangement(count, 5)
    assert count < 4 or order != derangement(count, 6)


def test_pairs_are_different_and_balanced():
    clips, portraits = [f"c{k}" for k in range(10)], [f"p{k}" for k in range(16)]
    pairs = balanced_pairs(clips, portraits, 100, 0)
    assert len(set(pairs)) == 100
    for side, expected in ((0, 10), (1, 6.25)):
        counts = collections.Counter(pair[side] for pair in pairs)
        assert max(counts.values()) <= np.ceil(expected) and min(counts.values()) >= np.floor(expected)
    assert len(set(balanced_pairs(clips, portraits, 160, 0))) == 160
    with pytest.raises(ValueError, match="only 160"):
        balanced_pairs(clips, portraits, 161, 0)


def test_one_clip_of_each_identity():
    names = [f"clip{k}.mp4" for k in range(6)]
    identities = {name: f"person {k // 2}" for k, name in enumerate(names[:4])}
    chosen = one_per_identity(names, identities, 1)
    assert len(chosen) == 4 and {identities.get(name, name) for name in chosen} == {
        "person 0", "person 1", "clip4.mp4", "clip5.mp4",
    }  # fmt: skip


def test_the_square_stays_inside_the_picture():
    points = np.array([[[10.0, 5.0], [50.0, 45.0]], [[20.0, 5.0], [60.0, 45.0]]])
    x0, y0, x1, y1 = square_around(points, (200, 150))
    assert x1 - x0 == y1 - y0 == 100 and x0 == 0 and y0 == 0
    assert square_around(points, (60, 80)) == (5, 0, 65, 60)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp("manifest") / "rendered"
    arguments = ["--protocols", "expression", "pose", "--people", "2", "--frames", "4", "--size", "64"]
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def test_rendered_people_move_in_one_way_alone(rendered):
    manifest, head = read_manifest(rendered), builtin_head()
    check_inputs(manifest, rendered)
    assert [sample.protocol for sample in manifest.samples] == ["expression"] * 2 + ["pose"] * 2
    for sample in manifest.samples:
        reference, driver = (manifest.sources[name] for name in (sample.reference, sample.driver))
        motion = true_animation(head, reference, driver)
        still, moving = ("rot", "expression") if sample.protocol == "expression" else ("expression", "rot")
        assert np.ptp(getattr(motion, still), axis=0).max() == 0
        assert np.ptp(getattr(motion, moving), axis=0).max() > 0.01
        truth = LazyFrames(truth_file(manifest, rendered, sample))
        assert len(truth) == 4 and truth[0].shape == (64, 64, 3) and truth.fps == manifest.fps
    # A person drives another one: the truth shows the portrait's colours, not the driver's.
    sample = manifest.samples[2]
    truth = LazyFrames(truth_file(manifest, rendered, sample))
    portrait = read_image(rendered / "references" / f"{sample.reference}.png")
    driver = LazyFrames(driver_file(rendered, sample.driver))
    assert image_scores([portrait], [truth[0]]).psnr > image_scores([driver[0]], [truth[0]]).psnr + 3


def test_a_frozen_list_gives_the_same_inputs(rendered, tmp_path):
    again = tmp_path / "again"
    assert main(["--frozen", str(rendered), "--out", str(again)]) == 0
    assert read_manifest(again) == read_manifest(rendered)
    (again / "drivers" / "pose-0.mp4").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"pose-0\.mp4: has other content"):
        check_inputs(read_manifest(again), again)


def test_recorded_clips(tmp_path, monkeypatch):
    """Clips by a stand-in for the networks: one is too short, one loses the face."""
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    monkeypatch.setattr("loki_jax.fitting.clips.default_landmarker", lambda: networks)
    folder, out = tmp_path / "clips", tmp_path / "out"
    folder.mkdir()
    shown = {"a": range(N), "b": [*range(8), -1, *range(8, N)], "c": range(5), "d": [-1, -1, *range(N)]}
    for name, indices in shown.items():
        write_video(folder / f"{name}.mp4", frames_showing(indices), RATE, crf=4)
    arguments = ["--sources", str(folder), "--frames", "10", "--size", "32", "--out", str(out)]
    assert main(arguments) == 0
    manifest = read_manifest(out)
    assert {s.name for s in manifest.samples} == {
        "same-a", "same-d", "cross-a-by-d", "cross-d-by-a",
    }  # fmt: skip
    assert "no 10 frames in a row" in manifest.rejected["b.mp4"]
    assert "5 frames" in manifest.rejected["c.mp4"]
    assert manifest.sources["a"].start == 0 and manifest.sources["d"].start == 2
    assert len(LazyFrames(driver_file(out, "d"))) == 10
    same = manifest.samples[0]
    assert truth_file(manifest, out, same) == driver_file(out, "a")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--protocols", "same"], "--sources"),
        (["--sources", "{folder}/none"], "no such folder"),
        (["--protocols", "pose", "--people", "1"], "--people 1"),
        (["--frozen", "{folder}/none.json"], "none.json"),
        (["--protocols", "pose", "--fps", "0"], "--fps 0"),
        (["--protocols", "pose", "--frames", "1"], "--frames 1"),
    ],
)
def test_bad_options_are_one_clear_error(tmp_path, arguments, message, capsys):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"samples": [{"name": "x", "protocol": "same", "reference": "nobody", "driver": "nobody"}]},
        {"sources": [{"name": "../x", "identity": "x", "frames": 2}], "samples": []},
        {"fps": "0/0"},
    ],
)
def test_damaged_manifests(rendered, tmp_path, change):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads((rendered / "manifest.json").read_text()) | change))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(path)
