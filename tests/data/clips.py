"""Small made-up clips for the tests of records and pipeline."""

from fractions import Fraction

import numpy as np

from loki_jax.data.schema import Clip
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera, Coefficients

SIZE = 16


def small_head(n_shape=4, n_expression=6, vertices=7, name="small"):
    """A valid head asset of a few vertices; records only care about its sizes."""
    rng = np.random.default_rng(3)
    return HeadAsset(
        template=rng.normal(size=(vertices, 3)).astype(np.float32),
        faces=np.array([[0, 1, 2], [2, 3, 4]], np.int32),
        shape_basis=rng.normal(size=(n_shape, vertices, 3)).astype(np.float32),
        expression_basis=rng.normal(size=(n_expression, vertices, 3)).astype(np.float32),
        pose_correctives=np.zeros((0, vertices, 3), np.float32),
        joint_regressor=np.full((2, vertices), 1 / vertices, np.float32),
        parents=(-1, 0),
        skinning_weights=np.full((vertices, 2), 0.5, np.float32),
        render_mask=np.ones(vertices, bool),
        inner_mouth=np.zeros(vertices, bool),
        shape_sigma=np.ones(n_shape, np.float32),
        expression_sigma=np.ones(n_expression, np.float32),
        expression_bounds=np.tile(np.array([[-1, 1]], np.float32), (n_expression, 1)),
        landmarks={},
        name=name,
        joint_names=("root", "neck"),
        shape_names=tuple(f"shape{i}" for i in range(n_shape)),
        expression_names=tuple(f"expression{i}" for i in range(n_expression)),
        licence="Apache-2.0",
        provenance="tests",
    )


def make_clip(number, length, split="train", *, latents=False, images=True, **changes):
    """A clip whose every value is a function of (number, frame): the first pixel holds both.

    `images`: True, False, or the pictures themselves.
    """
    if not isinstance(images, bool):
        changes["images"] = images
    rng = np.random.default_rng(number)

    def pictures():
        for frame in range(length):
            image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            image[0, 0] = (number, frame, 7)
            yield image

    coefficients = Coefficients(
        betas=rng.normal(size=4),
        expression=np.stack([np.full(6, number + frame / 100) for frame in range(length)])
        if length
        else np.zeros((0, 6)),
        **{name: rng.normal(size=(length, 3)) for name in ("rot", "tra", "neck", "jaw", "eyes")},
    )
    fields = {
        "clip_id": f"clip{number}",
        "identity": f"person{number}",
        "fps": Fraction(30000, 1001),
        "split": split,
        "source": f"file{number}.mp4",
        "licence": "CC0",
        "coefficients": coefficients,
        "camera": Camera(np.array([900.0, 910.0, 250.0, 260.0]), np.eye(4)),
        "crop": np.array([10.5, 20.25, 300.5, 310.25]),
        "images": pictures() if images else None,
        "latent_mean": rng.normal(size=(length, 2, 2, 4)) if latents else None,
        "latent_logvar": rng.normal(size=(length, 2, 2, 4)) - 5 if latents else None,
        "confidence": np.linspace(0.5, 1, length),
        "fit_quality": 1.25,
        "extra": {"identity_seed": number},
    }
    clip = Clip(**fields)
    for name, value in changes.items():
        # As from a caller that no type checker has seen.
        object.__setattr__(clip, name, value)
    return clip
