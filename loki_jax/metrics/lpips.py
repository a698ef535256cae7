"""LPIPS, learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018; docs/metrics.md)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from loki_jax.arrays import ArrayLike
from loki_jax.downloads import LPIPS, fetch_files
from loki_jax.face.flame import load_trusted_pickle

Network = Literal["alex", "vgg"]

# Mean and deviation of ImageNet's pixels between -1 and 1.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class _Stage(NamedTuple):
    """Convolutions (stride, padding), each with a ReLU, after a max pool of stride 2 (window 0: none)."""

    pool: int
    convolutions: tuple[tuple[int, int], ...]


# The features of a trunk are the outputs of its five stages.
_STAGES = {
    "alex": (
        _Stage(0, ((4, 2),)),
        _Stage(3, ((1, 2),)),
        _Stage(3, ((1, 1),)),
        _Stage(0, ((1, 1),)),
        _Stage(0, ((1, 1),)),
    ),
    "vgg": tuple(_Stage(2 if index else 0, ((1, 1),) * depth) for index, depth in enumerate((2, 2, 3, 3, 3))),
}
_FILES = {"alex": ("alexnet", "AlexNet_0"), "vgg": ("vgg16", "VGG16_0")}


# Not type-checked: tree transformations build networks of shapes.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LpipsNetwork:
    """Weights of LPIPS.

    Attributes:
      kernels: of the trunk's convolutions, (height, width, in, out) each.
      biases: (out,) each.
      heads: weight (features,) of the channels of each stage.
      name: "alex" or "vgg".
    """

    kernels: tuple[Float[ArrayLike, "kh kw i o"], ...]
    biases: tuple[Float[ArrayLike, " o"], ...]
    heads: tuple[Float[ArrayLike, " o"], ...]
    name: str = dataclasses.field(metadata={"static": True})


def load_lpips(name: Network = "alex") -> LpipsNetwork:
    """The network from the user's cache, fetched on first use.

    Raises:
      DownloadError: it is not cached and pip cannot download it.
    """
    stem, trunk = _FILES[name]
    tree = load_trusted_pickle(fetch_files(LPIPS)[stem])
    layers = [tree[trunk][f"Conv_{index}"] for index in range(len(tree[trunk]))]
    return LpipsNetwork(
        kernels=tuple(layer["kernel"] for layer in layers),
        biases=tuple(layer["bias"] for layer in layers),
        heads=tuple(
            tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(-1)
            for index in range(len(_STAGES[name]))
        ),
        name=name,
    )


def lpips(
    network: LpipsNetwork,
    prediction: Shaped[ArrayLike, "*b h w 3"],
    target: Shaped[ArrayLike, "..."],
    max_value: float = 255.0,
) -> Float[Array, " *b"]:
    """LPIPS of each image; 0 for equal ones, lower is better. Meant to be jitted.

    Args:
      prediction, target: RGB images of any dtype, black at 0 and white at `max_value`, of one shape; edges of
        at least 64 pixels.

    Raises:
      ValueError: the shapes differ, or an edge is too short.
    """
    shape = prediction.shape
    if shape != target.shape or len(shape) < 3 or shape[-1] != 3 or min(shape[-3:-1]) < 64:
        raise ValueError(
            f"lpips compares RGB images (..., height, width, 3) of one shape, edges at least 64 pixels, "
            f"found {shape} and {target.shape}"
        )
    scaled = [
        (jnp.asarray(image, jnp.float32).reshape(-1, *shape[-3:]) * (2 / max_value) - 1 - _SHIFT) / _SCALE
        for image in (prediction, target)
    ]
    total = jnp.zeros(len(scaled[0]))
    for head, one, other in zip(network.heads, *(_features(network, image) for image in scaled), strict=True):
        total += (((one - other) ** 2) @ head).mean((-2, -1))
    return total.reshape(shape[:-3])


def _features(network: LpipsNetwork, images: Float[Array, "n h w 3"]) -> list[Float[Array, "n _ _ c"]]:
    """Outputs of the trunk's stages, of unit length over the channels."""
    layers = iter(zip(network.kernels, network.biases, strict=True))
    features = []
    for stage in _STAGES[network.name]:
        if stage.pool:
            images = jax.lax.reduce_window(
                images, -jnp.inf, jax.lax.max, (1, stage.pool, stage.pool, 1), (1, 2, 2, 1), "VALID"
            )
        for stride, padding in stage.convolutions:
            kernel, bias = next(layers)
            images = jax.lax.conv_general_dilated(
                images, jnp.asarray(kernel), (stride, stride), [(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
            )  # fmt: skip
            images = jax.nn.relu(images + bias)
        features.append(images / (jnp.linalg.norm(images, axis=-1, keepdims=True) + 1e-10))
    return features
