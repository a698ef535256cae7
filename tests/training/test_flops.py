"""Operations counted in the traced program against XLA's analysis and against formulas; chips and MFU."""

from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from loki_jax.training.flops import (
    CHIPS,
    chip_named,
    chip_of,
    device_count,
    operations,
    step_flops,
    work_of,
)


def traced(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def convolution(x, kernel, stride=1, padding=((1, 1), (1, 1)), **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


# ---------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda a, b: a @ b, [(8, 16), (16, 32)]),
        (lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [(2, 8, 3, 16), (2, 12, 3, 16)]),
        (convolution, [(2, 9, 9, 4), (3, 3, 4, 8)]),
        (lambda x, k: convolution(x, k, stride=2), [(2, 8, 8, 4), (3, 3, 4, 8)]),
        (lambda x, k: convolution(x, k, stride=2, padding=((0, 1), (0, 1))), [(2, 8, 8, 4), (3, 3, 4, 8)]),
        (lambda x, k: convolution(x, k, feature_group_count=2), [(2, 8, 8, 4), (3, 3, 2, 8)]),
        (lambda x, k: convolution(x, k, rhs_dilation=(2, 2)), [(2, 8, 8, 4), (3, 3, 4, 8)]),
        (
            jax.grad(lambda x, k: convolution(x, k, stride=2).sum(), argnums=(0, 1)),
            [(2, 8, 8, 4), (3, 3, 4, 8)],
        ),
        (jax.grad(lambda k, x: convolution(x, k, feature_group_count=4).sum()), [(3, 3, 1, 8), (2, 8, 8, 4)]),
    ],
)
def test_matrix_operations_are_those_of_xla(function, shapes):
    program = traced(function, *shapes)
    work = work_of(program.jaxpr)
    # XLA's figure holds the elementwise work of the gradients' sums, too: a few operations.
    assert work.matrix == pytest.approx(program.lower().cost_analysis()["flops"], rel=5e-3)
    assert work.matrix > 0


def test_loops_branches_and_recomputation():
    weights = (16, 16)
    layer = lambda x, w: jnp.tanh(x @ w)
    once = 2 * 16**3
    count = lambda f, *shapes: work_of(traced(f, *shapes).jaxpr)
    assert (
        count(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, x: layer(x, w), x), weights, weights).matrix
        == 5 * once
    )
    assert count(lambda x, w: jax.lax.map(lambda row: row @ w, x[None]), weights, weights).matrix == once
    either = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
    assert count(either, weights, weights).matrix == 2 * once
    loss = lambda apply: jax.value_and_grad(lambda w, x: apply(lambda x: layer(layer(x, w), w))(x).sum())
    plain = count(loss(lambda f: f), weights, weights)
    # Forward 2, backward to the weights 2 and through the second layer 1.
    assert plain.matrix == plain.model == 5 * once and plain.recomputed == 0
    saved = count(loss(jax.checkpoint), weights, weights)
    assert saved.model == plain.matrix and saved.recomputed == 2 * once
    assert saved.matrix == saved.model + saved.recomputed


def test_results_nobody_reads_are_not_counted():
    work = work_of(traced(lambda a, b: (a @ b, a @ b @ b)[0], (16, 16), (16, 16)).jaxpr)
    assert work.matrix == 2 * 16**3


def test_shards_are_summed_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    assert work_of(traced(split, (8, 16), (16, 32)).jaxpr).matrix == 2 * 8 * 16 * 32


def test_attention_leaves_its_logits_out_of_the_traffic():
    program = traced(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (1, 64, 2, 8), (1, 128, 2, 8))
    (product,) = [op for op in operations(program.jaxpr) if op.kind == "attention"]
    assert product.flops == 2 * 2 * 64 * 128 * 8
    assert product.bytes == 4 * 2 * 8 * (64 + 128)
    (dense,) = operations(traced(lambda a, b: a @ b, (8, 16), (16, 32), dtype=jnp.bfloat16).jaxpr)
    assert dense.kind == "matmul" and dense.bytes == 2 * (8 * 16 + 16 * 32 + 8 * 32)


@pytest.mark.parametrize(
    "layout, shape, keys", [(0, (2, 64, 3, 8), (2, 128, 3, 8)), (1, (2, 3, 64, 8), (2, 3, 128, 8))]
)
def test_cudnn_kernels_are_counted_from_their_shapes(layout, shape, keys):
    # The public dot_product_attention refuses to trace this kernel where there is no GPU.
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    none = jnp.zeros(0, jnp.bfloat16)
    empty = jnp.zeros(0, jnp.int32)

    def forward(q, k, v):
        return kernels._dot_product_attention_fwd_p_wrapper.bind(
            q,
            k,
            v,
            none,
            *[empty] * 6,
            scale=1.0,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(False, False),
            mask_type=kernels.MaskType.NO_MASK,
            layout=layout,
            sliding_window_length=None,
            is_training=True,
        )

    work = work_of(traced(forward, shape, keys, keys, dtype=jnp.bfloat16).jaxpr)
    assert work.matrix == work.attention == 2 * (2 * 2 * 3 * 64 * 128 * 8)


# ------------------------------------------------------------------------------- compiled programs


def test_flops_of_a_compiled_program_are_summed_over_devices():
    compiled = traced(lambda a, b: a @ b, (64, 64), (64, 64)).lower().compile()
    assert device_count(compiled) == 1
    assert step_flops(compiled) == pytest.approx(2 * 64**3, rel=0.01)
    shardings = (SimpleNamespace(device_set={1, 2, 3, 4}),)
    several = Mock(spec=jax.stages.Compiled, input_shardings=shardings, output_shardings=())
    several.cost_analysis.return_value = {"flops": 10.0}
    assert step_flops(several) == 40
    with pytest.raises(ValueError, match="no cost analysis"):
        step_flops(Mock(spec=jax.stages.Compiled, **{"cost_analysis.return_value": None}))


# ------------------------------------------------------------------------------------------- chips


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_a_device_is_known_by_its_exact_kind(kind, name):
    chip = chip_of(kind)
    assert (chip.name if chip else None) == name


def test_unknown_chips_are_named_with_the_known_ones():
    assert [chip_named(chip.name) for chip in CHIPS] == list(CHIPS)
    with pytest.raises(
        ValueError, match="unknown chip 'h300'; known are h100, h200, a100-80, v4, v5e, v5p, v6e"
    ):
        chip_named("h300")
