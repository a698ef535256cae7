"""The driver arm of the driver's pixels: masks, place, and what training changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.driver.encoding import DriverInputs
from loki_jax.driver.map import map_of_mesh
from loki_jax.driver.regions import (
    REGIONS,
    DriverFrames,
    aligned_view,
    perturb_driver,
    preview_regions,
    region_masks,
    region_points,
    regions_map,
)
from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Camera
from loki_jax.pipeline import LokiPipeline
from loki_jax.sources import load_driving_clip, load_portrait
from loki_jax.synthetic.clips import synth_clip
from tests.random_model import random_model
from tests.synthetic.synthetic_clips import write_clips

SIZE, FRAMES = 64, 3

pytestmark = pytest.mark.usefixtures("few_optimizations")


@pytest.fixture(scope="module")
def people():
    """Two people who perform one motion, each in a frame of their own."""
    head = builtin_head()
    made = []
    for seed in (1, 2):
        clip = synth_clip(head, seed, 7, FRAMES, SIZE)
        camera = Camera(*(np.tile(x, (FRAMES, *[1] * x.ndim)) for x in clip.camera))
        crop = np.tile(clip.crop, (FRAMES, 1))
        made.append(DriverFrames(clip.frames, clip.coefficients, camera, crop, crop))
    return head, *made


draw = jax.jit(lambda head, person: regions_map(head, person, SIZE))


def face(points, box):
    """Mean and size of a face's points in the normalised positions of a box."""
    points = 2 * (np.asarray(points) - box[0, :2]) / (box[0, 2:] - box[0, :2]) - 1
    flat = points.reshape(len(points), -1, 2)
    return flat.mean(1), flat.std(1).mean()


def test_masks_of_a_face_by_hand():
    """Four regions of known outline: an octagon's corners in a random order, soft at the edge."""
    centres = np.array([[-0.5, -0.3], [0.5, -0.3], [0, 0], [0, 0.5]])
    angles = 2 * np.pi * np.array([0, 3, 6, 1, 4, 7, 2, 5]) / 8
    points = centres[:, None] + 0.2 * np.stack([np.cos(angles), np.sin(angles)], -1)
    masks = np.asarray(region_masks(jnp.asarray(points, jnp.float32), 200))
    axis = (np.arange(200) + 0.5) / 100 - 1
    distance = np.hypot(axis[None] - centres[:, 0, None, None], axis[:, None] - centres[:, 1, None, None])
    size = np.sqrt(np.square(points - points.mean((0, 1))).sum(-1).mean())
    edge = 0.2 + 0.12 * size  # corners with the margin
    assert (masks[distance < edge * np.cos(np.pi / 8) - 0.06 * size] == 1).all()
    assert (masks[distance > edge + 0.06 * size] == 0).all()
    squares = np.asarray(region_masks(jnp.asarray(points, jnp.float32), 200, "square"))
    inside = squares > 0.5
    assert (inside.sum((1, 2)) == 50 * 50).all()  # a quarter of the side
    np.testing.assert_allclose(axis[inside[3].any(1)][[0, -1]], [0.255, 0.745], atol=1e-6)
    with pytest.raises(ValueError, match="unknown shape of regions 'disc'"):
        region_masks(jnp.asarray(points), 200, "disc")


def test_the_map_shows_eyes_nose_and_mouth_and_nothing_else(people):
    head, person, _ = people
    shown = np.asarray(draw(head, person))
    mask = shown[..., 3]
    assert shown.shape == (FRAMES, SIZE, SIZE, 4) and 0.02 < (mask > 0).mean() < 0.15
    pixels = person.image / 127.5 - 1
    np.testing.assert_allclose(shown[..., :3], mask[..., None] * pixels, atol=1e-5)
    points = np.asarray(region_points(head, person.coefficients, person.camera))
    assert points.shape == (FRAMES, len(REGIONS), 12, 2)
    middle = (points.mean(2) - person.crop[:, None, :2]) / (person.crop[:, 2:] - person.crop[:, :2])[:, None]
    at = np.floor(middle * SIZE).astype(int)
    assert all((mask[i, at[i, :, 1], at[i, :, 0]] == 1).all() for i in range(FRAMES))
    picture = np.asarray(preview_regions(shown))
    assert (picture[mask == 0] == 255).all()
    np.testing.assert_allclose(picture[mask == 1], person.image[mask == 1], atol=1)
    no_mesh = DriverInputs(*np.zeros((4, 0, 3)))
    with pytest.raises(ValueError, match="'regions' has no driver map of a head"):
        map_of_mesh(np.zeros((1, 3, 3)), np.ones(3, bool), no_mesh, SIZE, "regions")


def test_the_driver_takes_the_place_and_size_of_the_face_that_it_drives(people):
    head, driven, driver = people
    to, by = (region_points(head, person.coefficients, person.camera) for person in (driven, driver))
    view = np.asarray(aligned_view(to[:1], by[:1], driven.crop[:1]))
    (wanted, size), (found, same) = face(to[:1], driven.crop), face(by[:1], view)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert abs(same / size - 1) < 0.05  # the two faces have other proportions
    assert np.abs(face(by[:1], driver.crop)[0] - wanted).max() > 0.01
    # Whoever drives himself stays where he is.
    np.testing.assert_allclose(aligned_view(to, to, driven.crop), driven.crop, atol=1e-3)


def test_training_changes_colours_place_and_completeness_alike_in_all_frames(people):
    head, person, _ = people
    windows = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 16), person)
    keys = jax.random.split(jax.random.key(0), 16)
    perturb = jax.jit(perturb_driver)
    none = perturb(keys, windows, 0.0)
    np.testing.assert_allclose(none.image, windows.image / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(none.view, windows.view, atol=1e-3)
    assert (none.weights == 1).all()
    changed = perturb(keys, windows, 1.0)
    assert float(jnp.abs(changed.image).max()) <= 1
    side = windows.view[..., 2:] - windows.view[..., :2]
    shift = np.abs(np.asarray((changed.view - windows.view)[..., :2] / side))
    assert 0.02 < shift.max() < 0.08 and (changed.view == changed.view[:, :1]).all()
    assert 0 < (changed.weights == 0).mean() < 0.3 and (changed.weights == changed.weights[:, :1]).all()
    colours = np.asarray(changed.image).mean((1, 2, 3))
    assert colours.std(0).min() > 0.02
    # A lost region is gone from the map.
    lost = person._replace(weights=np.tile([1, 1, 1, 0], (FRAMES, 1)).astype(np.float32))
    full, without = (np.asarray(draw(head, p))[..., 3] for p in (person, lost))
    assert (without <= full).all() and 0.1 < 1 - without.sum() / full.sum() < 0.5


def test_an_animation_follows_the_drivers_pixels(people, tmp_path):
    """And has a driver's frames in its windows, with a history or without."""
    head = builtin_head()
    clips = write_clips(tmp_path / "shards", frames=5, size=32)
    changes = {
        "driver.arm": "regions", "history.frames": 1, "sample.pose": "absolute", "image_size": 32,
        "model.unet.multipliers": (1,), "model.unet.attention_modes": ("3d",),
        "model.unet.attention_levels": (0,), "model.reference.driver": False,
    }  # fmt: skip
    pipeline = LokiPipeline(random_model(**changes))
    portrait, clip = load_portrait(clips[0], head, 32), load_driving_clip(clips[1], head, 32)
    shown = list(pipeline.windows(portrait, clip, steps=1))
    frames, maps = (np.concatenate(part) for part in zip(*shown, strict=True))
    assert frames.shape == maps.shape == (5, 32, 32, 3)
    seen = (maps != 255).any(-1)
    assert 0.02 < seen.mean() < 0.2 and seen.any((1, 2)).all()
    other = pipeline(portrait, clip._replace(frames=255 - np.stack(list(clip.frames))), steps=1)
    assert (other != frames).mean() > 0.01
    with pytest.raises(ValueError, match="follows the driver's pixels"):
        pipeline(portrait, clip._replace(crop=None), steps=1)
    with pytest.raises(ValueError, match="controls and sliders do not"):
        pipeline(portrait, clip, steps=1, sliders={"smile": 1.0})
