"""A Stable-Diffusion-shaped network of tiny widths, and files with its weights in foreign layouts."""

import json

import numpy as np

from configs.common import base_config
from loki_jax.training.config import config_to_json
from loki_jax.weights.layouts import make_layout, make_network
from loki_jax.weights.match import state_shape


def tiny_config():
    config = base_config()
    config.model.unet.channels = 32
    config.model.unet.multipliers = (1, 2)
    config.model.unet.num_res_blocks = 1
    config.model.unet.attention_levels = (0,)
    config.model.unet.attention_modes = ("spatial", "3d")
    config.model.unet.head_channels = 16
    config.model.encoder.stem = 32
    config.model.encoder.widths = (32, 32)
    config.model.reference.context_dim = 16
    config.model.autoencoder.widths = (32, 32)
    config.model.autoencoder.num_res_blocks = 1
    return config


def tiny_network():
    return make_network(tiny_config().model)


def save_config(folder):
    """Path of a file for --config."""
    path = folder / "tiny.json"
    path.write_text(config_to_json(tiny_config()))
    return str(path)


def random_state(network, layout, seed=0, dtype=np.float32, **options):
    """Weights under the names and in the shapes of a layout, every one random."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(state_shape(network.shapes[path], how)).astype(dtype)
        for path, (name, how) in make_layout(layout, network, **options).table.items()
    }


def save_null_prompt(folder, network):
    path = folder / "null.npy"
    np.save(path, np.random.default_rng(9).standard_normal(network.shapes["null_prompt"]).astype(np.float32))
    return path


def parts_of(state):
    """A state with names "part/name" as {part: {name: array}}."""
    parts = {}
    for name, array in state.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = array
    return parts


def save_diffusers(folder, state, save, filename):
    """Write a diffusers folder with `save(dict, path)`."""
    for part, arrays in parts_of(state).items():
        (folder / part).mkdir(parents=True)
        save(arrays, folder / part / filename)
    return folder


def save_torch(arrays, path, **around):
    """A .bin, or a .ckpt with a state_dict and other entries when `around` is given."""
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    torch.save({"state_dict": tensors} | around if around else tensors, path)


def save_shards(arrays, path, save, count=3):
    """`count` shards and their index beside `path`, whose name is the index's without .index.json."""
    names = sorted(arrays)
    weight_map = {}
    for i in range(count):
        shard = f"{path.stem}-{i + 1:05d}-of-{count:05d}{path.suffix}"
        chosen = names[i::count]
        save({name: arrays[name] for name in chosen}, path.with_name(shard))
        weight_map |= dict.fromkeys(chosen, shard)
    path.with_name(path.name + ".index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
