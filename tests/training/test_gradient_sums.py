"""What 8 simulated devices exchange in a bfloat16 step, and what it does to the gradients."""

import json
import subprocess
import sys

import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.planning.report import make_plan
from loki_jax.planning.work import make_subject
from loki_jax.training.flops import chip_named
from tests.training.tiny_run import ROOT, environment, write_shards

CONFIG = """
from tests.training.tiny_run import tiny_config
config = tiny_config(
    {shards!r}, batch_size=8, window=2, model__dtype="bfloat16", driver__arm="flame_vector",
    sharding_min_size=256, model__unet__multipliers=(1,), model__unet__attention_modes=("3d",),
    model__unet__attention_levels=(0,), model__reference__driver=False,
)
"""
COMPILE = """
import jax, json
jax.config.update("jax_enable_compilation_cache", False)
from loki_jax.face.builtin import builtin_head
from loki_jax.planning.compiled import compile_step
from loki_jax.planning.work import make_subject
found = {}
for dtype in ("float32", "bfloat16"):
    config.gradient_dtype = dtype
    found[dtype] = compile_step(make_subject(config, builtin_head()), 2, 4)["collectives"]
print(json.dumps(found))
"""
ERRORS = """
import jax, json
import jax.numpy as jnp
import numpy as np
from loki_jax.networks import build_networks, draw_params
from loki_jax.training.inputs import open_inputs
from loki_jax.training.sharding import global_batch, make_mesh
from loki_jax.training.state import TrainState
from loki_jax.training.step import make_gradients
alone = make_mesh(1, 1, jax.devices()[:1])
inputs = open_inputs(config, alone)
head = inputs.dataset.head()
networks = build_networks(config, head)
params = jax.tree.map(lambda x: x + 0.05, draw_params(networks, jax.random.key(0)))
frozen = {"autoencoder": params.pop("autoencoder")}
state = TrainState(jnp.asarray(7, jnp.int32), params, None, None, frozen)
def gradients(mesh, steps, dtype):
    config.grad_accum_steps, config.gradient_dtype = steps, dtype
    batch = global_batch(inputs.windows[0], mesh)
    loss, found = jax.jit(make_gradients(config, networks, mesh))(state, batch, head)
    return float(loss), jax.device_get(found)
# One device, one window after another, summed in float32.
loss, exact = gradients(alone, 8, "float32")
found = {}
cases = {"data": ((8, 1), "float32"), "fsdp": ((2, 4), "float32"), "bfloat16": ((8, 1), "bfloat16")}
for name, (shape, dtype) in cases.items():
    other, grads = gradients(make_mesh(*shape), 1, dtype)
    pairs = zip(jax.tree.leaves(exact), jax.tree.leaves(grads), strict=True)
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs if np.linalg.norm(a) > 0]
    found[name] = {"loss": abs(other / loss - 1), "median": float(np.median(errors)), "largest": max(errors)}
print(json.dumps(found))
"""


def on_eight_devices(script, shards, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CONFIG.format(shards=str(shards)) + script]
    env = environment(tmp_path / "cache") | flags
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_gradients_are_summed_in_float32_unless_asked(tmp_path):
    """The collectives of the partitioned program, by kind and type, are those that the plan promises."""
    found = on_eight_devices(COMPILE, "unused", tmp_path)
    scope = {}
    exec(CONFIG.format(shards="unused"), scope)  # noqa: S102 (the config of the other process)
    for dtype, name in (("float32", "f32"), ("bfloat16", "bf16")):
        scope["config"].gradient_dtype = dtype
        subject = make_subject(scope["config"], builtin_head())
        planned = make_plan(subject, chip_named("h200"), 2, 4, 1, "chunked")["collectives"]
        total = lambda rows, kind, *types: sum(
            row["bytes"] for row in rows if row["kind"] == kind and (not types or row["what"] in types)
        )
        for kind in ("all-reduce", "reduce-scatter"):
            # A few parameters are not used: XLA drops them.
            assert total(found[dtype], kind, name) == pytest.approx(total(planned, kind), rel=0.01)
            # Numbers of other types: the loss, and the norm of the gradients.
            assert total(found[dtype], kind) - total(found[dtype], kind, name) < 1000
        assert total(found[dtype], "all-gather") == pytest.approx(total(planned, "all-gather"), rel=0.01)
        assert {row["kind"] for row in found[dtype]} == {"all-reduce", "reduce-scatter", "all-gather"}


@pytest.mark.slow
def test_the_number_of_devices_adds_no_error(tmp_path):
    found = on_eight_devices(ERRORS, write_shards(tmp_path / "shards", count=10), tmp_path)
    for layout in ("data", "fsdp"):
        assert found[layout]["loss"] < 1e-6 and found[layout]["median"] < 1e-6
    assert 1e-3 < found["bfloat16"]["median"] < 1e-2
