"""Against the real libraries: files that diffusers and transformers wrote, and files that they read."""

import json
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax import convert
from loki_jax.models.loki import make_loki
from loki_jax.weights import sources
from loki_jax.weights.conversion import RECORD
from loki_jax.weights.layouts import diffusers_configs, make_network
from tests.models.weights import error, quick_jit
from tests.weights.tiny import save_config, save_null_prompt, tiny_config

# Slow, because importing diffusers alone takes longer than most test files.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers (the convert extra)"),
]

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def network():
    # Outputs are compared in float32; configs compute in bfloat16 by default.
    config = tiny_config().model
    config.dtype = "float32"
    return make_network(config)


def randomised(module):
    """Every parameter random: zero-initialised layers would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 1 / np.sqrt(max(parameter[0].numel(), 1)) if parameter.ndim > 1 else 0.1)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
    return module.eval()


@pytest.fixture(scope="module")
def diffusers_folder(network, tmp_path_factory):
    """A folder as `save_pretrained` writes it, and the models in it."""
    import diffusers

    folder = tmp_path_factory.mktemp("sd")
    configs = {
        part: {key: value for key, value in config.items() if not key.startswith("_")}
        for part, config in diffusers_configs(network).items()
    }
    unet = randomised(diffusers.UNet2DConditionModel(**configs["unet"]))
    vae = randomised(diffusers.AutoencoderKL(**configs["vae"]))
    unet.save_pretrained(folder / "unet", max_shard_size="2MB")
    vae.save_pretrained(folder / "vae")
    return folder, unet, vae


def converted(folder, tmp_path, network):
    assert convert.main([
        str(folder), "--out", str(tmp_path / "ours"), "--config", save_config(tmp_path),
        "--null-prompt", str(save_null_prompt(tmp_path, network)),
    ]) == 0  # fmt: skip
    tensors = sources.open_orbax(tmp_path / "ours")
    tree = {}
    for name in tensors.infos:
        *parents, leaf = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = jnp.asarray(tensors.read(name))
    return tree


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def test_unet_and_vae_compute_what_diffusers_does(diffusers_folder, tmp_path, network):
    folder, unet, vae = diffusers_folder
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    params = converted(folder, tmp_path, network)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((2, 77, 16)).astype(np.float32)
    timesteps = np.array([3, 700])
    reference = make_loki(network.config).reference
    out, _ = quick_jit(
        lambda p: reference.apply({"params": p}, x[:, None], timesteps[:, None], context=context)
    )(params["reference"])
    with torch.no_grad():
        expected = unet(nchw(x), torch.from_numpy(timesteps), torch.from_numpy(context)).sample
    assert error(out[:, 0], nhwc(expected)) < 1e-4

    image = rng.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    autoencoder, scale = network.autoencoder, network.autoencoder.scale
    apply = lambda method: quick_jit(lambda p, x: autoencoder.apply({"params": p}, x, method=method))
    mean, _ = apply("encode")(params["autoencoder"], image)
    decoded = apply("decode")(params["autoencoder"], mean)
    with torch.no_grad():
        latents = vae.encode(nchw(image)).latent_dist.mean
        expected = vae.decode(latents).sample
    assert error(mean / scale, nhwc(latents)) < 1e-4
    assert error(decoded, nhwc(expected)) < 1e-4


def test_diffusers_reads_what_we_write(diffusers_folder, tmp_path, network):
    """PyTorch: the same bits. Flax: the same prediction but for its tanh GELU and larger eps."""
    import diffusers

    folder, unet, _ = diffusers_folder
    config = save_config(tmp_path)
    assert (
        convert.main([str(folder), "--out", str(tmp_path / "torch"), "--to", "diffusers", "--config", config])
        == 0
    )
    assert (
        convert.main([str(folder), "--out", str(tmp_path / "flax"), "--to", "flax", "--config", config]) == 0
    )
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "torch" / "unet")
    for name, value in unet.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.config.attention_head_dim == unet.config.attention_head_dim

    flax_unet, params = diffusers.FlaxUNet2DConditionModel.from_pretrained(str(tmp_path / "flax" / "unet"))
    diffusers.FlaxAutoencoderKL.from_pretrained(str(tmp_path / "flax" / "vae"))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    context = rng.standard_normal((1, 77, 16)).astype(np.float32)
    out = flax_unet.apply({"params": params}, x, jnp.array([50]), context).sample
    with torch.no_grad():
        expected = unet(torch.from_numpy(x), 50, torch.from_numpy(context)).sample
    assert error(out, expected.numpy()) < 2e-2


def test_null_prompt_of_a_text_encoder(diffusers_folder, tmp_path, network):
    """The empty prompt as SD 2's tokenizer spells it: start, end, then the padding token 0."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="gelu",
    )  # fmt: skip
    model = randomised(transformers.CLIPTextModel(config))
    model.save_pretrained(tmp_path / "text_encoder")
    assert convert.main([
        str(diffusers_folder[0]), "--out", str(tmp_path / "ours"), "--config", save_config(tmp_path),
        "--text-encoder", str(tmp_path / "text_encoder"),
    ]) == 0  # fmt: skip
    stored = sources.open_orbax(tmp_path / "ours").read("null_prompt")
    tokens = torch.zeros((1, 77), dtype=torch.long)
    tokens[0, :2] = torch.tensor([49406, 49407])
    with torch.no_grad():
        expected = model(tokens).last_hidden_state.numpy()
    np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(stored) > 0.1
    record = json.loads((tmp_path / "ours" / RECORD).read_text())
    assert any(entry["name"] == "model.safetensors" for entry in record["null_prompt"]["files"])
