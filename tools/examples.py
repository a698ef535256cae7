"""Make the example portraits and the example driver of `loki_jax.app`: renders of the built-in head.

python -m tools.examples        # writes loki_jax/assets/examples
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Coefficients
from loki_jax.synthetic.appearance import sample_appearance, sample_shape
from loki_jax.synthetic.clips import render_frames, synth_camera, synth_clip
from loki_jax.video import write_video
from loki_jax.video.writer import SYNTHETIC_TAG

FOLDER = Path(__file__).resolve().parents[1] / "loki_jax" / "assets" / "examples"
PEOPLE = (104, 100)  # seeds of identities
DRIVER, MOTION, FRAMES = 101, 7, 64
SIZE = 512


def portrait(head, seed: int) -> np.ndarray:
    """A person at rest in the middle of the picture, seen from the front."""
    still = {name: np.zeros((1, 3), np.float32) for name in ("rot", "tra", "neck", "jaw", "eyes")}
    expression = np.zeros((1, head.n_expression), np.float32)
    rest = Coefficients(betas=sample_shape(seed, head)[None], expression=expression, **still)
    crop = np.array([36, 6, 476, 446], np.float32)
    return render_frames(head, rest, synth_camera(0), crop, sample_appearance(seed, head), SIZE)[0]


def main() -> None:
    head = builtin_head()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(PEOPLE, 1):
        picture = Image.fromarray(portrait(head, seed))
        picture.save(FOLDER / f"portrait_{number}.jpg", quality=90, comment=SYNTHETIC_TAG)
    clip = synth_clip(head, DRIVER, MOTION, FRAMES, 256)
    write_video(FOLDER / "driver.mp4", clip.frames, Fraction(25), crf=24)


if __name__ == "__main__":
    main()
