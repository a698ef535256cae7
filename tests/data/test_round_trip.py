"""Whatever fits the schema comes back as it was written."""

import tempfile
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import COEFFICIENT_FEATURES, Clip
from loki_jax.data.writer import write_dataset
from loki_jax.face.types import Camera, Coefficients
from tests.data.clips import small_head


def floats(*shape, low=-(2.0**100), high=2.0**100):
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


def perhaps_repeated(length, *shape, **bounds):
    """One value a frame, or one for all frames."""
    return floats(length, *shape, **bounds) | floats(*shape, **bounds)


@st.composite
def clips(draw, number, split, sizes, image_size, latent_shape):
    n_shape, n_expression = sizes
    length = draw(st.integers(1, 5))
    corner = draw(perhaps_repeated(length, 2, low=-1e4, high=1e4))
    extent = draw(floats(2, low=1, high=1e4))
    latents = lambda: floats(length, *latent_shape)
    return Clip(
        clip_id=f"{number}-{draw(st.text(max_size=8))}",
        identity=f"person {number}",
        fps=Fraction(draw(st.integers(1, 120_000)), draw(st.integers(1, 1001))),
        split=split,
        source=draw(st.text(max_size=8)),
        licence=draw(st.text(max_size=8)),
        coefficients=Coefficients(
            draw(perhaps_repeated(length, n_shape)),
            draw(floats(length, n_expression)),
            *(draw(floats(length, 3)) for _ in range(5)),
        ),
        camera=Camera(draw(perhaps_repeated(length, 4)), draw(perhaps_repeated(length, 4, 4))),
        crop=np.concatenate([corner, corner + extent], axis=-1),
        images=None
        if image_size is None
        else list(draw(hnp.arrays(np.uint8, (length, image_size, image_size, 3)))),
        latent_mean=None if latent_shape is None else draw(latents()),
        latent_logvar=None if latent_shape is None else draw(latents()),
        confidence=draw(st.none() | floats(length, low=0, high=1)),
        fit_quality=draw(st.none() | st.floats(0, 100)),
        extra=draw(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=2)),
    )


@st.composite
def datasets(draw):
    """(head, clips, image size): one to four clips of one layout."""
    sizes = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    image_size = draw(st.none() | st.integers(1, 9))
    latent_shape = st.tuples(*(st.integers(1, 3),) * 3)
    latent_shape = draw(latent_shape if image_size is None else st.none() | latent_shape)
    splits = draw(st.lists(st.sampled_from(["train", "validation"]), min_size=1, max_size=4))
    made = [draw(clips(i, split, sizes, image_size, latent_shape)) for i, split in enumerate(splits)]
    return small_head(*sizes), made, image_size or 8


@settings(max_examples=60, deadline=None)
@given(datasets(), st.integers(1, 4000))
def test_random_clips_come_back(dataset, shard_bytes):
    head, written, image_size = dataset
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "d", head, written, image_size, shard_bytes=shard_bytes)
        found = open_dataset(Path(folder) / "d")
        assert len(found.clips) == len(written)
        for row, clip in zip(found.clips, written, strict=True):
            for name in ("clip_id", "identity", "fps", "split", "source", "licence", "fit_quality", "extra"):
                assert getattr(row, name) == getattr(clip, name)
            frames = found.read_clip(row)
            length = len(clip.coefficients.expression)
            assert [frame.frame_index for frame in frames] == list(range(length))
            expected = dict(zip(COEFFICIENT_FEATURES, clip.coefficients, strict=True)) | clip.camera._asdict()
            for index, frame in enumerate(frames):
                stored = dict(zip(COEFFICIENT_FEATURES, frame.coefficients, strict=True))
                stored |= frame.camera._asdict() | {"crop": frame.crop}
                for name, value in (expected | {"crop": clip.crop}).items():
                    wanted = value[index] if value.ndim > stored[name].ndim else value
                    np.testing.assert_array_equal(stored[name], wanted, err_msg=name)
                    assert stored[name].dtype == np.float32
                assert frame.confidence == (1 if clip.confidence is None else clip.confidence[index])
                if clip.images is not None:
                    np.testing.assert_array_equal(frame.image, clip.images[index])
                for name in ("latent_mean", "latent_logvar"):
                    if getattr(clip, name) is not None:
                        wanted = getattr(clip, name)[index].astype(ml_dtypes.bfloat16)
                        np.testing.assert_array_equal(getattr(frame, name), wanted)
