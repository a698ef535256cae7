"""How well real portraits follow real clips by geometry alone, and how fast.

    python benchmarks/geometry.py --portraits PICTURES... --clips CLIPS... [--frames 24] [--sheets FOLDER]
    python benchmarks/geometry.py --only pairs|self|speed|all ...

Twenty fixed pairs of the sorted portraits and clips. Every pair is animated, at `--frames` times spread
over the clip, or at all of them (0), which the fit smooths at their own rate. The head is fitted to the
result by landmarks, and HPF and HEF against the clip are those of the result over those of the portrait as
it is (`still`). `aligned_hpf` does not depend on the noise of the first frame, to which HPF is relative.
`self`: each clip drives its own most frontal frame; PSNR and SSIM inside the box of the head, beside those
of that frame (`still`) and of that frame moved by a similarity onto the eyes, nose and mouth of each frame
(`aligned`). `speed`: 512 x 512, compiled, milliseconds a frame, beside cv2.remap of the same picture and
the landmark networks; and the peak memory after 6 and after 60 seconds of a clip. `all`, only where it is
named: every portrait with every clip, one contact sheet a portrait in `--sheets`. The last line is one JSON
object.

`--rows FILE` keeps the rows of `pairs` and `self` as they are measured, one JSON object a line; a run that is
started again goes on where the last one stopped. Delete the file when the code has changed.
"""

import argparse
import functools
import json
import resource
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.builtin import builtin_head
from loki_jax.face.crop import crop_and_resize
from loki_jax.fitting.clips import default_landmarker, fit_video, head_extent
from loki_jax.fitting.tracking import clip_landmarks
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.metrics.hef import head_expression_follow
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.metrics.image import psnr, ssim
from loki_jax.sources import DrivingClip, Portrait, fit_portrait

PAIRS = 20
# Eye corners, nose, corners of the mouth: what the similarity of `aligned` is fitted to.
ANCHORS = [33, 133, 263, 362, 1, 61, 291]


def spread(length: int, count: int) -> np.ndarray:
    """Indices of `count` frames spread over a clip, of all for 0."""
    count = count or length
    return np.unique(np.linspace(0, length - 1, count).round().astype(int))


def fitted_clip(path, head, count):
    """The clip, fitted as a whole and reduced to frames spread over it: fit, frames, landmarks."""
    fitted = fit_video(path, head)
    index = spread(len(fitted.frames), count)
    coefficients = jax.tree.map(lambda x: x[index], fitted.fit.coefficients)
    frames = np.stack([fitted.frames[i] for i in index])
    return fitted, coefficients, frames, fitted.track.points[index, :, :2]


def driving(fitted, coefficients, frames) -> DrivingClip:
    valid = np.ones(len(frames), bool)
    return DrivingClip(
        frames[:, :1, :1], coefficients, fitted.fit.camera, fitted.fps, valid, None, fitted.name
    )


def follow(head, fitted, coefficients, prediction, repeat):
    """HPF, HPF after alignment and HEF of fitted coefficients against a clip; `repeat`: of one frame's."""
    if repeat:
        prediction = jax.tree.map(lambda x: np.repeat(x[None], len(coefficients.rot), 0), prediction)
    pose = head_pose_follow(prediction.rot, coefficients.rot, prediction.neck, coefficients.neck)
    hef = head_expression_follow(head, prediction, coefficients, fitted.fit.camera, size=256).distance
    return {"hpf": pose.degrees, "aligned_hpf": pose.aligned_degrees, "hef": hef}


class Rows:
    """Rows of a table, kept in a file so that an interrupted run goes on."""

    def __init__(self, path):
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.done = {json.loads(line)["row"]: json.loads(line) for line in lines}

    def __call__(self, name, measure):
        """The row `name`: a dictionary, measured unless it is there already."""
        if name not in self.done:
            self.done[name] = {"row": name, **measure()}
            if self.path:
                with self.path.open("a") as file:
                    print(json.dumps(self.done[name]), file=file)
        row = self.done[name]
        print(
            " ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True
        )
        return row


def measure_pairs(args, pipeline):
    head, rows = pipeline.head, Rows(args.rows)
    portrait_of = functools.cache(lambda path: fit_portrait(str(path), head, 512))
    clip_of = functools.cache(lambda path: fitted_clip(path, head, args.frames))

    def measure(picture, path):
        portrait = portrait_of(picture)
        fitted, coefficients, frames, _ = clip_of(path)
        result = pipeline(portrait, driving(fitted, coefficients, frames))
        # The fit expects motion to be smooth: frames apart in time are frames of a slower clip.
        rate = fitted.fps * len(frames) / len(fitted.frames)
        again = fit_video(result, head, fps=rate, name=portrait.name)
        ours = follow(head, fitted, coefficients, again.fit.coefficients, False)
        still = follow(head, fitted, coefficients, portrait.coefficients, True)
        if args.sheets:
            name = f"{Path(picture).stem}_{Path(path).stem}.jpg"
            write_sheet(args.sheets / name, [frames, result])
        return ours | {f"still_{name}": value for name, value in still.items()}

    portraits, clips = sorted(args.portraits), sorted(args.clips)
    table = []
    for k in range(PAIRS):
        pair = portraits[k % len(portraits)], clips[(3 * k + k // len(portraits)) % len(clips)]
        name = " x ".join(Path(path).stem for path in pair)
        table.append(rows(name, lambda pair=pair: measure(*pair)))
    ratio = lambda name: float(np.median([row[name] / row[f"still_{name}"] for row in table]))
    median = lambda name: float(np.median([row[name] for row in table]))
    worse = [row["row"] for row in table
             if row["hpf"] > row["still_hpf"] or row["hef"] > row["still_hef"]]  # fmt: skip
    names = ("hpf", "aligned_hpf", "hef")
    return {
        **{f"median_{still}{name}": median(f"{still}{name}") for name in names for still in ("", "still_")},
        **{f"{name}_share": ratio(name) for name in names},
        "worse_than_still": worse,
    }


def measure_all(args, pipeline):
    """Every portrait with every clip; the sheets are for the eye, numbers only say that none failed."""
    clips = [fitted_clip(path, pipeline.head, args.frames) for path in sorted(args.clips)]
    failed = []
    for picture in sorted(args.portraits):
        sheet = args.sheets / f"{Path(picture).stem}.jpg"
        if sheet.exists():
            continue
        portrait = fit_portrait(str(picture), pipeline.head, 512)
        results = []
        for fitted, coefficients, frames, _ in clips:
            try:
                results.append(pipeline(portrait, driving(fitted, coefficients, frames)))
            except Exception as error:  # the purpose is to count them
                failed.append(f"{portrait.name} x {fitted.name}: {error!r}")
        write_sheet(sheet, results, height=200)
        print(sheet, flush=True)
    return {"failed": failed}


def write_sheet(path, videos, columns=8, height=256):
    """Videos below each other, at times spread over each."""
    shrink = lambda x: Image.fromarray(x).resize((round(x.shape[1] * height / x.shape[0]), height))
    rows = [
        np.concatenate([np.asarray(shrink(video[i])) for i in spread(len(video), columns)], axis=1)
        for video in videos
    ]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def similarity(source, target):
    """The 2 x 3 similarity that takes points to points, least squares."""
    x, y = source - source.mean(0), target - target.mean(0)
    product = (x[:, 0] - 1j * x[:, 1]) @ (y[:, 0] + 1j * y[:, 1]) / (x**2).sum()
    matrix = np.array([[product.real, -product.imag], [product.imag, product.real]])
    return np.concatenate([matrix, (target.mean(0) - matrix @ source.mean(0))[:, None]], axis=1)


def measure_self(args, pipeline):
    head, rows = pipeline.head, Rows(args.rows)

    def measure(path):
        fitted, coefficients, frames, points = fitted_clip(path, head, args.frames)
        first = int(np.argmin(np.linalg.norm(coefficients.rot[:, :2], axis=1)))
        one = jax.tree.map(lambda x, first=first: x[first], coefficients)
        picture = frames[first]
        portrait = Portrait(
            picture[:1, :1], one, fitted.fit.camera, fitted.crop, fitted.name, picture, points[first]
        )
        result = pipeline(portrait, driving(fitted, coefficients, frames), mode="absolute")
        size = picture.shape[1::-1]
        aligned = np.stack([
            cv2.warpAffine(picture, similarity(points[first, ANCHORS], p[ANCHORS]), size,
                           flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE) for p in points
        ])  # fmt: skip
        still = np.broadcast_to(picture, frames.shape)
        low, high = head_extent(head, coefficients, fitted.fit.camera)
        others = [i for i in range(len(frames)) if i != first]
        row = {}
        for name, video in (("still", still), ("aligned", aligned), ("ours", result)):
            boxes = [np.concatenate([low[i], high[i]]) for i in others]
            seen, truth = (
                np.stack([crop_and_resize(v[i], box, 256) for i, box in zip(others, boxes, strict=True)])
                for v in (video, frames)
            )
            row[f"{name}_psnr"] = float(np.mean(psnr(seen, truth)))
            row[f"{name}_ssim"] = float(np.mean(ssim(seen, truth)))
        return row

    table = [rows(f"self {Path(path).stem}", lambda path=path: measure(path)) for path in sorted(args.clips)]
    mean = lambda key: float(np.mean([row[key] for row in table]))
    keys = [key for key in table[0] if key != "row"]
    beaten = sum(
        row["ours_psnr"] > max(row["still_psnr"], row["aligned_psnr"])
        and row["ours_ssim"] > max(row["still_ssim"], row["aligned_ssim"])
        for row in table
    )
    return {**{f"self_{key}": mean(key) for key in keys}, "self_clips_better": f"{beaten} of {len(table)}"}


def best_time(work, repeats=5):
    """Shortest time of several, seconds."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_speed(args, pipeline):
    path = sorted(args.portraits)[0]
    picture = np.asarray(Image.open(path).convert("RGB").resize((512, 512)))
    portrait = fit_portrait(picture, pipeline.head, 512)
    fitted, coefficients, frames, _ = fitted_clip(sorted(args.clips)[0], pipeline.head, 32)
    repeated = lambda n: driving(
        fitted,
        jax.tree.map(lambda x: np.resize(x, (n, *x.shape[1:])), coefficients),
        np.zeros((n, 1, 1, 3), np.uint8),
    )
    animate = pipeline.prepare(portrait)
    target = jax.tree.map(lambda x: np.resize(x, (16, *x.shape[1:])), coefficients)
    ours = best_time(lambda: animate(target)) / 16
    x, y = np.meshgrid(np.arange(512, dtype=np.float32), np.arange(512, dtype=np.float32))
    remap = best_time(lambda: [cv2.remap(picture, x + 0.3, y + 0.3, cv2.INTER_CUBIC) for _ in range(8)]) / 8
    video = np.repeat(picture[None], 8, 0)
    networks = best_time(lambda: clip_landmarks(default_landmarker(), video), 3) / 8
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory = []
    for length in (round(6 * fitted.fps), round(60 * fitted.fps)):
        for _ in pipeline.windows(portrait, repeated(length)):
            pass
        memory.append(peak())
    return {
        "ms_frame": 1e3 * ours, "frames_a_second": 1 / ours, "ms_remap_cubic": 1e3 * remap,
        "ms_landmarks": 1e3 * networks, "peak_mib_6_s": memory[0], "peak_mib_60_s": memory[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--portraits", nargs="+", required=True)
    parser.add_argument("--clips", nargs="+", required=True)
    parser.add_argument("--frames", type=int, default=24, help="of each clip")
    parser.add_argument("--only", choices=("pairs", "self", "speed", "all"))
    parser.add_argument("--sheets", type=Path, help="folder for a contact sheet of each pair")
    parser.add_argument("--rows", type=Path, help="file that keeps the rows")
    args = parser.parse_args()
    if args.only == "all" and not args.sheets:
        parser.error("--only all needs --sheets")
    enable_compile_cache()
    pipeline = GeometryPipeline(builtin_head())
    parts = {"speed": measure_speed, "self": measure_self, "pairs": measure_pairs}
    result = {}
    if args.only == "all":
        result = measure_all(args, pipeline)
    for name, measure in parts.items():
        if args.only in (None, name):
            result |= measure(args, pipeline)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
