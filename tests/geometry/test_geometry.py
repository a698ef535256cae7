"""The geometry renderer on painted heads, whose true renders are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.skinning import head_vertices, landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Coefficients
from loki_jax.fitting.clips import clip_crop_box
from loki_jax.fitting.fit import make_camera
from loki_jax.geometry.align import align, aligned_identity, openings
from loki_jax.geometry.motion import TURN_LIMIT, limit_motion, make_rig
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.geometry.renderer import make_scene, render_frames
from loki_jax.metrics.image import psnr
from loki_jax.sources import Portrait
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.shading import render

SIZE = 224
HEAD = jax.tree.map(jnp.asarray, builtin_head())
CAMERA = jax.tree.map(jnp.asarray, make_camera((SIZE, SIZE)))


def coefficients(**fields):
    """The mean head, facing the camera, filling most of the picture; fields replace those of the rest."""
    still = {name: jnp.zeros(3) for name in ("rot", "neck", "jaw", "eyes")}
    still |= {"betas": jnp.zeros(HEAD.n_shape), "expression": jnp.zeros(HEAD.n_expression)}
    return Coefficients(**still | {"tra": jnp.array([0.0, 0.0, -0.95])} | fields)


def expression(**axes):
    values = np.zeros(HEAD.n_expression, np.float32)
    for name, value in axes.items():
        values[HEAD.expression_names.index(name)] = value
    return jnp.asarray(values)


def stack(*frames):
    return jax.tree.map(lambda *x: jnp.stack(x), *frames)


@pytest.fixture(scope="module")
def appearance():
    return jax.tree.map(jnp.asarray, sample_appearance(3, HEAD))


@pytest.fixture(scope="module")
def draw(appearance):
    """True renders of coefficients (n, ...), uint8."""
    identity = make_identity(HEAD, jnp.zeros(HEAD.n_shape))
    box = jnp.array([0.0, 0.0, SIZE, SIZE])

    @jax.jit
    def frame(one, look):
        return jnp.round(255 * render(HEAD, identity, one, CAMERA, box, look, SIZE)).astype(jnp.uint8)

    return lambda frames, look=appearance: np.stack(
        [np.asarray(frame(jax.tree.map(lambda x, k=k: x[k], frames), look)) for k in range(len(frames.rot))]
    )


@pytest.fixture(scope="module")
def portrait(draw):
    own = coefficients()
    crop = clip_crop_box(HEAD, stack(own), CAMERA)
    picture = draw(stack(own))[0]
    return Portrait(picture, own, CAMERA, crop, "painted", picture)


@pytest.fixture(scope="module")
def animate(portrait):
    scene, layout = make_scene(
        HEAD, portrait.picture, portrait.coefficients, CAMERA, portrait.crop, portrait.landmarks
    )

    def frames(*targets):
        # Always as many, so that one program serves all tests.
        filled = (*targets, *[targets[-1]] * (4 - len(targets)))
        return np.asarray(render_frames(HEAD, scene, stack(*filled), layout))[: len(targets)]

    return frames


def marks(one):
    world = world_vertices(HEAD, make_identity(HEAD, one.betas), one)
    return np.asarray(
        project(camera_from_world(landmark_positions(HEAD, world, "mediapipe478"), CAMERA), CAMERA)
    )


def inside_head(picture, crop):
    x0, y0, x1, y1 = np.asarray(crop).astype(int)
    margin = (x1 - x0) // 8
    return picture[max(0, y0 + margin) : y1 - margin, max(0, x0 + margin) : x1 - margin]


def test_without_motion_the_portrait_comes_back(portrait, animate):
    (frame,) = animate(portrait.coefficients)
    assert float(psnr(frame, portrait.picture)) >= 45


@pytest.mark.parametrize(
    "name, target",
    [
        ("turned", coefficients(rot=jnp.array([0.0, 0.25, 0.0]))),
        ("nodding", coefficients(rot=jnp.array([0.15, 0.0, 0.1]))),
        ("smiling", coefficients(expression=expression(mouthSmileLeft=0.8, mouthSmileRight=0.8))),
    ],
)
def test_frames_are_near_the_true_renders(portrait, animate, draw, name, target):
    """Closer to the truth than the still portrait, by a margin, inside the box of the head."""
    (frame,) = animate(target)
    (truth,) = draw(stack(target))
    ours = float(psnr(inside_head(frame, portrait.crop), inside_head(truth, portrait.crop)))
    still = float(psnr(inside_head(portrait.picture, portrait.crop), inside_head(truth, portrait.crop)))
    assert ours > still + {"turned": 2.5, "nodding": 2.5, "smiling": 2.0}[name], (ours, still)


def test_the_border_stays_and_nothing_is_white(portrait, animate):
    far = coefficients(tra=jnp.array([0.1, -0.08, -0.95]))
    near = coefficients(tra=jnp.array([-0.08, 0.08, -0.8]), rot=jnp.array([0.1, 0.4, 0.2]))
    for frame in animate(far, near):
        for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            # Along the border the picture may move, but nothing comes across it.
            shown, own = frame[border].astype(int), portrait.picture[border].astype(int)
            nearest = np.abs(shown[:, None] - own[None]).sum(-1).min(1)
            assert nearest.max() <= 36  # summed over channels: values between those of neighbours occur
        # Shoulders are still; where the picture is squeezed it is smoothed.
        change = np.abs(frame[-1].astype(int) - portrait.picture[-1].astype(int))
        assert change.mean() < 2 and change.max() <= 48
        assert frame.max() <= int(portrait.picture.max()) + 3


def test_lids_close_with_skin(portrait, animate):
    shut = coefficients(expression=expression(eyeBlinkLeft=1.0, eyeBlinkRight=1.0))
    (frame,) = animate(shut)
    skin = frame[tuple(np.flip(marks(shut)[6].astype(int)))].astype(float)  # between the eyes
    for iris in (468, 473):
        x, y = marks(portrait.coefficients)[iris].astype(int)
        open_eye = portrait.picture[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
        closed = frame[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
        assert np.abs(closed - skin).sum() < 0.6 * np.abs(open_eye - skin).sum()


def test_gaze_moves_the_iris(portrait, animate):
    aside = coefficients(eyes=jnp.array([0.0, 0.35, 0.0]))
    (frame,) = animate(aside)
    change = np.abs(frame.astype(int) - portrait.picture.astype(int)).sum(-1)
    eyes = marks(portrait.coefficients)[[468, 473]]
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    distance = min(
        (np.hypot(columns - x, rows - y) for x, y in eyes), key=lambda d: -change[d < 5].sum()
    )  # fmt: skip
    assert change[distance < 6].mean() > 10
    far = np.min([np.hypot(columns - x, rows - y) for x, y in eyes], axis=0) > 14
    assert change[far].max() <= 2


def test_reflections_stay_where_gaze_moves_the_iris(portrait):
    """A lamp's reflection, painted on both irises, is left where it was."""
    picture = portrait.picture.copy()
    places = marks(portrait.coefficients)[[468, 473]].astype(int)
    for x, y in places:
        picture[y - 1 : y + 1, x - 1 : x + 1] = 255
    scene, layout = make_scene(HEAD, picture, portrait.coefficients, CAMERA, portrait.crop, None)
    targets = stack(*[coefficients(eyes=jnp.array([0.0, 0.3, 0.0]))] * 4)
    frame = np.asarray(render_frames(HEAD, scene, targets, layout))[0].astype(float).mean(-1)
    for x, y in places:
        around = frame[y - 6 : y + 6, x - 8 : x + 8]
        row, column = np.unravel_index(np.argmax(around), around.shape)
        assert around.max() > 170 and abs(row - 5.5) <= 1.5 and abs(column - 7.5) <= 1.5


@pytest.mark.slow
def test_the_skin_is_relit_as_the_head_turns(portrait, draw, appearance):
    """With a lamp from the side a turned head is nearer to its true render."""
    side = np.array([0.8, 0.2, 0.56], np.float32)
    lamp = appearance._replace(light=jnp.asarray(side), ambient=jnp.full(3, 0.35), diffuse=jnp.full(3, 0.75))
    target = coefficients(rot=jnp.array([0.0, -0.4, 0.0]))
    picture, truth = draw(stack(portrait.coefficients, target), lamp)
    score = []
    for relight in (False, True):
        scene, layout = make_scene(HEAD, picture, portrait.coefficients, CAMERA, portrait.crop, None, relight)
        # As many as in the other tests, so that programs are shared.
        targets = stack(portrait.coefficients, *[target] * 3)
        back, frame, *_ = np.asarray(render_frames(HEAD, scene, targets, layout))
        assert float(psnr(back, picture)) >= 45
        score.append(float(psnr(inside_head(frame, portrait.crop), inside_head(truth, portrait.crop))))
    assert score[1] > score[0] + 0.5, score


def test_parted_lips_show_teeth_before_the_dark(portrait, animate):
    wide = coefficients(jaw=jnp.array([0.35, 0.0, 0.0]))
    (frame,) = animate(wide)
    points = marks(wide)
    (x, top), (_, bottom) = points[13], points[14]
    column = frame[int(top) + 1 : int(bottom), int(x)].astype(float).mean(-1)
    assert len(column) > 5
    assert column[:2].max() > 1.5 * column[2:].min()


def test_turns_are_limited_softly():
    identity = make_identity(HEAD, jnp.zeros(HEAD.n_shape))
    own = coefficients()
    rig = make_rig(HEAD, identity, own, CAMERA, clip_crop_box(HEAD, stack(own), CAMERA))
    angles = [0.05, 0.3, 0.7, 1.4]
    found = [
        float(jnp.linalg.norm(limit_motion(
            rig, own, coefficients(rot=jnp.array([0.0, a, 0.0])), CAMERA, jnp.array([SIZE, SIZE], jnp.float32)
        ).rot)) for a in angles
    ]  # fmt: skip
    assert np.isclose(found[0], 0.05, rtol=1e-3) and np.isclose(found[1], 0.3, rtol=0.02)
    assert found[1] < found[2] < found[3] < TURN_LIMIT


def test_the_head_moves_onto_landmarks_and_still_shuts():
    own = coefficients()
    identity = make_identity(HEAD, own.betas)
    rng = np.random.default_rng(0)
    seen = marks(own).copy()
    # A picture whose eyes are taller and whose features are a little elsewhere.
    for upper, lower in ((159, 145), (386, 374)):
        seen[upper, 1] -= 0.5
        seen[lower, 1] += 0.5
    seen = seen + rng.normal(0, 0.2, (1, 2))
    alignment = align(HEAD, identity, own, CAMERA, seen)
    moved = aligned_identity(HEAD, identity, alignment, own)
    world = world_vertices(HEAD, moved, own)
    found = np.asarray(
        project(camera_from_world(landmark_positions(HEAD, world, "mediapipe478"), CAMERA), CAMERA)
    )
    before = np.abs(marks(own) - seen)[[159, 145, 386, 374, 1, 61]].mean()
    assert np.abs(found - seen)[[159, 145, 386, 374, 1, 61]].mean() < 0.35 * before
    shut = coefficients(expression=expression(eyeBlinkLeft=1.0, eyeBlinkRight=1.0))
    closed = openings(HEAD, head_vertices(HEAD, aligned_identity(HEAD, identity, alignment, shut), shut))
    assert (np.asarray(closed)[1:] < 0.0015).all()


def test_an_open_mouth_closes_where_a_fit_of_closed_lips_stops_short():
    wide = coefficients(jaw=jnp.array([0.3, 0.0, 0.0]))
    identity = make_identity(HEAD, wide.betas)
    seen = marks(wide).copy()
    seen[[82, 13, 312], 1] -= 0.5  # opened a little wider than the head opens it
    seen[[87, 14, 317], 1] += 0.5
    alignment = align(HEAD, identity, wide, CAMERA, seen)
    nearly = coefficients(jaw=jnp.array([0.02, 0.0, 0.0]))
    apart = lambda identity: 1000 * np.asarray(openings(HEAD, head_vertices(HEAD, identity, nearly)))[0]
    assert 0.7 < apart(identity) < 1.4  # mm
    assert apart(aligned_identity(HEAD, identity, alignment, nearly)) < 0.35


@pytest.mark.slow
def test_only_the_part_around_the_head_changes_in_a_large_picture(portrait):
    wide = np.full((480, 640, 3), 90, np.uint8)
    wide[100 : 100 + SIZE, 200 : 200 + SIZE] = portrait.picture
    camera = CAMERA._replace(intrinsics=CAMERA.intrinsics + jnp.array([0.0, 0.0, 200.0, 100.0]))
    large = portrait._replace(
        picture=wide, camera=camera, crop=portrait.crop + np.array([200, 100, 200, 100], np.float32)
    )
    target = stack(coefficients(rot=jnp.array([0.0, 0.2, 0.0])))
    (frame,) = GeometryPipeline(HEAD).prepare(large)(target)
    assert frame.shape == wide.shape
    changed = np.abs(frame.astype(int) - wide.astype(int)).sum(-1) > 0
    assert changed[100:260, 200:360].mean() > 0.2
    assert not changed[:, 520:].any() and not changed[400:].any()
