"""Speed of the fit: the solver beside SciPy's, the way from mp4 to shards, memory by number of clips.

    OPENBLAS_NUM_THREADS=1 python benchmarks/fit.py [--quick] [--clip FILE.mp4 --head HEAD.npz]
        [--frames 64] [--scipy-frames 8]

(One thread for SciPy's small decompositions: on a busy machine more of them wait for one another, up to
hundreds of times longer.) Three parts, each printed with what was measured; the last line is one JSON object.

Solver (`solver_fps`, `scipy_over_ours`). A clip of the built-in head from `benchmarks/fit_accuracy.py` is
fitted by `loki_jax.fitting.problem`, all frames together, from landmarks to coefficients and errors.
`scipy.optimize.least_squares` (trf with bounds, x_scale "jac", exact) gets single frames of the same
problem: the same residuals, robust weights, priors and bounds, the same start (moved off the bounds, where
trf is slow) and our Jacobian, jitted, so that it does not pay for finite differences. It has a shape of its
own for each frame and no smoothness, which makes low costs easier for it, and stops as soon as its cost is
what ours is for that frame. Calls are taken in turns; the ratio is one of median seconds a frame of the two
optimisers.
`finite_difference_over_ours`: the same with SciPy's own "2-point" Jacobian, on one frame.

Pipeline (`pipeline_fps`). `python -m data_prep.build` on one copy of a clip for each core, and on 1 +
`--copies` copies for each, both after a build that compiled: the further frames over the further seconds, so
that imports and compilation do not count (the compiling build took `first_clips_s`). The clip is `--clip`, or
a synthetic one. Needs the cached landmark models (`python -m data_prep.fetch_models`); without them these
figures are null.

Memory (`peak_mib_few`, `peak_mib_many`): peak resident memory of the largest process in these two builds.

About 4 minutes on 2 idle cores; `--quick` about 2.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Coefficients
from loki_jax.fitting import fit
from loki_jax.fitting import problem as model
from loki_jax.fitting import solver as lm_solver
from loki_jax.fitting.fit import DEFAULT_SETTINGS, fit_landmarks
from loki_jax.fitting.model_files import cached_models
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import render_frames
from loki_jax.synthetic.motion import FPS
from loki_jax.video.writer import write_video
from tests.fitting.accuracy import FRAME_SIZE, observe, true_clip

COST_TOLERANCE = 1e-3  # SciPy may stop this much above our cost


def single_frame(problem, frame: int):
    """Frame `frame` of the problem as a problem of its own."""
    names = ("observed", "weight", "sigma", "real")
    rows = {name: getattr(problem, name)[frame : frame + 1] for name in names}
    return problem._replace(**rows, shape_prior=problem.shape_prior / problem.real.sum())


def robust(error, sigma, weight, huber):
    """A landmark's error (2,) scaled so that half its square is `weight` times its Huber cost."""
    error = error / sigma
    distance = jnp.sqrt(jnp.maximum(jnp.sum(error**2), 1e-12))
    beyond = jnp.sqrt(jnp.maximum(2 * huber * distance - huber**2, 1e-12)) / distance
    return error * jnp.where(distance < huber, 1.0, beyond) * jnp.sqrt(weight)


def scipy_functions(layout):
    """Residuals and Jacobian, jitted, of `single_frame` problems in the unknowns y = (shape, x)."""

    def priors(problem):
        return jnp.sqrt(jnp.concatenate([problem.shape_prior, problem.frame_prior]))

    def parts(problem):
        return problem.sigma[0], problem.weight[0], jnp.full_like(problem.sigma[0], problem.huber)

    @jax.jit
    def residuals(problem, y):
        n_shape = len(problem.shape_prior)
        error = lm_solver.residuals(problem, layout, y[:n_shape], y[None, n_shape:])[0]
        return jnp.concatenate([jax.vmap(robust)(error, *parts(problem)).ravel(), priors(problem) * y])

    @jax.jit
    def jacobian(problem, y):
        n_shape = len(problem.shape_prior)
        linearise = model.frame_linearisation(problem, layout, y[:n_shape])
        predicted, by_shape, by_frame = linearise(y[n_shape:])
        by_error = jax.vmap(jax.jacfwd(robust))(predicted - problem.observed[0], *parts(problem))
        by_unknown = jnp.concatenate([by_shape, by_frame], axis=-1)
        data = jnp.einsum("nij,njp->nip", by_error, by_unknown, precision="highest").reshape(-1, len(y))
        return jnp.concatenate([data, jnp.diag(priors(problem))])

    return residuals, jacobian


def solver(frames: int, scipy_frames: int, rounds: int) -> dict:
    """Seconds a frame of ours and of SciPy's solver at the same cost, see this module's docstring."""
    head = builtin_head()
    true, camera = true_clip(head, 0, frames)
    points, confidence = observe(head, true, camera, 0.5, 0)
    size, focal = (FRAME_SIZE, FRAME_SIZE), float(camera.intrinsics[0])
    problem, layout, start, _ = fit.make_problem(
        head, points, confidence, size, focal, DEFAULT_SETTINGS, 25.0
    )
    no_shape = np.zeros(head.n_shape, np.float32)
    limits = DEFAULT_SETTINGS.iterations, np.float32(DEFAULT_SETTINGS.tolerance)

    def ours():
        return jax.block_until_ready(lm_solver.optimise(problem, layout, no_shape, start, *limits))

    shape, x, cost, steps = ours()
    residuals, jacobian = scipy_functions(layout)
    chosen = np.linspace(0, frames - 1, scipy_frames).round().astype(int)
    lower = np.concatenate([np.full(head.n_shape, -np.inf), problem.lower])
    upper = np.concatenate([np.full(head.n_shape, np.inf), problem.upper])

    def theirs(t, analytic=True):
        frame = single_frame(problem, t)
        half_square = lambda y: 0.5 * float(np.sum(np.asarray(residuals(frame, y), np.float64) ** 2))
        wanted = half_square(jnp.concatenate([shape, x[t]])) * (1 + COST_TOLERANCE)

        def enough(intermediate_result):
            if intermediate_result.cost <= wanted:
                raise StopIteration

        # Well inside the box: from its walls, where ours starts, SciPy needs twice the steps.
        first = np.clip(np.concatenate([no_shape, start[t]]), lower + 0.05, upper - 0.05).astype(np.float64)
        as_double = lambda f: lambda y: np.asarray(f(frame, y.astype(np.float32)), np.float64)
        # Finite differences of float32 residuals need a step that their rounding does not swamp.
        how = {"jac": as_double(jacobian)} if analytic else {"jac": "2-point", "diff_step": 1e-3}
        how |= {"bounds": (lower, upper), "x_scale": "jac", "max_nfev": 200, "callback": enough}
        found = least_squares(as_double(residuals), first, **how)
        return found.cost / wanted, found.nfev

    theirs(chosen[0])  # compiles
    seconds = {"ours": [], "theirs": []}
    ratios, evaluations = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        ours()
        seconds["ours"].append((time.perf_counter() - begun) / frames)
        for t in chosen:
            begun = time.perf_counter()
            ratio, evaluated = theirs(t)
            seconds["theirs"].append(time.perf_counter() - begun)
            ratios.append(ratio)
            evaluations.append(evaluated)
    begun = time.perf_counter()
    differences_ratio, _ = theirs(chosen[len(chosen) // 2], analytic=False)
    differences = time.perf_counter() - begun
    whole = []
    for _ in range(rounds):
        begun = time.perf_counter()
        fit_landmarks(head, points, confidence, size, focal=focal)
        whole.append((time.perf_counter() - begun) / frames)
    mine, other = np.median(seconds["ours"]), np.median(seconds["theirs"])
    print(
        f"ours: {frames} frames together, {int(steps)} steps, {1 / mine:.0f} frames/s "
        f"({1 / np.median(whole):.0f} with preparation and errors)"
    )
    print(
        f"SciPy: {len(chosen)} frames one by one, {np.mean(evaluations):.1f} evaluations a frame, "
        f"{1 / other:.1f} frames/s; final cost over ours at most {max(ratios) * (1 + COST_TOLERANCE):.4f}"
    )
    return {
        "solver_fps": 1 / np.median(whole),
        "optimiser_fps": 1 / mine,
        "scipy_fps": 1 / other,
        "scipy_over_ours": other / mine,
        "scipy_cost_over_ours": max(ratios) * (1 + COST_TOLERANCE),
        "finite_difference_over_ours": differences / mine,
        "finite_difference_cost_over_ours": differences_ratio * (1 + COST_TOLERANCE),
    }


def synthetic_clip(path: Path, frames: int, size: int = 512) -> None:
    """A talking built-in head whose face the landmark networks recognise."""
    head = builtin_head()
    true, _ = true_clip(head, 3, frames)
    still = Coefficients(*(np.asarray(field) for field in true))
    still = still._replace(rot=0.3 * still.rot, neck=0.3 * still.neck)
    camera = fit.make_camera((size, size))
    still.tra[:, 2] = -1.4
    crop = np.array([0, 0, size, size], np.float32)
    write_video(path, render_frames(head, still, camera, crop, sample_appearance(3, head), size), FPS)


def build(clips: list[Path], head: str, out: Path, size: int, overlay: str) -> tuple[float, int, float]:
    """Wall seconds, frames written and peak MiB of one run of `data_prep.build`."""
    command = [sys.executable, "-m", "data_prep.build", "--clips", *map(str, clips), "--head", head]
    command += ["--out", str(out), "--size", str(size), "--overlay", overlay]
    # Compiled by the first build for all.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled")}
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"the build failed:\n{log.read()[-2000:]}")
    summary = json.loads((out / "summary.json").read_text())
    return seconds, sum(row["frames"] for row in summary["clips"]), usage.ru_maxrss / 1024


def pipeline(clip: Path | None, head: str, frames: int, copies: int, size: int, overlay: str) -> dict:
    """mp4 to shards, and the peak memory of builds of one and of many clips."""
    names = ("pipeline_fps", "first_clips_s", "peak_mib_few", "peak_mib_many")
    if cached_models() is None:
        print("pipeline: the landmark models are not cached; run `python -m data_prep.fetch_models` first")
        return dict.fromkeys(names)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = clip
        if source is None:
            source = folder / "synthetic.mp4"
            synthetic_clip(source, frames)
        runs = []
        few = os.cpu_count() or 1
        for run, count in enumerate((few, few, few * (1 + copies))):
            inputs = folder / f"in{run}"
            inputs.mkdir()
            for index in range(count):
                copy = Path(shutil.copy(source, inputs / f"clip{index}{source.suffix}"))
                # Equal files would be built once: so many empty boxes make them differ (MP4, QuickTime).
                with copy.open("ab") as file:
                    file.write(b"\0\0\0\x08free" * index)
            runs.append(build(sorted(inputs.iterdir()), head, folder / f"out{run}", size, overlay))
    (cold_s, *_), (first_s, first_frames, first_mib), (all_s, all_frames, all_mib) = runs
    more = all_s - first_s
    rate = (all_frames - first_frames) / more if more > 0 else None
    print(
        f"pipeline: {clip or 'synthetic clip'}, {size} px, overlay {overlay}: {first_frames} frames in "
        f"{cold_s:.1f} s with compilation, {first_s:.1f} s without; {all_frames} in {all_s:.1f} s, "
        + ("a busy machine hides the rate; " if rate is None else f"{rate:.1f} frames/s between; ")
        + f"peak {first_mib:.0f} MiB for {few} clips, {all_mib:.0f} MiB for {few * (1 + copies)}"
    )
    return dict(zip(names, (rate, cold_s, first_mib, all_mib), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 frames, 2 of them by SciPy, 1 further copy")
    parser.add_argument("--frames", type=int, default=64, help="of the solver's and the synthetic clip")
    parser.add_argument("--scipy-frames", type=int, default=8)
    parser.add_argument("--clip", type=Path, help="an mp4 with a face (default: a synthetic one)")
    parser.add_argument("--head", default="builtin", help="head of the pipeline's fit")
    parser.add_argument("--copies", type=int, default=4, help="further copies for each core")
    parser.add_argument("--size", type=int, default=512, help="side of the stored frames")
    parser.add_argument("--overlay", default="0", help="side of the overlay videos; 0: none")
    parser.add_argument("--no-pipeline", action="store_true", help="the solver only")
    args = parser.parse_args()
    frames, scipy_frames, copies = args.frames, args.scipy_frames, args.copies
    if args.quick:
        frames, scipy_frames, copies = 16, 2, 1
    print(f"{os.cpu_count()} cores, jax {jax.__version__} on {jax.default_backend()}")
    result = solver(frames, scipy_frames, rounds=2 if args.quick else 5)
    if not args.no_pipeline:
        result |= pipeline(args.clip, args.head, frames, copies, args.size, args.overlay)
    print(json.dumps({key: None if v is None else round(float(v), 4) for key, v in result.items()}))


if __name__ == "__main__":
    main()
