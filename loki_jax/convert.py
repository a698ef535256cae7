"""Convert weights between projects, strictly: every tensor and every parameter is accounted for.

    python -m loki_jax.convert SD21 --out sd21                      # config.pretrained of configs/hdtf.py
    python -m loki_jax.convert sd21 --out sd21_diffusers --to diffusers
    python -m loki_jax.convert loki.ckpt --out runs/loki --head flame.npz --config configs/hdtf.py:official
    python -m loki_jax.convert --workdir runs/demo --out model.safetensors

SOURCE is one of
  a diffusers folder (unet/, vae/; .safetensors or .bin, sharded or not; or diffusers' Flax files),
  an original latent-diffusion checkpoint (v2-1_512-ema-pruned, .safetensors or .ckpt),
  a training checkpoint of the public Loki code, a folder that this program wrote, or a workdir.
--to is one of
  orbax      a folder for `config.pretrained` (the default); float32, with the null prompt
  diffusers  a folder of safetensors files;  flax: the same of Flax files
  ldm, loki  one .safetensors file under the names of the original code
  workdir    a run to animate or to start from (the default for Loki checkpoints); needs --head, --config

The null prompt, the text encoder's output for "", comes from SOURCE/text_encoder, --text-encoder DIR
(needs transformers and torch) or --null-prompt FILE.npy. Pickles are never executed. Beside the weights
lies `conversion.json`: SHA-256 of all source files, what was dropped and why, what is new.

With --workdir alone, the moving average of a run (or its parameters, with --no-ema) becomes one file
for inference. That works for models of the built-in head; others carry licences and stay in their workdir.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.driver.registry import DEFAULT_ARM, find_map_arm
from loki_jax.face.asset import HeadAssetError, load_head
from loki_jax.io import atomic_path, file_sha256, remove, stale_siblings
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.training.config import CheckpointError, config_from_json, config_to_json
from loki_jax.training.model_file import save_model_file
from loki_jax.weights import layouts, sources
from loki_jax.weights.diffusers_names import current_name
from loki_jax.weights.flax_msgpack import write_msgpack
from loki_jax.weights.match import KeyMatch, match_keys
from loki_jax.weights.tensors import Tensors, WeightsError
from loki_jax.weights.write import (
    cast,
    to_ours,
    to_theirs,
    write_orbax,
    write_safetensors,
)

TARGETS = ("orbax", "diffusers", "flax", "ldm", "loki", "workdir")
RECORD = "conversion.json"

# CLIP's tokens of the empty prompt: start, end, and what Stable Diffusion 2 pads with.
_START, _END, _PADDING, _VOCABULARY = 49406, 49407, 0, 49408


class Opened(NamedTuple):
    """A source whose layout is known."""

    tensors: Tensors
    layout: layouts.Layout
    config: ConfigDict
    network: layouts.Network  # that `config.model` describes
    note: str = ""


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    enable_compile_cache()
    try:
        if args.source is None:
            _export_run(args)
        else:
            convert(args)
    except (WeightsError, CheckpointError, HeadAssetError) as error:
        sys.exit(f"error: {error}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loki_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="weights to read, see above")
    parser.add_argument("--out", required=True, type=Path, help="folder or .safetensors file to write")
    parser.add_argument("--to", choices=TARGETS, help="layout to write")
    parser.add_argument("--config", help="FILE.py[:VARIANT] or a run's config.json; default: SD 2.1's sizes")
    parser.add_argument("--text-encoder", type=Path, help="text_encoder folder of SD 2.1 for the null prompt")
    parser.add_argument("--null-prompt", type=Path, help=".npy file with the null prompt, (1, 77, width)")
    parser.add_argument("--head", type=Path, help="head.npz of the workdir to write")
    parser.add_argument(
        "--sha256", action="append", default=[], metavar="HEX", help="a weights file must have it"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: as in the source"
    )
    parser.add_argument("--workdir", help="workdir of a run of loki_jax.train, instead of SOURCE")
    parser.add_argument(
        "--no-ema", action="store_true", help="the last parameters instead of their moving average"
    )
    args = parser.parse_args(argv)
    if (args.source is None) == (args.workdir is None):
        parser.error("give either SOURCE or --workdir")
    is_file = args.workdir is not None or args.to in ("ldm", "loki")
    if is_file and args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out}: the only file format written is .safetensors")
    if args.workdir is not None and args.to is not None:
        parser.error(f"--to {args.to}: give the workdir as SOURCE")
    if args.text_encoder is not None and args.null_prompt is not None:
        parser.error("--text-encoder and --null-prompt exclude each other")
    return args


def _export_run(args: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(args.workdir, use_ema=not args.no_ema)
    save_model_file(args.out, checkpoint)
    print(f"{args.out}: step {checkpoint.step}, {args.out.stat().st_size / 1e6:.1f} MB")


def convert(args: argparse.Namespace) -> None:
    """Convert `args.source` to `args.out`.

    Raises:
      WeightsError: anything is missing, left over, damaged or unsafe; nothing is written then.
    """
    # ------------------------------------------------------------------------------------- read
    opened = open_source(args.source, args.config, use_ema=not args.no_ema)
    target = args.to or ("workdir" if opened.layout.name == "loki" else "orbax")
    if target in ("orbax", "workdir") and args.dtype not in (None, "float32"):
        raise WeightsError(f"--dtype {args.dtype}: parameters that a run starts from are float32.")
    print(f"{args.source}: layout {opened.layout.name}, {len(opened.tensors.infos)} tensors")
    if opened.note:
        print(f"note: {opened.note}")

    # -------------------------------------------------------------------------------- accounts
    network = opened.network
    if args.source.is_dir() and opened.layout.name in ("diffusers", "flax"):
        check_settings(args.source, network)
    key_match = match_keys(
        opened.tensors.infos, opened.layout.table, network.shapes, opened.layout.drops, str(args.source)
    )
    params = to_ours(opened.tensors, opened.layout.table, key_match.used, network.shapes)
    destination = layouts.make_layout(target, network)
    prompt = None
    if "null_prompt" in destination.table:
        params, prompt = with_null_prompt(params, args, network.shapes["null_prompt"])
    key_match = _settle_target(key_match, params, destination, network, new_prompt=prompt is not None)
    files = hash_files(opened.tensors.files, args.sha256)

    # ------------------------------------------------------------------------------------ write
    dtypes = Counter(opened.tensors.infos[name].dtype for name in key_match.used.values())
    record = {
        "format": "loki_jax-conversion-1",
        "source": {"layout": opened.layout.name, "files": files, "dtypes": dict(dtypes)},
        "null_prompt": prompt,
        "used": len(key_match.used),
        "dropped": _by_reason(key_match.dropped),
        "new": _by_reason(key_match.new),
    }
    dtype = "float32" if target in ("orbax", "workdir") else args.dtype
    if dtype is not None:
        params = cast(params, dtype)
    if args.out.exists():
        raise WeightsError(f"{args.out}: exists already. Choose another --out, or remove it.")
    for stale in stale_siblings(args.out):
        remove(stale)
    with atomic_path(args.out) as partial:
        if target == "orbax":
            write_orbax(partial, params)
        elif target == "workdir":
            _write_workdir(partial, params, opened.config, args)
        elif target in ("ldm", "loki"):
            metadata = {"format": "pt", "conversion": json.dumps(record)}
            write_safetensors(partial, to_theirs(params, destination.table), metadata)
        else:
            _write_diffusers(partial, to_theirs(params, destination.table), network, flax=target == "flax")
        if partial.is_dir():
            (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    _report(record, args.out, target)


# ------------------------------------------------------------------------------------------- source


def open_source(path: Path, config: str | None, use_ema: bool = True) -> Opened:
    """Find out what `path` holds and open it.

    Args:
      config: the --config option; without it, a workdir's own config or SD 2.1's sizes decide.

    Raises:
      WeightsError: there is nothing that this program reads.
    """
    given = None if config is None else layouts.load_config(config)
    sd21 = ConfigDict({"model": layouts.sd21_config().to_dict()})
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        own = config_from_json((path / "config.json").read_text()) if given is None else given
        network = layouts.make_network(own.model, _encoder_channels(own))
        return Opened(_open_workdir(path, use_ema), layouts.make_layout("workdir", network), own, network)
    expected = given if given is not None else sd21
    network = layouts.make_network(expected.model, _encoder_channels(expected))
    if (path / "_METADATA").is_file():
        return Opened(sources.open_orbax(path), layouts.make_layout("orbax", network), expected, network)
    if (path / "unet").is_dir():
        flax = sources.has_flax_files(path)
        tensors = sources.open_diffusers(path, flax)
        if not flax:
            tensors = sources.renamed(tensors, current_name)
        layout = layouts.make_layout("flax" if flax else "diffusers", network)
        return Opened(tensors, layout, expected, network, _prediction_note(path))
    if path.is_dir():
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise WeightsError(
            f"{path}: neither a diffusers folder (unet/, vae/) nor a folder of this program (_METADATA) "
            f"nor a workdir (config.json, checkpoints/); it holds {held}."
        )
    tensors = sources.open_file(path)
    wrapped = any(name.startswith("model.model.diffusion_model.") for name in tensors.infos)
    outer = "model." if wrapped else ""
    is_loki = any(
        name.startswith((f"{outer}ref_extractor.", f"{outer}model.diffusion_model.cond_encoder."))
        for name in tensors.infos
    )
    if not is_loki and not any(name.startswith("model.diffusion_model.") for name in tensors.infos):
        raise WeightsError(
            f"{path}: neither an original Stable Diffusion checkpoint nor one of Loki; its first tensors "
            f"are {', '.join(list(tensors.infos)[:3]) or 'none'}. For a diffusers model give the folder that "
            "holds unet/ and vae/."
        )
    layout = layouts.make_layout("loki" if is_loki else "ldm", network, wrapped)
    return Opened(tensors, layout, expected, network)


def check_settings(folder: Path, network: layouts.Network) -> None:
    """Compare a diffusers folder's own settings, as far as shapes do not show them, with the network's.

    Raises:
      WeightsError: the weights belong to another network of the same shapes.
    """
    for part, ours in layouts.diffusers_configs(network).items():
        path = folder / part / "config.json"
        if not path.is_file():
            continue
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise WeightsError(f"{path}: not a JSON file ({error}). Copy it again.") from error
        heads = theirs.get("attention_head_dim")
        if isinstance(heads, int):
            theirs["attention_head_dim"] = [heads] * len(ours["block_out_channels"])
        differing = [
            f"{key}: {theirs[key]} there, {ours[key]} here"
            for key in layouts.CHECKED_SETTINGS
            if key in ours and key in theirs and theirs[key] != ours[key]
        ]
        if differing:
            raise WeightsError(f"{path}: another network.\n  " + "\n  ".join(differing))


def _prediction_note(folder: Path) -> str:
    """What to know of a Stable Diffusion folder that its weights do not tell."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        kind = json.loads(path.read_text()).get("prediction_type", "epsilon")
    except (OSError, ValueError, AttributeError):
        return ""
    if kind == "epsilon":
        return ""
    return (
        f"this model predicts {kind!r} (SD 2.1 at 768 pixels does); Loki starts from SD 2.1-base, "
        "which predicts noise"
    )


def _open_workdir(path: Path, use_ema: bool) -> Tensors:
    """The newest checkpoint of a run, with its frozen parameters."""
    steps = [int(folder.name) for folder in (path / "checkpoints").iterdir() if folder.name.isdecimal()]
    if not steps:
        raise WeightsError(f"{path / 'checkpoints'}: holds no finished checkpoint.")
    newest = path / "checkpoints" / str(max(steps))
    parts = [sources.open_orbax(newest / ("ema" if use_ema and (newest / "ema").is_dir() else "params"))]
    if (path / "frozen").is_dir():
        parts.append(sources.open_orbax(path / "frozen"))
    return sources.merge(*parts)


def _encoder_channels(config: ConfigDict) -> int:
    """Channels of the driver map of a config; of the default arm's if it names none with a map."""
    return find_map_arm(config.driver.arm if "driver" in config else DEFAULT_ARM).channels


# -------------------------------------------------------------------------------------- null prompt


def with_null_prompt(
    params: Tensors, args: argparse.Namespace, shape: tuple[int, ...]
) -> tuple[Tensors, dict | None]:
    """Parameters with the null prompt added or replaced, and where it came from (None: the source's own).

    Raises:
      WeightsError: neither the source nor the options give one, or it has another shape.
    """
    encoder = args.text_encoder
    own = args.source / "text_encoder"
    if encoder is None and args.null_prompt is None and "null_prompt" not in params.infos and own.is_dir():
        encoder = own
    if encoder is not None:
        embedding, files = null_prompt_of(encoder), sorted(p for p in encoder.iterdir() if p.is_file())
    elif args.null_prompt is not None:
        embedding, files = _read_npy(args.null_prompt), [args.null_prompt]
    elif "null_prompt" in params.infos:
        return params, None
    else:
        raise WeightsError(
            f"{args.source}: has no embedding of the empty prompt {shape}. Give SD 2.1's text_encoder folder "
            "(--text-encoder DIR) or a stored embedding (--null-prompt FILE.npy)."
        )
    if embedding.shape != shape or not np.isfinite(embedding).all():
        raise WeightsError(
            f"{encoder or args.null_prompt}: null prompt of shape {embedding.shape}, expected finite numbers "
            f"of {shape}. Use the text encoder of SD 2.1."
        )
    rest = Tensors({k: v for k, v in params.infos.items() if k != "null_prompt"}, params.read, params.files)
    added = sources.from_arrays({"null_prompt": embedding.astype(np.float32)})
    return sources.merge(rest, added), {"files": hash_files(tuple(files), [])}


def null_prompt_of(text_encoder: Path) -> Float[np.ndarray, "1 77 d"]:
    """The text encoder's last hidden states for "", float32.

    Raises:
      WeightsError: transformers or torch is missing, or the folder is no CLIP text encoder.
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
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise WeightsError(f"{path}: not a .npy file of numbers ({error}).") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise WeightsError(f"{path}: not one array of floating-point numbers.")
    return array


# ----------------------------------------------------------------------------------------- accounts


def _settle_target(
    key_match: KeyMatch, params: Tensors, target: layouts.Layout, network: layouts.Network, new_prompt: bool
) -> KeyMatch:
    """The account of the whole way: what the target cannot hold is dropped, what it lacks is an error.

    Raises:
      WeightsError: the target needs parameters that the source does not have.
    """
    lacking = sorted(target.table.keys() - params.infos.keys())
    if lacking:
        named = "\n  ".join(f"{path} {network.shapes[path]}" for path in lacking[:8])
        raise WeightsError(
            f"--to {target.name}: needs {len(lacking)} parameters that the source does not have:\n  {named}\n"
            "A backbone gives orbax, diffusers, flax or ldm; a Loki checkpoint or a run also loki, workdir."
        )
    left = {path: name for path, name in key_match.used.items() if path not in target.table}
    reasons = {
        "generation": f"the generation branch has no place in layout {target.name}",
        "null_prompt": f"the null prompt has no place in layout {target.name}",
    }
    dropped = dict(key_match.dropped)
    for path, name in left.items():
        part = path.partition("/")[0]
        if part not in reasons:
            raise WeightsError(f"--to {target.name}: no place for {name} {network.shapes[path]}.")
        dropped[name] = reasons[part]
    used = {path: name for path, name in key_match.used.items() if path in target.table}
    new = layouts.new_parameters(network) if target.name == "orbax" else {}
    if new_prompt:
        new["null_prompt"] = "the text encoder's output for the empty prompt"
        if name := used.pop("null_prompt", None):
            dropped[name] = "replaced by the null prompt that was given"
    return KeyMatch(used, dropped, new)


def hash_files(files: tuple[Path, ...], expected: list[str]) -> list[dict]:
    """Name, size and SHA-256 of files.

    Raises:
      WeightsError: none of them has one of the expected digests.
    """
    found = [{"name": f.name, "bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files]
    digests = {entry["sha256"] for entry in found}
    for wanted in expected:
        if wanted.lower() not in digests:
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
        inside = [name for name in tensors.infos if name.startswith(prefix)]
        own = Tensors(
            {name.removeprefix(prefix): tensors.infos[name] for name in inside},
            lambda name, prefix=prefix: tensors.read(prefix + name),
            tensors.files,
        )
        if flax:
            config = config | {"_class_name": "Flax" + config["_class_name"]}
            write_msgpack(folder / part / "diffusion_flax_model.msgpack", own.infos, own.read)
        else:
            write_safetensors(folder / part / "diffusion_pytorch_model.safetensors", own, {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_workdir(folder: Path, params: Tensors, config: ConfigDict, args: argparse.Namespace) -> None:
    """A run that has not trained yet: `animate` reads it, `config.init_from` starts from it."""
    if args.head is None or "window" not in config:
        raise WeightsError(
            "--to workdir: needs the head asset and the whole config: --head head.npz --config FILE."
        )
    load_head(args.head)  # fails with a clear message
    trained = {"generation"} | ({"reference"} if config.model.reference.trainable else set())
    part = lambda keep: Tensors(
        {name: info for name, info in params.infos.items() if (name.partition("/")[0] in trained) == keep},
        params.read, params.files,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "checkpoints" / "0").mkdir(parents=True)
    write_orbax(folder / "checkpoints" / "0" / "params", part(True))
    write_orbax(folder / "frozen", part(False))
    (folder / "config.json").write_text(config_to_json(config))
    shutil.copyfile(args.head, folder / "head.npz")


def _report(record: dict, out: Path, target: str) -> None:
    for entry in record["source"]["files"]:
        print(f"  sha256 {entry['sha256']}  {entry['name']}")
    print(f"  {record['used']} parameters filled")
    for kind in ("dropped", "new"):
        for reason, names in record[kind].items():
            print(f"  {len(names)} {kind}: {reason}")
    print(f"{out}: layout {target}")


if __name__ == "__main__":
    main()
