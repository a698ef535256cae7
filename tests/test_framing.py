"""The crop of an animation holds the head, on the built-in head whose projection is known."""

import warnings

import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.types import Coefficients
from loki_jax.fitting.clips import clip_crop_box, head_extent
from loki_jax.fitting.fit import make_camera
from loki_jax.framing import LARGEST_GROWTH, frame_animation
from loki_jax.sources import Portrait
from loki_jax.video import InputWarning

SHAPE = (480, 640)


def coefficients(head, translation) -> Coefficients:
    """A neutral, frontal head at each of these places (N, 3)."""
    n = len(translation)
    zeros = lambda width: np.zeros((n, width), np.float32)
    return Coefficients(
        zeros(head.n_shape), zeros(head.n_expression), zeros(3), np.asarray(translation, np.float32),
        zeros(3), zeros(3), zeros(3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def portrait(head) -> Portrait:
    camera = make_camera(SHAPE)
    own = coefficients(head, [[0, 0, -1.2]])
    crop = clip_crop_box(head, own, camera)
    picture = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), np.uint8)
    image = crop_and_resize(picture, crop, 64)
    return Portrait(image, Coefficients(*(x[0] for x in own)), camera, crop, "me.png", picture)


def path(*end) -> np.ndarray:
    """From the portrait's place to another in nine steps."""
    return np.linspace([0, 0, -1.2], np.array([0, 0, -1.2]) + end, 9)


def test_a_head_that_stays_inside_changes_nothing(head, portrait):
    still = coefficients(head, path(0.005, 0.005, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framed, moved = frame_animation(head, portrait, still)
    assert framed is portrait and moved is still


def test_the_crop_grows_until_it_holds_all_frames(head, portrait):
    rising = coefficients(head, path(0, 0.08, 0))
    low, high = head_extent(head, rising, portrait.camera)
    assert low[-1, 1] < portrait.crop[1]  # the portrait's own crop cuts the head
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framed, moved = frame_animation(head, portrait, rising)
    assert moved is rising
    x0, y0, x1, y1 = framed.crop
    assert x1 - x0 == pytest.approx(y1 - y0) and x1 - x0 < LARGEST_GROWTH * np.ptp(portrait.crop[::2])
    # It holds the portrait and all frames, and no more.
    assert y0 == pytest.approx(low[-1, 1], abs=0.01) and y1 == pytest.approx(portrait.crop[3], abs=0.01)
    assert x0 <= portrait.crop[0] and x1 >= portrait.crop[2]
    np.testing.assert_array_equal(framed.image, crop_and_resize(portrait.picture, framed.crop, 64))


def test_beyond_the_largest_crop_the_translation_is_eased(head, portrait):
    leaving = coefficients(head, path(0.6, 0, 0))
    with pytest.warns(InputWarning, match=r"me.png: \d\d % of the driver's translation is followed") as said:
        framed, moved = frame_animation(head, portrait, leaving)
    assert len(said) == 1
    assert np.ptp(framed.crop[::2]) <= LARGEST_GROWTH * np.ptp(portrait.crop[::2]) * 1.0001
    low, high = head_extent(head, moved, portrait.camera)
    assert (low >= framed.crop[:2] - 0.01).all() and (high <= framed.crop[2:] + 0.01).all()
    share = moved.tra[-1, 0] / leaving.tra[-1, 0]
    np.testing.assert_allclose(
        moved.tra, portrait.coefficients.tra + share * (leaving.tra - leaving.tra[0]), atol=1e-6
    )
    # No more than needed: a hundredth more would not fit.
    low, high = head_extent(head, coefficients(head, path(0.6 * (share + 0.01), 0, 0)), portrait.camera)
    assert high[-1, 0] - portrait.crop[0] > LARGEST_GROWTH * np.ptp(portrait.crop[::2])


def test_what_is_still_cut_is_said(head, portrait):
    stored = portrait._replace(picture=None)  # a clip of a dataset: there is nothing around its crop
    half = coefficients(head, path(0, 0.08, 0))
    low, high = head_extent(head, half, portrait.camera)
    outside = ((portrait.crop[1] - low[:, 1]) / (high - low)[:, 1]).clip(0)
    words = rf"up to {100 * outside.max():.0f} % of the head .* in {100 * np.mean(outside > 0.01):.0f} % of"
    with pytest.warns(InputWarning, match=words):
        framed, moved = frame_animation(head, stored, half)
    assert framed is stored and moved is half
