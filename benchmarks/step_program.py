"""Size of the train step's program by part, and what compiling each part takes.

    python benchmarks/step_program.py [--config configs/demo128.py] [--batch 16] [--compile]

Counts the traced operations of each part (loops once, results that nobody reads left out). `--compile` also
compiles the driver map, the loss, its gradients, the update of parameters and the whole step for the device
that is there, each without a cache, and counts the instructions before and after the compiler's passes, and
the megabytes of constants. The last line of the output is one JSON object.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from loki_jax.driver.encoding import ReferenceFrame  # noqa: E402
from loki_jax.face.builtin import builtin_head  # noqa: E402
from loki_jax.networks import driver_input  # noqa: E402
from loki_jax.planning.work import Subject, make_subject, part_of  # noqa: E402
from loki_jax.training.flops import bodies, live_jaxpr  # noqa: E402
from loki_jax.training.init import abstract_batch  # noqa: E402
from loki_jax.training.sharding import make_mesh  # noqa: E402
from loki_jax.training.step import apply_gradients, make_gradients, make_loss, make_train_step, window_keys  # noqa: E402
from loki_jax.weights.layouts import load_config  # noqa: E402


def scopes(jaxpr: Jaxpr, scope: str = "") -> Iterator[str]:
    """The name stack of every operation, bodies of calls and loops included."""
    for equation in jaxpr.eqns:
        here = f"{scope}/{equation.source_info.name_stack}"
        inner = bodies(equation)
        if not inner:
            yield here
        for body in inner:
            yield from scopes(body, here)


def parts(subject: Subject, mesh: jax.sharding.Mesh) -> dict[str, tuple[Callable, tuple]]:
    """(function, arguments as ShapeDtypeStructs) of each part of the step."""
    config, head, networks, optimizer, state = subject
    batch = abstract_batch(config, head)

    def draw(batch, head):
        own = (batch.reference_coefficients, batch.reference_camera, batch.reference_crop)
        inputs = (batch.coefficients, batch.camera, batch.crop)
        return driver_input(config, head, *inputs, ReferenceFrame(*own, batch.reference))

    def loss(state, batch, head):
        keys = window_keys(jax.random.key(0), jnp.arange(config.batch_size))
        return make_loss(config, networks)(state.params, state.frozen, batch, head, keys, True, 1.0)

    update = lambda state, grads: apply_gradients(config, optimizer, state, jnp.float32(0), grads)
    return {
        "driver map": (draw, (batch, head)),
        "loss": (loss, (state, batch, head)),
        "loss and gradients": (make_gradients(config, networks, mesh), (state, batch, head)),
        "update": (update, (state, state.params)),
        "step": (make_train_step(config, networks, optimizer, mesh), (state, batch, head)),
    }


def measure(function: Callable, arguments: tuple) -> dict:
    """Seconds of lowering and compiling; instructions of the program before and after; MB of constants."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    before = lowered.as_text()
    sizes = re.findall(r"stablehlo\.constant dense<\"0x([0-9A-F]+)\"", before)
    return {
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "instructions": len(re.findall(r"^\s+%[^=]+ = ", before, re.M)),
        "compiled_instructions": len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", compiled.as_text(), re.M)),
        "constant_mb": sum(map(len, sizes)) / 2e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo128.py")
    parser.add_argument("--batch", type=int, help="windows; by default those of the config")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = load_config(args.config)
    config.batch_size = args.batch or config.batch_size
    mesh = make_mesh(1, 1, jax.devices()[:1])
    programs = parts(make_subject(config, builtin_head()), mesh)
    step, arguments = programs["step"]
    traced = jax.jit(step).trace(*arguments)
    counts = Counter(map(part_of, scopes(live_jaxpr(traced.jaxpr))))
    for part, count in counts.most_common():
        print(f"{part:22s} {count:7,d} operations, {count / counts.total():.0%}")
    compiled = {}
    for name, program in programs.items() if args.compile else ():
        compiled[name] = measure(*program)
        print(name, {key: round(value, 1) for key, value in compiled[name].items()}, flush=True)
    arrays = len(jax.tree.leaves(arguments[0].params))
    device = jax.devices()[0].device_kind
    print(json.dumps({"config": args.config, "device": device, "trained_arrays": arrays,
                      "operations": dict(counts), "compiled": compiled}))  # fmt: skip


if __name__ == "__main__":
    main()
