"""The train step: from a batch of frames and coefficients to new parameters. Method, sections 1, 7, 11.

Loss and gradients are computed by each device for the windows it holds, and then averaged over devices: in
float32, whatever the activations are (`config.gradient_dtype`). XLA left to itself sums each gradient right
after the product that makes it, in bfloat16, with an error that grows with the number of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from loki_jax.arrays import ArrayLike
from loki_jax.data.schema import Batch
from loki_jax.diffusion.loss import diffusion_loss
from loki_jax.driver.encoding import ReferenceFrame
from loki_jax.driver.regions import DriverFrames, perturb_driver
from loki_jax.driver.registry import find_arm
from loki_jax.face.asset import HeadAsset
from loki_jax.models.autoencoder import sample_posterior
from loki_jax.models.loki import drop_identity, drop_motion
from loki_jax.networks import (
    Networks,
    align_driver,
    denoise,
    driver_input,
    encode_condition,
    reference_features,
    unit_range,
)  # fmt: skip
from loki_jax.training.sharding import BATCH_AXES, gather_params, mean_over_devices, on_devices, param_specs
from loki_jax.training.state import TrainState, update_ema


def window_keys(key: PRNGKeyArray, rows: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each window, by its row in the global batch: draws are the same however a batch is cut up."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def dropout_masks(keys: Key[Array, " b"], dropout: ConfigDict) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
    """(keep identity, keep motion) of each window.

    Exclusive shares lose one, the other or both.
    """
    u = jax.vmap(jax.random.uniform)(keys)
    both, identity = dropout.both, dropout.both + dropout.identity
    lost_both, lost_identity = u < both, (u >= both) & (u < identity)
    lost_motion = (u >= identity) & (u < identity + dropout.motion)
    return ~(lost_both | lost_identity), ~(lost_both | lost_motion)


def share_without_history(config: ConfigDict, step: Int[Array, ""]) -> Float[Array, ""]:
    """Share of windows that lose their history in an update after `step` others: all, and few at the end."""
    first = round((1 - config.history.real_share) * config.steps)
    return jnp.where(step < first, 1.0, config.history.dropout)


def draw_history(
    latents: Float[Array, "b k h w c"], keys: Key[Array, " b"], noise: float, lost: Float[Array, " b"]
) -> tuple[Float[Array, "b k h w c"], Bool[Array, " b"]]:
    """The history of windows as training shows it, and which windows keep theirs; the others see zeros.

    Sampling hands on frames with errors, so each window's gets noise of a standard deviation up to `noise`.

    Args:
      lost: the probability of each window to lose its history.
    """

    def draw(latents: Array, key: PRNGKeyArray, lost: Array) -> tuple[Array, Array]:
        kept, level, gaussian = jax.random.split(key, 3)
        added = noise * jax.random.uniform(level) * jax.random.normal(gaussian, latents.shape)
        return latents + added, jax.random.uniform(kept) >= lost

    noisy, keep = jax.vmap(draw)(latents, keys, lost)
    return drop_motion(noisy, keep), keep


def make_loss(config: ConfigDict, networks: Networks) -> Callable:
    """loss(trained, frozen, batch, head, keys, dropout, lost_history) -> scalar.

    `keys` (B,) of `window_keys`; `lost_history` is the share of windows without their history.
    """
    history_frames = config.history.frames

    def loss(
        trained: PyTree, frozen: PyTree, batch: Batch, head: HeadAsset, keys: Key[Array, " b"], dropout: bool,
        lost_history: Float[ArrayLike, ""] | float,
    ):  # fmt: skip
        params = trained | frozen
        keys_of = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        latent_keys, reference_keys, dropout_keys, diffusion_keys = keys_of
        x0 = _latents(networks, params, batch, "", latent_keys)
        drawn = config.model.autoencoder.sample_reference
        reference = _latents(networks, params, batch, "reference_", reference_keys if drawn else None)
        strength = config.driver.perturbation if dropout else 0.0
        frame_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 5)  # beside the draws above and below
        driver, reference_condition = _drivers(
            config, networks, params, batch, head, _driver_frames(config, batch, head, frame_keys, strength)
        )
        keep_identity, keep_motion = jnp.ones((2, x0.shape[0]), bool)
        if dropout:
            keep_identity, keep_motion = dropout_masks(dropout_keys, config.dropout)
        keep_frames, history = jnp.repeat(keep_motion[:, None], x0.shape[1], axis=1), None
        if history_frames:
            # No term of the guidance has a history without the motion.
            lost = jnp.where(keep_motion, lost_history, 1.0)
            history_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 4)  # beside the four above
            history, keep = draw_history(x0[:, :history_frames], history_keys, config.history.noise, lost)
            x0 = x0[:, history_frames:]
            keep_frames = keep_frames.at[:, :history_frames].set(keep[:, None])
        if config.dropout.null_reference == "latent":
            reference = drop_motion(reference, keep_identity)
        features = reference_features(networks, params, reference, reference_condition)
        if config.dropout.null_reference != "latent":
            features = drop_identity(features, keep_identity)
        condition = encode_condition(networks, params, drop_motion(driver, keep_frames))
        if not config.dropout.null_gradient:
            # On a zero map the encoder's planes are constant: each of its group norms multiplies gradients by
            # up to 1 / sqrt(eps), at full width to a norm of 1e16 in the second step.
            kept = keep_frames[:, :, None, None, None]
            condition = jnp.where(kept, condition, jax.lax.stop_gradient(condition))
        predict = lambda x, t: denoise(networks, params, x, t, condition, features, history)
        # Validation is not weighted, so that runs can be compared.
        gamma = config.diffusion.min_snr_gamma if dropout else 0.0
        options = (config.diffusion.prediction, config.diffusion.shared_timesteps, gamma)
        return diffusion_loss(predict, x0, diffusion_keys, networks.schedule, *options)[0]

    return loss


def _driver_frames(
    config: ConfigDict, batch: Batch, head: HeadAsset, keys: Key[Array, " b"], strength: float
) -> DriverFrames | None:
    """Who drives the windows, for arms that read frames: another person where there is one; perturbed."""
    if not find_arm(config.driver.arm).frames:
        return None
    if batch.frames is None:
        raise ValueError(f"driver arm {config.driver.arm!r} reads frames, and the batch has none")
    own = (batch.coefficients, batch.camera, batch.crop)
    frames = DriverFrames(batch.frames, *own, batch.crop)
    if batch.driver is not None:
        frames = align_driver(head, *own, DriverFrames(*batch.driver, batch.driver.crop))
    return perturb_driver(keys, frames, strength) if strength else frames


def _drivers(
    config: ConfigDict, networks: Networks, params: PyTree, batch: Batch, head: HeadAsset,
    frames: DriverFrames | None,
) -> tuple[ArrayLike, Array | None]:  # fmt: skip
    """The window's driver input, and the encoded one of its reference frame where the config wants it."""
    draw = jax.named_scope("driver_map")(functools.partial(driver_input, config))
    inputs = (batch.coefficients, batch.camera, batch.crop)
    own = (batch.reference_coefficients, batch.reference_camera, batch.reference_crop)
    reference = ReferenceFrame(*own, batch.reference)
    if not config.model.reference.driver:
        return draw(head, *inputs, reference, frames), None
    if frames is not None:
        alone = jax.tree.map(lambda x: x[:, None], reference)
        frame = (alone.coefficients, alone.camera, alone.crop)
        shown = draw(head, *frame, reference, DriverFrames(alone.image, *frame, alone.crop))
        return draw(head, *inputs, reference, frames), encode_condition(networks, params, shown)[:, 0]
    # Window and reference are drawn together: one rasterisation.
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, None]], 1), inputs, own)
    coefficients, camera, crop = joined
    driver = draw(head, coefficients, camera, crop, reference)
    return driver[:, :-1], encode_condition(networks, params, driver[:, -1:])[:, 0]


def _latents(
    networks: Networks, params: PyTree, batch: Batch, prefix: str, keys: Key[Array, " b"] | None
) -> Float[Array, "b *t h w c"]:
    """Latents of the frames or of the reference: from the shards where they hold them, else encoded.

    The posterior mean, or a draw of it where each window has a key.
    """
    images = batch.reference if prefix else batch.frames
    if batch.latent_mean is not None:
        scale = networks.autoencoder.scale
        mean = getattr(batch, f"{prefix}latent_mean").astype(jnp.float32) * scale
        logvar = getattr(batch, f"{prefix}latent_logvar").astype(jnp.float32) + 2 * jnp.log(scale)
    elif images is None:
        raise ValueError("a batch without images and without latents")
    else:
        flat = unit_range(images).reshape(-1, *images.shape[-3:])
        encoded: Any = networks.autoencoder.apply({"params": params["autoencoder"]}, flat, method="encode")
        mean, logvar = (x.reshape(*images.shape[:-3], *x.shape[1:]) for x in encoded)
    return mean if keys is None else jax.vmap(sample_posterior)(keys, mean, logvar)


def split_microbatches(tree: PyTree, count: int) -> PyTree:
    """Leaves (B, ...) -> (count, B / count, ...); B must be a multiple of `count`."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


def over_microbatches(function: Callable, windows: tuple, count: int) -> PyTree:
    """Mean of `function(*microbatch)` over microbatches of `windows`, one after another."""
    if count == 1:
        return function(*windows)
    microbatches = split_microbatches(windows, count)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, microbatch: (jax.tree.map(jnp.add, total, function(*microbatch)), None)
    return jax.tree.map(lambda x: x / count, jax.lax.scan(add, zeros, microbatches)[0])


def make_gradients(config: ConfigDict, networks: Networks, mesh: Mesh) -> Callable:
    """gradients(state, batch, head) -> (loss, gradients).

    Both are means over the global batch of step `state.step + 1`. With `config.grad_accum_steps` > 1 they
    are summed over as many microbatches, one after another.
    """
    loss_of = make_loss(config, networks)
    dtype = jnp.dtype(config.gradient_dtype)

    def gradients(state: TrainState, batch: Batch, head: HeadAsset):
        specs = param_specs(config, mesh, {"params": state.params, "frozen": state.frozen})
        whole = functools.partial(gather_params, dtype=jnp.dtype(config.model.dtype), gradient_dtype=dtype)
        mean = functools.partial(mean_over_devices, mesh=mesh)

        def on_device(trained, frozen, batch, head, key, rows, lost):
            frozen = whole(frozen, specs["frozen"])

            def loss(trained, batch, rows):
                keys = window_keys(key, rows)
                return loss_of(whole(trained, specs["params"]), frozen, batch, head, keys, True, lost)

            of = functools.partial(jax.value_and_grad(loss), trained)
            found, grads = over_microbatches(of, (batch, rows), config.grad_accum_steps)
            grads = jax.tree.map(functools.partial(mean, dtype=dtype), grads, specs["params"])
            return mean(found, PartitionSpec()), grads

        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        split = PartitionSpec(BATCH_AXES)
        copied = PartitionSpec()
        in_specs = (specs["params"], specs["frozen"], split, copied, copied, split, copied)
        run = on_devices(on_device, mesh, in_specs, (copied, specs["params"]))
        rows, lost = jnp.arange(config.batch_size), share_without_history(config, state.step)
        return run(state.params, state.frozen, batch, head, key, rows, lost)

    return gradients


def make_train_step(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch, HeadAsset], tuple[TrainState, dict[str, Array]]]:
    """step(state, batch, head) -> (state, {"loss", "grad_norm", "skipped"}).

    Where the loss or the gradients' norm is not finite, parameters, average and optimiser stay as they
    are (`skipped` is 1); the step still counts, so that the next batch meets other noise.
    """
    gradients = make_gradients(config, networks, mesh)

    def step(state: TrainState, batch: Batch, head: HeadAsset):
        return apply_gradients(config, optimizer, state, *gradients(state, batch, head))

    return step


def apply_gradients(
    config: ConfigDict, optimizer: optax.GradientTransformation, state: TrainState, loss: Float[Array, ""],
    grads: PyTree,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """The second half of a step: (state, {"loss", "grad_norm", "skipped"}), see `make_train_step`."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else update_ema(state.ema, params, state.step, config.ema_decay)
    new, old = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
    params, ema, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics = {"loss": loss, "grad_norm": norm, "skipped": 1.0 - finite}
    return TrainState(state.step + 1, params, ema, opt_state, state.frozen), metrics


def make_eval_step(config: ConfigDict, networks: Networks, mesh: Mesh) -> Callable:
    """loss(trained, frozen, batch, head, index) at noise and timesteps fixed by `index`, nothing dropped.

    Windows have no history, so that runs with and without can be compared.
    Goes through the batch in the microbatches of the train step.
    """
    loss_of = make_loss(config, networks)

    def evaluate(trained: PyTree, frozen: PyTree, batch: Batch, head: HeadAsset, index: Int[Array, ""] | int):
        params = {"params": trained, "frozen": frozen}
        specs = param_specs(config, mesh, params)

        def on_device(params, batch, head, keys):
            params = gather_params(params, specs, jnp.dtype(config.model.dtype))
            trained, frozen = params["params"], params["frozen"]
            of = lambda batch, keys: loss_of(trained, frozen, batch, head, keys, False, 1.0)
            loss = over_microbatches(of, (batch, keys), config.grad_accum_steps)
            return mean_over_devices(loss, PartitionSpec(), mesh)

        keys = window_keys(jax.random.fold_in(jax.random.key(0), index), jnp.arange(config.batch_size))
        split = PartitionSpec(BATCH_AXES)
        run = on_devices(on_device, mesh, (specs, split, PartitionSpec(), split), PartitionSpec())
        return run(params, batch, head, keys)

    return evaluate
