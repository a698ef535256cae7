"""Time until a run has its first parameters: drawn array by array, and by one compiled program.

    python benchmarks/first_params.py [--config configs/demo128.py]

`draw_params` makes the same numbers as `jax.jit(random_params)`, and this script compares them. Each way runs
in a process of its own without a compilation cache; times include tracing, compiling and drawing. The last
line of the output is one JSON object.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from loki_jax.face.builtin import builtin_head  # noqa: E402
from loki_jax.networks import build_networks, draw_params, random_params  # noqa: E402
from loki_jax.weights.layouts import load_config  # noqa: E402

WAYS = {
    "array by array": draw_params,
    "one program": lambda networks, key: jax.jit(lambda key: random_params(networks, key))(key),
}


def measure(config: str, way: str) -> dict:
    """Seconds, number of arrays and a hash of all numbers."""
    networks = build_networks(load_config(config), builtin_head())
    start = time.perf_counter()
    leaves = jax.block_until_ready(jax.tree.leaves(WAYS[way](networks, jax.random.key(0))))
    seconds = time.perf_counter() - start
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    return {"seconds": seconds, "arrays": len(leaves), "sha256": digest}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo128.py")
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.config, args.way)))
        return
    found = {}
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    for way in WAYS:
        command = [sys.executable, __file__, "--config", args.config, "--way", way]
        output = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, check=True, text=True
        ).stdout
        found[way] = json.loads(output.splitlines()[-1])
        print(f"{way}: {found[way]['seconds']:.1f} s, {found[way]['arrays']} arrays", flush=True)
    ours, other = (found[way] for way in WAYS)
    assert ours["sha256"] == other["sha256"], "the two ways made other numbers"
    ratio = other["seconds"] / ours["seconds"]
    print(json.dumps({"config": args.config, "device": jax.devices()[0].device_kind, "ratio": ratio} | found))


if __name__ == "__main__":
    main()
