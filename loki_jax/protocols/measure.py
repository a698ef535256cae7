"""One animation measured: a row of metrics.jsonl (docs/evaluation.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from loki_jax.evaluation import image_scores, measure_following
from loki_jax.face.asset import HeadAsset
from loki_jax.face.motion_file import Motion, without_identity, write_motion
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import fit_video
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.problem import FitError
from loki_jax.fitting.tracking import image_landmarks
from loki_jax.metrics.blendshapes import (
    BlendshapeReading,
    CanonicalFace,
    blendshape_distance,
    load_canonical_face,
    read_blendshapes,
)
from loki_jax.metrics.gaze import gaze_error
from loki_jax.metrics.hpf import head_pose_follow, head_rotation
from loki_jax.metrics.identity import Embed, cosine_similarity, embedding_distance
from loki_jax.metrics.temporal import flicker, landmark_jitter, root_mean_square, rotation_jitter
from loki_jax.pictures import resize_frames
from loki_jax.protocols.inputs import driver_file, reference_file, true_motion, truth_file
from loki_jax.protocols.manifest import Manifest, Sample
from loki_jax.video import LazyFrames, read_image

_EMBEDDED = 8  # frames of a clip, spread over it, that the identity network sees
_KEPT = 32  # drivers

Compare = Callable[[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]], float]
Describe = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, " d"]]


class Tools(NamedTuple):
    """What measures; None: this is not measured.

    Attributes:
      head, landmarker: the estimator of pose and expression.
      hef_size: edge of HEF's renders in pixels.
      embed: the identity network.
      second: networks and face model of MediaPipe's `face_landmarker.task`, a second estimator.
      lpips: distance of two pictures.
      describe: features of a video, for FVD.
    """

    head: HeadAsset
    landmarker: Landmarker
    hef_size: int = 512
    embed: Embed | None = None
    second: tuple[Landmarker, CanonicalFace] | None = None
    lpips: Compare | None = None
    describe: Describe | None = None


class Reading(NamedTuple):
    """A head as the estimators read it from a video.

    Attributes:
      coefficients, camera, valid: of the fit, or exact of a rendered driver.
      embeddings: of up to 8 frames that show the face.
      second: what MediaPipe reads.
      trembling: root mean square jitter of the landmarks, % of the outer eye distance.
    """

    coefficients: Coefficients
    camera: Camera
    valid: Bool[np.ndarray, " n"]
    embeddings: Float[np.ndarray, "k d"] | None
    second: BlendshapeReading | None
    trembling: float | None

    def motion(self, head: HeadAsset, fps: Any) -> Motion:
        """What a motion file keeps of it."""
        own = without_identity(head, self.coefficients, self.camera)
        return Motion(own, self.camera, fps, self.valid, np.zeros(0, np.int64), 0)


class Judge:
    """Measures the animations of a manifest's samples, whoever made them.

    Drivers and portraits are read once and kept.
    """

    def __init__(self, manifest: Manifest, folder: Path, tools: Tools):
        self.manifest, self.folder, self.tools = manifest, folder, tools
        self.driver = functools.lru_cache(_KEPT)(self._driver)
        self._reference = functools.lru_cache(_KEPT)(self._embed_reference)
        self.driver_features = functools.lru_cache(None)(self._driver_features)

    def measure(
        self, sample: Sample, video: Path, motion_file: Path | None = None
    ) -> tuple[dict[str, Any], Float[np.ndarray, " d"] | None]:
        """The row of an animation, and its features for FVD.

        A video without a face is a row with `failed` true and track rate 0. Frames without the face, or that
        the video lacks, count in `track_rate`.

        Args:
          motion_file: where to keep the motion that was read.

        Raises:
          MediaError: the video cannot be read.
        """
        tools, target = self.tools, self.driver(sample.driver)
        length = self.manifest.sources[sample.driver].frames
        frames = LazyFrames(video, self.manifest.fps)
        frames = self._sized(frames[: min(length, len(frames))])
        row: dict[str, Any] = {
            "sample": sample.name, "protocol": sample.protocol, "reference": sample.reference,
            "driver": sample.driver, "frames": length, "failed": False,
        }  # fmt: skip
        try:
            reading = self.read(frames, sample.name)
        except (LandmarkError, FitError) as error:
            row |= {"failed": True, "why": str(error), "track_rate": 0.0}
        else:
            row |= self._followed(reading, target)
            if reading.embeddings is not None and target.embeddings is not None:
                row |= self._identity(reading.embeddings, sample, target.embeddings)
            if reading.second is not None and target.second is not None:
                row |= _second_opinion(reading.second, target.second)
            if motion_file is not None:
                write_motion(motion_file, tools.head, reading.motion(tools.head, self.manifest.fps))
        row["flicker"] = _mean(flicker(frames))
        truth = truth_file(self.manifest, self.folder, sample)
        if truth is not None:
            row |= self._compared(frames, LazyFrames(truth))
        features = None
        if tools.describe is not None:
            features = tools.describe(np.stack(list(frames)))
        return row, features

    def read(self, frames: LazyFrames, name: str) -> Reading:
        """The head in a video.

        Raises:
          LandmarkError, FitError: no face.
        """
        tools = self.tools
        fitted = fit_video(
            frames, tools.head, fps=self.manifest.fps, landmarker=tools.landmarker,
            all_shots=True, allow_lost=True, name=name,
        )  # fmt: skip
        found = np.asarray(fitted.track.score) >= 0.5
        embeddings = second = None
        if tools.embed is not None:
            chosen = _spread(np.flatnonzero(found))
            embeddings = np.stack([tools.embed(fitted.frames[i], fitted.track.points[i]) for i in chosen])
        if tools.second is not None:
            second = read_blendshapes(*tools.second, fitted.frames, fitted.track.points, found)
        valid = np.asarray(fitted.fit.confidence) > 0
        trembling = root_mean_square(landmark_jitter(fitted.track.points, found))
        return Reading(fitted.fit.coefficients, fitted.fit.camera, valid, embeddings, second, trembling)

    def _driver(self, source: str) -> Reading:
        """A driver as the target: read by the same estimators, or exact where it was rendered."""
        reading = self.read(LazyFrames(driver_file(self.folder, source)), source)
        if self.manifest.sources[source].file:
            return reading
        coefficients, camera = true_motion(self.tools.head, self.manifest.sources[source])
        return reading._replace(
            coefficients=coefficients, camera=camera, valid=np.ones(len(reading.valid), bool)
        )

    def _sized(self, frames: LazyFrames) -> LazyFrames:
        """All systems are seen at the manifest's size."""
        size = self.manifest.size
        if frames[0].shape[0] == size:
            return frames
        return frames.map(lambda frame: resize_frames(frame[None], size)[0])

    def _followed(self, reading: Reading, target: Reading) -> dict[str, Any]:
        following = measure_following(
            self.tools.head, reading.coefficients, target.coefficients, target.camera, self.tools.hef_size,
            reading.valid, target.valid, reading.camera,
        )  # fmt: skip
        pose, expression = following
        seen = np.isfinite(pose.per_frame)
        length = min(len(reading.valid), len(target.valid))
        common = reading.valid[:length] & target.valid[:length]
        turns = head_rotation(reading.coefficients.rot, reading.coefficients.neck)
        hef = np.full(len(seen), np.nan)
        hef[seen] = expression.per_frame
        return following.scores() | {
            "track_rate": pose.track_rate,
            "failed": pose.degrees is None,
            "hef_uncovered": expression.uncovered,
            "gaze": _mean(gaze_error(reading.coefficients, target.coefficients, common)),
            "rotation_jitter": root_mean_square(rotation_jitter(turns.as_rotvec(), reading.valid)),
            "landmark_jitter": reading.trembling,
            "per_frame": {"hpf": _json_numbers(pose.per_frame), "hef": _json_numbers(hef)},
        }

    def _identity(
        self, shown: Float[np.ndarray, "k d"], sample: Sample, driver: Float[np.ndarray, "m d"]
    ) -> dict[str, float]:
        own, other = self._reference(sample.reference), driver.mean(0)
        scores = {
            "identity_cosine": cosine_similarity(shown, own),
            "identity_distance": embedding_distance(shown, own),
            "driver_distance": embedding_distance(shown, other),
        }
        return {name: float(values.mean()) for name, values in scores.items()}

    def _embed_reference(self, source: str) -> Float[np.ndarray, " d"]:
        tools = self.tools
        if tools.embed is None:
            raise ValueError("no identity network")
        picture = read_image(reference_file(self.folder, source))
        return tools.embed(picture, image_landmarks(tools.landmarker, picture, 0, source).points[0])

    def _compared(self, frames: LazyFrames, truth: LazyFrames) -> dict[str, float | None]:
        if frames[0].shape != truth[0].shape:
            return {}
        scores: dict[str, float | None] = image_scores(frames, truth).means()
        if self.tools.lpips is not None:
            pairs = zip(frames, truth, strict=False)
            scores["lpips"] = float(np.mean([self.tools.lpips(*pair) for pair in pairs]))
        return scores

    def _driver_features(self, source: str) -> Float[np.ndarray, " d"]:
        if self.tools.describe is None:
            raise ValueError("no network for features")
        return self.tools.describe(np.stack(list(LazyFrames(driver_file(self.folder, source)))))


def _second_opinion(reading: BlendshapeReading, target: BlendshapeReading) -> dict[str, float | None]:
    pose = head_pose_follow(
        reading.rotation, target.rotation, pred_valid=reading.valid, target_valid=target.valid
    )
    distance = blendshape_distance(reading.scores, target.scores)
    return {"blendshapes": _mean(distance), "mediapipe_hpf": pose.degrees}


def _mean(values: Float[np.ndarray, " n"]) -> float | None:
    """Of the frames that could be judged."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _spread(indices: np.ndarray) -> Sequence[int]:
    at = np.linspace(0, len(indices) - 1, min(_EMBEDDED, len(indices))).round().astype(int)
    return [int(index) for index in indices[at]]


def _json_numbers(values: Float[np.ndarray, " n"]) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]


def load_tools(
    head: HeadAsset,
    landmarker: Landmarker,
    hef_size: int = 512,
    identity: bool | Path = True,
    task: Path | None = None,
    lpips: bool = True,
    fvd: bool = False,
) -> Tools:
    """The networks that are asked for, from the user's cache, fetched on first use.

    Args:
      identity: dlib's network, or an ONNX file of ArcFace; False: none.
      task: MediaPipe's `face_landmarker.task`, for its expression scores and head pose.
      lpips: LPIPS (AlexNet), where truth exists.
      fvd: features of I3D.

    Raises:
      IdentityError, DownloadError, LandmarkError: a network cannot be had.
    """
    import jax

    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.metrics import fvd as i3d
    from loki_jax.metrics.identity import load_arcface, load_identity
    from loki_jax.metrics.lpips import load_lpips
    from loki_jax.metrics.lpips import lpips as distance

    tools = Tools(head, landmarker, hef_size)
    if identity:
        tools = tools._replace(
            embed=load_arcface(identity) if isinstance(identity, Path) else load_identity()
        )
    if task is not None:
        tools = tools._replace(second=(default_landmarker(task), load_canonical_face(task)))
    if lpips:
        network, compare = load_lpips(), jax.jit(distance)
        tools = tools._replace(lpips=lambda one, other: float(compare(network, one, other)))
    if fvd:
        weights = i3d.load_i3d()
        tools = tools._replace(describe=lambda video: i3d.i3d_features(weights, video[None])[0])
    return tools
