"""Conversion of weights: find out what a source holds, match every tensor, write the target."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from loki_jax.driver.registry import DEFAULT_ARM, find_map_arm
from loki_jax.face.asset import load_head
from loki_jax.face.builtin import builtin_head
from loki_jax.io import atomic_path, file_sha256, remove, stale_siblings
from loki_jax.training.checkpoint import saved_steps
from loki_jax.training.config import config_to_json, read_config
from loki_jax.weights import layouts, sources
from loki_jax.weights.diffusers_names import current_name
from loki_jax.weights.match import match_keys
from loki_jax.weights.options import ConvertOptions
from loki_jax.weights.tensors import Tensors, WeightsError
from loki_jax.weights.write import cast, to_ours, to_theirs, write_flax, write_orbax, write_safetensors

RECORD = "conversion.json"

# CLIP's tokens of the empty prompt: start, end, and what Stable Diffusion 2 pads with.
_START, _END, _PADDING, _VOCABULARY = 49406, 49407, 0, 49408


class Source(NamedTuple):
    """Weights whose layout is known; `network` is what `config.model` describes."""

    path: Path
    tensors: Tensors
    layout: layouts.Layout
    config: ConfigDict
    network: layouts.Network
    note: str = ""


def open_source(options: ConvertOptions) -> Source:
    """Find out what `options.source` holds and open it.

    Raises:
      WeightsError: there is nothing that is understood.
      CheckpointError: a workdir's config is damaged.
    """
    path = Path(options.source or "")
    is_workdir = (path / "config.json").is_file() and (path / "checkpoints").is_dir()
    if options.config is not None:
        config = layouts.load_config(options.config)
    elif is_workdir:
        config = read_config(path / "config.json")
    else:
        config = ConfigDict({"model": layouts.sd21_config().to_dict()})
    try:
        channels = find_map_arm(config.driver.arm if "driver" in config else DEFAULT_ARM).channels
        if callable(channels):
            channels = channels(builtin_head())
        network = layouts.make_network(config.model, channels)
    except WeightsError:
        raise
    except Exception as error:  # a damaged config can hold anything
        file = options.config or path / "config.json"
        raise WeightsError(f"{file}: describes no network ({type(error).__name__}: {error}).") from error

    def source(tensors: Tensors, layout: str, wrapped: bool = False, note: str = "") -> Source:
        return Source(path, tensors, layouts.make_layout(layout, network, wrapped), config, network, note)

    if is_workdir:
        return source(_open_workdir(path, options.ema), "workdir")
    if (path / "_METADATA").is_file():
        return source(sources.open_orbax(path), "orbax")
    if (path / "unet").is_dir():
        tensors, is_flax = sources.open_diffusers(path)
        _check_settings(path, network)
        note = _prediction_note(path)
        if is_flax:
            return source(tensors, "flax", note=note)
        return source(sources.renamed(tensors, current_name), "diffusers", note=note)
    if path.is_dir():
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise WeightsError(
            f"{path}: neither a diffusers folder (unet/, vae/) nor a folder of this program (_METADATA) "
            f"nor a workdir (config.json, checkpoints/); it holds {held}."
        )
    tensors = sources.open_file(path)
    names = list(tensors.infos)
    starts = lambda *prefixes: any(name.startswith(prefixes) for name in names)
    outer = "model." if starts("model.model.diffusion_model.") else ""
    if starts(f"{outer}ref_extractor.", f"{outer}model.diffusion_model.cond_encoder."):
        return source(tensors, "loki", wrapped=bool(outer))
    if starts("model.diffusion_model."):
        return source(tensors, "ldm")
    raise WeightsError(
        f"{path}: neither an original Stable Diffusion checkpoint nor one of Loki; its first tensors are "
        f"{', '.join(names[:3]) or 'none'}. For a diffusers model give the folder that holds unet/ and vae/."
    )


def convert(source: Source, options: ConvertOptions) -> tuple[str, dict[str, Any]]:
    """Write `source` to `options.out`. Every tensor is used, or dropped for a stated reason.

    Returns:
      the layout written, and what `conversion.json` holds: digests of the source's files, the tensors that
      were used, dropped and why, and new.

    Raises:
      WeightsError: anything is missing, left over, damaged or unsafe; nothing is written then.
      HeadAssetError: `options.head` is no head asset.
    """
    target = options.to or ("workdir" if source.layout.name == "loki" else "orbax")
    dtype: str | None = options.dtype
    if target in ("orbax", "workdir"):
        if dtype not in (None, "float32"):
            raise WeightsError(f"--dtype {dtype}: parameters that a run starts from are float32.")
        dtype = "float32"
    if options.out.exists():
        raise WeightsError(f"{options.out}: exists already. Choose another --out, or remove it.")

    network, tensors, table = source.network, source.tensors, source.layout.table
    dropped = match_keys(tensors.infos, table, network.shapes, source.layout.drops, str(source.path))
    params = to_ours(tensors, table, network.shapes)
    destination = layouts.make_layout(target, network)
    prompt = None
    if "null_prompt" in destination.table:
        params, prompt = _with_null_prompt(params, source.path, options, network.shapes["null_prompt"])
    unplaced = _match_target(source, params, destination, new_prompt=prompt is not None)
    new = layouts.new_parameters(network) if target == "orbax" else {}
    if prompt is not None:
        new["null_prompt"] = "the text encoder's output for the empty prompt"
    used = [weight.name for weight in table.values() if weight.name not in unplaced]
    files = _hash_files(tensors.files, options.sha256)
    dtypes = Counter(tensors.infos[name].dtype for name in used)
    record = {
        "format": "loki_jax-conversion-1",
        "source": {"layout": source.layout.name, "files": files, "dtypes": dict(dtypes)},
        "null_prompt": prompt,
        "used": len(used),
        "dropped": _by_reason(dropped | unplaced),
        "new": _by_reason(new),
    }
    if dtype is not None:
        params = cast(params, dtype)
    for stale in stale_siblings(options.out):
        remove(stale)
    with atomic_path(options.out) as partial:
        if target == "orbax":
            write_orbax(partial, params)
        elif target == "workdir":
            _write_workdir(partial, params, source.config, options.head)
        elif target in ("ldm", "loki"):
            metadata = {"format": "pt", "conversion": json.dumps(record)}
            write_safetensors(partial, to_theirs(params, destination.table), metadata)
        else:
            _write_diffusers(partial, to_theirs(params, destination.table), network, flax=target == "flax")
        if partial.is_dir():
            (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return target, record


# ------------------------------------------------------------------------------------------- source


def _check_settings(folder: Path, network: layouts.Network) -> None:
    """Compare a diffusers folder's own settings, as far as shapes do not show them, with the network's.

    Raises WeightsError where the weights belong to another network of the same shapes.
    """
    for part, ours in layouts.diffusers_configs(network).items():
        path = folder / part / "config.json"
        if not path.is_file():
            continue
        try:
            theirs = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise WeightsError(f"{path}: not a JSON file of settings ({error}). Copy it again.") from error
        if isinstance(heads := theirs.get("attention_head_dim"), int):
            theirs["attention_head_dim"] = [heads] * len(ours["block_out_channels"])
        checked = [key for key in layouts.CHECKED_SETTINGS if key in ours and key in theirs]
        differing = [f"{k}: {theirs[k]} there, {ours[k]} here" for k in checked if theirs[k] != ours[k]]
        if differing:
            raise WeightsError(f"{path}: another network.\n  " + "\n  ".join(differing))


def _prediction_note(folder: Path) -> str:
    """What to know of a Stable Diffusion folder that its weights do not tell."""
    try:
        kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    except (OSError, ValueError, LookupError, TypeError):
        kind = "epsilon"
    if kind == "epsilon":
        return ""
    return (
        f"this model predicts {kind!r} (SD 2.1 at 768 pixels does); Loki starts from SD 2.1-base, "
        "which predicts noise"
    )


def _open_workdir(path: Path, use_ema: bool) -> Tensors:
    """The newest checkpoint of a run, with its frozen parameters."""
    steps = saved_steps(path)
    if not steps:
        raise WeightsError(f"{path / 'checkpoints'}: holds no finished checkpoint.")
    newest = path / "checkpoints" / str(steps[-1])
    parts = [sources.open_orbax(newest / ("ema" if use_ema and (newest / "ema").is_dir() else "params"))]
    if (path / "frozen").is_dir():
        parts.append(sources.open_orbax(path / "frozen"))
    return sources.merge(*parts)


# -------------------------------------------------------------------------------------- null prompt


def _with_null_prompt(
    params: Tensors, source: Path, options: ConvertOptions, shape: tuple[int, ...]
) -> tuple[Tensors, dict | None]:
    """Parameters with the null prompt added or replaced, and where it came from (None: the source's own).

    Raises WeightsError where neither the source nor the options give one, or it has another shape.
    """
    encoder, own = options.text_encoder, source / "text_encoder"
    if encoder is None and options.null_prompt is None:
        if "null_prompt" in params.infos:
            return params, None
        encoder = own if own.is_dir() else None
    if encoder is not None:
        embedding, given = _null_prompt_of(encoder), encoder
    elif options.null_prompt is not None:
        embedding, given = _read_npy(options.null_prompt), options.null_prompt
    else:
        raise WeightsError(
            f"{source}: has no embedding of the empty prompt {shape}. Give SD 2.1's text_encoder folder "
            "(--text-encoder DIR) or a stored embedding (--null-prompt FILE.npy)."
        )
    if embedding.shape != shape or not np.isfinite(embedding).all():
        raise WeightsError(
            f"{given}: null prompt of shape {embedding.shape}, expected finite numbers of {shape}. Use the "
            "text encoder of SD 2.1."
        )
    others = params.keep(name for name in params.infos if name != "null_prompt")
    added = sources.from_arrays({"null_prompt": embedding.astype(np.float32)})
    files = sorted(path for path in given.iterdir() if path.is_file()) if given.is_dir() else [given]
    return sources.merge(others, added), {"files": _hash_files(files)}


def _null_prompt_of(text_encoder: Path) -> Float[np.ndarray, "1 77 d"]:
    """The text encoder's last hidden states for "", float32.

    Raises WeightsError where transformers or torch is missing, or the folder is no CLIP text encoder.
    """
    if not (text_encoder / "config.json").is_file():
        raise WeightsError(f"{text_encoder}: not a text_encoder folder of SD 2.1 (no config.json).")
    try:
        import torch
        from transformers import CLIPTextModel
    except ImportError as error:
        raise WeightsError(
            f"the null prompt needs transformers and torch ({error}): pip install -e '.[convert]' torch, "
            "or give --null-prompt FILE.npy."
        ) from error
    try:
        model = CLIPTextModel.from_pretrained(text_encoder, local_files_only=True, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{text_encoder}: not a CLIP text encoder ({error}).") from error
    if model.config.vocab_size != _VOCABULARY:
        raise WeightsError(f"{text_encoder}: {model.config.vocab_size} tokens, CLIP's has {_VOCABULARY}.")
    tokens = [_START, _END] + [_PADDING] * (layouts.PROMPT_TOKENS - 2)
    with torch.no_grad():
        return model(torch.tensor([tokens])).last_hidden_state.numpy()


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: no more than the file holds
    except (OSError, ValueError, EOFError) as error:
        raise WeightsError(f"{path}: not a .npy file of numbers ({error}).") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise WeightsError(f"{path}: not one array of floating-point numbers.")
    return array


# ------------------------------------------------------------------------------------------- record


def _match_target(
    source: Source, params: Tensors, target: layouts.Layout, new_prompt: bool
) -> dict[str, str]:
    """Tensors of the source that the target has no place for -> why.

    Raises WeightsError where the target needs parameters that the source does not have, or lacks others.
    """
    shapes = source.network.shapes
    if lacking := sorted(target.table.keys() - params.infos.keys()):
        named = "\n  ".join(f"{path} {shapes[path]}" for path in lacking[:8])
        raise WeightsError(
            f"--to {target.name}: needs {len(lacking)} parameters that the source does not have:\n  {named}\n"
            "A backbone gives orbax, diffusers, flax or ldm; a Loki checkpoint or a run also loki, workdir."
        )
    parts = {"generation": "generation branch", "null_prompt": "null prompt"}
    unplaced = {}
    for path, (name, _) in source.layout.table.items():
        part = path.partition("/")[0]
        if path == "null_prompt" and new_prompt:
            unplaced[name] = "replaced by the null prompt that was given"
        elif path not in target.table and part in parts:
            unplaced[name] = f"the {parts[part]} has no place in layout {target.name}"
        elif path not in target.table:
            raise WeightsError(f"--to {target.name}: no place for {name} {shapes[path]}.")
    return unplaced


def _hash_files(files: Sequence[Path], expected: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of files. Raises WeightsError where none has one of the expected digests."""
    found = [{"name": f.name, "bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files]
    for wanted in expected:
        if wanted.lower() not in {entry["sha256"] for entry in found}:
            listed = "\n  ".join(f"{entry['sha256']}  {entry['name']}" for entry in found)
            raise WeightsError(f"--sha256 {wanted}: no file of the source has it. They have\n  {listed}")
    return found


def _by_reason(names: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in names.items():
        groups.setdefault(reason, []).append(name)
    return groups


# ------------------------------------------------------------------------------------------ targets


def _write_diffusers(folder: Path, tensors: Tensors, network: layouts.Network, flax: bool) -> None:
    for part, config in layouts.diffusers_configs(network).items():
        (folder / part).mkdir(parents=True)
        prefix = f"{part}/"
        own = tensors.pick({
            name.removeprefix(prefix): name for name in tensors.infos if name.startswith(prefix)
        })  # fmt: skip
        if flax:
            config = config | {"_class_name": "Flax" + config["_class_name"]}
            write_flax(folder / part / sources.FLAX_FILE, own)
        else:
            write_safetensors(folder / part / sources.DIFFUSERS_FILES[0], own, {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_workdir(folder: Path, params: Tensors, config: ConfigDict, head: Path | None) -> None:
    """A run that has not trained yet: `animate` reads it, `config.init_from` starts from it."""
    if head is None or "window" not in config:
        raise WeightsError(
            "--to workdir: needs the head asset and the whole config: --head head.npz --config FILE."
        )
    load_head(head)  # fails with a clear message
    trained = {"generation"} | ({"reference"} if config.model.reference.trainable else set())
    is_trained = {name: name.partition("/")[0] in trained for name in params.infos}
    (folder / "checkpoints" / "0").mkdir(parents=True)
    write_orbax(folder / "checkpoints" / "0" / "params", params.keep(n for n in is_trained if is_trained[n]))
    write_orbax(folder / "frozen", params.keep(n for n in is_trained if not is_trained[n]))
    (folder / "config.json").write_text(config_to_json(config))
    shutil.copyfile(head, folder / "head.npz")
