"""The same run on other topologies: 1 x 8, 2 x 4 and 4 x 2 processes x devices, data and fsdp.

    python benchmarks/topologies.py [--quick] [--steps 20]

One of the topologies, 2 x 2, also cuts each batch into two parts (gradient accumulation).

The real program trains a tiny config (global batch 8) on simulated CPU devices whose processes talk
over gloo. Against one process with one device: gradients of the first step, relative in norm per tensor
(read from the first checkpoint: Adam's first moment is (1 - b1) times the gradient, clipping is off), and
the loss of every step, relative. Then the last checkpoint of each is restored under each other, the
shards of all arrays compared with the files bit for bit. --quick: two processes of one device, fsdp,
accumulation, 3 steps. The last line of the output is one JSON object; the exit code is 1 unless all
bounds hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tiny_run import environment, tiny_config, train_command, write_shards  # noqa: E402
from loki_jax.networks import build_networks  # noqa: E402
from loki_jax.training import checkpoint as ckpt  # noqa: E402
from loki_jax.training.distributed import find_cluster, join  # noqa: E402
from loki_jax.training.inputs import open_inputs, start_reading  # noqa: E402
from loki_jax.training.logging import read_metrics  # noqa: E402
from loki_jax.training.sharding import make_mesh, path_name, tree_shardings  # noqa: E402
from loki_jax.training.state import create_state, make_optimizer  # noqa: E402
from loki_jax.training.step import initial_params  # noqa: E402

GRADIENT_BOUND, LOSS_BOUND = 1e-5, 1e-4


class Topology(NamedTuple):
    processes: int
    devices: int  # of each process
    axis: str  # which mesh axis takes them all
    accumulate: int = 1

    @property
    def name(self) -> str:
        return f"{self.processes}x{self.devices}-{self.axis}-{self.accumulate}"


ONE = Topology(1, 1, "data")
ALL = [Topology(p, 8 // p, axis) for axis in ("data", "fsdp") for p in (1, 2, 4)] + [
    Topology(2, 2, "fsdp", 2)
]
QUICK = [Topology(2, 1, "fsdp", 2)]


def config_of(topology: Topology, shards: Path, steps: int):
    """The tiny config on a topology; batch 8, no clipping, every array of 64 numbers or more sharded."""
    count = topology.processes * topology.devices
    return tiny_config(
        shards, steps=steps, batch_size=8, accumulate=topology.accumulate, optimizer__clip_norm=0.0,
        sharding_min_size=64, checkpoint__every=1, checkpoint__keep_every=1, checkpoint__keep_best=0,
        mesh__data=count if topology.axis == "data" else 1,
        mesh__fsdp=count if topology.axis == "fsdp" else 1,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(command: list[str], topology: Topology, cache: Path) -> None:
    """Run one command in all processes of a topology; RuntimeError with their output when one fails."""
    address = f"localhost:{free_port()}"
    env = environment(cache, topology.devices)
    running = []
    for index in range(topology.processes):
        cluster = []
        if topology.processes > 1:
            cluster = [
                f"--coordinator={address}",
                f"--processes={topology.processes}",
                f"--process_id={index}",
            ]
        running.append(
            subprocess.Popen(
                [*command, *cluster], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate()[0] for process in running]
    codes = [process.returncode for process in running]
    if any(codes):
        raise RuntimeError(
            f"{topology.name}: exit codes {codes}\n" + "\n".join(out[-3000:] for out in outputs)
        )


def first_gradients(workdir: Path) -> list[np.ndarray]:
    """Gradients of step 1, up to a factor."""
    tree = ckpt.restore_as_numpy((workdir / "checkpoints" / "1" / "optimizer").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [np.asarray(leaf, np.float64) for path, leaf in leaves if "mu" in path_name(path).split("/")]


def gradient_error(workdir: Path, reference: Path) -> float:
    """Largest relative error in norm over the tensors; those without a gradient must have none in both."""
    worst = 0.0
    for mine, theirs in zip(first_gradients(workdir), first_gradients(reference), strict=True):
        size = np.linalg.norm(theirs)
        error = np.linalg.norm(mine - theirs)
        worst = max(worst, error / size if size > 0 else float(error > 0))
    return worst


def losses(workdir: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row])


def restore_all(topology: Topology, shards: Path, steps: int, workdirs: list[Path]) -> None:
    """In one process of a topology: restore the last checkpoint of each workdir, compare every shard."""
    config = config_of(topology, shards, steps)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    inputs = open_inputs(config, mesh)
    head = inputs.dataset.head()
    optimizer = make_optimizer(config)
    params, frozen = initial_params(config, build_networks(config, head), head)
    abstract = jax.eval_shape(lambda p: create_state(p, frozen, optimizer, keep_ema=True), params)
    shardings, _ = tree_shardings(abstract, mesh, config.sharding_rules, config.sharding_min_size)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
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


def measure(folder: Path, topologies: list[Topology], steps: int, cache: Path, say=print) -> dict:
    """The whole measurement in `folder`; the JSON object."""
    began = time.monotonic()
    shards = write_shards(folder / "shards")
    for topology in (ONE, *topologies):
        config = config_of(topology, shards, steps)
        start(train_command(config, folder / topology.name), topology, cache)
        say(f"{topology.name}: trained")
    reference = folder / ONE.name
    expected = losses(reference)
    gradients, relative = {}, {}
    for topology in topologies:
        workdir = folder / topology.name
        gradients[topology.name] = gradient_error(workdir, reference)
        relative[topology.name] = float(np.max(np.abs(losses(workdir) / expected - 1)))
        say(
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
        say(f"{topology.name}: restored those of {len(others)} others")
    return {
        "topologies": [topology.name for topology in topologies],
        "steps": steps,
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
