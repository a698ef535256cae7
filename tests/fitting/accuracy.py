"""Clips of the built-in head with known coefficients, and errors of their fits from noisy landmarks."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.spatial.transform import Rotation

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.skinning import landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.fit import DEFAULT_SETTINGS, fit_landmarks, make_camera
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.problem import FitSettings
from loki_jax.metrics.hef import head_expression_follow
from loki_jax.metrics.hpf import head_pose_follow, head_rotation
from loki_jax.synthetic.appearance import sample_shape
from loki_jax.synthetic.motion import synth_motion

FRAME_SIZE = 512
FACE_HEIGHT = 256.0  # pixels between forehead (10) and chin (152)
LARGEST_YAW = 45.0
YAW_BINS = np.array([-45.0, -30.0, -15.0, 0.0, 15.0, 30.0, 45.0])
# First iris landmark of each eye: middle of its upper and lower lid, outer and inner corner.
EYES = {468: (159, 145, 33, 133), 473: (386, 374, 263, 362)}
LIMITS = {"pose": 0.5, "hpf": 0.3, "hef_ratio": 1 / 3, "gaze": 3.0}


def true_clip(head: HeadAsset, seed: int, frames: int) -> tuple[Coefficients, Camera]:
    """Coefficients of one person's clip, 1 m from the camera; its largest yaw is 45 degrees.

    The extrinsics are the identity, as the fit assumes, so that rotations can be compared as they are.
    """
    motion = synth_motion(head, seed, frames)
    stretch = np.deg2rad(LARGEST_YAW) / np.abs(motion.rot[:, 1] + motion.neck[:, 1]).max()
    rot, neck, tra = motion.rot.copy(), motion.neck.copy(), motion.tra.copy()
    rot[:, 1] *= stretch
    neck[:, 1] *= stretch
    tra[:, 2] -= 1.0
    shape = sample_shape(seed, head)
    identity = make_identity(head, jnp.asarray(shape))
    forehead, chin = np.asarray(landmark_positions(head, identity.vertices, LANDMARK_SET))[[10, 152]]
    focal = float(FACE_HEIGHT / np.linalg.norm(forehead - chin))
    coefficients = motion._replace(betas=np.tile(shape, (frames, 1)), rot=rot, neck=neck, tra=tra)
    return coefficients, make_camera((FRAME_SIZE, FRAME_SIZE), focal)


@jax.jit
def landmark_pixels(head: HeadAsset, coefficients: Coefficients, camera: Camera) -> Float[Array, "N 478 2"]:
    """Landmarks of the whole head in pixels, by the package's own functions and not the fit's."""
    world = world_vertices(head, make_identity(head, coefficients.betas[:1]), coefficients)
    marks = landmark_positions(head, world, LANDMARK_SET)
    return jax.vmap(lambda points: project(camera_from_world(points, camera), camera))(marks)


def observe(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, noise: float, seed: int
) -> tuple[Float[np.ndarray, "N 478 2"], Float[np.ndarray, "N 478"]]:
    """Noisy landmarks and their confidence: irises lose theirs where lids close."""
    points = np.asarray(landmark_pixels(head, coefficients, camera))
    noisy = points + noise * np.random.default_rng(seed).standard_normal(points.shape)
    confidence = np.ones(points.shape[:2], np.float32)
    for iris, (upper, lower, outer, inner) in EYES.items():
        opening = np.linalg.norm(points[:, upper] - points[:, lower], axis=-1)
        width = np.linalg.norm(points[:, outer] - points[:, inner], axis=-1)
        confidence[:, iris : iris + 5] = np.clip((opening / width - 0.08) / 0.1, 0, 1)[:, None]
    return noisy.astype(np.float32), confidence


def _forward(rotation: Rotation) -> Float[np.ndarray, "n 3"]:
    return rotation.apply([0.0, 0.0, 1.0])


def _yaw(rotation: Rotation) -> Float[np.ndarray, " n"]:
    forward = _forward(rotation)
    return np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))


def compare(
    head: HeadAsset,
    found: Coefficients,
    true: Coefficients,
    camera: Camera,
    open_eyes: Bool[np.ndarray, " N"],
    size: int,
    hef_frames: int,
) -> dict:
    """Errors of one fitted clip, angles in degrees; `hef_frames` frames are rendered for HEF."""
    follow = head_pose_follow(found.rot, true.rot, found.neck, true.neck)
    true_rotation = head_rotation(true.rot, true.neck)
    found_rotation = head_rotation(found.rot, found.neck)
    gaze = [Rotation.from_rotvec(c.eyes) for c in (found, true)]
    cosine = np.clip(np.sum(_forward(gaze[0]) * _forward(gaze[1]), -1), -1, 1)
    chosen = np.linspace(0, len(true.rot) - 1, min(hef_frames, len(true.rot))).round().astype(int)
    some = lambda c: Coefficients(*(np.asarray(field)[chosen] for field in c))
    target = some(true)
    still = Coefficients(*(np.zeros_like(field) for field in target))
    return {
        "pose": np.degrees((found_rotation.inv() * true_rotation).magnitude()),
        "hpf": follow.degrees,
        "hef": head_expression_follow(head, some(found), target, camera, size).distance,
        "hef_neutral": head_expression_follow(head, still, target, camera, size).distance,
        "gaze": np.degrees(np.arccos(cosine))[open_eyes],
        "yaw": _yaw(true_rotation),
        "yaw_error": _yaw(found_rotation) - _yaw(true_rotation),
    }


def summarise(clips: list[dict]) -> dict:
    """The figures named in this module's docstring, and `by_yaw`: (from, to, frames, pose, bias)."""
    keys = ("pose", "gaze", "yaw", "yaw_error")
    joined = {key: np.concatenate([clip[key] for clip in clips]) for key in keys}
    hef, hef_neutral = (float(np.mean([clip[key] for clip in clips])) for key in ("hef", "hef_neutral"))
    by_yaw = []
    for low, high in zip(YAW_BINS[:-1], YAW_BINS[1:], strict=True):
        inside = (joined["yaw"] >= low) & (joined["yaw"] < high)
        if inside.any():
            by_yaw.append(
                (float(low), float(high), int(inside.sum()), float(np.median(joined["pose"][inside])),
                 float(joined["yaw_error"][inside].mean()))
            )  # fmt: skip
    return {
        "pose": float(np.median(joined["pose"])),
        "pose_p95": float(np.quantile(joined["pose"], 0.95)),
        "hpf": float(np.median([clip["hpf"] for clip in clips])),
        "hef": hef,
        "hef_neutral": hef_neutral,
        "hef_ratio": hef / hef_neutral,
        "gaze": float(np.median(joined["gaze"])),
        "yaw_bias": {f"{low:.0f}..{high:.0f}": round(bias, 3) for low, high, _, _, bias in by_yaw},
        "worst_yaw_bias": float(max(abs(row[4]) for row in by_yaw)),
        "by_yaw": by_yaw,
    }


def measure(
    head: HeadAsset,
    identities: int,
    frames: int,
    noise: float = 0.5,
    guess_camera: bool = False,
    size: int = 256,
    hef_frames: int = 10,
    settings: FitSettings = DEFAULT_SETTINGS,
    log=lambda line: None,
) -> dict:
    """Fit `identities` clips of `frames` frames and compare; see this module's docstring."""
    clips, seconds = [], []
    for seed in range(identities):
        true, camera = true_clip(head, seed, frames)
        points, confidence = observe(head, true, camera, noise, seed)
        started = time.perf_counter()
        fitted = fit_landmarks(
            head, points, confidence, (FRAME_SIZE, FRAME_SIZE),
            focal=None if guess_camera else float(camera.intrinsics[0]), settings=settings,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
        open_eyes = confidence[:, list(EYES)].min(1) > 0.5
        clips.append(compare(head, fitted.coefficients, true, camera, open_eyes, size, hef_frames))
        last = clips[-1]
        log(
            f"person {seed}: pose {np.median(last['pose']):.2f}, HPF {last['hpf']:.2f}, "
            f"HEF {last['hef']:.4f} of {last['hef_neutral']:.4f}, gaze {np.median(last['gaze']):.2f}, "
            f"{fitted.iterations} steps, {seconds[-1]:.1f} s"
        )
    result = summarise(clips)
    result["seconds_a_clip"] = float(np.median(seconds))
    return result
