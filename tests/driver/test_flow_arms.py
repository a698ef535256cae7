"""The arms that read the portrait: what their maps hold, that they train and animate, what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.data.schema import DatasetError
from loki_jax.data.writer import write_dataset
from loki_jax.driver import ReferenceFrame, driver_map
from loki_jax.driver.flow_map import FLOW_SCALE
from loki_jax.driver.registry import find_arm
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import make_identity, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import head_flow, normalise_positions, pixel_positions
from loki_jax.pipeline import LokiPipeline
from loki_jax.sources import load_driving_clip, load_portrait
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.shading import render
from loki_jax.train import train
from tests.training.tiny_run import SIZE, noise_clips, tiny_config, write_shards

S = 64
HEAD = builtin_head()
CAMERA = Camera(jnp.array([500.0, 500.0, 200.0, 200.0]), jnp.eye(4))

pytestmark = pytest.mark.usefixtures("few_optimizations")


def turned(yaw, frames=()):
    zeros = lambda n: jnp.zeros((*frames, n))
    return Coefficients(
        betas=zeros(HEAD.n_shape), expression=zeros(HEAD.n_expression),
        rot=jnp.broadcast_to(jnp.array([0.0, yaw, 0.0]), (*frames, 3)),
        tra=jnp.broadcast_to(jnp.array([0.0, 0.0, -0.7]), (*frames, 3)),
        neck=zeros(3), jaw=zeros(3), eyes=zeros(3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    """Identity, crop, a portrait with its picture, and the painted head as it is drawn."""
    identity, portrait = make_identity(HEAD, jnp.zeros(HEAD.n_shape)), turned(0.1)
    points = camera_from_world(world_vertices(HEAD, identity, portrait), CAMERA)
    crop = crop_box(project(points, CAMERA)[mesh_render_mask(HEAD)], 1.4)
    appearance = sample_appearance(3, HEAD)
    paint = jax.jit(lambda c: render(HEAD, identity, c, CAMERA, crop, appearance, S))
    image = jnp.round(255 * paint(portrait)).astype(jnp.uint8)
    return identity, crop, ReferenceFrame(portrait, CAMERA, crop, image), paint


def draw(scene, coefficients, arm):
    identity, crop, reference, _ = scene
    run = jax.jit(lambda c, r: driver_map(HEAD, identity, c, CAMERA, crop, S, arm, reference=r))
    return np.asarray(run(coefficients, reference))


def test_maps_hold_the_full_map_and_the_flow(scene):
    identity, crop, reference, _ = scene
    moved = jax.tree.map(lambda *x: jnp.stack(x), turned(-0.2), turned(0.3))
    flow_arm, warp_arm = draw(scene, moved, "flow"), draw(scene, moved, "warp")
    assert flow_arm.shape == (2, S, S, 48) and warp_arm.shape == (2, S, S, 51)
    np.testing.assert_allclose(flow_arm[..., :45], draw(scene, moved, "full"), atol=1e-6)
    np.testing.assert_allclose(warp_arm[..., :48], flow_arm, atol=1e-5)
    run = jax.jit(lambda c, r: head_flow(HEAD, identity, r.coefficients, c, CAMERA, crop, CAMERA, crop, S))
    flow = run(moved, reference)
    places = normalise_positions(flow.position, crop)
    np.testing.assert_allclose(flow_arm[..., 45:47] * FLOW_SCALE, places - pixel_positions(S), atol=1e-5)
    # Hidden within 3 mm: one unit in the last place of a depth of 0.7 m (6e-8 m) moves visibility by 3e-5.
    error = np.abs(flow_arm[..., 47] - flow.visibility)
    assert error.max() < 6e-5 and np.mean(error > 1e-5) < 1e-3
    background = (flow_arm[..., :45] == 0).all(-1)
    assert 0.2 < background.mean() < 0.9 and not flow_arm[background].any()


def test_the_portrait_itself_has_no_displacement_and_its_own_colours(scene):
    _, _, reference, _ = scene
    shown = draw(scene, reference.coefficients, "warp")
    assert np.abs(shown[..., 45:47]).max() * FLOW_SCALE * S / 2 < 1e-4  # pixels
    known = shown[..., 47] > 0.999
    colour = np.asarray(reference.image, np.float32) / 127.5 - 1
    np.testing.assert_allclose(shown[known][:, 48:], colour[known], atol=2e-3)
    assert known.mean() > 0.2


def test_the_warped_portrait_resembles_what_is_drawn_there(scene):
    """In colour and place: closer to the truth than the still portrait is, also where no head is."""
    _, _, reference, paint = scene
    target = turned(-0.15)
    shown = draw(scene, target, "warp")
    truth = 2 * np.asarray(paint(target)) - 1
    still = np.asarray(reference.image, np.float32) / 127.5 - 1
    seen = shown[..., 47] > 0.9
    error = lambda picture, where: np.abs(picture - truth)[where].mean()
    assert error(shown[..., 48:], seen) < 0.5 * error(still, seen)
    nobody = (shown[..., :45] == 0).all(-1) & (shown[..., 48:] != 0).all(-1)
    assert nobody.mean() > 0.05
    np.testing.assert_allclose(shown[nobody][:, 48:], still[nobody], atol=2e-3)


def test_previews(scene):
    moved = turned(-0.2)
    for arm in ("flow", "warp"):
        driver = draw(scene, moved, arm)
        picture = np.asarray(find_arm(arm).preview(jnp.asarray(driver)))
        assert picture.shape == (S, S, 3) and picture.dtype == np.uint8 and picture.std() > 10
        if arm == "warp":
            np.testing.assert_array_equal(picture, np.round(127.5 * (driver[..., 48:] + 1)).astype(np.uint8))
        else:
            assert (picture[(driver == 0).all(-1)] == 255).all()


def test_a_portrait_or_pixels_that_are_not_given_are_named(scene):
    identity, crop, reference, _ = scene
    given = (HEAD, identity, turned(0.0), CAMERA, crop, S)
    with pytest.raises(ValueError, match="arm 'flow' reads the portrait, which is not given"):
        driver_map(*given, "flow")
    with pytest.raises(ValueError, match="arm 'warp' reads the portrait's pixels"):
        driver_map(*given, "warp", reference=reference._replace(image=None))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("arms") / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["flow", "warp"])
def test_arms_train_animate_and_show_their_preview(arm, shards, tmp_path):
    changes = {"driver__arm": arm, "validation__every": 1, "sample__every": 1, "sample__video": False}
    assert np.isfinite(train(tiny_config(shards, steps=1, **changes), tmp_path))
    pipeline = LokiPipeline.from_checkpoint(tmp_path)
    portrait = load_portrait(f"{shards}:clip1", pipeline.head, SIZE)
    clip = load_driving_clip(f"{shards}:clip2", pipeline.head, SIZE)
    windows = list(pipeline.windows(portrait, clip, steps=1))
    frames, pictures = (np.concatenate(part) for part in zip(*windows, strict=True))
    assert frames.shape == pictures.shape == (len(clip.frames), SIZE, SIZE, 3)
    assert pictures.std() > 5


def write_latents(path, images):
    clips = noise_clips(HEAD, latents=0.5)
    write_dataset(path, HEAD, (c if images else dataclasses.replace(c, images=None) for c in clips), SIZE)
    return path


def test_an_arm_that_reads_pixels_refuses_shards_of_latents_alone(tmp_path):
    shards = write_latents(tmp_path / "latents", images=False)
    with pytest.raises(DatasetError, match="holds latents only, and driver arm 'warp' reads pixels"):
        train(tiny_config(shards, steps=1, driver__arm="warp"), tmp_path / "warp")


@pytest.mark.slow
@pytest.mark.parametrize("arm, images", [("flow", False), ("warp", True)])
def test_arms_train_on_latents(arm, images, tmp_path):
    shards = write_latents(tmp_path / "latents", images)
    assert np.isfinite(train(tiny_config(shards, steps=1, driver__arm=arm), tmp_path / "run"))
