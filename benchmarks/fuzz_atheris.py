"""Mutated files against every reader, chosen by what of our code they reach (atheris, libFuzzer).

    pip install -c constraints.txt -e ".[fuzz]"
    python benchmarks/fuzz_atheris.py [--seconds 600] [--readers torch head shards ...] [--keep DIR]

The readers and their valid files are those of benchmarks/fuzz_readers.py, whose mutations inside of zips,
headers and JSON are half of the mutations here; libFuzzer does the others, and keeps the files that reach
new lines of loki_jax and data_prep. Counted are exceptions that are not the reader's own, one for each
place that raises them. A crash, 20 seconds or 2 GB end a reader. The file of each finding is written to
--keep. The last line of the output is one JSON object; the exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.fuzz_readers import READERS, Files, _mutate_inside, _own_errors  # noqa: E402

DEFAULT = ("torch", "safetensors", "head", "loki_fit", "shards")


def mutable(name: str, files: Files) -> list[str]:
    """The files of a case that may be damaged; the first byte of an input chooses one."""
    return [path for path in sorted(files) if not re.fullmatch(READERS[name].fixed, path)]


def valid_files(name: str, folder: Path) -> Files:
    folder.mkdir(parents=True)
    READERS[name].make(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(name: str, keep: Path, arguments: list[str]) -> None:
    """Fuzz one reader in this process, which ends in libFuzzer's own way."""
    import atheris

    reader, folder = READERS[name], Path(tempfile.mkdtemp())
    with atheris.instrument_imports(include=["loki_jax", "data_prep"], enable_loader_override=False):
        files = valid_files(name, folder / "valid")
        own = _own_errors()
        reader.read(folder / "valid" / reader.main)  # imports what it needs
    paths, case = mutable(name, files), folder / "case"
    for path, content in files.items():
        (case / path).parent.mkdir(parents=True, exist_ok=True)
        (case / path).write_bytes(content)
    found: set[tuple[str, str, int]] = set()

    def test(data: bytes) -> None:
        if not data:
            return
        path = paths[data[0] % len(paths)]
        (case / path).write_bytes(data[1:])
        try:
            reader.read(case / reader.main)
        except own:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = (type(error).__name__, last.filename, last.lineno or 0)
            if place not in found:
                found.add(place)
                (keep / f"{name}_{len(found)}_{place[0]}_{Path(path).name}").write_bytes(data[1:])
                print(f"foreign {place[0]} at {last.filename}:{last.lineno}: {error}", flush=True)
        finally:
            (case / path).write_bytes(files[path])

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        if data and random.Random(seed).random() < 0.5:
            path = paths[data[0] % len(paths)]
            try:
                return (data[:1] + _mutate_inside(path, data[1:], np.random.default_rng(seed)))[:largest]
            except Exception:  # damaged already, so that there is no inside
                pass
        return atheris.Mutate(data, largest)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, path in enumerate(paths):
        (corpus / str(number)).write_bytes(bytes([number]) + files[path])
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], test, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, keep: Path) -> dict:
    """Files read, places of our code reached, and what was found, of one reader."""
    keep.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=200000"]
    options += [f"-artifact_prefix={keep}/{name}_", "-seed=1"]
    done = subprocess.run(
        [sys.executable, __file__, "--keep", str(keep), "--child", name, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    runs = re.findall(r"^#(\d+)\s.*?cov: (\d+)", done.stdout, re.MULTILINE)
    if not runs:
        raise RuntimeError(f"{name}: did not start:\n{done.stdout[-3000:]}")
    findings = re.findall(r"^(?:foreign .*|==\d+== ?ERROR: .*)$", done.stdout, re.MULTILINE)
    return {"files": int(runs[-1][0]), "reached": int(runs[-1][1]), "found": findings}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="for each reader")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(DEFAULT))
    parser.add_argument(
        "--keep", type=Path, default=Path("found"), help="folder for the files that are counted"
    )
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.keep, args.child[1:])
        return
    results = {}
    for name in args.readers:
        results[name] = fuzz(name, args.seconds, args.keep.absolute())
        print(f"{name}: {results[name]}", flush=True)
    print(json.dumps({"seconds": args.seconds, "readers": results}))
    sys.exit(any(result["found"] for result in results.values()))


if __name__ == "__main__":
    main()
