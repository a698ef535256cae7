"""Kill the build of a dataset at random moments, run it again, and compare with an undisturbed one.

    python benchmarks/build_kills.py [--quick] [--kills 20] [--clips FILES...] [--head HEAD] [--workers 2]

Without --clips, small clips of synthetic heads are made, one of them cut off in the middle. The build is
`python -m data_prep.build` in a process of its own. SIGKILL hits the program alone or it and all its
processes, at a moment drawn evenly over the time of an undisturbed run; every fourth time while the
shards are being written. It is started again until it completes; then a new dataset is begun, until all
kills are done. Every completed dataset must equal the undisturbed one in the bytes of all files, and no
clip with a work file may be fitted again. Needs the landmark models (`python -m data_prep.fetch_models`).
The last line of the output is one JSON object with `identical`, `lost` and `twice`.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_clips(folder: Path, identities: int, frames: int, size: int = 224) -> list[Path]:
    """Videos of synthetic heads, and a truncated one."""
    from loki_jax.face.builtin import builtin_head
    from loki_jax.synthetic.clips import synth_clip
    from loki_jax.video.writer import write_video

    head, paths = builtin_head(), []
    for i in range(identities):
        clip = synth_clip(head, 700 + i, 7000 + i, frames, size)
        paths.append(folder / f"synthetic{i}.mp4")
        write_video(paths[-1], clip.frames, 25)
    data = paths[0].read_bytes()
    paths.append(folder / "truncated.mp4")
    paths[-1].write_bytes(data[: len(data) // 2])
    return paths


def command(clips: list[Path], head: str, out: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, "-m", "data_prep.build", "--head", head, "--out", str(out), "--size", "128"),
        *("--overlay", "64", "--workers", str(workers), "--clips", *map(str, clips)),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for the seconds that the clips took."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "seconds.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def work_files(out: Path) -> int:
    """Clips that are done, fitted or rejected."""
    folder = out.with_name(f"{out.name}.work")
    return len({p.stem for p in folder.glob("*.npz")} | {p.stem for p in folder.glob("*.json")})


def wait_for_writing(process: subprocess.Popen, out: Path) -> None:
    while process.poll() is None and not list(out.parent.glob(f".{out.name}.*.partial")):
        time.sleep(0.002)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clips", nargs="+", type=lambda text: Path(text).resolve(), help="videos to build from"
    )
    parser.add_argument("--head", default="builtin")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--identities", type=int, default=6, help="synthetic clips, where none are given")
    parser.add_argument("--frames", type=int, default=24, help="frames of a synthetic clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="4 kills of 3 clips")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.identities, args.frames = 4, 3, 16
    rng = random.Random(args.seed)
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory(prefix="build_kills.") as scratch:
        scratch = Path(scratch)
        clips = args.clips or make_clips(scratch, args.identities, args.frames)
        head = str(Path(args.head).resolve()) if Path(args.head).exists() else args.head

        def start(out: Path) -> subprocess.Popen:
            # Output to a file: a pipe would keep orphans waiting.
            with (scratch / "log").open("w") as log:
                return subprocess.Popen(
                    command(clips, head, out, args.workers), cwd=root, env=environment, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

        begun = time.monotonic()
        if start(scratch / "undisturbed").wait() != 0:
            print((scratch / "log").read_text())
            raise SystemExit("the undisturbed build failed, see above")
        duration = time.monotonic() - begun
        expected = contents(scratch / "undisturbed")
        n_clips = len(json.loads(expected["clips.json"]))
        print(f"undisturbed: {n_clips} clips accepted, {duration:.1f} s, {len(expected)} files")

        kills = rounds = twice = lost = killed_writing = 0
        identical = True
        begun = time.monotonic()
        while kills < args.kills or rounds == 0:
            out = scratch / "killed" / "out"
            out.parent.mkdir()
            while True:
                done_before = work_files(out)
                process = start(out)
                if kills < args.kills:
                    if kills % 4 == 3:
                        wait_for_writing(process, out)
                        time.sleep(rng.uniform(0, 0.2))
                        killed_writing += process.poll() is None
                    else:
                        try:
                            process.wait(rng.uniform(0, duration))
                        except subprocess.TimeoutExpired:
                            pass
                    if process.poll() is None:
                        whole_group = rng.random() < 0.5
                        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
                        process.wait()
                        kills += 1
                        print(
                            f"kill {kills}/{args.kills}: "
                            f"{'all processes' if whole_group else 'the program'}, "
                            f"{work_files(out)} of {len(clips)} clips done, "
                            f"{time.monotonic() - begun:.0f} s", flush=True,
                        )  # fmt: skip
                        lost += work_files(out) < done_before and not out.exists()
                        continue
                code, log = process.wait(), (scratch / "log").read_text()
                # Clips done before are not among those worked on.
                worked = re.findall(r"^\[\d+/(\d+)\] ", log, re.MULTILINE)
                twice += max(0, len(worked) - (len(clips) - done_before)) if done_before else 0
                if code != 0:
                    print(log)
                    raise SystemExit("the build failed after kills, see above")
                break
            rounds += 1
            found = contents(out)
            left = [path.name for path in out.parent.iterdir() if path != out]
            differing = [
                name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
            ]
            lost += n_clips - len(json.loads(found["clips.json"]))
            identical &= not differing and not left
            print(
                f"round {rounds}: {'identical' if not differing else f'{differing} differ'}; left over: "
                f"{left or 'nothing'}"
            )
            shutil.rmtree(out.parent)
    result = {
        "kills": kills, "killed_writing": killed_writing, "rounds": rounds, "clips": n_clips,
        "identical": identical, "lost": lost, "twice": twice, "undisturbed_seconds": round(duration, 1),
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if identical and not lost and not twice else 1


if __name__ == "__main__":
    sys.exit(main())
