"""A stand-in for the fit of a clip, picklable and quick: everything follows from the bytes of its file."""

import dataclasses
import functools
import hashlib
import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.dataset.assemble import RejectedClip, build
from data_prep.dataset.clip_file import ClipData, overlay_path
from data_prep.dataset.manifest import pipeline_identity, plan_clips
from data_prep.dataset.options import DatasetOptions
from data_prep.dataset.summary import SECONDS_FILE
from loki_jax.face.types import Camera, Coefficients
from tests.data.clips import small_head

SIZE = 16


def make_fake_fit(fit_log=None):
    """`fit_log`: a file that gets a line for every clip that is fitted."""

    def fit(clip, folder):
        content = clip.path.read_bytes()
        if fit_log is not None:
            with Path(fit_log).open("a") as file:
                file.write(f"{clip.path.name}\n")
        if content.startswith(b"bad"):
            raise RejectedClip(f"{clip.path}: bad")
        if content.startswith(b"bug"):
            raise TypeError("something unforeseen")
        if content.startswith(b"interrupt"):
            raise KeyboardInterrupt
        if content.startswith(b"die"):
            os._exit(3)
        overlay_path(folder, clip.key).write_bytes(content)
        rng = np.random.default_rng(list(hashlib.sha256(content).digest()))
        length = 4 + len(content) % 3
        images = []
        for _ in range(length):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(buffer, "PNG")
            images.append(buffer.getvalue())
        coefficients = Coefficients(
            betas=np.tile(rng.normal(size=4), (length, 1)),
            expression=rng.normal(size=(length, 6)),
            **{name: rng.normal(size=(length, 3)) for name in ("rot", "tra", "neck", "jaw", "eyes")},
        )
        camera = Camera(np.array([900.0, 910.0, 250.0, 260.0]), np.eye(4))
        row = {"frames": length, "fps": str(Fraction(25)), "error_percent": 1.5, "error_pixels": 0.75}
        return ClipData(
            coefficients, camera, np.array([1.0, 2, 30, 31]), rng.uniform(size=length), images, row
        )

    return fit


def write_files(folder, contents):
    """Files NAME.mp4 with these contents, in order."""
    folder.mkdir(exist_ok=True)
    paths = []
    for name, content in contents.items():
        path = folder / f"{name}.mp4"
        path.write_bytes(content.encode())
        paths.append(path)
    return paths


OPTIONS = DatasetOptions(size=SIZE, validation=0.3, workers=0)


def build_fake(paths, out, *, fit_log=None, settings=None, labels=None, encoder=None, log=len, **changes):
    """Build `out` from files with the stand-in; `changes` to OPTIONS."""
    options = dataclasses.replace(OPTIONS, **changes)
    head = small_head()
    made_by = pipeline_identity(head, {}, settings or {"size": SIZE})
    planned = plan_clips(paths, made_by, options, labels=labels)
    make_fit = functools.partial(make_fake_fit, fit_log)
    return build(planned, head, out, make_fit, made_by, options, encoder=encoder, log=log)


def tree(folder):
    """Every file of a folder with its bytes, but for the seconds that the clips took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != SECONDS_FILE
    }
