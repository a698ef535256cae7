"""Synthetic clips: motion statistics, one crop a clip, exact truth, a dataset that reads back."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_prep import synth
from loki_jax.data.reader import open_dataset
from loki_jax.face.builtin import builtin_head
from loki_jax.synthetic import clips
from loki_jax.synthetic.appearance import sample_appearance, sample_shape
from loki_jax.synthetic.motion import synth_motion

SIZE = 32


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def clip(head):
    return clips.synth_clip(head, identity_seed=7, clip_seed=7000, n_frames=20, size=SIZE)


def _head_yaw(motion):
    rotation = Rotation.from_rotvec(motion.rot) * Rotation.from_rotvec(motion.neck)
    return np.rad2deg(rotation.as_rotvec())


@pytest.mark.parametrize("n_frames", [32, 48, 64])
def test_motion_is_lively_and_smooth(head, n_frames):
    turns, openings, blinks = [], [], []
    for seed in range(12):
        motion = synth_motion(head, seed, n_frames)
        angles = _head_yaw(motion)
        turns.append(angles)
        assert angles[:, 1].std() >= 8.0, seed
        assert np.abs(angles[:, 1]).max() < 48
        assert np.abs(np.diff(angles, axis=0)).max() < 6.0  # degrees a frame, at 25 fps
        openings.append(motion.jaw[:, 0])
        blinks.append(motion.expression[:, head.expression_names.index("eyeBlinkLeft")])
        assert motion.jaw[:, 0].min() >= 0 and motion.jaw[:, 0].max() < 0.4
        assert np.abs(motion.tra).max() < 0.05
        low, high = head.expression_bounds.T
        assert (motion.expression >= low).all() and (motion.expression <= high).all()
    turns = np.stack(turns)
    assert 4 < turns[..., 0].std() < 9 and 2.5 < turns[..., 2].std() < 6.5
    assert np.abs(turns[..., 1]).max() > 18
    assert np.stack(openings).max(1).mean() > 0.12  # the mouth opens
    assert (np.stack(blinks).max(1) > 0.9).mean() > 0.5  # most clips hold a blink


def test_every_expression_axis_is_used(head):
    used = np.max([synth_motion(head, seed, 48).expression.max(0) for seed in range(30)], axis=0)
    idle = [name for name, value in zip(head.expression_names, used, strict=True) if value < 0.15]
    assert idle == []


def test_clips_repeat_exactly(head, clip):
    again = clips.synth_clip(head, identity_seed=7, clip_seed=7000, n_frames=20, size=SIZE)
    np.testing.assert_array_equal(clip.frames, again.frames)
    for a, b in zip(clip.coefficients, again.coefficients, strict=True):
        np.testing.assert_array_equal(a, b)
    other = synth_motion(head, 7001, 20)
    assert np.abs(other.rot - clip.coefficients.rot).max() > 0.05
    # Pinned numbers: the same motion on every machine.
    np.testing.assert_allclose(clip.coefficients.rot[0], [-0.120966, 0.230936, 0.072495], atol=1e-5)
    np.testing.assert_allclose(clip.coefficients.jaw[10], [0.078904, -0.027961, 0], atol=1e-5)
    np.testing.assert_allclose(clip.camera.intrinsics[0], 1194.7611, rtol=1e-6)


def test_one_box_a_clip_with_the_head_inside(head, clip):
    x0, y0, x1, y1 = clip.crop
    assert abs((x1 - x0) - (y1 - y0)) < 1e-2
    pixels = np.asarray(clips._head_pixels(head, clip.coefficients, clip.camera)).reshape(-1, 2)
    low, high = pixels.min(0), pixels.max(0)
    side = x1 - x0
    assert (low > [x0 + 0.05 * side, y0 + 0.05 * side]).all() and (
        high < [x1 - 0.05 * side, y1 - 0.05 * side]
    ).all()
    assert np.isclose(side, 1.2 * (high - low).max(), rtol=1e-3)


def test_frames_are_a_moving_person(clip):
    assert clip.frames.shape == (20, SIZE, SIZE, 3) and clip.frames.dtype == np.uint8
    assert clip.frames.std() > 15
    assert np.abs(np.diff(clip.frames.astype(float), axis=0)).mean() > 0.3
    # Padding of the last chunk leaves no trace: every frame differs from its neighbour.
    assert (np.abs(np.diff(clip.frames.astype(int), axis=0)).max((1, 2, 3)) > 0).all()


def test_dataset_reads_back_and_rebuilds_the_truth(head, tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = ["--out", str(out), "--identities", "3", "--clips-per-identity", "1", "--frames", "4..6"]
    arguments += ["--size", str(SIZE), "--seed", "2", "--validation", "0.3"]
    assert synth.main(arguments) == 0
    dataset = open_dataset(out)
    assert {row.split for row in dataset.clips} == {"train", "validation"}
    assert [row.extra["identity_seed"] for row in dataset.clips] == [2000000, 2000001, 2000002]
    row = dataset.clips[1]
    assert 4 <= row.length <= 6 and row.fps == 25
    appearance = sample_appearance(row.extra["identity_seed"], head)
    frame = dataset.read_clip(row)[0]
    single = [np.asarray(field)[None] for field in frame.coefficients]
    again = clips.render_frames(
        head, type(frame.coefficients)(*single), frame.camera, frame.crop, appearance, SIZE
    )
    assert np.abs(again[0].astype(int) - frame.image.astype(int)).max() <= 1
    # A second run does not overwrite without being told.
    assert synth.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_held_out_identities_are_new(head):
    """Offsets make disjoint identities, and neighbouring seeds are not alike."""
    shapes = np.stack([sample_shape(seed, head) for seed in (0, 1, 1000, 1_000_000)])
    distance = np.linalg.norm(shapes[:, None] - shapes[None], axis=-1) + 10 * np.eye(4)
    assert distance.min() > 4


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--out", "x", "--preview", "y.png"],
        ["--out", "x", "--frames", "9..3"],
        ["--out", "x", "--identities", "0"],
    ],
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        synth.main(arguments)
    assert error.value.code == 2
    assert "error" in capsys.readouterr().err


def test_preview_is_a_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    assert synth.main(["--preview", str(path), "--identities", "2", "--size", str(SIZE)]) == 0
    from PIL import Image

    assert Image.open(path).size == (10 * SIZE, 2 * SIZE)
