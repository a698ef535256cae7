"""Files of tensors, opened without loading them: names, shapes and dtypes now, one tensor at a time later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open

from loki_jax.weights import flax_msgpack, torch_zip
from loki_jax.weights.tensors import TensorInfo, Tensors, WeightsError

_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

# Files of a network in a diffusers folder, the preferred first.
_DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
_FLAX_FILE = "diffusion_flax_model.msgpack"


def open_file(path: Path) -> Tensors:
    """The tensors of one file, whose format its suffix tells.

    Raises:
      WeightsError: no such file, an unknown suffix, or a file that is damaged, cut short or unsafe.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    readers = {
        ".safetensors": _open_safetensors, ".ckpt": torch_zip.open_torch, ".bin": torch_zip.open_torch,
        ".pt": torch_zip.open_torch, ".pth": torch_zip.open_torch, ".msgpack": flax_msgpack.open_msgpack,
    }  # fmt: skip
    if path.suffix not in readers:
        raise WeightsError(f"{path}: unknown kind of file; known are {', '.join(readers)}.")
    return readers[path.suffix](path)


def open_diffusers(folder: Path, flax: bool) -> Tensors:
    """UNet and VAE of a diffusers folder; names are "unet/..." and "vae/...".

    Args:
      flax: take the Flax files (`diffusion_flax_model.msgpack`) instead of PyTorch's.

    Raises:
      WeightsError: a network has no file of that kind, or it cannot be read.
    """
    parts = {}
    for part in ("unet", "vae"):
        wanted = (_FLAX_FILE,) if flax else _DIFFUSERS_FILES
        found = [folder / part / name for name in wanted if (folder / part / name).is_file()]
        if not found:
            there = sorted(p.name for p in (folder / part).glob("*")) or "nothing"
            raise WeightsError(
                f"{folder / part}: expected {' or '.join(wanted)}, found {there}. "
                "Give the folder that holds unet/ and vae/; rename a variant (.fp16.) to the plain name."
            )
        parts[part] = open_file(found[0])
    return _join(parts, "/")


def has_flax_files(folder: Path) -> bool:
    """Whether a diffusers folder holds the UNet in Flax files only."""
    return (folder / "unet" / _FLAX_FILE).is_file() and not any(
        (folder / "unet" / name).is_file() for name in _DIFFUSERS_FILES
    )


def open_orbax(folder: Path) -> Tensors:
    """A tree saved by Orbax; names are the paths, joined by "/".

    Raises:
      WeightsError: it is no finished Orbax checkpoint.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        infos = {
            "/".join(str(key.key) for key in path): TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype).name)
            for path, leaf in flat
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
    owner: dict[str, Tensors] = {}
    for tensors in parts:
        if twice := owner.keys() & tensors.infos.keys():
            raise WeightsError(
                f"{_files(parts)}: {len(twice)} tensors occur twice, first {sorted(twice)[0]}."
            )
        owner |= dict.fromkeys(tensors.infos, tensors)
    return Tensors(
        {name: tensors.infos[name] for name, tensors in owner.items()},
        lambda name: owner[name].read(name),
        tuple(file for tensors in parts for file in tensors.files),
    )


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
            raise WeightsError(f"{_files([tensors])}: {other} and {name} are two names of the same weight.")
    infos = {new: tensors.infos[old] for new, old in original.items()}
    return Tensors(infos, lambda name: tensors.read(original[name]), tensors.files)


def _block_of(name: str) -> str:
    """What the first two levels of a path name, "reference/up_1_transformer_0"."""
    return "/".join(name.split("/")[:2])


def _restore(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Some tensors of an Orbax tree."""
    item: dict = {}
    for name in names:
        *parents, leaf = name.split("/")
        branch = item
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = 0
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute(), args=arguments)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: {names[0]} cannot be read ({error}). Make the folder anew.") from error
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): array for path, array in leaves}


def _join(parts: dict[str, Tensors], separator: str) -> Tensors:
    return merge(
        *(
            renamed(tensors, lambda name, part=part: f"{part}{separator}{name}")
            for part, tensors in parts.items()
        )
    )


def _open_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            infos = {
                name: TensorInfo(
                    tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype())
                )
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: damaged or cut short, not a readable safetensors file ({error}). "
            "Copy it again and compare its SHA-256."
        ) from error

    def read(name: str) -> np.ndarray:
        with safe_open(str(path), framework="np") as file:
            return file.get_tensor(name)

    return Tensors(infos, read, (path,))


def _open_sharded(index: Path) -> Tensors:
    """Shards named by an index file `{"weight_map": {tensor: file}}`."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{index}: not an index of shards ({error!r}). Copy it again.") from error
    # A name with folders in it could reach any file of the machine.
    if strange := [name for name in shards if not isinstance(name, str) or Path(name).name != name]:
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


def _files(parts) -> str:
    return ", ".join(str(file) for tensors in parts for file in tensors.files[:2]) or "weights"
