"""The train step: from a batch of frames and coefficients to new parameters. Method, sections 1, 7, 11."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from loki_jax.data.schema import Batch
from loki_jax.diffusion.loss import diffusion_loss
from loki_jax.face.asset import HeadAsset
from loki_jax.models.autoencoder import sample_posterior
from loki_jax.models.loki import drop_identity, drop_motion
from loki_jax.networks import (
    Networks,
    denoise,
    driver_input,
    encode_condition,
    reference_features,
    unit_range,
)  # fmt: skip
from loki_jax.training.sharding import BATCH_AXES
from loki_jax.training.state import TrainState, update_ema


def sharded_driver_input(config: ConfigDict, mesh: Mesh) -> Callable:
    """`driver_input` where each device draws the windows it holds, so that nothing is gathered."""
    batch = PartitionSpec(BATCH_AXES)
    draw = lambda head, *inputs: driver_input(config, head, *inputs)
    specs = (PartitionSpec(), batch, batch, batch)
    return jax.shard_map(draw, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)


def window_keys(key: PRNGKeyArray, rows: Int[Array, " b"]) -> PRNGKeyArray:
    """A key for each window, by its row in the global batch: draws are the same however a batch is cut up."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def dropout_masks(keys: PRNGKeyArray, dropout: ConfigDict) -> tuple[Array, Array]:
    """(keep identity, keep motion), (B,) bool each, for keys (B,).

    Exclusive shares lose one, the other or both.
    """
    u = jax.vmap(jax.random.uniform)(keys)
    both, identity = dropout.both, dropout.both + dropout.identity
    lost_both, lost_identity = u < both, (u >= both) & (u < identity)
    lost_motion = (u >= identity) & (u < identity + dropout.motion)
    return ~(lost_both | lost_identity), ~(lost_both | lost_motion)


def make_loss(config: ConfigDict, networks: Networks, mesh: Mesh) -> Callable:
    """loss(trained, frozen, batch, head, keys, dropout) -> scalar; `keys` (B,) of `window_keys`."""
    draw = sharded_driver_input(config, mesh)

    def loss(
        trained: PyTree, frozen: PyTree, batch: Batch, head: HeadAsset, keys: PRNGKeyArray, dropout: bool
    ):
        params = trained | frozen
        split = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        keys = dict(zip(("latent", "reference", "dropout", "diffusion"), split, strict=True))
        x0 = _latents(networks, params, batch, "", keys["latent"])
        reference_keys = keys["reference"] if config.model.autoencoder.sample_reference else None
        reference = _latents(networks, params, batch, "reference_", reference_keys)
        driver, reference_condition = _drivers(config, networks, params, batch, head, draw)
        keep_identity, keep_motion = jnp.ones((2, x0.shape[0]), bool)
        if dropout:
            keep_identity, keep_motion = dropout_masks(keys["dropout"], config.dropout)
        if config.dropout.null_reference == "latent":
            reference = drop_motion(reference, keep_identity)
        features = reference_features(networks, params, reference, reference_condition)
        if config.dropout.null_reference != "latent":
            features = drop_identity(features, keep_identity)
        condition = encode_condition(networks, params, drop_motion(driver, keep_motion))
        if not config.dropout.null_gradient:
            # On a zero map the encoder's planes are constant: each of its group norms multiplies gradients by
            # up to 1 / sqrt(eps), at full width to a norm of 1e16 in the second step.
            kept = keep_motion[:, None, None, None, None]
            condition = jnp.where(kept, condition, jax.lax.stop_gradient(condition))
        predict = lambda x, t: denoise(networks, params, x, t, condition, features)
        # Validation is not weighted, so that runs can be compared.
        gamma = config.diffusion.min_snr_gamma if dropout else 0.0
        options = (config.diffusion.prediction, config.diffusion.shared_timesteps, gamma)
        return diffusion_loss(predict, x0, keys["diffusion"], networks.schedule, *options)[0]

    def loss_on_mesh(*args):
        # Kernels that XLA cannot split (splash attention) look the mesh up and split themselves.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss(*args)

    return loss_on_mesh


def _drivers(config, networks, params, batch, head, draw) -> tuple[Array, Array | None]:
    """The window's driver input, and the encoded one of its reference frame where the config wants it."""
    inputs = (batch.coefficients, batch.camera, batch.crop)
    if not config.model.reference.driver:
        return draw(head, *inputs), None
    # One camera and one crop a clip. Window and reference are drawn together: one rasterisation.
    reference = (batch.reference_coefficients, *jax.tree.map(lambda x: x[:, 0], inputs[1:]))
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, None]], 1), inputs, reference)
    driver = draw(head, *joined)
    return driver[:, :-1], encode_condition(networks, params, driver[:, -1:])[:, 0]


def _latents(
    networks: Networks, params: PyTree, batch: Batch, prefix: str, keys: PRNGKeyArray | None
) -> Float[Array, "b *t h w c"]:
    """Latents of the frames or of the reference: from the shards where they hold them, else encoded.

    The posterior mean, or a draw of it where each window has a key.
    """
    if batch.latent_mean is not None:
        scale = networks.autoencoder.scale
        mean = getattr(batch, f"{prefix}latent_mean").astype(jnp.float32) * scale
        logvar = getattr(batch, f"{prefix}latent_logvar").astype(jnp.float32) + 2 * jnp.log(scale)
    else:
        images = unit_range(batch.reference if prefix else batch.frames)
        flat = images.reshape(-1, *images.shape[-3:])
        encoded = networks.autoencoder.apply({"params": params["autoencoder"]}, flat, method="encode")
        mean, logvar = (x.reshape(*images.shape[:-3], *x.shape[1:]) for x in encoded)
    return mean if keys is None else jax.vmap(sample_posterior)(keys, mean, logvar)


def split_microbatches(tree: PyTree, count: int, mesh: Mesh) -> PyTree:
    """Leaves (B, ...) -> (count, B / count, ...): every device splits the windows it holds, none moves.

    B must be a multiple of count x devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: Array) -> Array:
        x = x.reshape(mesh.size, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(count, -1, *x.shape[3:]), sharding)

    return jax.tree.map(split, tree)


def make_gradients(config: ConfigDict, networks: Networks, mesh: Mesh) -> Callable:
    """gradients(state, batch, head) -> (loss, gradients).

    Both are means over the global batch of step `state.step + 1`. With `config.grad_accum_steps` > 1 they
    are summed over as many microbatches, one after another.
    """
    value_and_grad = jax.value_and_grad(make_loss(config, networks, mesh))
    steps = config.grad_accum_steps

    def gradients(state: TrainState, batch: Batch, head: HeadAsset):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rows = jnp.arange(config.batch_size)
        of = lambda batch, rows: value_and_grad(
            state.params, state.frozen, batch, head, window_keys(key, rows), True
        )
        if steps == 1:
            return of(batch, rows)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        add = lambda total, microbatch: (jax.tree.map(jnp.add, total, of(*microbatch)), None)
        total, _ = jax.lax.scan(add, zeros, split_microbatches((batch, rows), steps, mesh))
        return jax.tree.map(lambda x: x / steps, total)

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
        loss, grads = gradients(state, batch, head)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else update_ema(state.ema, params, state.step, config.ema_decay)
        new, old = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": 1.0 - finite}
        return TrainState(state.step + 1, params, ema, opt_state, state.frozen), metrics

    return step


def make_eval_step(config: ConfigDict, networks: Networks, mesh: Mesh) -> Callable:
    """loss(trained, frozen, batch, head, index) at noise and timesteps fixed by `index`, nothing dropped.

    Goes through the batch in the microbatches of the train step.
    """
    loss_of, steps = make_loss(config, networks, mesh), config.grad_accum_steps

    def evaluate(trained: PyTree, frozen: PyTree, batch: Batch, head: HeadAsset, index: int):
        keys = window_keys(jax.random.fold_in(jax.random.key(0), index), jnp.arange(config.batch_size))
        of = lambda batch, keys: loss_of(trained, frozen, batch, head, keys, False)
        if steps == 1:
            return of(batch, keys)
        add = lambda total, microbatch: (total + of(*microbatch), None)
        return jax.lax.scan(add, 0.0, split_microbatches((batch, keys), steps, mesh))[0] / steps

    return evaluate
