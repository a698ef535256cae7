"""What a run starts from: shapes of state and batch, the split into trained and frozen, first parameters."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from loki_jax.data.schema import Batch, DriverWindow
from loki_jax.driver.registry import find_arm
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera, Coefficients
from loki_jax.networks import Networks, draw_params, random_params
from loki_jax.training.checkpoint import (
    check_finite,
    check_fit,
    leaf_shapes,
    load_checkpoint,
    restore_as_numpy,
)
from loki_jax.training.config import CheckpointError
from loki_jax.training.sharding import tree_shardings
from loki_jax.training.state import TrainState, create_state


def abstract_state(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation
) -> TrainState:
    """The train state as ShapeDtypeStructs."""

    def build():
        params, frozen = split_params(config, random_params(networks, jax.random.key(0)))
        return create_state(params, frozen, optimizer, keep_ema=config.ema_decay > 0)

    return jax.eval_shape(build)


def sharded_state(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState, list]:
    """(`abstract_state` with shardings, its shardings, what stays whole: see `tree_shardings`)."""
    state = abstract_state(config, networks, optimizer)
    shardings, unsharded = tree_shardings(state, mesh, config.sharding_rules, config.sharding_min_size)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, state, shardings), shardings, unsharded


def abstract_batch(config: ConfigDict, head: HeadAsset, latents_of: Networks | None = None) -> Batch:
    """A global batch as ShapeDtypeStructs: of images, or of latents.

    Args:
      latents_of: networks whose autoencoder's latents the shards hold instead of images.
    """
    b, t, s = config.batch_size, config.history.frames + config.window, config.image_size
    floats, ints, pixels, latents = (
        lambda *shape, dtype=dtype: jnp.zeros(shape, dtype)
        for dtype in (jnp.float32, jnp.int32, jnp.uint8, jnp.bfloat16)
    )

    def coefficients(*lead: int) -> Coefficients:
        rotations = (floats(*lead, 3) for _ in range(5))
        return Coefficients(floats(*lead, head.n_shape), floats(*lead, head.n_expression), *rotations)

    def batch() -> Batch:
        driver = None
        if config.data.cross_share:
            camera = Camera(floats(b, t, 4), floats(b, t, 4, 4))
            driver = DriverWindow(pixels(b, t, s, s, 3), coefficients(b, t), camera, floats(b, t, 4))
        pictures = {"frames": pixels(b, t, s, s, 3), "reference": pixels(b, s, s, 3)}
        if latents_of is not None:
            if not find_arm(config.driver.arm).pixels:
                pictures = {}
            side, channels = latents_of.model_config.latent_size, latents_of.model_config.latent_channels
            pictures |= {
                f"{prefix}latent_{name}": latents(*lead, side, side, channels)
                for prefix, lead in (("", (b, t)), ("reference_", (b,)))
                for name in ("mean", "logvar")
            }
        return Batch(
            coefficients=coefficients(b, t),
            reference_coefficients=coefficients(b),
            camera=Camera(floats(b, t, 4), floats(b, t, 4, 4)),
            crop=floats(b, t, 4),
            confidence=floats(b, t),
            clip_index=ints(b),
            frame_index=ints(b, t),
            reference_index=ints(b),
            reference_camera=Camera(floats(b, 4), floats(b, 4, 4)),
            reference_crop=floats(b, 4),
            **pictures,
            driver=driver,
        )

    return jax.eval_shape(batch)


def split_params(config: ConfigDict, params: PyTree) -> tuple[PyTree, PyTree]:
    """(trained, frozen) parts of all parameters; frozen ones in the computation's dtype."""
    trained = {"generation"} | ({"reference"} if config.model.reference.trainable else set())
    cast = lambda x: x.astype(jnp.dtype(config.model.dtype))
    frozen = {key: jax.tree.map(cast, value) for key, value in params.items() if key not in trained}
    return {key: params[key] for key in sorted(trained)}, frozen


def initial_params(config: ConfigDict, networks: Networks, head: HeadAsset) -> tuple[PyTree, PyTree]:
    """(trained, frozen) parameters that a run starts from.

    `config.init_from` names another run's model; else `config.pretrained` gives SD 2.1, whose UNet
    (without cross-attention) starts the generation branch; else everything is random.

    Raises:
      CheckpointError: a file is missing, or its arrays do not fit the config.
    """
    abstract = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    if config.init_from:
        loaded = load_checkpoint(config.init_from)
        params = {key: loaded.params.get(key, {}) for key in abstract}
        check_fit(leaf_shapes(params), abstract, f"config.init_from={config.init_from}")
        # What was frozen there, in the dtype of its activations, may be trained here.
        return split_params(config, jax.tree.map(lambda x, a: jnp.asarray(x, a.dtype), params, abstract))
    path = _converted_folder(config.pretrained) if config.pretrained else None
    given = {"reference", "autoencoder", "null_prompt"} & abstract.keys() if path else set()
    params = draw_params(networks, jax.random.key(config.seed), given)
    if path:
        # Without the devices of the process that converted it.
        backbone = check_finite(restore_as_numpy(path.absolute()), str(path))
        check_fit(leaf_shapes(backbone), {k: abstract[k] for k in given}, str(path))
        params |= backbone
        params["generation"] = dict(params["generation"]) | {
            "unet": _take_shared(params["generation"]["unet"], backbone["reference"])
        }
    return split_params(config, params)


def _converted_folder(pretrained: str) -> Path:
    """The folder `config.pretrained` names; CheckpointError where `loki_jax.convert` did not write it."""
    path = Path(pretrained)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no converted weights there. "
            "Make them with `python -m loki_jax.convert` from SD 2.1-base."
        )
    if not (path / "_METADATA").is_file():
        raise CheckpointError(
            f"{path}: not a folder of converted weights (it has no _METADATA). Convert it with "
            f"`python -m loki_jax.convert {path} --out DIR` and give --config.pretrained=DIR."
        )
    return path


def _take_shared(target: PyTree, source: PyTree) -> PyTree:
    """`target` with every array that `source` also has copied from it (a step donates its buffers)."""
    if not isinstance(target, dict):
        return jnp.array(source)
    return {
        key: _take_shared(value, source[key]) if key in source else value for key, value in target.items()
    }
