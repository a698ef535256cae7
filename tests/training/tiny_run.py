"""A training run that takes seconds: shards of noise and a config to go with them.

For benchmarks and tests of the training program, which ask how it stops, resumes and spreads over
devices, not what it learns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import demo
from loki_jax.data.schema import Clip
from loki_jax.data.writer import write_dataset
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Camera, Coefficients

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16  # pixels


def noise_clips(
    head: HeadAsset, count: int = 4, frames: int = 6, latents: float | None = None
) -> Iterator[Clip]:
    """Clips of random pixels and random motion; the first is held out.

    Args:
      latents: also give latents, all of this value (infinity spoils every step that meets them).
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        moving = lambda n, scale: (rng.standard_normal((frames, n)) * scale).astype(np.float32)
        latent = {}
        if latents is not None:
            shape = (frames, SIZE // 4, SIZE // 4, 48)
            latent = {"latent_mean": np.full(shape, latents), "latent_logvar": np.full(shape, -30.0)}
        yield Clip(
            clip_id=f"clip{i}", identity=f"person{i}", fps=Fraction(25),
            split="validation" if i == 0 else "train", source="noise", licence="none",
            coefficients=Coefficients(
                betas=rng.standard_normal(head.n_shape).astype(np.float32),
                expression=moving(head.n_expression, 0.1), rot=moving(3, 0.2), tra=moving(3, 0.0),
                neck=moving(3, 0.05), jaw=moving(3, 0.1), eyes=moving(3, 0.1),
            ),
            camera=Camera(
                np.array([400, 400, 64, 64], np.float32),
                np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], np.float32),
            ),
            crop=np.array([0, 0, 128, 128], np.float32),
            images=list(rng.integers(0, 255, (frames, SIZE, SIZE, 3), dtype=np.uint8)),
            **latent,
        )  # fmt: skip


def write_shards(path: Path, **options) -> Path:
    """A dataset of `noise_clips(**options)`."""
    head = builtin_head()
    write_dataset(path, head, noise_clips(head, **options), SIZE)
    return path


def tiny_config(shards: Path, **changes) -> ConfigDict:
    """configs/demo.py:tiny at 16 pixels with a UNet of one level and without driver maps, all logged.

    Most of a run's time is compilation, and it is one for all tests that ask nothing of the model.

    Args:
      changes: keys with dots as double underscores.
    """
    config = demo.get_config("tiny")
    config.image_size = SIZE
    config.model.unet.multipliers = (1,)
    config.model.unet.attention_modes = ("3d",)
    config.model.unet.attention_levels = ()  # its middle attends all the same
    config.model.reference.driver = False
    config.driver.arm = "flame_vector"
    config.data.path = str(shards)
    config.data.threads = 2
    config.optimizer.warmup_steps = 0
    config.optimizer.decay = "constant"
    config.checkpoint.every = 2
    config.validation.every = 0
    config.sample.every = 0
    config.log.every = 1
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def train_command(config: ConfigDict, workdir: Path, *more: str) -> list[str]:
    """The command line that runs `config`, which must be the tiny one but for simple values."""
    flat = _flatten(config.to_dict())
    base = _flatten(demo.get_config("tiny").to_dict())
    changed = [f"--config.{key}={value}" for key, value in flat.items() if value != base.get(key)]
    command = [sys.executable, "-m", "loki_jax.train", "--config", str(ROOT / "configs" / "demo.py:tiny")]
    return [*command, "--workdir", str(workdir), *changed, *more]


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Environment of a run on simulated CPU devices whose compiled programs are kept in `cache`.

    Programs are optimised as in this process.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(jax.config.read("jax_disable_most_optimizations"))),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(ROOT),
    }
