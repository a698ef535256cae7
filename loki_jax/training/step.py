"""The train step: from a batch of frames and coefficients to new parameters. Design sections 1, 7, 11."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from loki_jax.diffusion.loss import check_prediction, diffusion_loss
from loki_jax.head.asset import HeadAsset
from loki_jax.models.autoencoder import sample_posterior
from loki_jax.models.loki import drop_identity, drop_motion
from loki_jax.networks import (
    Networks,
    denoise,
    driver_input,
    encode_condition,
    random_params,
    reference_features,
    unit_range,
)
from loki_jax.training.checkpoint import (
    CheckpointError,
    check_fit,
    leaf_shapes,
    load_checkpoint,
    restore_as_numpy,
)
from loki_jax.training.sharding import BATCH_AXES
from loki_jax.training.state import TrainState, update_ema


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


# --------------------------------------------------------------------------------------- parameters


def split_params(config: ConfigDict, params: PyTree) -> tuple[PyTree, PyTree]:
    """(trained, frozen) parts of all parameters; frozen ones in the computation's dtype."""
    trained = {"generation"} | ({"reference"} if config.model.reference.trainable else set())
    dtype = jnp.dtype(config.model.dtype)
    frozen = {
        key: jax.tree.map(lambda x: x.astype(dtype), value)
        for key, value in params.items()
        if key not in trained
    }
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
    # Returning only what is not given, so that XLA never draws a backbone that would be thrown away.
    draw = lambda: {
        k: v for k, v in random_params(networks, jax.random.key(config.seed)).items() if k not in given
    }
    params = jax.jit(draw)()
    if path:
        # Without the devices of the process that converted it.
        backbone = restore_as_numpy(path.absolute())
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


# --------------------------------------------------------------------------------------------- loss


def sharded_driver_input(config: ConfigDict, mesh: Mesh) -> Callable:
    """`driver_input` where each device draws the windows it holds, so that nothing is gathered."""
    batch = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        lambda head, *inputs: driver_input(config, head, *inputs),
        mesh=mesh,
        in_specs=(PartitionSpec(), batch, batch, batch),
        out_specs=batch,
        check_vma=False,
    )


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
        trained: PyTree,
        frozen: PyTree,
        batch: dict[str, Any],
        head: HeadAsset,
        keys: PRNGKeyArray,
        dropout: bool,
    ):
        params = trained | frozen
        split = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        keys = dict(zip(("latent", "reference", "dropout", "diffusion"), split, strict=True))
        x0 = _latents(networks, params, batch, "", keys["latent"])
        reference = _latents(
            networks,
            params,
            batch,
            "reference_",
            keys["reference"] if config.model.autoencoder.sample_reference else None,
        )
        driver, reference_condition = _drivers(config, networks, params, batch, head, draw)
        keep_identity, keep_motion = jnp.ones((2, x0.shape[0]), bool)
        if dropout:
            keep_identity, keep_motion = dropout_masks(keys["dropout"], config.dropout)
        if config.dropout.null_reference == "latent":
            features = reference_features(
                networks, params, drop_motion(reference, keep_identity), reference_condition
            )
        else:
            features = drop_identity(
                reference_features(networks, params, reference, reference_condition), keep_identity
            )
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
    inputs = (batch["coefficients"], batch["camera"], batch["crop"])
    if not config.model.reference.driver:
        return draw(head, *inputs), None
    # One camera and one crop a clip. Window and reference are drawn together: one rasterisation.
    reference = (batch["reference_coefficients"], *jax.tree.map(lambda x: x[:, 0], inputs[1:]))
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, None]], 1), inputs, reference)
    driver = draw(head, *joined)
    return driver[:, :-1], encode_condition(networks, params, driver[:, -1:])[:, 0]


def _latents(
    networks: Networks, params: PyTree, batch: dict, prefix: str, keys: PRNGKeyArray | None
) -> Float[Array, "b *t h w c"]:
    """Latents of the frames or of the reference: from the shards where they hold them, else encoded.

    The posterior mean, or a draw of it where each window has a key.
    """
    if f"{prefix}latent_mean" in batch:
        scale = networks.autoencoder.scale
        mean = batch[f"{prefix}latent_mean"].astype(jnp.float32) * scale
        logvar = batch[f"{prefix}latent_logvar"].astype(jnp.float32) + 2 * jnp.log(scale)
    else:
        images = unit_range(batch["reference" if prefix else "frames"])
        flat = images.reshape(-1, *images.shape[-3:])
        encoded = networks.autoencoder.apply({"params": params["autoencoder"]}, flat, method="encode")
        mean, logvar = (x.reshape(*images.shape[:-3], *x.shape[1:]) for x in encoded)
    return mean if keys is None else jax.vmap(sample_posterior)(keys, mean, logvar)


# -------------------------------------------------------------------------------------------- steps


def deal_windows(tree: PyTree, parts: int, mesh: Mesh) -> PyTree:
    """Leaves (B, ...) -> (parts, B / parts, ...): every device deals out the windows it holds, none moves.

    B must be a multiple of parts x devices.
    """
    placed = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def deal(x: Array) -> Array:
        x = x.reshape(mesh.size, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(parts, -1, *x.shape[3:]), placed)

    return jax.tree.map(deal, tree)


def make_gradients(config: ConfigDict, networks: Networks, mesh: Mesh) -> Callable:
    """gradients(state, batch, head) -> (loss, gradients).

    Both are means over the global batch of step `state.step + 1`.
    With `config.accumulate` > 1 the batch goes through in so many parts, one after another, whose
    gradients are summed: the memory of a part, the result of the whole up to rounding.
    """
    value_and_grad = jax.value_and_grad(make_loss(config, networks, mesh))

    def gradients(state: TrainState, batch: dict, head: HeadAsset):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rows = jnp.arange(config.batch_size)
        of = lambda batch, rows: value_and_grad(
            state.params, state.frozen, batch, head, window_keys(key, rows), True
        )
        if config.accumulate == 1:
            return of(batch, rows)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        add = lambda total, part: (jax.tree.map(jnp.add, total, of(*part)), None)
        total, _ = jax.lax.scan(add, zeros, deal_windows((batch, rows), config.accumulate, mesh))
        return jax.tree.map(lambda x: x / config.accumulate, total)

    return gradients


def make_train_step(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, dict, HeadAsset], tuple[TrainState, dict[str, Array]]]:
    """step(state, batch, head) -> (state, {"loss", "grad_norm", "skipped"}).

    Where the loss or the gradients' norm is not finite, parameters, average and optimiser stay as they
    are (`skipped` is 1); the step still counts, so that the next batch meets other noise.
    """
    gradients = make_gradients(config, networks, mesh)

    def step(state: TrainState, batch: dict, head: HeadAsset):
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
    """loss(trained, frozen, batch, head, index) at noise and timesteps fixed by `index`, nothing dropped."""
    loss_of = make_loss(config, networks, mesh)

    def evaluate(trained: PyTree, frozen: PyTree, batch: dict, head: HeadAsset, index: int):
        keys = window_keys(jax.random.fold_in(jax.random.key(0), index), jnp.arange(config.batch_size))
        return loss_of(trained, frozen, batch, head, keys, False)

    return evaluate
