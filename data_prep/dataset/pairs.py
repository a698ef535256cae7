"""Another person performs each clip of a dataset: pairs for cross-identity supervision (docs/svp.md).

The clip of the other person has the pose and expression of every frame, and nothing else of it. It is a clip
of the dataset like any other, whose `extra["drives"]` names the clip that it performs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from loki_jax.data.reader import Dataset
from loki_jax.data.schema import Clip, ClipInfo, DatasetError
from loki_jax.data.windows import is_driver
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_mesh
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import clip_crop_box
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import retarget_clip
from loki_jax.sources import DrivingClip, Portrait
from loki_jax.synthetic.appearance import sample_appearance, sample_shape
from loki_jax.synthetic.clips import clip_crop, render_frames

_FIRST_SEED = 10**9  # of the people who drive synthetic clips: they occur nowhere else
_CHUNK = 16  # frames rendered at a time


def paired_clips(dataset: Dataset, portraits: Sequence[Portrait], seed: int = 0) -> Iterator[Clip]:
    """The clips of a dataset, each with the clip of another person who performs it, with a line of progress.

    Args:
      portraits: who performs clips of real people, drawn for each clip; not used for synthetic clips, which
        are rendered exactly.

    Raises:
      DatasetError: a clip is not synthetic, and there are no portraits; the dataset has pairs already.
    """
    head, mesh = dataset.head(), builtin_mesh()
    if any(map(is_driver, dataset.clips)):
        raise DatasetError(f"{dataset.path}: has pairs already. Give the dataset that they were made of.")
    for info in tqdm(dataset.clips, unit="clip"):
        clip = dataset.stored_clip(info)
        yield clip
        if "identity_seed" in info.extra:
            other = _FIRST_SEED + info.clip_index
            betas = np.broadcast_to(sample_shape(other, head), clip.coefficients.betas.shape)
            coefficients = clip.coefficients._replace(betas=betas)
            camera = jax.tree.map(lambda x: x[0], clip.camera)
            crop = clip_crop(head, coefficients, camera)
            appearance = sample_appearance(other, head, mesh)
            size = dataset.metadata.image_size
            images = render_frames(head, coefficients, camera, crop, appearance, size)
            yield _driver(info, f"person-{other}", coefficients, camera, crop, images, "CC0-1.0")
            continue
        if not portraits:
            raise DatasetError(
                f"{dataset.path}: clip {info.clip_id!r} shows a real person. Give --portraits FOLDER."
            )
        drawn = np.random.default_rng((seed, info.clip_index)).integers(len(portraits))
        yield perform(head, clip, info, portraits[int(drawn)], dataset.metadata.image_size)


def perform(head: HeadAsset, clip: Clip, info: ClipInfo, portrait: Portrait, size: int) -> Clip:
    """The clip that shows the person of a portrait in the poses and expressions of `clip`.

    The geometry renderer moves the portrait. The head is turned as the clip's own. It is where the portrait
    has it, moved by the clip's increments.
    """
    camera = jax.tree.map(lambda x: np.asarray(x)[0], clip.camera)
    length = len(clip.coefficients.expression)
    driving = DrivingClip(
        np.zeros((length, 1, 1, 3), np.uint8), clip.coefficients, camera, clip.fps, np.ones(length, bool),
        None, clip.clip_id,
    )  # fmt: skip
    turned = retarget_clip(head, driving, portrait, "absolute")
    moved = turned._replace(tra=retarget_clip(head, driving, portrait, "relative").tra)
    moved = jax.tree.map(np.asarray, moved)
    crop = clip_crop_box(head, moved, portrait.camera)
    images = _rendered(head, portrait, moved, crop, size)
    return _driver(info, portrait.name, moved, portrait.camera, crop, images, "as the portrait")


def _rendered(
    head: HeadAsset, portrait: Portrait, moved: Coefficients, crop: np.ndarray, size: int
) -> Iterator[UInt8[np.ndarray, "s s 3"]]:
    render = GeometryPipeline(head).prepare(portrait)
    length = len(moved.expression)
    own = np.asarray(portrait.crop, np.float64)
    for start in range(0, length, _CHUNK):
        index = np.minimum(np.arange(start, start + _CHUNK), length - 1)
        frames = render(jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], moved))
        # The frames are the whole picture, perhaps reduced, or the portrait's crop where it has no picture.
        if portrait.picture is None:
            box = (crop - np.tile(own[:2], 2)) * frames.shape[1] / (own[2] - own[0])
        else:
            box = crop * frames.shape[1] / portrait.picture.shape[0]
        for frame in frames[: length - start]:
            yield crop_and_resize(frame, box, size)


def _driver(info: ClipInfo, identity: str, coefficients, camera: Camera, crop, images, licence: str) -> Clip:
    return Clip(
        clip_id=f"{info.clip_id}-driver", identity=f"driver of {info.identity}", fps=info.fps,
        split=info.split, source=f"{identity} performs {info.clip_id}", licence=licence,
        coefficients=coefficients, camera=camera, crop=crop, images=images,
        extra={"drives": info.clip_id},
    )  # fmt: skip
