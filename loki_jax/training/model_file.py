"""A trained model as one `.safetensors` file: bfloat16 parameters, config and head name in its metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.flax import save_file

from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.io import atomic_path
from loki_jax.training.config import CheckpointError, config_from_json, config_to_json


class Checkpoint(NamedTuple):
    """A model ready for inference. `params` is {"generation": ..., "reference": ..., ...}."""

    config: ConfigDict
    params: Any
    head: HeadAsset
    step: int


def save_model_file(path: Path, checkpoint: Checkpoint) -> None:
    """Write one `.safetensors` file with bfloat16 parameters and everything needed to use them.

    Only models of the built-in head can be files: that head ships with the package, others have licences.

    Raises:
      CheckpointError: the model was trained on another head than the built-in one.
    """
    if checkpoint.head.name != builtin_head().name:
        raise CheckpointError(
            f"head {checkpoint.head.name!r} cannot be part of a model file; share the workdir instead."
        )
    flat = flatten_dict(checkpoint.params, sep="/")
    tensors = {key: jnp.asarray(value, jnp.bfloat16) for key, value in flat.items()}
    metadata = {
        "format": "loki_jax-1",
        "config": config_to_json(checkpoint.config),
        "head": checkpoint.head.name,
        "head_geometry": _geometry_digest(checkpoint.head),
        "step": str(checkpoint.step),
    }
    with atomic_path(path) as partial:
        save_file(tensors, str(partial), metadata=metadata)


def _geometry_digest(head: HeadAsset) -> str:
    """SHA-256 of what the driver map depends on, to a hundredth of a millimetre; landmarks may change."""
    digest = hashlib.sha256(np.asarray(head.faces, np.int32).tobytes())
    bases = (head.template, head.shape_basis, head.expression_basis)
    for array in (*bases, head.skinning_weights, head.render_mask):
        digest.update(np.round(np.asarray(array, np.float64) * 1e5).astype(np.int64).tobytes())
    return digest.hexdigest()


def load_model_file(path: Path) -> Checkpoint:
    """Read a file of `save_model_file`; parameters come back as float32.

    Raises:
      CheckpointError: missing, damaged, not ours, or made with another built-in head.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such model file. Give a workdir of loki_jax.train instead.")
    try:
        with safe_open(str(path), framework="flax") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "loki_jax-1":
                raise CheckpointError(
                    f"{path}: not a loki_jax model file. For other weights use `python -m loki_jax.convert`."
                )
            # On the host: as jax arrays every shape would compile its own conversion.
            tensors = {key: np.asarray(file.get_tensor(key)).astype(np.float32) for key in file.keys()}
        params = {"autoencoder": {}} | unflatten_dict(tensors, sep="/")
        config, step = config_from_json(metadata["config"]), int(metadata["step"])
        head_name, geometry = metadata["head"], metadata["head_geometry"]
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, JAX and JSON raise many types about damaged files
        raise CheckpointError(
            f"{path}: damaged, not a readable model file ({type(error).__name__}: {error}). Copy it again."
        ) from error
    head = builtin_head()
    if head_name != head.name or geometry != _geometry_digest(head):
        raise CheckpointError(
            f"{path}: made with another built-in head ({head_name}); use the version that made it."
        )
    return Checkpoint(config, params, head, step)
