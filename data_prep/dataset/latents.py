"""VAE latents of clips: mean and log-variance of the posterior, in batches of one compiled size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, UInt8

from loki_jax.data.reader import decode_image
from loki_jax.data.schema import DatasetError


class LatentEncoder(NamedTuple):
    """A VAE's encoder with its weights.

    Attributes:
      encode: pictures (n, S, S, 3) uint8 -> mean and log-variance (n, h, w, c), bfloat16, not multiplied
        by the scale factor.
      sha256: of the weights.
    """

    encode: Callable[
        [UInt8[np.ndarray, "n S S 3"]],
        tuple[BFloat16[np.ndarray, "n h w c"], BFloat16[np.ndarray, "n h w c"]],
    ]
    sha256: str


def load_encoder(
    folder: str | os.PathLike, image_size: int, *, config: str | None = None, batch: int = 8
) -> LatentEncoder:
    """The VAE encoder in a folder that `python -m loki_jax.convert` wrote.

    Args:
      image_size: side S of the pictures.
      config: FILE.py[:VARIANT] or a run's config.json with the VAE's sizes; None: Stable Diffusion 2.1's.
      batch: pictures encoded at a time.

    Raises:
      DatasetError: no such weights there, other sizes, or an image size that is no multiple of the VAE's
        stride.
    """
    # Here and not above: data_prep works without the networks.
    import jax
    import jax.numpy as jnp

    from loki_jax.weights import layouts, sources
    from loki_jax.weights.tensors import WeightsError

    folder = Path(folder)
    try:
        model_config = layouts.sd21_config() if config is None else layouts.load_config(config).model
        network = layouts.make_network(model_config)
        tensors = sources.open_orbax(folder)
    except WeightsError as error:
        raise DatasetError(f"{error} `--latents` takes a folder of `python -m loki_jax.convert`.") from error
    model = network.autoencoder
    if image_size % model.stride:
        raise DatasetError(
            f"--size {image_size} is no multiple of the VAE's stride of {model.stride} pixels. Choose "
            "another size."
        )
    wanted = {
        name.removeprefix("autoencoder/"): shape
        for name, shape in network.shapes.items()
        if name.startswith(("autoencoder/encoder/", "autoencoder/quant/"))
    }
    digest, params = hashlib.sha256(repr((model.scale, sorted(wanted.items()))).encode()), {}
    for name in sorted(wanted):
        info = tensors.infos.get(f"autoencoder/{name}")
        if info is None or tuple(info.shape) != wanted[name]:
            found = "nothing" if info is None else f"shape {tuple(info.shape)}"
            raise DatasetError(
                f"{folder}: for autoencoder/{name} it holds {found}, the VAE needs {wanted[name]}. Convert "
                "the "
                "weights again, or give their sizes with `--latents-config`."
            )
        array = np.asarray(tensors.read(f"autoencoder/{name}"), np.float32)
        digest.update(array.tobytes())
        branch = params
        *parents, leaf = name.split("/")
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = jnp.asarray(array)
    encode = jax.jit(lambda params, images: _moments(model, params, images))

    def encode_all(images: UInt8[np.ndarray, "n S S 3"]):
        means, logvars = [], []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            mean, logvar = encode(params, padded)
            means.append(np.asarray(mean)[: len(part)])
            logvars.append(np.asarray(logvar)[: len(part)])
        return np.concatenate(means), np.concatenate(logvars)

    return LatentEncoder(encode_all, digest.hexdigest())


def _moments(model, params, images):
    import jax.numpy as jnp

    mean, logvar = model.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1, method="encode")
    # The model's latents carry the scale factor, the records' do not.
    mean, logvar = mean / model.scale, logvar - 2 * jnp.log(model.scale)
    return mean.astype(ml_dtypes.bfloat16), logvar.astype(ml_dtypes.bfloat16)


def encode_clip(
    encoder: LatentEncoder, images: Sequence[bytes], chunk: int = 64
) -> tuple[BFloat16[np.ndarray, "n h w c"], BFloat16[np.ndarray, "n h w c"]]:
    """Moments of the pictures as they are stored, so that pictures and latents show the same pixels."""
    parts = [
        encoder.encode(np.stack([decode_image(image) for image in images[start : start + chunk]]))
        for start in range(0, len(images), chunk)
    ]
    means, logvars = zip(*parts, strict=True)
    return np.concatenate(means), np.concatenate(logvars)
