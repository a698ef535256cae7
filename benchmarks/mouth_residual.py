"""How well a fitted head explains the mouth of real clips, before and after refinement by pixels.

    python benchmarks/mouth_residual.py --head HEAD.npz [--frames 64] CLIP.mp4 ...

Points of the head's surface keep their colour: at each point near the lips the colour in a frame is compared
with the point's median over the clip. Printed for each clip: the mean absolute difference in grey levels of
the points that are seen, for the landmark fit and after `loki_jax.fitting.refine`, and the same for the rest
of the face. The last line is one JSON object. Colours of the picture are compared, not the contrast that the
refinement works with.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.asset import HeadAsset, load_head
from loki_jax.face.skinning import landmark_positions, template_vertices
from loki_jax.fitting.clips import FittedClip, default_landmarker, fit_track
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.refine import PhotometricSettings, face_pictures, point_views, refine, surface_points
from loki_jax.fitting.solver import surface_looks
from loki_jax.fitting.tracking import clip_landmarks
from loki_jax.video import read_video

_MOUTH = (61, 291, 0, 17)  # corners, middles of the lips
_REACH = 0.035  # metres from the middle of the mouth


def residuals(clip: FittedClip, head: HeadAsset) -> tuple[float, float]:
    """Mean absolute difference in grey levels at the mouth, and on the rest of the face."""
    settings = PhotometricSettings()
    points, _ = surface_points(head, settings.spacing)
    pictures, corner, scale = face_pictures(clip, settings)
    pixels, facing = point_views(
        head, points, clip.fit.coefficients, clip.fit.camera, corner, scale, settings.size
    )
    looks = np.asarray(surface_looks(jnp.asarray(pictures), jnp.asarray(corner), scale, pixels))
    seen = np.asarray(facing) > 0.3
    often = seen.mean(0) > 0.5
    looks, seen = looks[:, often], seen[:, often]
    usual = np.nanmedian(np.where(seen[..., None], looks, np.nan), axis=0)
    difference = np.abs(looks - usual).mean(-1)
    vertices = np.asarray(template_vertices(head))
    middle = np.asarray(landmark_positions(head, jnp.asarray(vertices), LANDMARK_SET))[list(_MOUTH)].mean(0)
    place = np.einsum("mk,mkc->mc", points.bary, vertices[np.asarray(head.faces)[points.face]])[often]
    mouth = np.linalg.norm(place - middle, axis=-1) < _REACH
    return tuple(float(difference[:, part][seen[:, part]].mean()) for part in (mouth, ~mouth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", type=Path, required=True, help="head asset with MediaPipe landmarks")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("clips", type=Path, nargs="+")
    args = parser.parse_args()
    enable_compile_cache()
    head, landmarker, result = load_head(args.head), default_landmarker(), {}
    print(f"{'clip':32}{'mouth':>20}{'rest of the face':>20}")
    for path in args.clips:
        video = read_video(path)
        frames = video.frames[: args.frames]
        track = clip_landmarks(landmarker, frames, name=str(path))
        before = fit_track(frames, video.fps, track, head, name=str(path))
        pairs = zip(residuals(before, head), residuals(refine(before, head), head), strict=True)
        result[path.stem] = list(pairs)
        print(f"{path.stem:32}" + "".join(f"{a:11.2f} -> {b:5.2f}" for a, b in result[path.stem]), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
