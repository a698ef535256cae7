"""What training, sampling and evaluation share: networks built from a config, and their inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr  # jax.extend.core has no dead-code elimination
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8
from ml_collections import ConfigDict

from loki_jax.arrays import ArrayLike
from loki_jax.diffusion.sampler import Blend, Guidance, sample_latents
from loki_jax.diffusion.schedule import Schedule, make_schedule
from loki_jax.driver.encoding import ReferenceFrame
from loki_jax.driver.map import driver_map
from loki_jax.driver.regions import DriverFrames, aligned_view, region_points
from loki_jax.driver.registry import DEFAULT_ARM, driver_channels, find_arm
from loki_jax.face.asset import HeadAsset
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.models.autoencoder import Autoencoder, make_autoencoder, sample_posterior
from loki_jax.models.loki import Loki, init_params, make_loki
from loki_jax.models.unet import Features, KeysValues, keys_values

Driver = Float[
    ArrayLike, "b t *s channels"
]  # maps (B,T,S,S,C), or vectors (B,T,C) for an arm that is not spatial
Images = UInt8[ArrayLike, "*b s s 3"]  # RGB
Latents = Float[Array, "*b h w c"]


class Networks(NamedTuple):
    """The networks of a config; their parameters travel separately.

    Parameters are a dict: "generation" and "reference" (see `models/loki.py`), "autoencoder" (empty
    for the pixel autoencoder) and, where the reference branch has cross-attention, "null_prompt".
    """

    loki: Loki
    autoencoder: Autoencoder
    schedule: Schedule
    model_config: ConfigDict


def build_networks(config: ConfigDict, head: HeadAsset) -> Networks:
    """Build the networks of `config` for a head.

    Raises:
      ValueError: an option is unknown, or sizes do not fit each other.
    """
    spatial = find_arm(config.driver.arm).spatial
    model_config = ConfigDict(config.model.to_dict())
    autoencoder = make_autoencoder(model_config)
    if config.image_size % autoencoder.stride:
        raise ValueError(f"config.image_size={config.image_size} is not divisible by {autoencoder.stride}")
    model_config.latent_size = config.image_size // autoencoder.stride
    model_config.encoder.kind = "map" if spatial else "vector"
    model_config.encoder.in_channels = driver_channels(config.driver.arm, head)
    stages = len(model_config.encoder.widths)
    if spatial and 2**stages != autoencoder.stride:
        raise ValueError(
            f"config.model.encoder.widths has {stages} stride-2 stages, "
            f"the latents have stride {autoencoder.stride}"
        )
    schedule = make_schedule(
        rescale_zero_snr=config.diffusion.rescale_zero_snr,
        max_beta=config.diffusion.max_beta,
        shift_frames=config.diffusion.shift_frames or None,
        latent_size=model_config.latent_size,
    )
    return Networks(make_loki(model_config), autoencoder, schedule, model_config)


def random_params(networks: Networks, key: PRNGKeyArray) -> PyTree:
    """Random parameters of all networks, float32; traceable. To make them, use `draw_params`."""
    loki_key, autoencoder_key = jax.random.split(key)
    params = dict(init_params(networks.loki, networks.model_config, loki_key))
    image = jnp.zeros((1, networks.autoencoder.stride * 2, networks.autoencoder.stride * 2, 3))
    params["autoencoder"] = networks.autoencoder.init(autoencoder_key, image).get("params", {})
    context_dim = networks.loki.reference.context_dim or networks.loki.generation.unet.context_dim
    if context_dim is not None:
        params["null_prompt"] = jnp.zeros((1, 77, context_dim))
    return params


def draw_params(networks: Networks, key: PRNGKeyArray, given: Collection[str] = ()) -> PyTree:
    """`random_params` without the networks `given`: the same numbers up to their last bit, array by array.

    Of the traced function only what the parameters need is run, one small compiled program for each kind
    and shape of operation. Compiling all draws as one program takes most of a minute on a GPU.
    """
    wanted = lambda key: {k: v for k, v in random_params(networks, key).items() if k not in given}
    traced, shapes = jax.make_jaxpr(wanted, return_shape=True)(key)
    needed, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    leaves = jaxpr_as_fun(ClosedJaxpr(needed, traced.consts))(key)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def driver_input(
    config: ConfigDict,
    head: HeadAsset,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "b t 4"],
    reference: ReferenceFrame | None = None,
    frames: DriverFrames | None = None,
) -> Driver:
    """The driver path's input.

    Args:
      coefficients, camera: leading axes (B, T); a window shows one identity, the one of its first frame.
      crop: boxes in pixels of the uncropped frames.
      reference: the portraits (B, ...) that are animated, for arms that read them.
      frames: of who drives (B, T, ...), for arms that read them.

    Raises:
      ValueError: the arm reads a portrait, pixels or frames that are not given.
    """
    still = lambda c: c if config.driver.neck else c._replace(neck=jnp.zeros_like(c.neck))
    coefficients = still(coefficients)
    name, dtype = config.driver.arm, jnp.dtype(config.model.dtype)
    arm = find_arm(name)
    if not arm.spatial:
        return arm.encode(head, coefficients)
    if arm.frames:
        if frames is None:
            raise ValueError(f"driver arm {name!r} reads the driver's frames, which are not given")
        return arm.encode(head, frames, config.image_size, dtype, config.driver.regions)
    identity = make_identity(head, coefficients.betas[:, :1])
    if reference is not None:
        reference = jax.tree.map(lambda x: jnp.asarray(x)[:, None], reference)
        reference = reference._replace(coefficients=still(reference.coefficients))
    return driver_map(head, identity, coefficients, camera, crop, config.image_size, name, dtype, reference)


def align_driver(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, crop: Float[ArrayLike, "b t 4"],
    frames: DriverFrames,
) -> DriverFrames:  # fmt: skip
    """Frames of who drives (B,T,...) with the view in which their face lies on the driven one.

    The similarity between the faces is that of the first frame and constant in time.

    Args:
      coefficients, camera, crop: of the driven head, as for `driver_input`.
    """
    first = lambda *tree: jax.tree.map(lambda x: jnp.asarray(x)[:, :1], tree)
    driven = region_points(head, *first(coefficients, camera))
    driver = region_points(head, *first(frames.coefficients, frames.camera))
    view = aligned_view(driven, driver, jnp.asarray(crop)[:, :1])
    return frames._replace(view=jnp.broadcast_to(view, crop.shape))


def driver_preview(
    config: ConfigDict,
    head: HeadAsset,
    driver: Driver,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "b t 4"],
) -> Images:
    """RGB pictures of what `driver_input` gave; an arm without a map shows the default map instead."""
    if not find_arm(config.driver.arm).spatial:
        identity = make_identity(head, coefficients.betas[:, :1])
        driver = driver_map(head, identity, coefficients, camera, crop, config.image_size, DEFAULT_ARM)
    return find_arm(config.driver.arm).preview(driver)


def unit_range(images: Images) -> Float[Array, "*b s s 3"]:
    """uint8 RGB -> float32 in [-1, 1]."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def encode_images(
    networks: Networks, params: PyTree, images: Images, key: PRNGKeyArray | None = None
) -> Latents:
    """Scaled latents: the posterior mean, or a random draw when a key is given."""
    flat = unit_range(images.reshape(-1, *images.shape[-3:]))
    mean, logvar = _apply(networks.autoencoder, params["autoencoder"], "encode", flat)
    latents = mean if key is None else sample_posterior(key, mean, logvar)
    return latents.reshape(*images.shape[:-3], *latents.shape[1:])


def decode_latents(networks: Networks, params: PyTree, latents: Latents) -> UInt8[Array, "*b s s 3"]:
    """Latents -> uint8 RGB, one frame at a time (the decoder's activations are the largest there are)."""
    decode = lambda z: _apply(networks.autoencoder, params["autoencoder"], "decode", z[None])[0]
    images = jax.lax.map(decode, latents.reshape(-1, *latents.shape[-3:]))
    images = jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
    return images.reshape(*latents.shape[:-3], *images.shape[1:])


def reference_features(
    networks: Networks,
    params: PyTree,
    latent: Float[Array, "b h w c"],
    condition: Float[Array, "b h w c0"] | None = None,
) -> Features:
    """Features of the reference portrait, one array for each self-attention.

    Args:
      condition: encoded driver map of the portrait itself, where `config.model.reference.driver` asks for it.
    """
    context = _null_prompt(params, latent.shape[0]) if "null_prompt" in params else None
    return _apply(networks.loki, _loki_params(params), "reference_features", latent, context, condition)


def portrait_keys_values(
    config: ConfigDict,
    networks: Networks,
    params: PyTree,
    head: HeadAsset,
    image: UInt8[ArrayLike, "b s s 3"],
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "b 4"],
) -> KeysValues:
    """What the generation UNet sees of pictures of known coefficients (B, ...), cameras and crops; traceable.

    Keys and values of `reference_features`, which sampling would else project anew in every step.
    """
    condition = None
    if config.model.reference.driver:
        reference = ReferenceFrame(coefficients, camera, crop, image)
        frame = jax.tree.map(lambda x: x[:, None], reference)
        own = (frame.coefficients, frame.camera, frame.crop)
        frames = DriverFrames(frame.image, *own, frame.crop)
        driver = driver_input(config, head, *own, reference, frames)
        condition = encode_condition(networks, params, driver)[:, 0]
    features = reference_features(networks, params, encode_images(networks, params, image), condition)
    return keys_values(networks.loki.generation.unet, params["generation"]["unet"], features)


def encode_condition(networks: Networks, params: PyTree, driver: Driver) -> Float[Array, "b t h w c0"]:
    """The generation UNet's residual."""
    return _apply(networks.loki, _loki_params(params), "encode_condition", driver)


def denoise(networks: Networks, params: PyTree, x, timesteps, condition, features, history=None):
    """`Loki.denoise` of a window; cross-attention, where the generation UNet keeps it, sees the null prompt.

    Args:
      history: clean latents (B,k,h,w,c) of the frames before the window, None for none. They stand in front
        of the window at timestep 0; `condition` has k + T frames then, and the prediction T.
    """
    if history is not None:
        x = jnp.concatenate([history, x], axis=1)
        timesteps = jnp.pad(timesteps, ((0, 0), (history.shape[1], 0)))
    has_context = networks.loki.generation.unet.context_dim is not None
    context = _null_prompt(params, x.shape[0]) if has_context else None
    inputs = x, timesteps, condition, features, context
    out = _apply(networks.loki, _loki_params(params), "denoise", *inputs)
    return out if history is None else out[:, history.shape[1] :]


def _null_prompt(params: PyTree, batch: int) -> Float[Array, "b l e"]:
    return jnp.broadcast_to(params["null_prompt"], (batch, *params["null_prompt"].shape[1:]))


def _loki_params(params: PyTree) -> dict:
    return {name: params[name] for name in ("generation", "reference")}


def _apply(module: Loki | Autoencoder, params: PyTree, method: str, *inputs) -> Any:
    """`Module.apply`, which gives a pair only where variables are mutable; none are here."""
    return module.apply({"params": params}, *inputs, method=method)


def initial_noise(
    networks: Networks, key: PRNGKeyArray, windows: int, frames: int
) -> Float[Array, "windows frames h w c"]:
    """Standard normal latents."""
    size, channels = networks.model_config.latent_size, networks.model_config.latent_channels
    return jax.random.normal(key, (windows, frames, size, size, channels))


def default_guidance(config: ConfigDict) -> Guidance:
    """The guidance of `config.sample`: nested where it has `fusion`."""
    return tuple(config.sample.fusion) or config.sample.guidance


def sample_windows(
    config: ConfigDict,
    networks: Networks,
    params: PyTree,
    reference: Features | KeysValues,
    driver: Driver,
    noise: Float[Array, "b n h w c"],
    *,
    solver: str,
    steps: int,
    guidance: Guidance,
    spacing: str,
    guided_steps: tuple[float, float] = (0.0, 1.0),
    blend: Blend | None = None,
    blended: PyTree = None,
    history: Float[Array, "b k h w c"] | None = None,
) -> tuple[Float[Array, "b n h w c"], PyTree]:
    """Latents of windows that animate references, given by `portrait_keys_values` (or features); traceable.

    `noise`, of `initial_noise`, is what sampling starts from; for the other options and the second result
    see `diffusion.sampler.sample_latents`.
    The unconditional branch has zero features, a zero driver map (docs/decisions.md, row 1) and no history.

    Args:
      guidance: one scale, or those of nested guidance: of the source beside nothing, of the motion beside the
        source, and of the history beside both. The last has no effect on a model without history.
      history: latents of the `config.history.frames` frames before the window, whose driver input is then in
        front of the window's in `driver`; zero where there are none. None: none.
    """
    if history is None and (frames := config.history.frames):
        history = jnp.zeros((noise.shape[0], frames, *noise.shape[2:]))
        driver = jnp.pad(driver, ((0, 0), (frames, 0), *((0, 0),) * (driver.ndim - 2)))
    condition = encode_condition(networks, params, driver)
    # One frame is enough: all are alike.
    dropped = encode_condition(networks, params, jnp.zeros_like(driver[:1, :1]))
    dropped = jnp.broadcast_to(dropped, condition.shape)
    no_reference, no_history = jax.tree.map(jnp.zeros_like, (reference, history))
    between = []
    if isinstance(guidance, tuple):
        between.append((dropped, reference, no_history))
        if history is None:
            guidance = guidance[:2]
        else:
            known = history.shape[1]
            motion = jnp.concatenate([dropped[:, :known], condition[:, known:]], axis=1)
            between.append((motion, reference, no_history))
    return sample_latents(
        lambda x, t, inputs: denoise(networks, params, x, t, *inputs),
        noise,
        networks.schedule,
        conditional=(condition, reference, history),
        unconditional=(dropped, no_reference, no_history),
        between=between,
        solver=solver,
        steps=steps,
        guidance=guidance,
        guided_steps=guided_steps,
        spacing=spacing,
        prediction=config.diffusion.prediction,
        clip=config.diffusion.clip or None,
        blend=blend,
        blended=blended,
    )
