"""The same run on other topologies: 1 x 8, 2 x 4 and 4 x 2 processes x devices, data and fsdp.

    python benchmarks/topologies.py [--quick] [--steps 20]

One of the topologies, 2 x 2, also cuts each batch into two parts (gradient accumulation).

The real program trains a tiny config (global batch 8) on simulated CPU devices whose processes talk
over gloo. All parameters start from random numbers: layers that start at zero would hide what is behind
them. Against one process with one device: gradients of the first step, relative in norm per tensor (read from
the first checkpoint: Adam's first moment is (1 - b1) times the gradient, clipping is off), and the loss of
every step, relative. Then the last checkpoint of each is restored under each other, the
shards of all arrays compared with the files bit for bit. --quick: two processes of one device, fsdp,
accumulation, 3 steps. The last line of the output is one JSON object; the exit code is 1 unless all
bounds hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.data.reader import open_dataset
from loki_jax.networks import build_networks, draw_params
from loki_jax.training import checkpoint as ckpt
from loki_jax.training.distributed import find_cluster, join
from loki_jax.training.init import sharded_state
from loki_jax.training.inputs import open_inputs, start_reading
from loki_jax.training.model_file import Checkpoint, save_model_file
from loki_jax.training.sharding import make_mesh, path_name
from loki_jax.training.state import make_optimizer
from tests.training.processes import ONE, Topology, losses, start
from tests.training.tiny_run import tiny_config, train_command, write_shards

GRADIENT_BOUND, LOSS_BOUND = 1e-5, 1e-4
# The stem has 8 channels: in 8 groups its bias would have no gradient but rounding errors.
NORM_GROUPS = 4


ALL = [Topology(p, 8 // p, axis) for axis in ("data", "fsdp") for p in (1, 2, 4)] + [
    Topology(2, 2, "fsdp", 2)
]
QUICK = [Topology(2, 1, "fsdp", 2)]


def config_of(topology: Topology, shards: Path, steps: int):
    """The tiny config on a topology; batch 8, no clipping, every array of 64 numbers or more sharded."""
    count = topology.processes * topology.devices
    return tiny_config(
        shards, steps=steps, batch_size=8, grad_accum_steps=topology.accumulate, optimizer__clip_norm=0.0,
        sharding_min_size=64, checkpoint__every=1, checkpoint__keep_every=1, checkpoint__keep_best=0,
        init_from=str(start_file(shards)), model__norm_groups=NORM_GROUPS,
        mesh__data=count if topology.axis == "data" else 1,
        mesh__fsdp=count if topology.axis == "fsdp" else 1,
    )  # fmt: skip


def start_file(shards: Path) -> Path:
    """The model that all topologies start from."""
    return shards.parent / "start.safetensors"


def write_start(shards: Path) -> None:
    """Write it: of the tiny config, whose parameters are all random, zero-initialised ones too."""
    config, head = tiny_config(shards, model__norm_groups=NORM_GROUPS), open_dataset(shards).head()
    params = draw_params(build_networks(config, head), jax.random.key(1))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    # Of half the size of a common initialisation, so that activations and gradients stay moderate.
    scale = lambda x: 0.5 / np.sqrt(np.prod(x.shape[:-1])) if x.ndim > 1 else 0.1
    noisy = [x + scale(x) * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    model = Checkpoint(config, jax.tree.unflatten(treedef, noisy), head, 0)
    save_model_file(start_file(shards), model)


def first_gradients(workdir: Path) -> dict[str, np.ndarray]:
    """Gradients of step 1 by path, up to a factor."""
    tree = ckpt.restore_as_numpy((workdir / "checkpoints" / "1" / "optimizer").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = ((path_name(path), np.asarray(leaf, np.float64)) for path, leaf in leaves)
    return {name: leaf for name, leaf in named if "mu" in name.split("/")}


def gradient_error(workdir: Path, reference: Path) -> float:
    """Largest error in norm over the tensors, relative to each.

    Only the reference branch may have tensors without a gradient (nobody reads what comes after its last
    features); they must have none in both.

    Raises:
      RuntimeError: no gradient reaches a tensor of the generation branch: comparing it would say nothing.
    """
    worst = 0.0
    mine, theirs = first_gradients(workdir), first_gradients(reference)
    for name, gradient in theirs.items():
        size = float(np.linalg.norm(gradient))
        error = float(np.linalg.norm(mine[name] - gradient))
        if size == 0 and "generation" in name.split("/"):
            raise RuntimeError(f"{reference}: no gradient reaches {name}")
        worst = max(worst, error / size if size > 0 else float(error > 0))
    return worst


def restore_all(topology: Topology, shards: Path, steps: int, workdirs: list[Path]) -> None:
    """In one process of a topology: restore the last checkpoint of each workdir, compare every shard."""
    config = config_of(topology, shards, steps)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    inputs = open_inputs(config, mesh)
    head = inputs.dataset.head()
    abstract, _, _ = sharded_state(config, build_networks(config, head), make_optimizer(config), mesh)
    for workdir in workdirs:
        iterator = start_reading(config, inputs.windows, mesh)
        manager = ckpt.open_manager(workdir, config.checkpoint)
        state, run = ckpt.restore_state(manager, abstract, iterator)
        manager.close()
        assert run["step"] == steps and iterator.get_state()["batches"] == steps, (
            run["step"],
            iterator.get_state(),
        )
        for name, tree in (("params", state.params), ("ema", state.ema), ("optimizer", state.opt_state)):
            stored = ckpt.restore_as_numpy((workdir / "checkpoints" / str(steps) / name).absolute())
            for mine, whole in zip(jax.tree.leaves(tree), jax.tree.leaves(stored), strict=True):
                for shard in mine.addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole)[shard.index])


def measure(folder: Path, topologies: list[Topology], steps: int, cache: Path, log=print) -> dict:
    """The whole measurement in `folder`; the JSON object."""
    began = time.monotonic()
    shards = write_shards(folder / "shards")
    write_start(shards)
    for topology in (ONE, *topologies):
        config = config_of(topology, shards, steps)
        start(train_command(config, folder / topology.name), topology, cache)
        log(f"{topology.name}: trained")
    reference = folder / ONE.name
    expected = losses(reference)
    compared = first_gradients(reference)
    gradients, relative = {}, {}
    for topology in topologies:
        workdir = folder / topology.name
        gradients[topology.name] = gradient_error(workdir, reference)
        relative[topology.name] = float(np.max(np.abs(losses(workdir) / expected - 1)))
        log(
            f"{topology.name}: gradients {gradients[topology.name]:.1e}, losses {relative[topology.name]:.1e}"
        )
    restored = []
    for topology in (ONE, *topologies):
        others = [other.name for other in (ONE, *topologies) if other != topology]
        start(
            [sys.executable, __file__, "--restore", str(folder), "--topology", topology.name,
             "--steps", str(steps), "--workdirs", *others, "--"], topology, cache,
        )  # fmt: skip
        restored += itertools.product(others, [topology.name])
        log(f"{topology.name}: restored those of {len(others)} others")
    return {
        "topologies": [topology.name for topology in topologies],
        "steps": steps,
        "tensors": len(compared),
        "with_gradient": sum(bool(np.any(x)) for x in compared.values()),
        "gradient_error": max(gradients.values()),
        "loss_error": max(relative.values()),
        "within_bounds": max(gradients.values()) < GRADIENT_BOUND and max(relative.values()) < LOSS_BOUND,
        "restored_pairs": len(restored),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two processes of one device, fsdp, 3 steps")
    parser.add_argument("--steps", type=int, default=20)
    for hidden in ("--restore", "--topology"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--workdirs", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("cluster", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.restore:
        flags = dict(flag.removeprefix("--").split("=") for flag in args.cluster)
        numbers = {key: int(flags[key]) for key in ("processes", "process_id") if key in flags}
        join(find_cluster(os.environ, flags.get("coordinator"), **numbers))
        sizes, axis, accumulate = args.topology.split("-")
        topology = Topology(*map(int, sizes.split("x")), axis, int(accumulate))
        folder = Path(args.restore)
        restore_all(topology, folder / "shards", args.steps, [folder / name for name in args.workdirs])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        topologies, steps = (QUICK, 3) if args.quick else (ALL, args.steps)
        result = measure(folder, topologies, steps, folder / "cache")
    print(json.dumps(result))
    sys.exit(0 if result["within_bounds"] else 1)


if __name__ == "__main__":
    main()
