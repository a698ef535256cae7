"""Skinning against smplx.FLAME: 32 frames, the identity computed once.

    python benchmarks/head.py [--quick] [--frames 32]

Needs the `test` extra (smplx, torch). A synthetic model in FLAME's file format, of FLAME's size, is
written to a temporary folder and read by both; their vertices must agree to 1e-5 m before anything is
timed. smplx is called as shipped, with 150 shape and 65 expression coefficients, without gradients;
ours is jitted and given the cached identity. Times are taken in turns; the ratio is one of medians.
The last line of the output is one JSON object with `smplx_over_ours`.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.face.skinning import expression_offsets, head_vertices, make_identity
from loki_jax.face.types import Coefficients
from tests.face.smplx_oracle import N_VERTICES, TOLERANCE, both_models, random_coefficients

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def medians(calls: dict, repeats: int, clock: str) -> dict[str, float]:
    """Median seconds of each call, taken in turns after a first one that compiles."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = CLOCKS[clock]()
            call()
            times[name].append(CLOCKS[clock]() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repeats: a smoke test")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=None, help="times each call is measured")
    clock_help = "cpu: processor time of this process, for machines that others use too"
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=clock_help)
    arguments = parser.parse_args()
    try:
        import smplx  # noqa: F401
        import torch
    except ImportError as missing:
        raise SystemExit(f"{missing}: install the test extra first: pip install -e '.[test]'") from missing
    with tempfile.TemporaryDirectory() as folder:
        head, theirs = both_models(Path(folder))
    given = random_coefficients(arguments.frames)
    tensor = {field: torch.from_numpy(np.array(getattr(given, field))) for field in Coefficients._fields}

    def smplx_vertices():
        with torch.no_grad():
            return theirs(
                betas=tensor["betas"],
                expression=tensor["expression"],
                global_orient=tensor["rot"],
                transl=tensor["tra"],
                neck_pose=tensor["neck"],
                jaw_pose=tensor["jaw"],
                leye_pose=tensor["eyes"],
                reye_pose=tensor["eyes"],
            ).vertices

    identity = jax.block_until_ready(jax.jit(lambda s: make_identity(head, s))(given.betas[0]))
    skinned = jax.jit(lambda identity, given: head_vertices(head, identity, given))
    offsets = jax.jit(lambda identity, given: expression_offsets(head, identity, given))
    whole = jax.jit(lambda given: head_vertices(head, make_identity(head, given.betas), given))
    ours = np.asarray(skinned(identity, given))[:, :N_VERTICES]
    difference = float(np.abs(ours - smplx_vertices().numpy()).max())
    if difference > TOLERANCE:
        raise SystemExit(f"vertices differ from smplx by {difference:.1e} m: their times are not comparable")
    calls = {
        "smplx": smplx_vertices,
        "ours": lambda: skinned(identity, given).block_until_ready(),
        "offsets": lambda: offsets(identity, given).block_until_ready(),
        "no_cache": lambda: whole(given).block_until_ready(),
    }
    found = medians(calls, arguments.repeats or (5 if arguments.quick else 31), arguments.clock)
    result = {
        "smplx_over_ours": found["smplx"] / found["ours"],
        "smplx_over_ours_without_cache": found["smplx"] / found["no_cache"],
        "offsets_over_vertices": found["offsets"] / found["ours"],
    }
    result = {key: round(value, 3) for key, value in result.items()}
    result |= {"frames": arguments.frames, "largest_difference_m": difference}
    result |= {"clock": arguments.clock, "device": jax.devices()[0].device_kind}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
