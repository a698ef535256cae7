"""Scaled dot-product attention: one function in front of every backend.

Backends:
  xla      two matrix products and a softmax; memory grows with queries x keys.
  chunked  blocks of queries, each recomputed in the backward pass; memory grows linearly.
  cudnn    the fused flash kernel (CUDA GPUs, 16-bit inputs only).
  splash   the fused Pallas kernel (TPUs). It works on multiples of 128 tokens: others are padded, and
           segment ids keep the padding out of the softmax. No mask is ever materialised.
  auto     cudnn or splash where it can run, else chunked when the logits would be large, else xla.

Softmax and the accumulation of logits are float32 in all of them. On inputs of unit variance they agree
to 2e-5 in float32 and to 2e-2 in bfloat16 (tests/models/test_attention.py), gradients to 1e-4 and 5e-2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

BACKENDS = ("auto", "xla", "chunked", "cudnn", "splash")

# Logits beyond this number of float32 entries (1 GiB) are not materialised by `auto`.
_MAX_LOGITS = 2**28
# A block of the chunked backend holds at most this many entries (64 MiB), but has at least this many
# queries, however large the (global) batch is.
_CHUNK_LOGITS, _MIN_CHUNK = 2**24, 128
# The splash kernel works on multiples of this many tokens.
_LANES = 128


def attend(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    backend: str = "auto",
) -> Float[Array, "b n heads d"]:
    """softmax(q k^T / sqrt(d)) v for every head, in the dtype of `q`.

    Raises:
      ValueError: unknown backend, inconsistent shapes, or cudnn or splash where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; one of {', '.join(BACKENDS)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"attention shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if backend == "auto":
        backend = _choose(q, k)
    if problem := _problem(backend, q):
        raise ValueError(f"attention backend {backend!r} cannot run here: {problem}")
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if backend == "splash":
        return _splash(q, k, v)
    if backend == "chunked":
        return _chunked(q, k, v)
    return _xla(q, k, v)


def attend_frames(
    q: Float[Array, "b t n heads d"],
    k: Float[Array, "b t n heads d"],
    v: Float[Array, "b t n heads d"],
    shared: tuple[Float[Array, "b m heads d"], Float[Array, "b m heads d"]] | None = None,
    backend: str = "auto",
) -> Float[Array, "b t n heads d"]:
    """Attention within each frame, optionally with further tokens that all frames of a sample share.

    The same as `attend` on every frame with the shared keys and values appended. They are copied to the
    frames: the copies are small beside the logits, the fused kernels need them, and on CPU this is
    faster than attending to both parts separately and joining them.

    Raises:
      ValueError: as `attend`.
    """
    b, t = q.shape[:2]
    if shared is not None:
        copies = (jnp.broadcast_to(x[:, None], (b, t, *x.shape[1:])) for x in shared)
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip((k, v), copies, strict=True))
    flat = lambda x: x.reshape(b * t, *x.shape[2:])
    return attend(flat(q), flat(k), flat(v), backend).reshape(q.shape)


def _choose(q: Array, k: Array) -> str:
    fused = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend())
    if fused and _problem(fused, q) is None:
        return fused
    b, n, heads, _ = q.shape
    return "chunked" if b * heads * n * k.shape[1] > _MAX_LOGITS else "xla"


def _problem(backend: str, q: Array) -> str | None:
    """Why a fused kernel cannot run here; None where it can."""
    platform = jax.default_backend()
    if backend == "cudnn":
        if platform != "gpu":
            return f"it needs a CUDA GPU, the default backend is {platform!r}"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it needs bfloat16 or float16 inputs, not {q.dtype}; set model.dtype"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"it needs a head width that is a multiple of 8 up to 128, not {q.shape[-1]}"
    if backend == "splash":
        if platform != "tpu":
            return f"it needs a TPU, the default backend is {platform!r}"
        if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
            return "XLA cannot split a kernel over several chips; run the program under jax.set_mesh(mesh)"
        if q.shape[0] % _mesh_size():
            return f"a batch of {q.shape[0]} does not split evenly over {_mesh_size()} devices"
    return None


def _mesh_size() -> int:
    """Devices that XLA splits the program over; none more inside `shard_map`, where each has its share."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind != AxisType.Manual)


def _xla(q: Array, k: Array, v: Array) -> Array:
    # Heads before tokens: otherwise XLA transposes the weights, the largest array, for the second product.
    q, k, v = (x.swapaxes(1, 2) for x in (_scaled(q), k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    # Dividing the result by the sum of the weights, not the weights, saves a pass over the largest array.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(q.dtype).swapaxes(1, 2)


def _scaled(q: Array) -> Array:
    return q * (q.shape[-1] ** -0.5)


def _chunked(q: Array, k: Array, v: Array) -> Array:
    b, n, heads, d = q.shape
    chunk = min(n, max(_MIN_CHUNK, _CHUNK_LOGITS // (b * heads * k.shape[1])))
    blocks = -(-n // chunk)
    padded = _pad_tokens(q, blocks * chunk).reshape(b, blocks, chunk, heads, d).swapaxes(0, 1)
    # The backward pass adds up what the blocks send to k and v: in float32, whatever their dtype is.
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
    # Without the checkpoint the backward pass would keep the weights of every block.
    attend_block = jax.checkpoint(lambda block: _xla(block, k32.astype(k.dtype), v32.astype(v.dtype)))
    out = jax.lax.map(attend_block, padded)
    return out.swapaxes(0, 1).reshape(b, blocks * chunk, heads, d)[:, :n]


def _pad_tokens(x: Float[Array, "b n heads d"], n: int) -> Float[Array, "b n2 heads d"]:
    return jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)))


def _splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    """The TPU kernel on every sample. Under a mesh each device runs it on its share of the batch."""
    local = lambda q, k, v: _splash_local(q, k, v, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or _mesh_size() == 1:
        return local(q, k, v)
    batch = PartitionSpec(tuple(mesh.axis_names))
    return jax.shard_map(local, mesh=mesh, in_specs=(batch,) * 3, out_specs=batch, check_vma=False)(q, k, v)


def _splash_local(q: Array, k: Array, v: Array, interpret: bool) -> Array:
    # Importing Pallas takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    padded_n, padded_m = (-(-tokens // _LANES) * _LANES for tokens in (n, m))
    block_n, block_m = _splash_block(padded_n), _splash_block(padded_m)
    block_sizes = kernel.BlockSizes(
        block_q=block_n,
        block_kv=block_m,
        block_q_dkv=block_n,
        block_kv_dkv=block_m,
        block_q_dq=block_n,
        block_kv_dq=block_m,
    )
    apply = kernel.make_splash_mha(
        # Every query sees every key; this mask is a shape, not an array.
        masks.MultiHeadMask([masks.FullMask((padded_n, padded_m))] * heads),
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if padded_m != m:
        # Padded queries belong to the real segment, so that none has an empty softmax; they are cut off at
        # the end.
        padding = (jnp.arange(padded_m) >= m).astype(jnp.int32)
        segments = kernel.SegmentIds(q=jnp.zeros(padded_n, jnp.int32), kv=padding)
    q, k, v = _pad_tokens(_scaled(q), padded_n), _pad_tokens(k, padded_m), _pad_tokens(v, padded_m)
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.vmap(lambda q, k, v: apply(q, k, v, segment_ids=segments))(*heads_first)
    return out.swapaxes(1, 2)[:, :n]


def _splash_block(tokens: int) -> int:
    """The largest block up to 512 tokens that divides a multiple of 128."""
    return max(block for block in range(_LANES, 513, _LANES) if tokens % block == 0)
