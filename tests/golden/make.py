"""Cut the vectors that the tests need out of the complete set: python tests/golden/make.py FOLDER.

FOLDER holds the complete set (50 MB); README.md says where it comes from. Nothing is recomputed here: an
array is kept as it is, thinned out, or left out because no test reads it or because its seed rebuilds it.
"""

import hashlib
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# File -> arrays that are left out.
LEFT_OUT = {
    "attention": ["*/state/*", "*/x", "*/ref_kv", "*/cotangent", "*/block_*", "*/attn1_out_ref"],
    "conditioning_encoder": ["state/*", "input", "cotangent", "inter/*"],
    "ddim_cfg": [],
    "driver_map_64_inputs": [],
    "driver_map_64_fragments": ["pos_enc_input_unmasked"],
    "driver_map_64_posenc42": [],
    "driver_map_128_inputs": [],
    "driver_map_128_fragments": ["pos_enc_input_unmasked"],
    "driver_map_128_posenc42": [],
    "flame_io": [],
    "flame_model": [],
    "metrics": ["*/deform_swapped"],
    "noise_schedule": [],
    "projection_crop": ["*_norm_m1_1_rescale64"],
    "raster_conventions": [],
    "unet_tiny_io": [
        *("x", "ref_z", "null_context", "eps", "eps_*", "inter/*", "inter_*", "unreliable_torch_f32/*"),
        "f64ref/middle_block",
    ],
    "unet_tiny_ref_features": [],
    "vae_tiny": ["state/*", "image", "moments", "z", "inter/*"],
}
# Array -> what is kept of it.
THINNED = {
    "spatial_cond_0_42": np.s_[:, :, ::4, ::4],  # of (B, T, H, W, 42)
    "crop/*_rescale128_f32": np.s_[::2, ::2],  # of (128, 128, 3)
}
# The identity and expression axes of the synthetic FLAME model that no test gives a weight.
UNUSED_SHAPEDIRS = np.r_[150:300, 365:400]
# Network -> files with its weights, their names there, prefix of the names in the recipe, and seed.
NETWORKS = {
    "generation": ("unet_tiny_gen_params_*", "", "gen/", 20240),
    "reference": ("unet_tiny_ref_params_*", "", "ref/", 20240),
    "autoencoder": ("vae_tiny", "state/", "vae/", 4242),
    "encoder": ("conditioning_encoder", "state/", "", 1234),
    "attention_none": ("attention", "none/state/", "none/", 77),
    "attention_3d": ("attention", "3d/state/", "3d/", 77),
    "attention_temporal": ("attention", "temporal/state/", "temporal/", 77),
}
KEYS = [
    "attention_block_order",
    "loki_unet_keys",
    "param_counts",
    "ref_unet_keys",
    "sd21_ldm_checkpoint_keys",
]
KEYS += ["vae_keys"]


def thinned(name: str, array: np.ndarray) -> np.ndarray:
    for pattern, kept in THINNED.items():
        if fnmatchcase(name, pattern):
            return array[kept]
    if name == "model/shapedirs":
        array = array.copy()
        array[..., UNUSED_SHAPEDIRS] = 0
    return array


def kept_arrays(folder: Path, file: str) -> dict[str, np.ndarray]:
    """The arrays of one file of the complete set that tests/golden holds."""
    with np.load(folder / f"{file}.npz") as data:
        names = [n for n in data.files if not any(fnmatchcase(n, pattern) for pattern in LEFT_OUT[file])]
        return {name: thinned(name, data[name]) for name in names}


def state_of(folder: Path, network: str) -> dict[str, np.ndarray]:
    """State dict of one network of the complete set."""
    pattern, inside, _, _ = NETWORKS[network]
    state = {}
    for path in sorted(folder.glob(f"{pattern}.npz")):
        with np.load(path) as data:
            names = [n for n in data.files if n.startswith(inside) and n != "meta_json"]
            state |= {name.removeprefix(inside): data[name] for name in names}
    return state


def digest(state: dict[str, np.ndarray]) -> str:
    """SHA-256 over names and float32 values, in the names' order."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + b"\0" + np.ascontiguousarray(state[name], "<f4").tobytes())
    return found.hexdigest()


def write_json(path: Path, content: dict | list) -> None:
    """One name and its shape on a line."""
    text = json.dumps(content, separators=(",", ":"))
    path.write_text(text.replace('],"', '],\n"').replace("},{", "},\n{") + "\n")


def main(folder: Path) -> None:
    for file in LEFT_OUT:
        np.savez_compressed(HERE / f"{file}.npz", **kept_arrays(folder, file))
    (HERE / "keys").mkdir(exist_ok=True)
    for name in KEYS:
        write_json(HERE / f"keys/{name}.json", json.loads((folder / f"keys/{name}.json").read_text()))
    recipes = {}
    for network, (_, _, prefix, seed) in NETWORKS.items():
        state = state_of(folder, network)
        shapes = {name: array.shape for name, array in state.items()}
        recipes[network] = {"seed": seed, "prefix": prefix, "sha256": digest(state), "shapes": shapes}
    (HERE / "weights.json").write_text(
        json.dumps(recipes, separators=(",", ":")).replace('],"', '],\n"') + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
