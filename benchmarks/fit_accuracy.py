"""How exact the fit is: clips of the built-in head with known coefficients, fitted from noisy landmarks.

    python benchmarks/fit_accuracy.py [--quick] [--identities 20] [--frames 50] [--noise 0.5]

Every clip is another person, moved as in `data_prep.synth` (40 % of the turn in the neck, which the fit does
not know of), its yaw stretched to 45 degrees. All 478 landmarks are projected with a face 256 pixels high,
Gaussian noise of `--noise` pixels is added to x and y, and irises lose their confidence where lids close,
as the landmarker does it. The camera is given unless `--guess-camera`: then the fit takes its default field
of view, which is not the true one.

Printed: a table by yaw, the limits, and as the last line one JSON object. Angles in degrees. `pose`: median
over all frames of the angle between true and found head rotation R(rot) R(neck); `hpf`: median over clips of
the frame-0-anchored mean; `hef_ratio`: HEF of the fit over HEF of the neutral face, both against the truth;
`gaze`: median angle between true and found gaze in the head, eyes open; `yaw_bias`: mean signed yaw error in
each bin of true yaw, of which the largest is `worst_yaw_bias`. Under a minute on 2 idle cores.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.face.builtin import builtin_head
from tests.fitting.accuracy import LIMITS, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 people, 16 frames")
    parser.add_argument("--identities", type=int, default=20)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.5, help="pixels, in x and in y")
    parser.add_argument("--guess-camera", action="store_true", help="the fit's default field of view")
    args = parser.parse_args()
    identities, frames = (4, 16) if args.quick else (args.identities, args.frames)
    result = measure(
        builtin_head(), identities, frames, args.noise, args.guess_camera,
        log=lambda line: print(line, flush=True),
    )  # fmt: skip
    print("true yaw        frames  pose error  mean signed yaw error")
    for low, high, count, pose, bias in result.pop("by_yaw"):
        print(f"{low:4.0f} to {high:4.0f} deg  {count:6d}  {pose:10.2f}  {bias:+.2f}")
    for name, limit in LIMITS.items():
        verdict = "kept" if result[name] < limit else "MISSED"
        print(f"{name}: {result[name]:.3f}, limit {limit:.3f}: {verdict}")
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
