"""Memory does not grow with the length of a video."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from loki_jax.video import write_video

PROGRAM = """
import gc, resource, sys
gc.disable()  # pictures that refer to themselves would be freed at some time, or not
from loki_jax.video import LazyFrames, frames as module
module._KEPT_BYTES = 20 * 2**20
frames = LazyFrames(sys.argv[1])
for times in range(2):  # once for landmarks, once for crops
    total = sum(int(frame[0, 0, 0]) for frame in frames)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    """60 s of 320 x 240 take as much as 10 s. All frames would be 346 MB and 58 MB."""
    peak = {}
    picture = np.tile(np.arange(320, dtype=np.uint8)[:, None], (240, 1, 3))
    for seconds in (10, 60):
        path = tmp_path / f"{seconds}.mp4"
        write_video(path, (np.roll(picture, k, 1) for k in range(25 * seconds)), Fraction(25), crf=40)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        peak[seconds] = int(done.stdout)
    assert peak[60] < 1.1 * peak[10], peak
