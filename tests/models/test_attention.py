"""The attention backends against each other, their memory, and their errors."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from loki_jax.models import attention
from loki_jax.models.attention import attend, attend_frames
from loki_jax.models.autoencoder import make_autoencoder
from loki_jax.models.loki import make_loki
from loki_jax.weights.layouts import sd21_config
from tests.models.weights import quick_jit


def random_qkv(n, m, batch=1, heads=2, d=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, size: 3 * jax.random.normal(key, (batch, size, heads, d), dtype)
    return draw(keys[0], n), draw(keys[1], m), draw(keys[2], m)


def test_against_numpy_float64():
    q, k, v = random_qkv(5, 7, batch=2, heads=3, d=4)
    logits = np.einsum("bqhd,bkhd->bhqk", np.float64(q), np.float64(k)) / 2
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), np.float64(v))
    for backend in ("xla", "chunked", "auto"):
        np.testing.assert_allclose(attend(q, k, v, backend), expected, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = random_qkv(3, 4)
    out = attend(1e4 * q, k, v, "xla")
    best = jnp.argmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)  # softmax has become a choice
    expected = jnp.take_along_axis(v.swapaxes(1, 2), best[..., None], axis=2).swapaxes(1, 2)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def out_and_gradients(function, q, k, v):
    cotangent = jax.random.normal(jax.random.key(1), q.shape, q.dtype)

    @quick_jit
    def run(q, k, v):
        out, pullback = jax.vjp(function, q, k, v)
        return [x.astype(jnp.float32) for x in (out, *pullback(cotangent))]

    return run(q, k, v)


def unit_qkv(n, m, dtype, heads=2, d=64):
    return tuple((x / 3).astype(dtype) for x in random_qkv(n, m, heads=heads, d=d))


TOLERANCES = {jnp.float32: (2e-5, 1e-4), jnp.bfloat16: (2e-2, 5e-2)}


@pytest.mark.parametrize("n, m, dtype", [
    (300, 133, jnp.float32), (100, 77, jnp.float32), (128, 256, jnp.bfloat16),
])  # fmt: skip
def test_splash_equals_xla(n, m, dtype):
    """The TPU kernel, interpreted; token counts that are no multiples of 128 are padded and masked."""
    q, k, v = unit_qkv(n, m, dtype)
    splash = lambda q, k, v: attention._splash(q, k, v, interpret=True)
    expected = out_and_gradients(lambda *qkv: attend(*qkv, "xla"), q, k, v)
    forward, backward = TOLERANCES[dtype]
    tolerances = (forward, backward, backward, backward)
    for ours, theirs, atol in zip(out_and_gradients(splash, q, k, v), expected, tolerances, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


def test_splash_blocks():
    assert [attention._splash_block(n) for n in (128, 256, 4352, 1152, 17408, 16384)] == [
        128, 256, 256, 384, 512, 512
    ]  # fmt: skip


def test_splash_materialises_no_mask():
    q, k = jnp.zeros((1, 4096, 2, 64), jnp.bfloat16), jnp.zeros((1, 4352, 2, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda q, k: attention._splash(q, k, k))(q, k)
    constants = [np.size(x) for x in jaxpr.consts]
    sizes = [var.aval.size for eqn in all_equations(jaxpr.jaxpr) for var in eqn.outvars]
    assert max(sizes + constants) < 4096 * 4352 / 8


MESH_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from loki_jax.models import attention
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
keys = jax.random.split(jax.random.key(0), 3)
qkv = [jax.device_put(jax.random.normal(key, (4, 128, 1, 8)), split) for key in keys]

def loss(*qkv):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as the training step does
        return jnp.sin(attention._splash(*qkv, interpret=True)).sum()

gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)
expected = jax.grad(lambda *qkv: jnp.sin(attention.attend(*qkv, "xla")).sum(), argnums=(0, 1, 2))(*qkv)
for ours, theirs in zip(gradients, expected):
    assert ours.sharding.spec == split.spec, ours.sharding
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
"""


def test_splash_is_split_over_the_devices_of_a_mesh():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MESH_PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunked_equals_xla_in_both_precisions(monkeypatch, dtype):
    monkeypatch.setattr(attention, "_CHUNK_LOGITS", 2 * 300 * 8)
    monkeypatch.setattr(attention, "_MIN_CHUNK", 1)
    q, k, v = unit_qkv(200, 300, dtype)  # 25 blocks of 8 queries
    run = lambda backend: out_and_gradients(lambda *qkv: attend(*qkv, backend), q, k, v)
    chunked, plain = run("chunked"), run("xla")
    forward, backward = TOLERANCES[dtype]
    for ours, theirs, atol in zip(chunked, plain, (forward, backward, backward, backward), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


def test_chunked_equals_xla_over_several_uneven_blocks(monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK_LOGITS", 2 * 50 * 16)  # 16 queries a block
    monkeypatch.setattr(attention, "_MIN_CHUNK", 1)
    q, k, v = random_qkv(37, 50)
    cotangent = jax.random.normal(jax.random.key(1), q.shape)

    def run(backend):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, backend), q, k, v)
        return out, pullback(cotangent)

    for ours, expected in zip(jax.tree.leaves(run("chunked")), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(ours, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("backend, fits", [("chunked", True), ("xla", False)])
def test_memory_of_the_backward_pass(backend, fits):
    """At 8,192 x 8,192 tokens of two heads the logits take 512 MiB: chunked never holds them."""
    q, k, v = (jax.ShapeDtypeStruct((1, 8192, 2, 4), jnp.float32),) * 3
    gradient = jax.grad(lambda q, k, v: attend(q, k, v, backend).sum(), argnums=(0, 1, 2))
    memory = jax.jit(gradient).lower(q, k, v).compile().memory_analysis()
    assert (memory.temp_size_in_bytes < 2**29) == fits


@pytest.mark.parametrize("backward", [False, True])
def test_chunked_memory_is_linear_at_the_papers_size(backward):
    """16 x 1,024 queries, 1,024 reference keys, 10 heads of 64 in bfloat16 (method, section 6)."""

    def temporaries(frames):
        q, k = (jax.ShapeDtypeStruct((1, n * 1024, 10, 64), jnp.bfloat16) for n in (frames, frames + 1))
        function = lambda q, k, v: attend(q, k, v, "chunked")
        if backward:
            run = jax.grad(lambda *qkv: function(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        else:
            run = function
        return jax.jit(run).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporaries(frames) for frames in (8, 16, 32)]
    assert sizes[1] < 1e9
    # The logits alone would be 10.6 GiB, and grow fourfold.
    assert sizes[1] < 2.2 * sizes[0] and sizes[2] < 2.2 * sizes[1]


def test_auto_never_materialises_the_full_size_logits():
    """16,384 queries x 17,408 keys (method, section 6): auto on CPU takes the chunked backend."""
    q = jax.ShapeDtypeStruct((2, 16384, 10, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 17408, 10, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(attend)(q, k, k)
    sizes = [var.aval.size for eqn in all_equations(jaxpr.jaxpr) for var in eqn.outvars]
    assert max(sizes) < 0.01 * 2 * 10 * 16384 * 17408


def test_shared_tokens_are_appended_to_every_frame():
    batch, frames, n, m = 2, 3, 4, 5
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (batch, frames, n, 2, 4)) for key in keys[:3])
    shared_k, shared_v = (jax.random.normal(key, (batch, m, 2, 4)) for key in keys[3:])
    out = attend_frames(q, k, v, (shared_k, shared_v))
    for frame in range(frames):
        expected = attend(
            q[:, frame],
            jnp.concatenate([k[:, frame], shared_k], 1),
            jnp.concatenate([v[:, frame], shared_v], 1),
            "xla",
        )
        np.testing.assert_allclose(out[:, frame], expected, atol=1e-6)


def test_bfloat16_is_accumulated_in_float32():
    q, k, v = random_qkv(16, 512, dtype=jnp.bfloat16)
    out = attend(q, k, v, "xla")
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), "xla")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.06)


def test_errors(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the function's own checks are meant
    q, k, v = random_qkv(3, 4)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        attend(q, k, v, "flash")
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(q, k, v[:, :3])
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'cudnn' cannot run here: it needs a CUDA GPU"):
            attend(q, k, v, "cudnn")
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match="'splash' cannot run here: it needs a TPU"):
            attend(q, k, v, "splash")


def test_splash_on_several_chips_needs_their_mesh(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, _, _ = random_qkv(3, 4, batch=4)
    assert attention._choose(q, q) == "splash"
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"several chips; run the program under jax.set_mesh"):
        attend(q, q, q, "splash")
    assert attention._choose(q, q) == "xla"
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention._choose(q, q) == "splash"
        with pytest.raises(ValueError, match="batch of 3 does not split evenly over 4 devices"):
            attend(q[:3], q[:3], q[:3], "splash")


def test_the_vae_is_spared_the_fused_kernels():
    """Its one head is 512 wide; a config that asks for a fused kernel means the UNets."""
    config = sd21_config()
    for chosen, expected in (("cudnn", "auto"), ("splash", "auto"), ("chunked", "chunked")):
        config.attention_backend = chosen
        assert make_autoencoder(config).attention_backend == expected
        config.encoder.in_channels = 45
        assert make_loki(config).generation.unet.attention_backend == chosen


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the fused kernel needs a CUDA GPU")
def test_cudnn_equals_xla():
    q, k, v = random_qkv(256, 320, d=64, dtype=jnp.bfloat16)
    fused, plain = (attend(q, k, v, backend).astype(jnp.float32) for backend in ("cudnn", "xla"))
    np.testing.assert_allclose(fused, plain, atol=0.03)


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_equations(inner)
