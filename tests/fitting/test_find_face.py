"""Whose head is fitted, and in which frames: faces are found, turned, chosen and counted."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.clips import fit_video
from loki_jax.fitting.landmarker import suppress
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.tracking import (
    Track,
    choose_frames,
    cut_track,
    find_face,
    shots,
    steady_run,
    upright_turns,
)
from loki_jax.sources import fit_clip
from loki_jax.video import InputWarning, read_image, read_video, write_video
from tests.fitting.known_face import RATE, KnownFace, frames_showing, true_coefficients, true_points

FAULTS = Path(__file__).parents[1] / "faults"


def track_of(score, cuts=(), jump_at=None) -> Track:
    spread = np.stack([np.cos(np.arange(478)), np.sin(np.arange(478)), np.zeros(478)], 1) * 20
    points = np.tile(spread + 100, (len(score), 1, 1)).astype(np.float32)
    if jump_at is not None:
        points[jump_at:, :, 0] += 60
    return Track(points, np.ones((len(score), 478)), np.asarray(score, np.float32), 1, np.array(cuts, int))


def test_detections_inside_others_are_the_same_face():
    boxes = np.array([[0, 0, 100, 100], [20, 30, 60, 70], [200, 0, 260, 60], [150, -40, 300, 110]], float)
    merged = suppress(boxes, boxes, np.array([0.9, 0.6, 0.8, 0.55]))
    np.testing.assert_array_equal([box for box, _ in merged], boxes[[0, 2]])


@pytest.mark.parametrize(
    ("score", "cuts", "jump_at", "chosen", "words"),
    [
        (np.ones(20), (), None, (0, 20), []),
        (np.ones(20), (8,), None, (8, 20), ["2 shots; took the longest, frames 8 to 19 of 20"]),
        (np.ones(20), (), 13, (0, 13), ["frames 0 to 12 of 20"]),
        # Nobody is in the first shot: the clip has one shot of the face, and frames without it.
        (np.r_[np.zeros(5), np.ones(15)], (5,), None, (0, 20), ["not visible in 5 of 20 frames"]),
        (np.r_[np.ones(5), np.zeros(3), np.ones(7)], (7,), None, (8, 15), ["frames 8 to 14 of 15"]),
    ],
)
def test_the_longest_shot_is_used_and_lost_frames_are_counted(score, cuts, jump_at, chosen, words):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert choose_frames(track_of(score, cuts, jump_at), "x.mp4") == chosen
    assert len(said) == len(words)
    for warning, word in zip(said, words, strict=True):
        assert warning.category is InputWarning and word in str(warning.message)


def test_mostly_lost_faces_are_refused_unless_asked_for():
    track = track_of([1] * 6 + [0] * 69, (6,))
    with pytest.raises(LandmarkError, match=r"x.mp4: the face is visible in 6 of 75 frames.*--allow-lost"):
        choose_frames(track, "x.mp4")
    with pytest.warns(InputWarning, match="not visible in 69 of 75 frames"):
        assert choose_frames(track, "x.mp4", allow_lost=True) == (0, 75)
    two = track_of(np.ones(20), (8,))
    assert choose_frames(two, all_shots=True) == (0, 20)
    # What `build` takes ends at cuts, too; a part of a track keeps its cuts.
    assert steady_run(two) == (8, 20)
    np.testing.assert_array_equal(cut_track(two, 5, 15).cuts, [3])
    assert len(shots(cut_track(two, 8, 20))) == 1


# --- with the networks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "box"), [("closeup_false_2faces_a.png", (60, 100, 450, 512)), ("panorama_6000x400.jpg", None)]
)
def test_one_face_in_a_closeup_and_in_a_panorama(landmarker, name, box):
    image = read_image(FAULTS / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, track = find_face(landmarker, image[None], name=name)
    assert track.faces == 1 and track.score[0] > 0.95
    x, y = track.points[0, :468, 0], track.points[0, :468, 1]
    if box is None:
        box = (2950, 140, 3060, 270)  # by hand
    assert x.min() < box[0] and y.min() < box[1] and x.max() > box[2] and y.max() > box[3]


def test_of_two_faces_one_is_asked_for(landmarker):
    image = read_image(FAULTS / "two_faces.jpg")[None]
    with pytest.raises(LandmarkError, match=r"two.jpg: 2 faces .*--face INDEX"):
        find_face(landmarker, image, name="two.jpg")
    centres = [find_face(landmarker, image, face)[1].points[0, 1, 0] for face in (0, 1)]
    assert abs(centres[0] - 1068) < 80 and abs(centres[1] - 374) < 80
    with pytest.warns(InputWarning, match=r"clip: 2 faces; took the one of .*--driver-face"):
        find_face(landmarker, np.repeat(image, 3, 0))


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_pictures_are_turned_upright(landmarker, turns):
    data = pytest.importorskip("skimage.data", reason="needs scikit-image (the eval extra) for a portrait")
    portrait = np.ascontiguousarray(data.astronaut()[:256, 80:368])
    turned = np.ascontiguousarray(np.rot90(portrait, -turns))
    assert upright_turns(landmarker, [turned]) == turns
    if turns:
        with pytest.warns(InputWarning, match=f"turned by {90 * turns} degrees"):
            frames, track = find_face(landmarker, turned[None])
        np.testing.assert_array_equal(frames[0], portrait)
        _, straight = find_face(landmarker, portrait[None])
        np.testing.assert_array_equal(track.points, straight.points)


def test_cuts_are_found(landmarker):
    frames = read_video(FAULTS / "scene_cut_zoom.mp4").frames
    _, track = find_face(landmarker, frames)
    np.testing.assert_array_equal(track.cuts, [38])
    with pytest.warns(InputWarning, match="2 shots; took the longest, frames 0 to 37 of 75"):
        assert choose_frames(track) == (0, 38)
    _, track = find_face(landmarker, read_video(FAULTS / "face_6_frames_only.mp4").frames, name="six.mp4")
    with pytest.raises(LandmarkError, match="six.mp4: the face is visible in 6 of 75 frames"):
        choose_frames(track, "six.mp4")


def test_two_people_in_one_place_are_two_shots(landmarker, real_clips):
    """Same studio, same place, no change of light: only the face says that somebody else is there."""
    people = [
        read_video(real_clips / f"a_drv0{i}_grid_man{j}.mp4", 15).frames for i, j in ((8, ""), (9, "2"))
    ]
    _, track = find_face(landmarker, np.concatenate(people))
    np.testing.assert_array_equal(track.cuts, [15])
    assert steady_run(track) in ((0, 15), (15, 30))


# --- the longest shot of a file ----------------------------------------------------------------------


def test_fit_video_fits_the_longest_shot(tmp_path):
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    # Between frames 4 and 10 the picture changes six times as much as elsewhere.
    path = tmp_path / "cut.mp4"
    write_video(path, frames_showing([0, 1, 2, 3, 4, *range(10, 16)]), RATE, crf=1)
    with pytest.warns(InputWarning, match="cut.mp4: 2 shots; took the longest, frames 5 to 10 of 11"):
        fitted = fit_video(path, head, landmarker=networks)
    assert fitted.start == 5 and len(fitted.frames) == len(fitted.fit.coefficients.rot) == 6
    with pytest.warns(InputWarning, match="2 shots"):
        clip = fit_clip(path, head, 32, landmarker=networks)
    assert clip.start == 5 / RATE and np.stack(list(clip.frames)).shape == (6, 32, 32, 3)
    whole = fit_video(path, head, landmarker=networks, all_shots=True)
    assert whole.start == 0 and len(whole.frames) == 11


def test_repeated_pictures_are_no_cuts(tmp_path):
    """A clip of one picture a second changes from picture to picture as others do at a cut."""
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    frames = np.repeat(frames_showing([0, 2, 4, 6]), 25, axis=0)
    _, track = find_face(networks, frames)
    assert len(track.cuts) == 0 and choose_frames(track) == (0, 100)
