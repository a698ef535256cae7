"""The real training program on a tiny config and a tiny synthetic dataset."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo, hdtf
from data_prep import cross_pairs
from loki_jax.data.schema import DatasetError
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, draw_params, portrait_keys_values, random_params
from loki_jax.synthetic.clips import synth_clip
from loki_jax.train import train
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.training.config import CheckpointError
from loki_jax.training.init import initial_params
from loki_jax.training.logging import read_metrics
from loki_jax.training.model_file import load_model_file, save_model_file
from tests.synthetic.synthetic_clips import write_clips
from tests.training.tiny_run import SIZE, tiny_config, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def run_config(shards, steps, sample=False):
    """As the demo is trained: with the driver maps of the driver and of the portrait.

    The switches of docs/svp.md that need no pairs are on.
    """
    return tiny_config(
        shards, steps=steps, validation__every=2, sample__every=4 if sample else 0, driver__arm="full",
        model__reference__driver=True, model__unet__attention_modes=("full",),
        history__frames=1, history__real_share=0.5, sample__fusion=(2.0, 2.5, 1.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(run_config(shards, 4, sample=True), workdir)
    return workdir


def test_resumed_run_is_bit_identical(shards, finished, tmp_path):
    train(run_config(shards, 2), tmp_path)
    train(run_config(shards, 4), tmp_path)
    for use_ema in (True, False):
        straight, resumed = (load_checkpoint(path, use_ema) for path in (finished, tmp_path))
        assert straight.step == resumed.step == 4
        jax.tree.map(np.testing.assert_array_equal, straight.params, resumed.params)
    start = initial_params(
        run_config(shards, 4), build_networks(straight.config, straight.head), straight.head
    )[0]
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), start["generation"], dict(resumed.params)["generation"]
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_metrics_are_logged(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert list((finished / "tensorboard").iterdir())


def test_workdir_of_another_config_is_refused(shards, finished):
    config = run_config(shards, 6)
    config.model.unet.channels = 32
    with pytest.raises(
        CheckpointError, match=r"another config(.|\n)*model.unet.channels: 16 -> 32(.|\n)*--workdir"
    ):
        train(config, finished)


def test_init_from_another_architecture_is_refused(shards, finished, tmp_path):
    config = run_config(shards, 1)
    config.init_from = str(finished)
    config.model.encoder.stem = 16
    with pytest.raises(CheckpointError, match="another architecture"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_pretrained_weights_stop_the_run(shards, tmp_path):
    config = run_config(shards, 1)
    config.model.reference.trainable = False
    with pytest.raises(ValueError, match="reference.driver"):
        train(config, tmp_path / "new")
    config.model.reference.driver = False
    with pytest.raises(CheckpointError, match="pretrained"):
        train(config, tmp_path / "new")
    config.pretrained = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [32])
def test_dataset_of_another_size_is_refused(shards, tmp_path, size):
    config = run_config(shards, 1)
    config.image_size = size
    with pytest.raises(DatasetError, match=f"{SIZE} pixels.*{size}"):
        train(config, tmp_path / "new")


def test_model_file_round_trip_and_damage(finished, tmp_path):
    checkpoint = load_checkpoint(finished)
    path = tmp_path / "model.safetensors"
    save_model_file(path, checkpoint)
    back = load_model_file(path)
    assert back.config.to_dict() == checkpoint.config.to_dict() and back.step == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-30),
        dict(back.params),
        dict(checkpoint.params),
    )
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_model_file(path)
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(tmp_path)


def test_a_model_file_must_be_whole_and_of_its_config(finished, tmp_path):
    """Refused where it is loaded, not where it is used."""
    checkpoint = load_checkpoint(finished)
    path = tmp_path / "model.safetensors"
    changes = {
        "model.unet.channels": (32, "weights of another architecture"),
        "model.unet.num_res_blocks": (10**9, "more layers than the file has arrays"),
        "model.encoder": ("x", "its config describes no model"),
        "driver.arm": ("none", "unknown driver arm"),
        "sample.spacing": ("odd", "unknown spacing"),
        "sample.solver": ("odd", "unknown solver"),
        "diffusion.prediction": ("odd", "unknown prediction"),
        "window": (0, "window, image_size or sample.guidance"),
    }
    for key, (value, message) in changes.items():
        config = checkpoint.config.copy_and_resolve_references()
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
        save_model_file(path, checkpoint._replace(config=config))
        with pytest.raises(CheckpointError, match=f"model.safetensors: (.|\n)*{message}"):
            load_checkpoint(path)
    config = checkpoint.config.copy_and_resolve_references()
    del config.sample
    save_model_file(path, checkpoint._replace(config=config))
    with pytest.raises(CheckpointError, match="model.safetensors: damaged.*it has no sample"):
        load_checkpoint(path)

    spoilt = jax.tree.map(lambda x: np.full_like(x, np.nan) if x.ndim == 1 else x, dict(checkpoint.params))
    save_model_file(path, checkpoint._replace(params=spoilt))
    with pytest.raises(CheckpointError, match="model.safetensors: .* arrays hold NaN or infinity"):
        load_checkpoint(path)


@pytest.mark.slow
def test_frozen_reference_comes_from_pretrained_weights_and_stays(shards, tmp_path):
    import orbax.checkpoint as ocp

    config = run_config(shards, 2)
    config.model.reference.trainable = False
    config.model.reference.driver = False
    config.model.reference.context_dim = 8
    config.pretrained = str(tmp_path / "sd")
    config.validation.every = 0
    head = builtin_head()
    params = draw_params(build_networks(config, head), jax.random.key(7))
    backbone = {key: params[key] for key in ("reference", "autoencoder", "null_prompt")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "sd", backbone)
    train(config, tmp_path / "run")
    trained = load_checkpoint(tmp_path / "run", use_ema=False).params
    jax.tree.map(
        np.testing.assert_array_equal, trained["reference"], jax.tree.map(np.asarray, backbone["reference"])
    )
    # The generation branch started from the same backbone and moved.
    start, now = (
        backbone["reference"]["conv_in"]["kernel"],
        trained["generation"]["unet"]["conv_in"]["kernel"],
    )
    assert 0 < float(np.abs(now - start).max()) < 0.1
    # Going on needs the workdir alone.
    shutil.rmtree(tmp_path / "sd")
    config.steps = 3
    train(config, tmp_path / "run")
    resumed = load_checkpoint(tmp_path / "run", use_ema=False)
    assert resumed.step == 3
    jax.tree.map(np.testing.assert_array_equal, trained["reference"], resumed.params["reference"])
    shutil.rmtree(tmp_path / "run" / "frozen")
    config.steps = 4
    with pytest.raises(CheckpointError, match=r"frozen: missing.*init_from"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("with_driver", [True, False])
def test_portraits_driver_map_reaches_the_features_where_the_config_says_so(with_driver):
    config = demo.get_config("tiny")
    config.model.reference.driver = with_driver
    head = jax.tree.map(jnp.asarray, builtin_head())
    networks = build_networks(config, head)
    shapes = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    clip = synth_clip(builtin_head(), 1, 1, 2, config.image_size)
    pose = lambda i: jax.tree.map(lambda x: jnp.asarray(x[i : i + 1]), clip.coefficients)
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], (clip.frames[0], clip.camera, clip.crop))
    seen = jax.jit(lambda own: portrait_keys_values(config, networks, params, head, one[0], own, *one[1:]))
    first, second = (jax.device_get(jax.tree.leaves(seen(pose(i)))) for i in (0, 1))
    changed = [np.abs(a - b).max() > 1e-3 for a, b in zip(first, second, strict=True)]
    assert all(changed) if with_driver else not any(changed)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["no_posenc", "no_deform"])
def test_ablation_arms_train(shards, tmp_path, arm):
    config = run_config(shards, 1)
    config.driver.arm = arm
    config.validation.every = 0
    assert np.isfinite(train(config, tmp_path))


@pytest.mark.slow
def test_a_run_on_pairs_resumes_bit_identical(tmp_path):
    """Somebody else's pixels drive; history, full attention and nested guidance are on."""
    write_clips(tmp_path / "shards", frames=4, size=SIZE)
    arguments = ["--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "pairs")]
    assert cross_pairs.main(arguments) == 0

    def run(workdir, steps):
        config = run_config(tmp_path / "pairs", steps)
        config.driver.arm, config.data.cross_share, config.history.real_share = "regions", 1.0, 1.0
        return train(config, workdir)

    assert np.isfinite(run(tmp_path / "straight", 3))
    run(tmp_path / "resumed", 1)
    run(tmp_path / "resumed", 3)
    straight, resumed = (load_checkpoint(tmp_path / name).params for name in ("straight", "resumed"))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_full_size_parameters_are_split_as_in_the_paper():
    config = hdtf.get_config()
    networks = build_networks(config, builtin_head())
    shapes = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(shapes["generation"]) == 822_878_788
    assert count(shapes["generation"]["encoder"]) == 7_345_344
    assert count(shapes["reference"]) == 865_910_724
    assert count(shapes["autoencoder"]) == 83_653_863
