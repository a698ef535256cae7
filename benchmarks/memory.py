"""Peak memory of the programs that read videos, on 10 s and on 60 s of 1920 x 1080.

    python benchmarks/memory.py --clip CLIP.mp4 [--programs build evaluate animate] [--seconds 10 60]

CLIP, a short clip of a face, is repeated forwards and backwards (no cut) and scaled to 1920 x 1080 at 25
frames a second. `build` makes a dataset with overlays of 256 pixels; `evaluate` compares the clip with
itself, with a floor and with PSNR; `animate` drives its own first picture by the geometry renderer. The
built-in head throughout. The figure is the peak resident memory of the largest process of each run; the
last line of the output is one JSON object. Needs the landmark models (`python -m data_prep.fetch_models`).

On two cores about 15 minutes for `build` and `evaluate`; `--seconds 4 12` gives a first idea.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from loki_jax.video import read_video, write_video  # noqa: E402

SIZE = 1920, 1080
FPS = 25


def make_clip(source: Path, seconds: int, path: Path) -> None:
    """`source` forwards and backwards, scaled."""
    frames = read_video(source).frames
    order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    shown = (
        cv2.resize(frames[order[k % len(order)]], SIZE, interpolation=cv2.INTER_CUBIC)
        for k in range(FPS * seconds)
    )
    write_video(path, shown, Fraction(FPS), synthetic=False, crf=23)


def command(program: str, clip: Path, picture: Path, out: Path) -> list[str]:
    arguments = {
        "build": ["data_prep.build", "--clips", clip, "--head", "builtin", "--workers", "1",
                  "--out", out / "shards"],
        "evaluate": ["loki_jax.evaluate", "--video", clip, "--driver", clip, "--truth", clip, "--out", out],
        "animate": ["loki_jax.animate", "--reference", picture, "--driver", clip, "--checkpoint", "geometry",
                    "--out", out / "animated.mp4"],
    }  # fmt: skip
    return [sys.executable, "-m", *map(str, arguments[program])]


def peak_mib(arguments: list[str]) -> float:
    """Peak resident memory of a program, or of the largest process that it waited for."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(arguments)}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument(
        "--programs", nargs="+", default=["build", "evaluate"], choices=["build", "evaluate", "animate"]
    )
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 60])
    args = parser.parse_args()
    peaks: dict[str, list[float]] = {program: [] for program in args.programs}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "portrait.png"
        cv2.imwrite(str(picture), read_video(args.clip, 1).frames[0][..., ::-1])
        for seconds in args.seconds:
            clip = Path(folder) / f"{seconds}.mp4"
            make_clip(args.clip, seconds, clip)
            for program in args.programs:
                out = Path(folder) / f"{program}_{seconds}"
                out.mkdir()
                peaks[program].append(round(peak_mib(command(program, clip, picture, out))))
                print(f"{program}, {seconds} s: {peaks[program][-1]} MiB", flush=True)
    print(json.dumps({"seconds": args.seconds, "peak_mib": peaks}))


if __name__ == "__main__":
    main()
