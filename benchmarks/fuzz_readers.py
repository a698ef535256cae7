"""Mutated files against every reader: what ends in another exception than the reader's own, or takes memory.

    python benchmarks/fuzz_readers.py --count 20000 --keep found
    python benchmarks/fuzz_readers.py --count 20000 --readers torch flax

Each file is a small valid one with one to three mutations: flipped bits, a cut, bytes copied from elsewhere,
or a number where a size may stand. Half of the mutations happen inside the format (a zip's or a record file's
members, whose checksums then hold). Seed and index decide a file, so any one can be made again.

A reader runs in a child process whose address space may grow by 256 MB a file; files are below 1 MB. Counted
are foreign exceptions, files above that memory, files that take longer than 20 seconds of the processor, and
crashes of the process. Such files are copied to --keep. The last line of the output is one JSON object. Needs
torch, for the valid torch files alone.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from zlib import crc32

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MEMORY = 256 * 2**20  # bytes that reading one file may add
SECONDS = 20
BATCH = 2_000  # files that one child reads; what JAX keeps of traces would add up
SIZES = (0, 1, 2**7, 2**15, 2**16 - 1, 2**28, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)

Files = dict[str, bytes]  # path in a case's folder -> content


class Reader(NamedTuple):
    """`main` is the file or "." that `read` takes; `fixed` files are part of a case, but never mutated."""

    main: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    fixed: str = r"$^"


# ------------------------------------------------------------------------------------------- readers


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv/kernel": rng.standard_normal((3, 3, 2, 4)).astype(np.float32),
        "conv/bias": rng.standard_normal(4).astype(np.float16),
        "norm/scale": rng.standard_normal(8).astype(np.float32),
    }


def _read_tensors(path: Path) -> None:
    from loki_jax.weights.sources import open_file

    tensors = open_file(path)
    for name in tensors.infos:
        tensors.read(name)


def _make_torch(folder: Path) -> None:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    state = {"state_dict": tensors, "optimizer_states": [{"step": torch.ones(1)}], "callbacks": {"a": 1}}
    torch.save(state, folder / "x.ckpt")


def _make_flax(folder: Path) -> None:
    from loki_jax.weights.sources import from_arrays
    from loki_jax.weights.write import write_flax

    write_flax(folder / "x.msgpack", from_arrays(_arrays()))


def _make_safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(_arrays(), folder / "x.safetensors", {"format": "pt"})


def _make_sharded(folder: Path) -> None:
    from safetensors.numpy import save_file

    weight_map = {name: f"{i}.safetensors" for i, name in enumerate(_arrays())}
    for name, file in weight_map.items():
        save_file({name: _arrays()[name]}, folder / file)
    (folder / "x.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _make_model(folder: Path) -> None:
    import jax

    from configs import demo
    from loki_jax.face.builtin import builtin_head
    from loki_jax.networks import build_networks, draw_params
    from loki_jax.training.model_file import Checkpoint, save_model_file

    config = demo.get_config()
    config.image_size = 16
    config.model.unet.channels = config.model.unet.head_channels = config.model.norm_groups = 8
    config.model.unet.multipliers, config.model.unet.attention_modes = (1,), ("3d",)
    config.model.unet.attention_levels = ()
    config.model.encoder.stem, config.model.encoder.widths = 8, (8, 8)
    params = draw_params(build_networks(config, builtin_head()), jax.random.key(0))
    save_model_file(folder / "x.safetensors", Checkpoint(config, params, builtin_head(), 3))


def _read_model(path: Path, shapes: dict[str, Any] = {}) -> None:  # noqa: B006
    """Networks that were traced before are not traced again: that would take most of the time."""
    import jax
    import jax.numpy as jnp

    from loki_jax.networks import Networks, random_params
    from loki_jax.training import checkpoint

    def remembered(networks: Networks, key: jax.Array) -> Any:
        name = f"{networks.loki} {networks.autoencoder} {networks.model_config}"
        if name not in shapes:
            shapes[name] = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[name])

    with mock.patch.object(checkpoint, "random_params", remembered):
        checkpoint.load_checkpoint(path)


def _make_head(folder: Path) -> None:
    from loki_jax.face.asset import save_head
    from tests.data.clips import small_head

    save_head(folder / "head.npz", small_head())


def _read_head(path: Path) -> None:
    from loki_jax.face.asset import load_head

    load_head(path)


def _make_shards(folder: Path) -> None:
    from loki_jax.data.writer import write_dataset
    from tests.data.clips import SIZE, make_clip, small_head

    clips = [make_clip(i, 3, split) for i, split in enumerate(("train", "validation"))]
    write_dataset(folder / "shards", small_head(), clips, image_size=SIZE)


def _read_shards(path: Path) -> None:
    from loki_jax.data.reader import open_dataset

    dataset = open_dataset(path)
    dataset.head()
    for clip in dataset.clips:
        dataset.read_clip(clip)


def _make_loki(folder: Path) -> None:
    rng = np.random.default_rng(0)
    motion = {key: rng.standard_normal((2, 3)) * 0.1 for key in ("rot", "tra", "eye_rot", "neck_rot")}
    lens = {
        key: np.full((1, 1), value) for key, value in {"fx": 90.0, "fy": 90.0, "cx": 8.0, "cy": 8.0}.items()
    }
    np.savez(
        folder / "fit.npz", shape=rng.standard_normal(4), expr=rng.standard_normal((2, 6)),
        extr=np.eye(4)[None], **motion, **lens,
    )  # fmt: skip
    _make_pictures(folder)


def _make_vhap(folder: Path) -> None:
    rng = np.random.default_rng(0)
    keys = {"rotation": 3, "translation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "expr": 6}
    motion = {key: rng.standard_normal((2, size)) * 0.1 for key, size in keys.items()}
    np.savez(folder / "flame_param.npz", shape=rng.standard_normal(4), **motion)
    frames = [
        {
            "timestep_index": i, "camera_index": 0, "file_path": f"images/{i}.png", "w": 16, "h": 16,
            "fl_x": 90.0, "fl_y": 90.0, "cx": 8.0, "cy": 8.0, "transform_matrix": np.eye(4).tolist(),
        }
        for i in range(2)
    ]  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps({"frames": frames}))
    _make_pictures(folder)


def _make_pictures(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16)).save(folder / "images" / f"{i}.png")


def _read_fit(path: Path) -> None:
    from data_prep.importers.fits import read_fit
    from tests.data.clips import small_head

    read_fit(path, small_head())


READERS = {
    "torch": Reader("x.ckpt", _make_torch, _read_tensors),
    "flax": Reader("x.msgpack", _make_flax, _read_tensors),
    "safetensors": Reader("x.safetensors", _make_safetensors, _read_tensors),
    "sharded": Reader("x.safetensors.index.json", _make_sharded, _read_tensors),
    "model": Reader("x.safetensors", _make_model, _read_model),
    "head": Reader("head.npz", _make_head, _read_head),
    "shards": Reader("shards", _make_shards, _read_shards),
    "loki_fit": Reader("fit.npz", _make_loki, _read_fit, fixed=r"images/.*"),
    "vhap_fit": Reader("transforms.json", _make_vhap, _read_fit, fixed=r"images/.*"),
}


# ----------------------------------------------------------------------------------------- mutations


def _mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three mutations, or a valid file when `data` is empty."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not changed:
            break
        at = int(rng.integers(len(changed)))
        kind = rng.choice(["bits", "cut", "splice", "size", "digits"], p=[0.35, 0.1, 0.2, 0.2, 0.15])
        if kind == "bits":
            for position in rng.integers(len(changed), size=rng.integers(1, 9)):
                changed[position] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del changed[at:]
        elif kind == "splice":
            start, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
            changed[at : at + int(rng.integers(0, 64))] = data[start : start + length]
        elif kind == "size":
            width, order = int(rng.choice([1, 2, 4, 8])), rng.choice(["little", "big"])
            size = int(rng.choice(np.array(SIZES, dtype=object))) & (256**width - 1)
            changed[at : at + width] = size.to_bytes(width, str(order))
        elif numbers := [m.span() for m in re.finditer(rb"\d+", changed)]:
            start, stop = numbers[int(rng.integers(len(numbers)))]
            changed[start:stop] = str(rng.choice(np.array((*SIZES, -1), dtype=object))).encode()
    return bytes(changed)


def _mutate_json(text: bytes, rng: np.random.Generator) -> bytes:
    """Another value, another key or none at one place of a JSON text."""
    content = json.loads(text)
    node, parents = content, []
    while isinstance(node, dict | list) and node:
        key = (
            list(node)[int(rng.integers(len(node)))]
            if isinstance(node, dict)
            else int(rng.integers(len(node)))
        )
        parents.append((node, key))
        node = node[key]
    parent, key = parents[int(rng.integers(len(parents)))] if rng.random() < 0.3 else parents[-1]
    kind = rng.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.25 and isinstance(parent, dict):
        parent[str(rng.choice(["", "a", "version", "../x"]))] = parent.pop(key)
    else:
        values = (
            *SIZES,
            -1,
            0.5,
            1e308,
            float("nan"),
            None,
            True,
            False,
            "",
            "x",
            "1",
            [],
            [[]],
            {},
            [0] * 9,
        )
        parent[key] = values[int(rng.integers(len(values)))]
    return json.dumps(content).encode()


def _mutate_npy(content: bytes, rng: np.random.Generator) -> bytes:
    """Another array: of another shape, dtype or length, with another number, or with other JSON in it."""
    array = np.load(io.BytesIO(content))
    kind = rng.choice(["shape", "dtype", "rows", "number"])
    if array.dtype.kind == "U":
        array = np.asarray(_mutate_json(str(array).encode(), rng).decode())
    elif kind == "shape":
        array = array.reshape(rng.permutation(np.array([*array.shape, 1])))
    elif kind == "dtype":
        array = array.astype(rng.choice(["f2", "f8", "i1", "i8", "u4", "?", "c8", "U8", "M8[s]", "S4"]))
    elif kind == "rows" and array.ndim:
        array = array[: rng.integers(len(array) + 1)]
    elif array.size:
        array = array.copy()
        numbers = (0, -1, 2**31 - 1, -(2**31)) if array.dtype.kind in "iu" else (0, -1, np.inf, np.nan, 1e38)
        array.flat[rng.integers(array.size)] = rng.choice(numbers)
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _mutate_inside(path: str, data: bytes, rng: np.random.Generator) -> bytes:
    """A mutation of one member of a zip, one record, the header of a safetensors file, or one JSON value."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        chosen = str(rng.choice(sorted(members)))
        change = _mutate_npy if chosen.endswith(".npy") and rng.random() < 0.7 else _mutate_bytes
        members[chosen] = change(members[chosen], rng)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(
                    name, content, int(rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
                )
        return file.getvalue()
    if path.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        content = json.loads(header)
        if "config" in content.get("__metadata__", {}) and rng.random() < 0.7:
            change = _mutate_json if rng.random() < 0.8 else _mutate_bytes
            config = change(content["__metadata__"]["config"].encode(), rng)
            content["__metadata__"]["config"] = config.decode(errors="replace")
            header = json.dumps(content).encode()
        else:
            header = (_mutate_json if rng.random() < 0.7 else _mutate_bytes)(header, rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if "array_record" in path:
        from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

        with tempfile.TemporaryDirectory() as folder:
            old, new = f"{folder}/old", f"{folder}/new"
            Path(old).write_bytes(data)
            reader = ArrayRecordReader(old)
            records = reader.read_all()
            reader.close()
            chosen = int(rng.integers(len(records)))
            records[chosen] = _mutate_bytes(records[chosen], rng)
            writer = ArrayRecordWriter(new, "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
            return Path(new).read_bytes()
    if path.endswith(".json"):
        return _mutate_json(data, rng)
    return _mutate_bytes(data, rng)


def mutated(name: str, files: Files, seed: int, index: int) -> Files:
    rng = np.random.default_rng([seed, crc32(name.encode()), index])
    path = str(rng.choice([path for path in sorted(files) if not re.fullmatch(READERS[name].fixed, path)]))
    change = _mutate_bytes if rng.random() < 0.5 else lambda data, rng: _mutate_inside(path, data, rng)
    return files | {path: change(files[path], rng)}


# --------------------------------------------------------------------------------------------- child


class _TooSlow(BaseException):  # no reader may catch it
    pass


def _stop(*_: object) -> None:
    raise _TooSlow


def _own_errors() -> tuple[type[Exception], ...]:
    from loki_jax.data.schema import DatasetError
    from loki_jax.face.asset import HeadAssetError
    from loki_jax.training.config import CheckpointError
    from loki_jax.video import MediaError
    from loki_jax.weights.tensors import WeightsError

    return DatasetError, HeadAssetError, CheckpointError, MediaError, WeightsError


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _verdict(reader: Reader, path: Path, own: tuple[type[Exception], ...]) -> str:
    """ "accepted", "refused", or what went wrong."""
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    caught: BaseException | None = None
    try:
        reader.read(path)
        verdict = "accepted"
    except own as error:
        caught, verdict = error, "refused"
    except _TooSlow:
        verdict = "too slow"
    except Exception as error:
        caught, verdict = error, f"foreign {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    while caught is not None:  # a reader names the cause that it turned into its own error
        if isinstance(caught, MemoryError):
            verdict = "memory"
        caught = caught.__cause__
    return "memory" if _status("VmHWM") - held > MEMORY else verdict


def child(name: str, seeds: Path, seed: int, start: int, stop: int, keep: Path | None) -> None:
    """Read files `start` to `stop`; each line of the output is an index and its verdict."""
    reader, own = READERS[name], _own_errors()
    files: Files = pickle.loads(seeds.read_bytes())
    signal.signal(signal.SIGPROF, _stop)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(start - 1, stop):
            # First the valid file, which makes the reader import what it needs.
            case = files if index == start - 1 else mutated(name, files, seed, index)
            where = Path(folder) / "case"
            for path, content in case.items():
                (where / path).parent.mkdir(parents=True, exist_ok=True)
                (where / path).write_bytes(content)
            if index == start - 1:
                reader.read(where / reader.main)
            print(f"file {index}: begun", flush=True)
            verdict = _verdict(reader, where / reader.main, own)
            if keep is not None and verdict not in ("accepted", "refused"):
                shutil.copytree(
                    where, keep / f"{name}_{seed}_{index}_{verdict.replace(' ', '_')}", dirs_exist_ok=True
                )
            shutil.rmtree(where)
            print(f"file {index}: {verdict}", flush=True)


# -------------------------------------------------------------------------------------------- parent


def fuzz(name: str, count: int, seed: int, keep: Path | None, first: int = 0) -> Counter[str]:
    """Verdicts on `count` files of one reader."""
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        made.mkdir()
        READERS[name].make(made)
        files = {str(p.relative_to(made)): p.read_bytes() for p in sorted(made.rglob("*")) if p.is_file()}
        assert sum(map(len, files.values())) < 10**6, f"{name}: files of 1 MB or more"
        seeds = Path(folder) / "seeds"
        seeds.write_bytes(pickle.dumps(files))
        start = first
        while start < first + count:
            stop = min(start + BATCH, first + count)
            options = ["--child", name, str(seeds), "--seed", str(seed), "--range", str(start), str(stop)]
            options += ["--keep", str(keep)] if keep else []
            process = subprocess.Popen(
                [sys.executable, __file__, *options],
                stdout=subprocess.PIPE,
                text=True,
                stderr=subprocess.DEVNULL,
            )
            index, verdict = start - 1, ""
            for line in process.stdout or ():
                if match := re.fullmatch(r"file (-?\d+): (.*)\n", line):  # libraries may print, too
                    index, verdict = int(match[1]), match[2]
                    if verdict != "begun" and index >= start:
                        verdicts[verdict] += 1
            if process.wait() != 0:
                if index < start:
                    raise RuntimeError(f"{name}: the child cannot start; run it with {options}")
                verdicts[f"crash {process.returncode}"] += verdict == "begun"
                print(f"{name}: crash at {index}, exit code {process.returncode}")
            start = index + 1
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000, help="files per reader")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first file")
    parser.add_argument("--keep", type=Path, help="folder for the files that are counted")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--range", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.seed, *args.range, args.keep)
        return
    results = {}
    for name in args.readers:
        began = time.perf_counter()
        verdicts = fuzz(name, args.count, args.seed, args.keep, args.first)
        results[name] = dict(sorted(verdicts.items()))
        print(f"{name}: {results[name]}, {time.perf_counter() - began:.0f} s", flush=True)
    total: Counter[str] = Counter()
    for verdicts in results.values():
        total.update(verdicts)
    fine = total["accepted"] + total["refused"]
    print(json.dumps({
        "seed": args.seed, "first": args.first, "count": args.count, "readers": results,
        "foreign": sum(n for verdict, n in total.items() if verdict.startswith("foreign")),
        "above_256_MB": total["memory"], "others": sum(total.values()) - fine - total["memory"]
        - sum(n for verdict, n in total.items() if verdict.startswith("foreign")),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
