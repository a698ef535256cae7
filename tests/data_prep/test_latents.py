"""Latents in the records: the encoder of converted weights, with all parameters random."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_prep import build
from data_prep.dataset.latents import encode_clip, load_encoder
from loki_jax.data.schema import DatasetError
from loki_jax.models.autoencoder import make_autoencoder
from loki_jax.weights.sources import from_arrays
from loki_jax.weights.write import write_orbax
from tests.weights.tiny import save_config, tiny_config, tiny_network

SIZE = 16


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(folder as `loki_jax.convert` writes it, config file, parameters of the autoencoder)."""
    folder = tmp_path_factory.mktemp("vae")
    rng = np.random.default_rng(4)
    shapes = tiny_network().shapes
    arrays = {
        name: (rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[:-1])))).astype(np.float32)
        for name, shape in shapes.items()
        if name.startswith("autoencoder/")
    }
    write_orbax(folder / "sd", from_arrays(arrays))
    params = {}
    for name, array in arrays.items():
        branch = params
        *parents, leaf = name.split("/")[1:]
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = jnp.asarray(array)
    return folder / "sd", save_config(folder), params


def encoded(pictures):
    result = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        result.append(buffer.getvalue())
    return result


def test_moments_are_those_of_the_vae_without_its_scale(converted):
    folder, config, params = converted
    encoder = load_encoder(folder, SIZE, config=config, batch=4)
    pictures = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), np.uint8)
    mean, logvar = encode_clip(encoder, encoded(pictures), chunk=5)  # batches and chunks do not divide 7
    model = make_autoencoder(tiny_config().model)
    apply = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))
    expected_mean, expected_logvar = apply(pictures / np.float32(127.5) - 1)
    assert mean.dtype == logvar.dtype == jnp.bfloat16 and mean.shape == (7, SIZE // 2, SIZE // 2, 4)
    # What training computes from the records again (`training/step.py`).
    again = mean.astype(np.float32) * model.scale
    np.testing.assert_allclose(again, expected_mean, rtol=0.01, atol=1e-3)
    again = logvar.astype(np.float32) + 2 * np.log(model.scale)
    np.testing.assert_allclose(again, expected_logvar, rtol=0.01, atol=0.02)
    assert float(np.abs(expected_mean).max()) > 0.1  # the comparison means something
    other = load_encoder(folder, SIZE, config=config)
    assert other.sha256 == encoder.sha256 and len(encoder.sha256) == 64


def test_wrong_weights_are_refused(converted, tmp_path):
    folder, config, _ = converted
    with pytest.raises(DatasetError, match="--size 17 is no multiple of the VAE's stride of 2"):
        load_encoder(folder, 17, config=config)
    with pytest.raises(DatasetError, match=r"autoencoder/.* it holds shape .*--latents-config"):
        load_encoder(folder, SIZE)  # Stable Diffusion's sizes
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="`--latents` takes a folder of `python -m loki_jax.convert`"):
        load_encoder(tmp_path / "empty", SIZE, config=config)


def test_program_asks_for_what_belongs_together(tmp_path, capsys):
    common = ["--clips", str(tmp_path), "--head", "builtin", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        build.main([*common, "--no-images"])
    assert "--no-images needs --latents" in capsys.readouterr().err
