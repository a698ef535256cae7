"""The data of a run: training batches, held-out batches, and whether they fit the config."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from loki_jax.data.iterator import BatchIterator, iterate
from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import Batch, DatasetError
from loki_jax.data.windows import Batches, make_dataset
from loki_jax.driver.registry import find_arm
from loki_jax.training.logging import log
from loki_jax.training.sharding import batch_part, global_batch


class Inputs(NamedTuple):
    """`windows`: this process's part of every batch; `held_out`: its part of validation batches (numpy)."""

    dataset: Dataset
    windows: Batches
    held_out: list[Batch]


def open_inputs(config: ConfigDict, mesh: Mesh) -> Inputs:
    """Open the dataset of `config.data`.

    Raises:
      DatasetError: it is missing or damaged, or does not fit the config.
      ValueError: the batch cannot be split over the devices.
    """
    if not config.data.path:
        raise DatasetError(
            "config.data.path is empty: give --config.data.path=DIR, the folder with dataset_info.json"
        )
    dataset = open_dataset(config.data.path)
    if config.batch_size % (mesh.size * config.grad_accum_steps):
        raise ValueError(
            f"config.batch_size={config.batch_size} is not divisible by {mesh.size} devices "
            f"x config.grad_accum_steps={config.grad_accum_steps}"
        )
    source = dict(
        path=dataset.path, window=config.history.frames + config.window,
        batch=config.batch_size, seed=config.seed,
        image_size=config.image_size,
        process_index=batch_part(mesh), process_count=jax.process_count(),
        cache_bytes=config.data.cache_mb * 2**20, max_corrupt_share=config.data.max_corrupt_share,
        cross_share=config.data.cross_share,
    )  # fmt: skip
    # Cached latents are all a step needs, unless the driver shows the portrait; validation reads images too,
    # for its pictures.
    reads_pixels, has_images = find_arm(config.driver.arm).pixels, dataset.metadata.image_format is not None
    if reads_pixels and not has_images:
        raise DatasetError(
            f"{config.data.path}: holds latents only, and driver arm {config.driver.arm!r} reads pixels. "
            "Build the dataset with images, or set --config.driver.arm=flow, which needs none."
        )
    with_images = reads_pixels or dataset.metadata.latent_shape is None
    windows = make_dataset(**source, fixed_reference=config.data.fixed_reference, with_images=with_images)
    held_out = []
    if dataset.clips_of("validation"):
        batches = make_dataset(**source, split="validation", one_pass=True, with_images=has_images)
        held_out = list(itertools.islice(iterate(batches), config.validation.batches))
    return Inputs(dataset, windows, held_out)


def start_reading(config: ConfigDict, windows: Batches, mesh: Mesh) -> BatchIterator:
    """The batches as global arrays, read and sent to the devices ahead of the loop."""
    process = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    return iterate(
        windows, config.data.workers, config.data.threads, prefetch=2 * config.data.threads,
        to_device=lambda batch: global_batch(batch, mesh), report=lambda message: log(process + message),
    )  # fmt: skip
