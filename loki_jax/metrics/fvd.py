"""FVD, Fréchet video distance: features of I3D and the distance of their Gaussians (docs/metrics.md).

Unterthiner et al. 2018; the network is that of Carreira and Zisserman 2017, trained on Kinetics-400.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.downloads import I3D, fetch_files
from loki_jax.face.flame import load_trusted_pickle

SIZE = 224  # pixels of the network's input
SHORTEST = 9  # frames: the last pool spans two steps of eight frames

# Two levels of names as the file has them: {"params": {...}, "batch_stats": {...}}.
Weights = dict[str, Any]

# What follows the stem: max pools as (window, stride), and modules of four branches.
_PLAN = (
    *("Mixed_3b", "Mixed_3c", ((3, 3, 3), (2, 2, 2))),
    *("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f", ((2, 2, 2), (2, 2, 2))),
    *("Mixed_5b", "Mixed_5c"),
)


def load_i3d() -> Weights:
    """The network from the user's cache, fetched on first use.

    Raises:
      DownloadError: it is not cached and pip cannot download it.
    """
    (path,) = fetch_files(I3D).values()
    return load_trusted_pickle(path)


def i3d_features(weights: Weights, videos: UInt8[np.ndarray, "n t h w 3"]) -> Float[np.ndarray, "n 400"]:
    """Class scores before the softmax, averaged over time, of each video; one video at a time.

    Frames are resized to 224 x 224 pixels (bilinear between pixel centres, without antialiasing, as the usual
    PyTorch ports do) and scaled to -1..1.

    Raises:
      ValueError: fewer than 9 frames.
    """
    if videos.shape[1] < SHORTEST:
        raise ValueError(f"i3d_features: {videos.shape[1]} frames, I3D needs at least {SHORTEST}")
    return np.stack([np.asarray(_features(weights, video)) for video in videos])


def frechet_distance(features: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet distance of the Gaussians of two sets of features; lower is better, 0 for equal sets.

    |mean difference|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It falls with the number of videos, so compare only
    values of equally many; below a few hundred they mean little.

    Raises:
      ValueError: a set with fewer than two rows.
    """
    if min(len(features), len(other)) < 2:
        raise ValueError(
            f"frechet_distance needs two or more videos a side, found {len(features)} and {len(other)}"
        )
    sets = [np.asarray(x, np.float64) for x in (features, other)]
    means = [x.mean(0) for x in sets]
    # Covariances are A^T A and B^T B, and the roots of the eigenvalues of their product are the singular
    # values of A B^T: exact where there are fewer videos than features.
    one, two = ((x - mean) / np.sqrt(len(x) - 1) for x, mean in zip(sets, means, strict=True))
    cross = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    shift = np.square(means[0] - means[1]).sum()
    return float(shift + np.square(one).sum() + np.square(two).sum() - 2 * cross)


@jax.jit
def _features(weights: Weights, video: UInt8[ArrayLike, "t h w 3"]) -> Float[Array, " 400"]:
    frames = jnp.asarray(video, jnp.float32)
    frames = jax.image.resize(frames, (len(frames), SIZE, SIZE, 3), "bilinear", antialias=False)
    x = _unit(weights, ("Conv3d_1a_7x7",), (frames / 127.5 - 1)[None], 2)
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    x = _unit(weights, ("Conv3d_2b_1x1",), x)
    x = _unit(weights, ("Conv3d_2c_3x3",), x)
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    for part in _PLAN:
        x = _mixed(weights, part, x) if isinstance(part, str) else _pool(x, *part)
    # The last layer is linear, so that means of its inputs will do: over 7 x 7 pixels, pairs of steps, time.
    x = x.mean((2, 3))
    x = ((x[:, :-1] + x[:, 1:]) / 2).mean(1)[0]
    layer = weights["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
    return jnp.dot(x, layer["kernel"].reshape(len(x), -1), precision="highest") + layer["bias"]


def _mixed(weights: Weights, name: str, x: Float[Array, "1 t h w c"]) -> Float[Array, "1 t h w _"]:
    """Inception module: 1 x 1, two of 1 x 1 then 3 x 3, and a pool then 1 x 1, side by side."""
    one = lambda branch, y: _unit(weights, (name, f"Branch_{branch}"), y)
    return jnp.concatenate(
        [
            one("0/Conv3d_0a_1x1", x),
            one("1/Conv3d_0b_3x3", one("1/Conv3d_0a_1x1", x)),
            one("2/Conv3d_0b_3x3", one("2/Conv3d_0a_1x1", x)),
            one("3/Conv3d_0b_1x1", _pool(x, (3, 3, 3), (1, 1, 1))),
        ],
        axis=-1,
    )


def _unit(
    weights: Weights, names: tuple[str, ...], x: Float[Array, "1 t h w c"], stride: int = 1
) -> Float[Array, "1 _ _ _ o"]:
    """Convolution, batch norm without a scale (epsilon 0.001), ReLU."""
    params, stats = weights["params"], weights["batch_stats"]
    for name in names:
        params, stats = params[name], stats[name]
    x = jax.lax.conv_general_dilated(
        x, params["Conv_0"]["kernel"], (stride,) * 3, "SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest",
    )  # fmt: skip
    norm = stats["BatchNorm_0"]
    x = (x - norm["mean"]) * jax.lax.rsqrt(norm["var"] + 1e-3)
    return jax.nn.relu(x + params["BatchNorm_0"]["bias"])


def _pool(
    x: Float[Array, "1 t h w c"], window: tuple[int, int, int], stride: tuple[int, int, int]
) -> Float[Array, "1 _ _ _ c"]:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
