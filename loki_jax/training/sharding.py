"""Mesh and parameter sharding: axes and rules come from the config, nothing else decides.

Axis `data` replicates parameters, axis `fsdp` shards them; the batch is split over both.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: list | None = None) -> Mesh:
    """Mesh (data, fsdp); one of the two may be -1 and takes the devices that are left.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data == -1 and fsdp == -1:
        raise ValueError("config.mesh: only one of data and fsdp can be -1")
    if data == -1:
        data = count // fsdp
    if fsdp == -1:
        fsdp = count // data
    if data * fsdp != count or count == 0:
        raise ValueError(
            f"config.mesh: data={data} x fsdp={fsdp} does not match {count} devices; "
            "set config.mesh.data and config.mesh.fsdp so that they multiply to it"
        )
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def path_name(path: tuple) -> str:
    """A pytree key path as `a/b/c`: the names of arrays in checkpoints, rules and messages."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_spec(shape: tuple[int, ...], rule: str, fsdp: int, min_size: int) -> PartitionSpec:
    """Spec of one array under `rule` ("fsdp": largest dimension that the axis divides; "replicate")."""
    if rule == "replicate" or fsdp == 1 or math.prod(shape) < min_size:
        return PartitionSpec()
    if rule != "fsdp":
        raise ValueError(f"config.sharding_rules: unknown rule {rule!r}, use fsdp or replicate")
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible:
        return PartitionSpec()
    axis = max(divisible, key=lambda a: shape[a])
    return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))


def tree_shardings(tree, mesh: Mesh | AbstractMesh, rules, min_size: int):
    """NamedSharding of every leaf of `tree` (arrays or ShapeDtypeStructs).

    Optimiser moments and the moving average carry their parameter's path as a suffix, so the same
    regular expressions match all of them alike.

    Args:
      rules: pairs (regular expression on the path, "fsdp" | "replicate"); the first match decides.

    Returns:
      (shardings, unsharded): the tree of shardings, and the paths and shapes of the arrays of at
      least `min_size` elements that stay whole although the mesh has an fsdp axis.
    """
    fsdp = mesh.shape["fsdp"]
    unsharded = []

    def sharding(path, leaf):
        name, shape = path_name(path), tuple(leaf.shape)
        rule = next((rule for pattern, rule in rules if re.search(pattern, name)), "replicate")
        spec = leaf_spec(shape, rule, fsdp, min_size)
        if fsdp > 1 and spec == PartitionSpec() and math.prod(shape) >= min_size:
            unsharded.append((name, shape))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree), unsharded


# ------------------------------------------------------------------- programs of one device


def on_devices(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` run by each device on its own part of the arguments; on a mesh of one, just `function`."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_specs(config: ConfigDict, mesh: Mesh, tree: PyTree) -> PyTree:
    """PartitionSpec of every array of `tree`, by the rules of `config`."""
    shardings, _ = tree_shardings(tree, mesh, config.sharding_rules, config.sharding_min_size)
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def gather_params(
    shards: PyTree, specs: PyTree, dtype: jnp.dtype, gradient_dtype: jnp.dtype | None = None
) -> PyTree:
    """Whole parameters from this device's shards. Their gradients are those of the shards, summed over fsdp.

    Args:
      specs: of the shards; arrays that are not split are returned as they are.
      dtype: in which matrices and kernels travel: the layers' own, so that nothing is lost.
      gradient_dtype: in which gradients are summed; None: they have none.
    """

    def whole(x: Array, spec: PartitionSpec) -> Array:
        if "fsdp" not in spec:
            return x
        return _gather(x, tuple(spec).index("fsdp"), dtype if x.ndim > 1 else x.dtype, gradient_dtype)

    return jax.tree.map(whole, shards, specs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: Array, axis: int, dtype: jnp.dtype, gradient_dtype: jnp.dtype | None) -> Array:
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_backward(axis, dtype, gradient_dtype, _, gradient: Array) -> tuple[Array]:
    # all_gather's own derivative would sum in `dtype`.
    total = jax.lax.psum_scatter(gradient.astype(gradient_dtype), "fsdp", scatter_dimension=axis, tiled=True)
    return (total.astype(jnp.float32),)


_gather.defvjp(lambda *args: (_gather(*args), None), _gather_backward)


def mean_over_devices(x: Array, spec: PartitionSpec, mesh: Mesh, dtype: Any = jnp.float32) -> Array:
    """Mean over devices of float32 `x`, summed in `dtype`; gradients of shards are sums over fsdp already."""
    axes = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1 and axis not in spec]
    total = jax.lax.psum(x.astype(dtype), axes).astype(jnp.float32) if axes else x
    return total / mesh.size


# ---------------------------------------------------------------------------------- batches


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_part(mesh: Mesh) -> int:
    """Which of the equal parts of a global batch this process reads: `process_index` of `make_dataset`.

    A mesh may order the devices of a pod by its wiring, so that process p does not hold rows p B/n ... of
    the batch. What counts is where its rows are.
    """
    mine = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    if mine != list(range(mine[0], mine[0] + len(mine))):
        return jax.process_index()  # scattered rows: every window is read once, but rows are permuted
    return mine[0] // len(mine)


def global_batch(local_batch, mesh: Mesh):
    """This process's part of a batch (numpy) -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    join = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(join, local_batch)


def local_batch(batch):
    """The inverse of `global_batch`: this process's rows as numpy arrays."""

    def rows(x: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, batch)


def put_global(tree, shardings):
    """Arrays that every process holds whole -> global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x, sharding):
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)
