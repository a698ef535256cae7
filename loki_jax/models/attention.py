"""Scaled dot-product attention: one function in front of every backend.

Backends:
  xla      two einsums and a softmax; memory grows with queries x keys.
  chunked  blocks of queries, each recomputed in the backward pass; memory grows linearly.
  cudnn    the fused flash kernel (CUDA GPUs, 16-bit inputs only).
  auto     cudnn where it can run, else chunked when the logits would be large, else xla.

Softmax and the accumulation of logits are float32 in all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BACKENDS = ("auto", "xla", "chunked", "cudnn")

# Logits beyond this number of float32 entries (1 GiB) are not materialised by `auto`.
_MAX_LOGITS = 2**28
# Entries of logits that one block of the chunked backend may hold (64 MiB).
_CHUNK_LOGITS = 2**24
# But a block has at least this many queries, however large the (global) batch is.
_MIN_CHUNK = 128


def attend(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    backend: str = "auto",
) -> Float[Array, "b n heads d"]:
    """softmax(q k^T / sqrt(d)) v for every head, in the dtype of `q`.

    Raises:
      ValueError: unknown backend, inconsistent shapes, or cudnn where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; one of {', '.join(BACKENDS)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"attention shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if backend == "auto":
        backend = _choose(q, k)
    if backend == "cudnn":
        return _cudnn(q, k, v)
    if backend == "chunked":
        return _chunked(q, k, v)
    return _xla(q, k, v)


def attend_shared(
    q: Float[Array, "b t n heads d"],
    k: Float[Array, "b t n heads d"],
    v: Float[Array, "b t n heads d"],
    shared_k: Float[Array, "b m heads d"],
    shared_v: Float[Array, "b m heads d"],
    backend: str = "auto",
) -> Float[Array, "b t n heads d"]:
    """Attention within each frame, with further keys and values that all frames of a sample share.

    The same as `attend` on every frame with the shared tokens appended. The shared keys and values
    are copied to the frames: that is small beside the logits, the fused kernels need it, and on CPU
    it was measured faster than attending to both parts separately and joining them.
    """
    b, t = q.shape[:2]
    flat = lambda x: x.reshape(b * t, *x.shape[2:])
    append = lambda own, shared: flat(
        jnp.concatenate([own, jnp.broadcast_to(shared[:, None], (b, t, *shared.shape[1:]))], axis=2)
    )
    return attend(flat(q), append(k, shared_k), append(v, shared_v), backend).reshape(q.shape)


def _choose(q: Array, k: Array) -> str:
    if jax.default_backend() == "gpu" and _cudnn_problem(q) is None:
        return "cudnn"
    b, n, heads, _ = q.shape
    return "chunked" if b * heads * n * k.shape[1] > _MAX_LOGITS else "xla"


def _cudnn_problem(q: Array) -> str | None:
    if jax.default_backend() != "gpu":
        return f"it needs a CUDA GPU, the default backend is {jax.default_backend()!r}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16 inputs, not {q.dtype}; set model.dtype"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"it needs a head width that is a multiple of 8 up to 128, not {q.shape[-1]}"
    return None


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    problem = _cudnn_problem(q)
    if problem:
        raise ValueError(f"attention backend 'cudnn' cannot run here: {problem}")
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _scaled(q: Array) -> Array:
    return q * (q.shape[-1] ** -0.5)


def _xla(q: Array, k: Array, v: Array) -> Array:
    logits = jnp.einsum("bqhd,bkhd->bhqk", _scaled(q), k, preferred_element_type=jnp.float32)
    # Dividing the result by the sum of the weights, not the weights, saves a pass over the largest array.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1).swapaxes(1, 2)[..., None]).astype(q.dtype)


def _chunked(q: Array, k: Array, v: Array) -> Array:
    b, n, heads, d = q.shape
    chunk = min(n, max(_MIN_CHUNK, _CHUNK_LOGITS // (b * heads * k.shape[1])))
    blocks = -(-n // chunk)
    padded = jnp.pad(q, ((0, 0), (0, blocks * chunk - n), (0, 0), (0, 0)))
    padded = padded.reshape(b, blocks, chunk, heads, d).swapaxes(0, 1)
    # Without the checkpoint the backward pass would keep the weights of every block.
    out = jax.lax.map(jax.checkpoint(lambda block: _xla(block, k, v)), padded)
    return out.swapaxes(0, 1).reshape(b, blocks * chunk, heads, d)[:, :n]
