"""How much of a head's turn the fit finds: rendered heads in known poses, through the landmark networks.

    python benchmarks/pose_response.py [--ict ict_head5k.npz] [--people 3] [--plot PICTURE.png]

People on the built-in head, and on the ICT head if its arrays are given, are rendered as clips that turn from
-35 to 35 degrees about one axis at a time (yaw, pitch, roll). The networks mark the frames, `fit_landmarks`
fits them with the true focal length, and a line is fitted to the found angle against the true one within 30
degrees. Printed: the slope of each axis, mean and range over people, with and without the correction of the
network's bias (`loki_jax.fitting.pose_bias`), and as the last line one JSON object. The ICT head gets its
landmarks as in `python -m data_prep.head_asset ict`. 3 minutes on 2 cores.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from data_prep.landmarks.embed import paint, with_landmarks
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import NAME, builtin_head
from loki_jax.face.ict import head_from_ict
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import fetch_models
from loki_jax.fitting.tracking import Track, clip_landmarks
from loki_jax.synthetic.appearance import Appearance, sample_appearance, sample_shape
from tools.landmark_bias import SIZE, Posed, RawLandmarker, pose_person

AXES = {"pitch": 0, "yaw": 1, "roll": 2}
ANGLES = np.arange(-35.0, 36.0, 5.0)  # degrees
STRAIGHT = np.abs(ANGLES) <= 30  # where the slope is taken


def person_of(head: HeadAsset, seed: int) -> tuple[Float[np.ndarray, " n_shape"], Appearance]:
    """Shape and appearance of a person on any head with known landmarks."""
    if head.name == NAME:
        return sample_shape(seed, head), sample_appearance(seed, head)
    betas = np.clip(np.random.default_rng(seed).standard_normal(head.n_shape), -2, 2)
    return betas.astype(np.float32), paint(head, seed)


def turning_person(head: HeadAsset, seed: int, axis: str) -> Posed:
    """A person of `head` who turns about one axis through `ANGLES`."""
    rot = np.zeros((len(ANGLES), 3))
    rot[:, AXES[axis]] = np.radians(ANGLES)
    return pose_person(head, *person_of(head, seed), rot)


def found_angles(head: HeadAsset, person: Posed, track: Track, axis: str) -> Float[np.ndarray, " n"]:
    """The fitted angle about the axis in each frame, degrees."""
    focal = float(person.camera.intrinsics[0])
    fit = fit_landmarks(head, track.points, track.confidence, (SIZE, SIZE), focal=focal)
    yaw, pitch, roll = Rotation.from_rotvec(fit.coefficients.rot).as_euler("YXZ", degrees=True).T
    return {"yaw": yaw, "pitch": pitch, "roll": roll}[axis]


def response(head: HeadAsset, landmarkers: dict[str, Landmarker], people: range) -> dict:
    """{landmarker: {axis: found angles (people, angles)}}."""
    curves = {name: {axis: [] for axis in AXES} for name in landmarkers}
    for seed in people:
        for axis in AXES:
            person = turning_person(head, seed, axis)
            for name, landmarker in landmarkers.items():
                track = clip_landmarks(landmarker, person.frames)
                curves[name][axis].append(found_angles(head, person, track, axis))
    return curves


def slope(found: Float[np.ndarray, " n"]) -> float:
    """Slope of the line through the found angles against the true ones within 30 degrees."""
    return float(np.polyfit(ANGLES[STRAIGHT], found[STRAIGHT], 1)[0])


def plot(path: Path, curves: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(curves), 3, figsize=(9, 3.1 * len(curves)), squeeze=False, sharex=True)
    for row, (head, by_landmarker) in zip(rows, curves.items(), strict=True):
        for cell, axis in zip(row, ("yaw", "pitch", "roll"), strict=True):
            cell.plot(ANGLES, ANGLES, color="0.7", linewidth=1, label="true")
            for colour, (name, found) in zip(("tab:red", "tab:blue"), by_landmarker.items(), strict=True):
                cell.plot(ANGLES, np.mean(found[axis], axis=0), color=colour, linewidth=1.5, label=name)
                for person in found[axis]:
                    cell.plot(ANGLES, person, color=colour, linewidth=0.5, alpha=0.5)
            cell.set_title(f"{head}: {axis}", fontsize=9)
            cell.tick_params(labelsize=7)
    rows[0][0].legend(fontsize=7)
    rows[0][0].set_ylabel("found (degrees)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ict", type=Path, help="ICT-FaceKit arrays (.npz)")
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="picture of the curves to write")
    args = parser.parse_args()
    enable_compile_cache()
    models = fetch_models()
    landmarkers = {"as marked": RawLandmarker(models), "corrected": Landmarker(models)}
    heads = [builtin_head()]
    if args.ict is not None:
        heads.append(with_landmarks(head_from_ict(args.ict), landmarkers["as marked"])[0])
    curves = {head.name: response(head, landmarkers, range(1, 1 + args.people)) for head in heads}
    result = {}
    print(f"{'head':10}{'landmarks':12}" + "".join(f"{axis:>22}" for axis in AXES))
    for head, by_landmarker in curves.items():
        for name, found in by_landmarker.items():
            slopes = {axis: [slope(person) for person in found[axis]] for axis in AXES}
            result[f"{head}, {name}"] = {axis: float(np.mean(values)) for axis, values in slopes.items()}
            cells = (f"{np.mean(v):.3f} ({min(v):.2f} to {max(v):.2f})" for v in slopes.values())
            print(f"{head:10}{name:12}" + "".join(f"{cell:>22}" for cell in cells))
    if args.plot is not None:
        plot(args.plot, curves)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
