"""How long a frame takes from its arrival to the picture on the page of `python -m loki_jax.live`.

    python benchmarks/live.py --reference PORTRAIT --video CLIP [--size 384] [--seconds 20]

The clip is played at its rate, again and again, while a browser's stream is read. Frames that come while one
is in work are dropped, not queued. The first frames, which the shape is learnt from, do not count. Printed: a
table of the parts of a frame; as the last line one JSON object: milliseconds of latency (median, 95th, 99th
percentile), frames shown a second, share of frames dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.fitting.clips import default_landmarker
from loki_jax.geometry.live import LiveAnimator
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.sources import fit_portrait
from loki_jax.video import read_image
from loki_jax.video.image import reduce_picture
from loki_jax.video.latest import LatestFrame, played_frames
from loki_jax.video.page import Page


def browse(address: str) -> None:
    """Read the stream as a browser does, until it ends."""
    with urllib.request.urlopen(address + "stream") as stream:
        while stream.read(1 << 14):
            pass


def measure(reference: str, video: str, size: int, seconds: float) -> dict[str, object]:
    """Run for `seconds`; latencies and parts of frames in milliseconds."""
    pipeline, landmarker = GeometryPipeline(), default_landmarker()
    picture = reduce_picture(read_image(reference), size)
    portrait = fit_portrait(picture, pipeline.head, pipeline.size, landmarker=landmarker)
    animator = LiveAnimator(pipeline, portrait, landmarker)
    latencies, parts = [], []
    with Page(0) as page, LatestFrame(played_frames(video, loop=True)) as reader:
        threading.Thread(target=browse, args=(page.address,), daemon=True).start()
        began, before = None, (0, 0)
        for frame in reader:
            shown = animator(frame.image, frame.seconds)
            drawn = time.perf_counter()
            page.show(shown, animator.state)
            done = time.perf_counter()
            if animator.state != "following":
                continue
            if began is None:  # the first frame after the shape was learnt
                began, before = done, (reader.read, reader.dropped)
                continue
            latencies.append(done - frame.seconds)
            parts.append({**animator.spent, "page": done - drawn})
            if done > began + seconds:
                break
        came, dropped = reader.read - before[0], reader.dropped - before[1]
    columns = {name: 1000 * np.median([part[name] for part in parts]) for name in parts[0]}
    p50, p95, p99 = 1000 * np.percentile(latencies, (50, 95, 99))
    return {
        "size": f"{shown.shape[1]}x{shown.shape[0]}",
        "frames": len(latencies),
        "fps": round(len(latencies) / (done - began), 1),
        "dropped": round(dropped / max(came, 1), 3),
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "parts_ms": {name: round(value, 1) for name, value in columns.items()},
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", required=True)
    parser.add_argument("--video", required=True)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    enable_compile_cache()
    found = measure(options.reference, options.video, options.size, options.seconds)
    for name, value in found["parts_ms"].items():
        print(f"{name:12}{value:8.1f} ms")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
