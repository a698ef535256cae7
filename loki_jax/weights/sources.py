"""Files of tensors, opened without loading them: names, shapes and dtypes now, one tensor at a time later."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from loki_jax.training.sharding import path_name
from loki_jax.weights.tensors import SAFETENSORS_DTYPES, TensorInfo, Tensors, WeightsError
from loki_jax.weights.torch_zip import open_torch

# Files of a network in a diffusers folder, the preferred first.
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
FLAX_FILE = "diffusion_flax_model.msgpack"

FLAX_ARRAY = 1  # MessagePack extension; its payload is the array [shape, dtype name, bytes]
_MOST_AXES = 32


def open_file(path: Path) -> Tensors:
    """The tensors of one file, whose format its suffix tells.

    Raises:
      WeightsError: no such file, an unknown suffix, or a file that is damaged, cut short or unsafe.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file.")
    readers: dict[str, Callable[[Path], Tensors]] = {
        ".safetensors": _open_safetensors, ".ckpt": open_torch, ".bin": open_torch, ".pt": open_torch,
        ".pth": open_torch, ".msgpack": _open_flax, ".json": _open_sharded,
    }  # fmt: skip
    if path.suffix not in readers or (path.suffix == ".json" and not path.name.endswith(".index.json")):
        raise WeightsError(f"{path}: unknown kind of file; known are {', '.join(readers)}.")
    # Parsers and NumPy fail on damaged bytes in any way there is. This is the one place that names them.
    try:
        tensors = readers[path.suffix](path)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{path}: damaged or cut short ({_reason(error)}). Copy it again and compare its SHA-256."
        ) from error

    def read(name: str) -> np.ndarray:
        try:
            return tensors.read(name)
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(f"{path}: {name} is damaged ({_reason(error)}). Copy it again.") from error

    return tensors._replace(read=read)


def open_diffusers(folder: Path) -> tuple[Tensors, bool]:
    """UNet and VAE of a diffusers folder ("unet/...", "vae/..."), and whether they are Flax files.

    The UNet's files decide: PyTorch's are preferred to Flax files (`diffusion_flax_model.msgpack`).

    Raises:
      WeightsError: a network has no file of that kind, or it cannot be read.
    """
    held = {part: {path.name for path in (folder / part).glob("*")} for part in ("unet", "vae")}
    is_flax = FLAX_FILE in held["unet"] and held["unet"].isdisjoint(DIFFUSERS_FILES)
    wanted, parts = (FLAX_FILE,) if is_flax else DIFFUSERS_FILES, []
    for part, names in held.items():
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise WeightsError(
                f"{folder / part}: expected {' or '.join(wanted)}, found {sorted(names) or 'nothing'}. "
                "Give the folder that holds unet/ and vae/; rename a variant (.fp16.) to the plain name."
            )
        tensors = open_file(folder / part / found)
        parts.append(tensors.pick({f"{part}/{name}": name for name in tensors.infos}))
    return merge(*parts), is_flax


def open_orbax(folder: Path) -> Tensors:
    """A tree saved by Orbax; names are the paths, joined by "/".

    Raises:
      WeightsError: it is no finished Orbax checkpoint.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        infos = {
            path_name(path): TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype).name)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{folder}: not a finished Orbax checkpoint ({error}).") from error

    # Orbax takes longer to find a tensor than to read it, so a block of layers is read together and
    # kept until another one is asked for.
    block: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in block:
            block.clear()
            head = _block_of(name)
            block.update(_restore(folder, [other for other in infos if _block_of(other) == head]))
        return block[name]

    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return Tensors(infos, read, files)


def merge(*parts: Tensors) -> Tensors:
    """Several sources as one. Raises WeightsError when two of them have a tensor of the same name."""
    files = tuple(file for tensors in parts for file in tensors.files)
    owner: dict[str, Tensors] = {}
    for tensors in parts:
        if twice := owner.keys() & tensors.infos.keys():
            raise WeightsError(f"{_named(files)}: {len(twice)} tensors occur twice, first {min(twice)}.")
        owner |= dict.fromkeys(tensors.infos, tensors)
    infos = {name: tensors.infos[name] for name, tensors in owner.items()}
    return Tensors(infos, lambda name: owner[name].read(name), files)


def from_arrays(arrays: dict[str, np.ndarray], files: tuple[Path, ...] = ()) -> Tensors:
    """Arrays that are in memory already."""
    infos = {name: TensorInfo(array.shape, array.dtype.name) for name, array in arrays.items()}
    return Tensors(infos, arrays.__getitem__, files)


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """The same tensors under other names. Raises WeightsError when two names become one."""
    original: dict[str, str] = {}
    for name in tensors.infos:
        other = original.setdefault(rename(name), name)
        if other != name:
            raise WeightsError(
                f"{_named(tensors.files)}: {other} and {name} are two names of the same weight."
            )
    return tensors.pick(original)


def _named(files: tuple[Path, ...]) -> str:
    return ", ".join(map(str, files[:4])) or "weights"


def _reason(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except RecursionError:  # a KeyError shows its key, which a hostile pickle can nest without end
        return type(error).__name__


def _block_of(name: str) -> str:
    """What the first two levels of a path name, "reference/up_1_transformer_0"."""
    return "/".join(name.split("/")[:2])


def _restore(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Some tensors of an Orbax tree."""
    item = unflatten_dict(dict.fromkeys(names, 0), sep="/")
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return flatten_dict(checkpointer.restore(folder.absolute(), args=arguments), sep="/")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: {names[0]} cannot be read ({error}). Make the folder anew.") from error


def _open_safetensors(path: Path) -> Tensors:
    dtypes = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}
    with safe_open(str(path), framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        infos = {
            name: TensorInfo(tuple(part.get_shape()), dtypes.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }

    def read(name: str) -> np.ndarray:
        with safe_open(str(path), framework="np") as file:
            return file.get_tensor(name)

    return Tensors(infos, read, (path,))


def _open_flax(path: Path) -> Tensors:
    """A Flax file, nested maps of arrays in MessagePack. It is held in memory as a whole.

    `flax.serialization.msgpack_restore` reads the same, but a list's claimed length decides there how much
    is allocated. Here only an array's own three entries and its axes are lists.
    """
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=_flax_array, max_array_len=0)
    arrays = flatten_dict(tree, sep="/")
    for name, value in arrays.items():
        if "__msgpack_chunked_array__" in name:
            raise WeightsError(f"{path}: {name} is in chunks, as Flax stores arrays above 1 GB. Split it.")
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} is {value!r:.40} where an array or a map should be")
    return from_arrays(arrays, (path,))


def _flax_array(kind: int, data: bytes) -> np.ndarray:
    if kind != FLAX_ARRAY:
        raise ValueError(f"extension type {kind}; only arrays ({FLAX_ARRAY}) are known")
    shape, dtype, numbers = msgpack.unpackb(data, max_array_len=_MOST_AXES)
    if dtype not in SAFETENSORS_DTYPES or len(numbers) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"an array of dtype {dtype!r:.40}, shape {shape} and {len(numbers)} bytes")
    return np.frombuffer(numbers, dtype).reshape(shape)


def _open_sharded(index: Path) -> Tensors:
    """Shards named by an index file `{"weight_map": {tensor: file}}`."""
    content = json.loads(index.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise WeightsError(f"{index}: not an index of shards. Copy it again.")
    weight_map = content["weight_map"]
    shards = sorted(set(weight_map.values()))
    # A name with folders in it could reach any file of the machine.
    if strange := [name for name in shards if Path(name).name != name]:
        raise WeightsError(f"{index}: shard {strange[0]!r} is not a file beside the index.")
    parts = {name: open_file(index.parent / name) for name in shards}
    for name, tensors in parts.items():
        promised = {tensor for tensor, shard in weight_map.items() if shard == name}
        if differing := sorted(promised ^ tensors.infos.keys()):
            raise WeightsError(
                f"{index.parent / name}: index and shard disagree on {len(differing)} tensors, "
                f"first {differing[0]}. Copy index and shards of the same model."
            )
    together = merge(*parts.values())
    return together._replace(files=(index, *together.files))
