"""Configs: read from any version, written, compared, and checked before anything is opened.

configs/common.py explains the keys. Stored configs (`config.json` of a workdir, the metadata of a model
file) carry the version of their keys as `config_version`; `upgrade_config` reads all of them.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import loki_jax
from loki_jax.diffusion.loss import check_prediction
from loki_jax.driver.regions import SHAPES
from loki_jax.driver.registry import find_arm

CONFIG_VERSION = 2  # 2 renamed `accumulate`
RENAMED = {"accumulate": "grad_accum_steps"}

# Keys that may differ between a run and its continuation; all others describe the model, the data or
# the mathematics, and a changed one means another run.
RUN_KEYS = (
    "steps", "init_from", "pretrained", "log", "checkpoint", "validation", "sample", "mesh", "sharding_rules",
    "sharding_min_size", "gradient_dtype", "grad_accum_steps", "deterministic", "faults", "data.path",
    "data.workers", "data.threads", "data.cache_mb", "data.max_corrupt_share", "model.attention_backend",
    "model.remat",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the message names the remedy."""


class NonFiniteError(FloatingPointError):
    """The last updates of a run were skipped, or arrays to be saved hold NaN or infinity."""


def upgrade_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config of any version, as a dict of today's keys.

    An old key that is set counts. A missing one has the default of configs/common.py, which for a new key is
    what programs did before it.
    """
    content = {key: value for key, value in content.items() if key != "config_version"}
    content |= {new: content.pop(old) for old, new in RENAMED.items() if old in content}
    # By its path: a user's program may have another module of the name `configs`.
    common = runpy.run_path(str(Path(loki_jax.__file__).parents[1] / "configs" / "common.py"))
    return _with_defaults(content, common["base_config"]().to_dict())


def _with_defaults(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the keys of `defaults` that it lacks, in all sections."""
    section = lambda key, value: isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    return {
        key: _with_defaults(value, defaults[key]) if section(key, value) else value
        for key, value in (dict(defaults) | dict(content)).items()
    }


def config_to_json(config: ConfigDict) -> str:
    content = {"config_version": CONFIG_VERSION} | config.to_dict()
    return json.dumps(content, indent=1, sort_keys=True)


def config_from_json(text: str) -> ConfigDict:
    """The config that `config_to_json` wrote, today or in an older version.

    Raises:
      ValueError: no JSON, or not a whole config.
    """

    def freeze(value):
        if isinstance(value, dict):
            return {key: freeze(item) for key, item in value.items()}
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    content = freeze(json.loads(text))
    if missing := [key for key in ("model", "driver", "diffusion", "sample") if key not in content]:
        raise ValueError(f"not the config of a run: it has no {', '.join(missing)}")
    return ConfigDict(upgrade_config(content))


def read_config(path: Path) -> ConfigDict:
    """The config of a `config.json`. Raises CheckpointError where it is damaged."""
    try:
        return config_from_json(path.read_text())
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). Copy the workdir again.") from error


def import_configs() -> Path:
    """Let `configs` be the folder beside the package: of the checkout, or where a wheel put it.

    A config file anywhere can then import `configs.common`, whatever folders the working directory holds.

    Returns:
      the folder that holds `configs`.
    """
    root = Path(loki_jax.__file__).parents[1]
    if "configs" not in sys.modules and (root / "configs").is_dir():
        sys.modules["configs"] = package = types.ModuleType("configs")
        package.__path__ = [str(root / "configs")]
    return root


def config_arguments(argv: list[str]) -> list[str]:
    """The arguments of a program with a `--config` flag: keys by today's names, and a file that exists.

    `--config configs/NAME.py` that the working directory lacks is the file beside the package.
    """
    root = import_configs()
    found: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        key = name.lstrip("-").removeprefix("config.")
        if name.lstrip("-") == f"config.{key}" and key in RENAMED:
            print(f"note: config.{key} is now config.{RENAMED[key]}", file=sys.stderr)
            argument = name.replace(key, RENAMED[key]) + equals + value
        elif name.lstrip("-") == "config" and equals:
            argument = f"{name}={_config_file(value, root)}"
        elif found and found[-1].lstrip("-") == "config":
            argument = _config_file(argument, root)
        found.append(argument)
    return found


def _config_file(given: str, root: Path) -> str:
    """FILE.py[:VARIANT] as given where the file exists, else under `root` where it exists there."""
    file = given.partition(":")[0]
    return str(root / given) if not Path(file).exists() and (root / file).is_file() else given


def config_differences(mine: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Lines `key: theirs -> mine` for binding keys (all but RUN_KEYS) that differ."""
    a, b = (flatten_dict(json.loads(config_to_json(config)), sep=".") for config in (mine, theirs))
    binding = lambda key: not any(key == k or key.startswith(k + ".") for k in RUN_KEYS)
    return [
        f"{key}: {b.get(key, '(absent)')} -> {a.get(key, '(absent)')}"
        for key in sorted(filter(binding, a.keys() | b.keys()))
        if a.get(key) != b.get(key)
    ]


def check_config(config: ConfigDict) -> None:
    """Raise ValueError for options that do not exist or contradict each other."""
    positive = ("batch_size", "window", "image_size", "faults.max_skips", "checkpoint.keep", "sample.steps")
    never = ("log", "checkpoint", "validation", "sample")
    for least, keys in ((1, positive), (0, [f"{key}.every" for key in never]), (0, ["sample.pairs"])):
        for key in keys:
            if config[key] < least:
                raise ValueError(f"config.{key}={config[key]}: at least {least}")
    check_prediction(config.diffusion.prediction)
    batch, parts, dropout, diffusion = (
        config.batch_size, config.grad_accum_steps, config.dropout, config.diffusion
    )  # fmt: skip
    history = config.history
    reference, prompt = config.model.reference, config.model.unet.context_dim
    wrong = (
        (parts < 1 or batch % parts,
         f"batch_size={batch} cannot be split into grad_accum_steps={parts} microbatches"),
        (config.gradient_dtype not in ("float32", "bfloat16"),
         f"gradient_dtype={config.gradient_dtype!r}: use float32 or bfloat16"),
        (not math.isfinite(config.sample.guidance),
         f"sample.guidance={config.sample.guidance} is not a finite number"),
        (config.sample.pose not in ("relative", "absolute"),
         f"sample.pose={config.sample.pose!r}: use relative or absolute"),
        (not 0 <= diffusion.shared_timesteps <= 1,
         f"diffusion.shared_timesteps={diffusion.shared_timesteps} is not a share"),
        (not 0 <= history.frames <= config.window,
         f"history.frames={history.frames}: 0 to config.window={config.window}"),
        (not 0 <= history.noise < math.inf, f"history.noise={history.noise}: 0 or above"),
        (not (0 <= history.real_share <= 1 and 0 <= history.dropout <= 1),
         f"history: real_share={history.real_share} and dropout={history.dropout} are shares, from 0 to 1"),
        (not 0 <= config.data.cross_share <= 1, f"data.cross_share={config.data.cross_share} is not a share"),
        (config.data.cross_share > 0 and not find_arm(config.driver.arm).frames,
         f"data.cross_share: driver arm {config.driver.arm!r} reads no frames of another person"),
        (config.driver.regions not in SHAPES,
         f"driver.regions={config.driver.regions!r}: use {' or '.join(SHAPES)}"),
        (diffusion.min_snr_gamma < 0,
         f"diffusion.min_snr_gamma={diffusion.min_snr_gamma}: 0 (off) or above"),
        (diffusion.max_beta >= 1 and diffusion.prediction == "epsilon",
         "diffusion.max_beta=1 leaves no signal at the last step: set config.diffusion.prediction=v"),
        (prompt not in (None, reference.context_dim),
         f"model.unet.context_dim={prompt}: the null prompt has width {reference.context_dim} "
         "(config.model.reference.context_dim)"),
        (dropout.null_reference not in ("features", "latent"),
         f"dropout.null_reference={dropout.null_reference!r}: use features or latent"),
        (dropout.identity + dropout.motion + dropout.both > 1,
         "dropout: the three shares add up to more than 1"),
        (reference.trainable and reference.context_dim is not None,
         "model.reference: a branch that is trained has no null prompt; set context_dim=None"),
        (reference.driver and not reference.trainable,
         "model.reference.driver: a frozen branch has never seen a driver map; set it to False"),
    )  # fmt: skip
    for broken, message in wrong:
        if broken:
            raise ValueError(f"config.{message}")
    if not reference.trainable and not config.pretrained and not config.init_from:
        raise CheckpointError(
            "config.pretrained is empty, but the reference branch is frozen and a random one carries "
            "no identity. Convert Stable Diffusion 2.1 with `python -m loki_jax.convert` "
            "and give --config.pretrained=DIR."
        )
