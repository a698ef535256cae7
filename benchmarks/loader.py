"""Throughput of the shards: 512-pixel JPEG and cached latents, raw, decoded, and as training batches.

    python benchmarks/loader.py [--quick] [--rounds 3] [--seconds 4]

Takes about five minutes (--quick: one). The shards are made in a temporary folder (about 0.2 GB) and stay
in the page cache, so disks are not measured. Every measurement runs in a process of its own that never
imports TensorFlow (checked), after a warm-up; figures are medians over rounds in which all take turns.

    raw        plain `tfds.data_source`, serialised records at random, one thread
    examples   the same, parsed by TFDS, the picture left encoded
    tfds       the same, everything decoded by TFDS, pictures too
    threads    `tfds` in as many threads as there are cores
    frames     our `Dataset.read` of single records: parsed and decoded
    workers_n  `iterate` with n worker processes (0: two threads; else one thread each): training batches

"examples" is what a user gets who decodes pictures when they are wanted; a 512-pixel JPEG alone costs
about 3 ms of one core, so whatever decodes them is bound by that. Decoding releases Python's lock.
The last line of the output is one JSON object: records/s of each, windows/s of the batches, and
`jpeg_decodes_per_s_and_core`, the bound for everything that decodes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

WINDOW, BATCH, SIZE, LATENT = 16, 4, 512, (64, 64, 4)
CLIPS, FRAMES = 8, 125  # five seconds at 25 fps
SOURCES = ("raw", "examples", "tfds", "threads", "frames", "workers_0", "workers_1", "workers_2")
ROOT = Path(__file__).resolve().parents[1]


def photograph_like(rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8 with detail at all scales and some grain; about 130 KB as JPEG of quality 95."""
    from PIL import Image

    picture = np.zeros((SIZE, SIZE, 3))
    for side in (4, 8, 16, 32, 64, 128, 256, 512):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture += (np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) - 127.5) / side
    picture = 128 + picture * 6 + rng.normal(size=picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def make_shards(folder: Path, kind: str, clips: int) -> dict:
    """Write a dataset of `kind` "jpeg" or "latents" as folder/loki/1.0.0, where tfds.data_source finds it."""
    sys.path.insert(0, str(ROOT))
    from loki_jax.data.schema import Clip
    from loki_jax.data.writer import encode_image, write_dataset
    from loki_jax.face.builtin import builtin_head
    from loki_jax.face.types import Camera, Coefficients

    rng, head = np.random.default_rng(0), builtin_head()
    pictures = [encode_image(photograph_like(rng), "jpeg") for _ in range(16)] if kind == "jpeg" else []

    def clip(number: int) -> Clip:
        motion = {name: rng.normal(size=(FRAMES, 3)) for name in ("rot", "tra", "neck", "jaw", "eyes")}
        latents = (
            rng.normal(size=(2, FRAMES, *LATENT)).astype(np.float32) if kind == "latents" else (None, None)
        )
        return Clip(
            clip_id=f"clip{number}", identity=f"person{number}", fps=Fraction(25), split="train",
            source="benchmarks/loader.py", licence="CC0",
            coefficients=Coefficients(
                rng.normal(size=head.n_shape), rng.normal(size=(FRAMES, head.n_expression)), **motion),
            camera=Camera(np.array([900.0, 900.0, 256.0, 256.0]), np.eye(4)),
            crop=np.array([0.0, 0.0, 512.0, 512.0]),
            images=[pictures[(number + i) % 16] for i in range(FRAMES)] if kind == "jpeg" else None,
            latent_mean=latents[0], latent_logvar=latents[1],
        )  # fmt: skip

    path = folder / "loki" / "1.0.0"
    metadata = write_dataset(
        path, head, (clip(i) for i in range(clips)), SIZE, image_format="jpeg", shard_bytes=2**25
    )
    return {"records": metadata.records["train"], "bytes": sum(size for _, size in metadata.shards.values())}


def rate(read, seconds: float) -> float:
    """Calls of `read` a second, after a warm-up; `read` returns how many records or batches it took."""
    read()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += read()
    return count / (time.perf_counter() - start)


def measure(folder: Path, source: str, seconds: float) -> float:
    """Records/s of one source; runs in a process of its own."""
    rng, at_once = np.random.default_rng(1), 64
    if source in ("raw", "examples", "tfds", "threads"):
        import ml_dtypes  # noqa: F401  makes NumPy know bfloat16; without it TFDS asks TensorFlow
        import tensorflow_datasets as tfds

        options = {}
        if source == "raw":
            options["deserialize_method"] = tfds.decode.DeserializeMethod.RAW_BYTES
        elif source == "examples" and folder.name == "jpeg":
            options["decoders"] = {"image": tfds.decode.SkipDecoding()}
        data = tfds.data_source("loki", split="train", data_dir=folder, **options)
        take = data.__getitems__
        if source == "threads":
            from concurrent.futures import ThreadPoolExecutor

            count = os.cpu_count() or 1
            pool = ThreadPoolExecutor(count)
            take = lambda numbers: list(
                pool.map(data.__getitems__, [numbers[i::count] for i in range(count)])
            )
        result = rate(lambda: take(rng.integers(len(data), size=at_once).tolist()) and at_once, seconds)
    else:
        sys.path.insert(0, str(ROOT))
        from loki_jax.data.iterator import iterate
        from loki_jax.data.reader import open_dataset
        from loki_jax.data.windows import make_dataset

        path = folder / "loki" / "1.0.0"
        if source == "frames":
            data = open_dataset(path)
            total = data.metadata.records["train"]
            result = rate(
                lambda: len(data.read("train", rng.integers(total, size=at_once).tolist())), seconds
            )
        else:
            workers = int(source.removeprefix("workers_"))
            iterator = iterate(
                make_dataset(path, WINDOW, BATCH, seed=0), workers, threads=1 if workers else 2, prefetch=2
            )
            for _ in range(2 + 3 * workers):  # what was read ahead while the processes started
                next(iterator)
            result = rate(lambda: next(iterator).crop.shape[0] * (WINDOW + 1), seconds)
            iterator.close()
    if "tensorflow" in sys.modules:
        raise SystemExit("TensorFlow was imported")
    return result


def jpeg_rate(seconds: float) -> float:
    """Bare decodes of the benchmark's pictures a second on one core."""
    sys.path.insert(0, str(ROOT))
    from loki_jax.data.reader import decode_image
    from loki_jax.data.writer import encode_image

    encoded = encode_image(photograph_like(np.random.default_rng(0)), "jpeg")
    return rate(lambda: decode_image(encoded).shape[2] // 3, seconds)


def child(arguments: list[str]) -> float:
    """This script's measurement in a new process."""
    command = [sys.executable, __file__, "--measure", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round on fewer records")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "SOURCE", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.measure:
        folder, source, seconds = args.measure
        print(
            jpeg_rate(float(seconds)) if source == "jpeg" else measure(Path(folder), source, float(seconds))
        )
        return
    if args.quick:
        args.rounds, args.seconds = 1, 1.0
    result: dict = {"cores": os.cpu_count(), "window": WINDOW, "batch": BATCH}
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[tuple[str, str], list[float]] = {}
        for kind in ("jpeg", "latents"):
            size = make_shards(Path(scratch) / kind, kind, 2 if args.quick else CLIPS)
            result[kind] = {"bytes_per_record": round(size["bytes"] / size["records"])}
            print(
                f"{kind}: {size['records']} records of {result[kind]['bytes_per_record'] / 1e3:.0f} KB",
                flush=True,
            )
        bare = []
        for round_ in range(args.rounds):
            bare.append(child([scratch, "jpeg", str(args.seconds)]))
            for kind in ("jpeg", "latents"):
                for source in SOURCES:
                    value = child([str(Path(scratch) / kind), source, str(args.seconds)])
                    found.setdefault((kind, source), []).append(value)
                    print(
                        f"round {round_ + 1}/{args.rounds} {kind:8} {source:10} {value:9.0f} records/s",
                        flush=True,
                    )
    for (kind, source), values in found.items():
        records = statistics.median(values)
        result[kind][f"{source}_records_per_s"] = round(records, 1)
        if source.startswith("workers"):
            result[kind][f"{source}_windows_per_s"] = round(records / (WINDOW + 1), 2)
    result["jpeg_decodes_per_s_and_core"] = round(statistics.median(bare), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    from absl import app

    if "--measure" in sys.argv:  # Grain's workers want parsed absl flags
        app.run(main, argv=sys.argv, flags_parser=lambda argv: (app.flags.FLAGS.mark_as_parsed(), argv)[1])
    else:
        main(sys.argv)
