"""A full-size train step without its chips: traced from shapes, and its work by part.

Everything here is read off one trace of the real step at the batch that one device holds. Nothing is
compiled or allocated; a full-size trace takes seconds.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.extend.core import ClosedJaxpr, Literal
from jax.sharding import Mesh
from ml_collections import ConfigDict

from loki_jax.face.asset import HeadAsset
from loki_jax.networks import Networks, build_networks, initial_noise
from loki_jax.training.flops import Operation, Work, live_jaxpr, operations, total_work
from loki_jax.training.init import abstract_batch, abstract_state
from loki_jax.training.samples import animate_pairs, sampled_fields
from loki_jax.training.sharding import make_mesh
from loki_jax.training.state import TrainState, make_optimizer
from loki_jax.training.step import make_eval_step, make_train_step

# In the order in which a step does them.
PARTS = (
    "driver map", "VAE encode", "reference branch", "conditioning encoder", "generation forward",
    "recomputation", "backward", "optimiser", "rest",
)  # fmt: skip


class Subject(NamedTuple):
    """What is planned: a config, and what follows from it alone."""

    config: ConfigDict
    head: HeadAsset
    networks: Networks
    optimizer: optax.GradientTransformation
    state: TrainState  # ShapeDtypeStructs


def make_subject(config: ConfigDict, head: HeadAsset) -> Subject:
    """Networks, optimiser and state shapes of `config`. Raises ValueError on options that do not fit."""
    networks = build_networks(config, head)
    optimizer = make_optimizer(config)
    return Subject(config, head, networks, optimizer, abstract_state(config, networks, optimizer))


def trace_step(subject: Subject, windows: int, latents: bool = False) -> ClosedJaxpr:
    """The train step on one device that holds `windows` windows, attention written out (`xla`).

    Attention written out has every product in view; other backends do the same ones (flash kernels
    do q k^T once more in the backward pass).

    Args:
      latents: the shards hold latents, the VAE is skipped.
    """
    config, networks, mesh = _on_one_device(subject, windows)
    step = make_train_step(config, networks, subject.optimizer, mesh)
    batch = abstract_batch(config, subject.head, networks if latents else None)
    return jax.jit(step).trace(subject.state, batch, subject.head).jaxpr


def trace_validation(subject: Subject, windows: int, latents: bool = False) -> ClosedJaxpr:
    """The validation loss of `windows` windows on one device, in the microbatches of the step."""
    config, networks, mesh = _on_one_device(subject, windows)
    step = make_eval_step(config, networks, mesh)
    batch = abstract_batch(config, subject.head, networks if latents else None)
    params = subject.state.params | subject.state.frozen
    return jax.jit(step).trace(params, {}, batch, subject.head, 0).jaxpr


def trace_sampling(subject: Subject) -> ClosedJaxpr:
    """The animation of one pair, as `config.sample` draws it during training."""
    config, networks, _ = _on_one_device(subject, 1)
    batch = abstract_batch(config, subject.head)
    moved = ("coefficients", "camera", "crop")
    own = {f"driver_{name}": getattr(batch, name) for name in moved}
    fields = batch._asdict() | {"driver": batch.frames} | own
    # Without the history.
    window = lambda x: jax.ShapeDtypeStruct((x.shape[0], config.window, *x.shape[2:]), x.dtype)
    inputs: dict[str, Any] = {
        name: fields[name] if name.startswith("reference") else jax.tree.map(window, fields[name])
        for name in sampled_fields(config)
    }
    inputs["noise"] = jax.eval_shape(lambda: initial_noise(networks, jax.random.key(0), 1, config.window))
    animate = functools.partial(animate_pairs, config, networks)
    params = subject.state.params | subject.state.frozen
    return jax.jit(animate).trace(params, subject.head, inputs).jaxpr


def _on_one_device(subject: Subject, windows: int) -> tuple[ConfigDict, Networks, Mesh]:
    """Config, networks and mesh of one device, attention written out."""
    config = ConfigDict(subject.config.to_dict())
    config.batch_size = windows
    config.model.attention_backend = "xla"
    return config, build_networks(config, subject.head), make_mesh(1, 1, jax.devices()[:1])


def part_of(scope: str) -> str:
    """The part of the step that an operation belongs to, from its name stack."""
    if "rematted_computation" in scope:
        return "recomputation"
    if "transpose(" in scope:
        return "backward"
    if "driver_map" in scope:
        return "driver map"
    for mark, part in (
        ("Autoencoder", "VAE encode"),
        ("reference_features", "reference branch"),
        ("encode_condition", "conditioning encoder"),
        ("denoise", "generation forward"),
    ):
        if mark in scope:
            return part
    # What differentiation has touched belongs to the loss; the update is outside of it.
    return "rest" if "jvp(" in scope else "optimiser"


def work_by_part(jaxpr: ClosedJaxpr) -> dict[str, Work]:
    """Work of every part on one device, zero where the step has none."""
    parts: dict[str, list[Operation]] = {name: [] for name in PARTS}
    for op in operations(jaxpr):
        parts[part_of(op.scope)].append(op)
    return {name: total_work(ops) for name, ops in parts.items()}


def frozen_read(jaxpr: ClosedJaxpr, state: TrainState) -> list[bool]:
    """Whether the traced step reads each of the frozen arrays, in the order of `jax.tree.leaves`."""
    live = live_jaxpr(jaxpr)
    read = {var for equation in live.eqns for var in equation.invars if not isinstance(var, Literal)}
    # The arguments of the step come in this order: state (its fields in order), batch, head.
    before = len(jax.tree.leaves(state._replace(frozen=None)))
    frozen = live.invars[before : before + len(jax.tree.leaves(state.frozen))]
    return [var in read for var in frozen]


def count(tree: Any) -> int:
    """Scalars in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def parameters_by_part(state: TrainState) -> dict[str, int]:
    """Parameters of the generation UNet, conditioning encoder, reference branch, VAE and null prompt."""
    params = state.params | state.frozen
    generation = params["generation"]
    return {
        "generation UNet": count(generation["unet"]),
        "conditioning encoder": count(generation["encoder"]),
        "reference UNet": count(params["reference"]),
        "VAE": count(params.get("autoencoder", {})),
        "null prompt": count(params.get("null_prompt", {})),
    }
