"""A portrait that follows frames as they come; a stand-in for the renderer keeps what it was asked for."""

import jax
import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.face.controls import Controls
from loki_jax.geometry.live import FIRST, LiveAnimator
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.sources import fit_portrait
from tests.fitting.known_face import KnownFace, N, frames_showing, true_coefficients, true_points


class Painter(GeometryPipeline):
    """Keeps the coefficients that it was asked to draw, and draws nothing."""

    def prepare(self, portrait, relight=False, grid=None):
        self.drawn = []

        def render(target):
            self.drawn.append(jax.tree.map(lambda x: np.asarray(x)[0], target))
            return np.full((1, 8, 8, 3), len(self.drawn), np.uint8)

        return render


@pytest.fixture(scope="module")
def known():
    head = builtin_head()
    return head, KnownFace(true_points(head, true_coefficients(head)))


@pytest.fixture
def live(known):
    head, networks = known
    painter = Painter(head)
    portrait = fit_portrait(frames_showing([0])[0], head, 64, landmarker=networks)
    animator = LiveAnimator(painter, portrait, networks, controls=Controls(ease=0.2))
    painter.drawn.clear()
    return painter, portrait, animator


def play(animator, indices, start=0.0):
    """Show frames at 25 a second; the pictures' numbers."""
    frames = frames_showing(indices)
    return [int(animator(f, start + 0.04 * i)[0, 0, 0]) for i, f in enumerate(frames)]


def test_the_first_frames_are_learnt_and_then_followed(known, live):
    head, _ = known
    painter, portrait, animator = live
    assert play(animator, [-1, -1]) == [1, 1] and animator.state == "no face"
    play(animator, [0] * (FIRST - 1), 0.08)
    assert animator.state == "learning" and not painter.drawn
    play(animator, [0], 0.64)
    # The neutral pose is the portrait's own; then the head turns as the driver's does.
    play(animator, range(N), 0.68)
    assert animator.state == "following" and len(painter.drawn) == N
    np.testing.assert_allclose(painter.drawn[0].rot, portrait.coefficients.rot, atol=np.radians(0.5))
    true = true_coefficients(head)
    turned = np.degrees([each.rot[1] for each in painter.drawn]) - np.degrees(painter.drawn[0].rot[1])
    np.testing.assert_allclose(turned, np.degrees(true.rot[:, 1]), atol=2)
    assert animator.spent["fit"] > 0 and animator.spent["render"] > 0


def test_a_lost_face_is_held_and_eased_back(live):
    painter, _, animator = live
    play(animator, [0] * FIRST)
    before = play(animator, [8, 8, 8], 0.64)[-1]
    held = painter.drawn[-1]
    assert play(animator, [-1] * 10, 0.76) == [before] * 10 and animator.state == "lost"
    play(animator, [2] * 8, 1.16)
    yaw = [each.rot[1] for each in painter.drawn[-8:]]
    assert abs(yaw[0] - held.rot[1]) < 0.1 * abs(yaw[-1] - held.rot[1])  # no jump
    assert (np.diff(yaw) * np.sign(yaw[-1] - yaw[0]) > -1e-3).all()


def test_controls_change_at_any_time_and_recentre_makes_a_new_neutral_pose(live):
    painter, portrait, animator = live
    play(animator, [0] * FIRST)
    play(animator, [9], 0.64)
    assert np.degrees(painter.drawn[-1].rot[1] - portrait.coefficients.rot[1]) > 10
    animator.recentre()
    play(animator, [9], 0.68)
    np.testing.assert_allclose(painter.drawn[-1].rot, portrait.coefficients.rot, atol=np.radians(1.5))
    animator.sliders["yaw"] = 20.0
    play(animator, [9], 0.72)
    assert np.degrees(painter.drawn[-1].rot[1] - painter.drawn[-2].rot[1]) == pytest.approx(20, abs=2)
    animator.controls = Controls(pose=0.0)
    animator.sliders.clear()
    play(animator, [9], 0.76)
    np.testing.assert_array_equal(painter.drawn[-1].rot, portrait.coefficients.rot)


def test_a_portrait_without_landmarks_is_refused(known, live):
    with pytest.raises(ValueError, match="has no landmarks"):
        LiveAnimator(Painter(known[0]), live[1]._replace(landmarks=None), known[1])
