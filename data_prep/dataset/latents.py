"""VAE latents of clips: mean and log-variance of the posterior, in batches of one compiled size."""

from __future__ import annotations

import hashlib
import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, UInt8

from data_prep.dataset.options import DatasetOptions
from loki_jax.data.reader import decode_image
from loki_jax.data.schema import DatasetError
from loki_jax.io import atomic_path

Moments = tuple[BFloat16[np.ndarray, "n h w c"], BFloat16[np.ndarray, "n h w c"]]


class LatentEncoder(NamedTuple):
    """A VAE's encoder with its weights.

    Attributes:
      encode: pictures (n, S, S, 3) uint8 -> mean and log-variance (n, h, w, c), bfloat16, not multiplied
        by the scale factor.
      sha256: of the weights.
    """

    encode: Callable[[UInt8[np.ndarray, "n S S 3"]], Moments]
    sha256: str


def chosen_encoder(options: DatasetOptions) -> LatentEncoder | None:
    """The encoder that the options name, if they do. Raises as `load_encoder` does."""
    if options.latents is None:
        return None
    return load_encoder(
        options.latents, options.size, config=options.latents_config, batch=options.latents_batch
    )


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
    from flax.traverse_util import unflatten_dict

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
    digest = hashlib.sha256(repr((model.scale, sorted(wanted.items()))).encode())
    arrays: dict[str, Any] = {}
    for name in sorted(wanted):
        info = tensors.infos.get(f"autoencoder/{name}")
        if info is None or tuple(info.shape) != wanted[name]:
            found = "nothing" if info is None else f"shape {tuple(info.shape)}"
            raise DatasetError(
                f"{folder}: for autoencoder/{name} it holds {found}, the VAE needs {wanted[name]}. Convert "
                "the weights again, or give their sizes with `--latents-config`."
            )
        array = np.asarray(tensors.read(f"autoencoder/{name}"), np.float32)
        digest.update(array.tobytes())
        arrays[name] = jnp.asarray(array)
    params = unflatten_dict(arrays, sep="/")

    @jax.jit
    def moments(params, images):
        pixels = images.astype(jnp.float32) / 127.5 - 1
        mean, logvar = model.apply({"params": params}, pixels, method="encode")
        # The model's latents carry the scale factor, the records' do not.
        mean, logvar = mean / model.scale, logvar - 2 * jnp.log(model.scale)
        return mean.astype(ml_dtypes.bfloat16), logvar.astype(ml_dtypes.bfloat16)

    def encode(images: UInt8[np.ndarray, "n S S 3"]) -> Moments:
        def of_batch(part: UInt8[np.ndarray, "m S S 3"]) -> Moments:
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            mean, logvar = (np.asarray(values)[: len(part)] for values in moments(params, padded))
            return mean, logvar

        return _joined([of_batch(images[start : start + batch]) for start in range(0, len(images), batch)])

    return LatentEncoder(encode, digest.hexdigest())


def _joined(
    parts: Sequence[tuple[BFloat16[np.ndarray, "_ h w c"], BFloat16[np.ndarray, "_ h w c"]]],
) -> Moments:
    means, logvars = zip(*parts, strict=True)
    return np.concatenate(means), np.concatenate(logvars)


def encode_clip(encoder: LatentEncoder, images: Iterable[bytes], chunk: int = 64) -> Moments:
    """Moments of the pictures as they are stored, so that pictures and latents show the same pixels."""
    left, parts = iter(images), []
    while part := [decode_image(image) for image in itertools.islice(left, chunk)]:
        parts.append(encoder.encode(np.stack(part)))
    return _joined(parts)


def stored_latents(encoder: LatentEncoder, images: Iterable[bytes], folder: Path, key: str) -> Moments:
    """The moments of a clip's pictures, kept in the folder of work files for the next run."""
    path = folder / f"{key}.{encoder.sha256[:12]}.latents"
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["mean"].view(ml_dtypes.bfloat16), file["logvar"].view(ml_dtypes.bfloat16)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent or damaged
    mean, logvar = encode_clip(encoder, images)
    with atomic_path(path, durable=True) as partial, partial.open("wb") as opened:
        np.savez(opened, mean=mean.view(np.uint16), logvar=logvar.view(np.uint16))
    return mean, logvar
