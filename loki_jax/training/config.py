from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict

from loki_jax.diffusion.loss import check_prediction

# Keys that may differ between a run and its continuation; all others describe the model, the data or
# the mathematics, and a changed one means another run.
RUN_KEYS = (
    "steps", "init_from", "pretrained", "log", "checkpoint", "validation", "sample", "mesh", "sharding_rules",
    "sharding_min_size", "accumulate", "deterministic", "faults", "data.path", "data.workers", "data.threads",
    "data.cache_mb", "data.max_corrupt_share", "model.attention_backend", "model.remat",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the message names the mend."""


def config_to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def config_from_json(text: str) -> ConfigDict:
    def freeze(value):
        if isinstance(value, dict):
            return {key: freeze(item) for key, item in value.items()}
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return ConfigDict(freeze(json.loads(text)))


def flatten_dict(tree: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict whose keys are the joined names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten_dict(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest_dict(flat: dict[str, Any], separator: str) -> dict[str, Any]:
    """The inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flat_config(config: ConfigDict) -> dict[str, Any]:
    flat = flatten_dict(json.loads(config_to_json(config)), ".")
    return {
        key: value
        for key, value in flat.items()
        if not any(key == k or key.startswith(k + ".") for k in RUN_KEYS)
    }


def config_differences(mine: ConfigDict, theirs: ConfigDict, only: str = "") -> list[str]:
    """Lines `key: theirs -> mine` for binding keys (under the prefix `only`) that differ."""
    a, b = _flat_config(mine), _flat_config(theirs)
    return [
        f"{key}: {b.get(key, '(absent)')} -> {a.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if key.startswith(only) and a.get(key) != b.get(key)
    ]


def check_config(config: ConfigDict) -> None:
    """Raise ValueError for options that contradict each other."""
    check_prediction(config.diffusion.prediction)
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise ValueError(
            f"config.batch_size={config.batch_size} cannot be cut "
            f"into config.accumulate={config.accumulate} parts"
        )
    if config.faults.max_skips < 1:
        raise ValueError(f"config.faults.max_skips={config.faults.max_skips}: at least 1")
    if not 0 <= config.diffusion.shared_timesteps <= 1:
        raise ValueError(
            f"config.diffusion.shared_timesteps={config.diffusion.shared_timesteps} is not a share"
        )
    if config.diffusion.min_snr_gamma < 0:
        raise ValueError(f"config.diffusion.min_snr_gamma={config.diffusion.min_snr_gamma}: 0 (off) or above")
    if config.diffusion.max_beta >= 1 and config.diffusion.prediction == "epsilon":
        raise ValueError(
            "config.diffusion.max_beta=1 leaves no signal at the last step: set config.diffusion.prediction=v"
        )
    if config.model.unet.context_dim not in (None, config.model.reference.context_dim):
        raise ValueError(
            f"config.model.unet.context_dim={config.model.unet.context_dim}: the null prompt has width "
            f"{config.model.reference.context_dim} (config.model.reference.context_dim)"
        )
    if config.dropout.null_reference not in ("features", "latent"):
        raise ValueError(
            f"config.dropout.null_reference={config.dropout.null_reference!r}: use features or latent"
        )
    if config.dropout.identity + config.dropout.motion + config.dropout.both > 1:
        raise ValueError("config.dropout: the three shares add up to more than 1")
    if config.model.reference.trainable and config.model.reference.context_dim is not None:
        raise ValueError(
            "config.model.reference: a branch that is trained has no null prompt; set context_dim=None"
        )
    if config.model.reference.driver and not config.model.reference.trainable:
        raise ValueError(
            "config.model.reference.driver: a frozen branch has never seen a driver map; set it to False"
        )
    if not config.model.reference.trainable and not config.pretrained and not config.init_from:
        raise CheckpointError(
            "config.pretrained is empty, but the reference branch is frozen and a random one carries "
            "no identity. Convert Stable Diffusion 2.1 with `python -m loki_jax.convert` "
            "and give --config.pretrained=DIR."
        )
