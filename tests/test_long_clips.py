"""Clips of any length through a tiny model of random parameters: windows and their overlap."""

import jax
import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.pipeline import LokiPipeline
from loki_jax.sources import load_driving_clip, load_portrait
from tests.random_model import random_model
from tests.synthetic.synthetic_clips import write_clips

FRAMES, WINDOW = 11, 4

pytestmark = pytest.mark.usefixtures("few_optimizations")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    clips, head = write_clips(tmp_path_factory.mktemp("long") / "shards", frames=FRAMES), builtin_head()
    return load_portrait(clips[0], head, 64), load_driving_clip(clips[1], head, 64)


@pytest.fixture(scope="module")
def pipeline(few_optimizations):
    return LokiPipeline(random_model(window=WINDOW))


def assert_equal_up_to_rounding(a, b):
    """Programs for clips of other lengths may round a value to the next grey level."""
    assert np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 1e-3


@pytest.mark.parametrize("overlap, together", [(0, 1), (2, 1), (1, 2)])
def test_every_length_gives_its_frames(pipeline, inputs, overlap, together):
    portrait, clip = inputs
    options = {"steps": 2, "overlap": overlap, "windows_at_once": together}
    whole = pipeline(portrait, clip, **options)
    assert whole.shape == (FRAMES, 64, 64, 3) and whole.std() > 10
    for length in (1, WINDOW, WINDOW + 1, 2 * WINDOW - overlap, 2 * WINDOW):
        windows = list(pipeline.windows(portrait, clip.cut(0, length), **options))
        assert sum(len(window.frames) for window in windows) == length
        assert all(len(window.frames) == len(window.maps) > 0 for window in windows)


def test_windows_are_drawn_when_they_are_asked_for(pipeline, inputs, monkeypatch):
    """And do not depend on what comes later, but for the frames that they share with it."""
    portrait, clip = inputs
    drawn, draw = [], pipeline._sample
    monkeypatch.setattr(
        pipeline, "_sample", lambda *args, **options: drawn.append(1) or draw(*args, **options)
    )
    windows = pipeline.windows(portrait, clip, steps=2, overlap=2)
    first = [next(windows), next(windows)]
    assert len(drawn) == 2 and [len(window.frames) for window in first] == [2, 2]
    short = pipeline(portrait, clip.cut(0, 6), steps=2, overlap=2)
    assert_equal_up_to_rounding(np.concatenate([window.frames for window in first]), short[:4])


def test_windows_sampled_together_are_those_sampled_in_turn(pipeline, inputs):
    """Exactly, where none are shared; frames that are shared agree on something between."""
    portrait, clip = inputs
    frames = {
        (overlap, together): pipeline(portrait, clip, steps=2, overlap=overlap, windows_at_once=together)
        for overlap, together in ((0, 1), (0, 3), (2, 1), (2, 3))
    }
    close = lambda a, b: np.abs(a.astype(int) - b).mean()
    assert close(frames[0, 1], frames[0, 3]) < 0.01
    assert close(frames[2, 1], frames[2, 3]) < 0.2 * close(frames[0, 1], frames[2, 1])


def test_noise_of_a_frame_does_not_depend_on_its_window(pipeline, inputs):
    portrait, clip = inputs
    still = clip._replace(
        coefficients=jax.tree.map(lambda x: np.repeat(x[:1], FRAMES, axis=0), clip.coefficients)
    )
    draw = lambda **options: pipeline(portrait, still, steps=2, shared_noise=False, **options).astype(int)
    frames, other = draw(overlap=2), draw(overlap=0)
    assert np.abs(np.diff(frames, axis=0)).mean() > 5  # noise of its own
    assert np.abs(frames - other).mean() < 0.5 * np.abs(np.diff(frames, axis=0)).mean()


def test_a_model_with_history_goes_on_from_the_frames_before(inputs):
    """Each window depends on the one before; nothing else about windows changes."""
    pipeline = LokiPipeline(random_model(window=WINDOW, **{"history.frames": 2}))
    portrait, clip = inputs
    sampling = pipeline.sampling(steps=2)
    assert (sampling.overlap, sampling.windows_at_once) == (0, 1)
    options = {"steps": 2, "guidance": (2.0, 2.5, 1.0)}
    whole = pipeline(portrait, clip, **options)
    assert whole.shape == (FRAMES, 64, 64, 3) and whole.std() > 10
    assert_equal_up_to_rounding(pipeline(portrait, clip.cut(0, WINDOW), **options), whole[:WINDOW])
    # A driver that differs in the second frame, which only the first window sees, changes the next one, too.
    expression = np.array(clip.coefficients.expression)
    expression[1] += 1
    changed = clip._replace(coefficients=clip.coefficients._replace(expression=expression))
    other = pipeline(portrait, changed, **options)
    differs = [(other[i : i + WINDOW] != whole[i : i + WINDOW]).mean() for i in (0, WINDOW)]
    assert differs[0] > 0.1 and differs[1] > 0
    for wrong in ({"windows_at_once": 2}, {"overlap": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pipeline.sampling(**wrong)
