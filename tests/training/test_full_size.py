"""The full-size train step is lowered for 8 simulated devices without allocating it."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json
import jax
from configs import hdtf
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks
from loki_jax.training.init import abstract_batch, abstract_state
from loki_jax.training.sharding import batch_sharding, make_mesh, tree_shardings
from loki_jax.training.state import make_optimizer
from loki_jax.training.step import make_train_step

config = hdtf.get_config()
head = builtin_head()
networks = build_networks(config, head)
optimizer = make_optimizer(config)
mesh = make_mesh(4, 2)
state = abstract_state(config, networks, optimizer)
shardings, unsharded = tree_shardings(state, mesh, config.sharding_rules, config.sharding_min_size)
batch = abstract_batch(config, head)
split = jax.tree.map(lambda _: batch_sharding(mesh), batch)
step = jax.jit(make_train_step(config, networks, optimizer, mesh), donate_argnums=0,
               in_shardings=(shardings, split, None), out_shardings=(shardings, None))
lowered = step.lower(state, batch, head)
count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
sharded = [x.size for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings.params)) if s.spec]
new_state, metrics = lowered.out_info
print(json.dumps({
    "devices": jax.device_count(), "trained": count(state.params), "frozen": count(state.frozen),
    "ema": count(state.ema), "moments": count(state.opt_state), "sharded": sum(sharded),
    "unsharded": [name for name, _ in unsharded if name.startswith("params")],
    "frozen_dtypes": sorted({str(x.dtype) for x in jax.tree.leaves(state.frozen)}),
    "same_state": jax.tree.map(lambda a, b: (a.shape, str(a.dtype)) == (b.shape, str(b.dtype)),
                               state, new_state)
                  == jax.tree.map(lambda a: True, state),
    "loss_shape": list(metrics["loss"].shape),
}))
"""


def test_step_lowers_on_eight_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["devices"] == 8
    assert found["trained"] == found["ema"] == 822_878_788
    assert found["frozen"] == 865_910_724 + 83_653_863 + 77 * 1024
    assert 2 * 822_878_788 <= found["moments"] < 2 * 822_878_788 + 10
    assert found["sharded"] > 0.999 * found["trained"] and not found["unsharded"]
    assert found["frozen_dtypes"] == ["bfloat16"]
    assert found["same_state"] and found["loss_shape"] == []
