"""Test what is claimed of the method and of its metrics: one command a claim (docs/claims.md).

    python -m loki_jax.claims arithmetic --out claims
    python -m loki_jax.claims metrics --out claims --clips FOLDER
    python -m loki_jax.claims orthogonality --out claims --clips FOLDER
    python -m loki_jax.claims estimators --out claims --clips FOLDER --blendshapes face_landmarker.task
    python -m loki_jax.claims all --out claims

Each writes CLAIM.json and CLAIM.png to --out. Rendered people need nothing but the landmark networks;
recordings of FOLDER are used where it is given, each of another person. Under two hours on two cores.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

CLAIMS = ("arithmetic", "metrics", "orthogonality", "estimators")


@dataclasses.dataclass(frozen=True)
class ClaimsOptions:
    claim: tyro.conf.Positional[Literal["arithmetic", "metrics", "orthogonality", "estimators", "all"]]
    """what is tested"""
    out: Path
    """folder for the results"""
    clips: Path | None = None
    """folder of recordings, each of another person"""
    blendshapes: Path | None = None
    """MediaPipe's face_landmarker.task, for the second estimator"""
    people: int | None = None
    """rendered people (default: 3 for metrics, 20 for orthogonality)"""


def run_claims(options: ClaimsOptions) -> None:
    """Run the tests and write what they found. Raises the errors of the inputs."""
    from loki_jax.evidence import arithmetic, estimators, orthogonality, response
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.io import write_json
    from loki_jax.protocols.inputs import find_sources

    if options.people is not None and options.people < 2:
        raise ValueError(f"--people {options.people}: at least 2")
    clips: list[Path] = []
    if options.clips is not None:
        clips = [options.clips / name for name in find_sources(options.clips)[0]]
    complete = bool(clips) and options.blendshapes is not None
    if options.claim == "estimators" and not complete:
        raise ValueError("estimators needs --clips and --blendshapes: it compares two readings of recordings")
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = CLAIMS if complete else CLAIMS[:-1]
    for claim in wanted if options.claim == "all" else (options.claim,):
        began = time.monotonic()
        result: dict[str, Any]
        if claim == "arithmetic":
            result, draw = arithmetic.arithmetic(), arithmetic.draw
        elif claim == "metrics":
            result, draw = {"exact": response.exact_response()}, response.draw
            result["estimated"] = response.estimated_response(default_landmarker(), options.people or 3)
            if clips:
                result["recorded"] = response.recorded_response(default_landmarker(), clips)
        elif claim == "estimators" and options.blendshapes is not None:
            result = estimators.compare_estimators(clips, options.blendshapes)
            draw = estimators.draw_estimators
        else:
            result, draw = (
                orthogonality.orthogonality(default_landmarker(), clips, options.people or 20),
                orthogonality.draw,
            )
        result["seconds"] = round(time.monotonic() - began)
        write_json(options.out / f"{claim}.json", result)
        draw(result, options.out / f"{claim}.png")
        print(f"{claim}: wrote {options.out / claim}.json and .png ({result['seconds']} s)", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(ClaimsOptions, prog="python -m loki_jax.claims", args=argv, description=__doc__)

    from loki_jax.program import run_program

    return run_program(run_claims, options)


if __name__ == "__main__":
    sys.exit(main())
