"""The convert program: round trips between all layouts, and what it refuses."""

import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from loki_jax import convert
from loki_jax.face.asset import save_head
from loki_jax.face.builtin import builtin_head
from loki_jax.weights import layouts, sources
from loki_jax.weights.conversion import RECORD
from loki_jax.weights.layouts import diffusers_configs
from loki_jax.weights.tensors import WeightsError
from loki_jax.weights.write import write_flax
from tests.weights.tiny import (
    parts_of,
    random_state,
    save_config,
    save_diffusers,
    save_null_prompt,
    save_shards,
    save_torch,
    tiny_config,
    tiny_network,
)

SAFETENSORS = "diffusion_pytorch_model.safetensors"


_KNOWN: dict = {}


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Tracing the networks for their shapes takes most of a tiny conversion; it is done once."""
    original = layouts.make_network

    def make_network(config, channels=45):
        key = f"{config} {channels}"
        if key not in _KNOWN:
            _KNOWN[key] = original(config, channels)
        return _KNOWN[key]

    monkeypatch.setattr(layouts, "make_network", make_network)


@pytest.fixture
def options(tmp_path, network):
    return {"config": save_config(tmp_path), "null_prompt": str(save_null_prompt(tmp_path, network))}


def run(source, out, expected=0, **options):
    """The program, which returns `expected`."""
    arguments = [str(source), "--out", str(out)]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    assert convert.main(arguments) == expected


def error_of(capsys, source, out, **options):
    """The program's one message; nothing may be left behind."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    run(source, out, expected=1, **options)
    assert sorted(out.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


def read_diffusers(folder):
    return {
        f"{part}/{name}": array
        for part in ("unet", "vae") for name, array in load_file(folder / part / SAFETENSORS).items()
    }  # fmt: skip


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]


# --------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin", "flax"])
def test_diffusers_to_orbax_and_back(tmp_path, network, options, kind):
    """Whatever kind of file: the same Orbax folder, and the bits that went in."""
    state = random_state(network, "flax" if kind == "flax" else "diffusers")
    save = save_torch if kind.endswith("bin") else save_file
    filename = "diffusion_pytorch_model.bin" if kind.endswith("bin") else SAFETENSORS
    if kind == "flax":
        write = lambda arrays, path: write_flax(path, sources.from_arrays(arrays))
        save_diffusers(tmp_path / "sd", state, write, "diffusion_flax_model.msgpack")
    elif kind.startswith("sharded"):
        save_diffusers(tmp_path / "sd", state, lambda arrays, path: save_shards(arrays, path, save), filename)
    else:
        save_diffusers(tmp_path / "sd", state, save, filename)
    run(tmp_path / "sd", tmp_path / "ours", **options)
    target = "flax" if kind == "flax" else "diffusers"
    run(tmp_path / "ours", tmp_path / "back", to=target, config=options["config"])
    if kind == "flax":
        back, is_flax = sources.open_diffusers(tmp_path / "back")
        assert is_flax
        assert_same_bits({name: back.read(name) for name in back.infos}, state)
    else:
        assert_same_bits(read_diffusers(tmp_path / "back"), state)

    # What training reads.
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((tmp_path / "ours").absolute())
    assert set(tree) == {"reference", "autoencoder", "null_prompt"}
    flat = dict(leaves(tree))
    assert {name: array.shape for name, array in flat.items()} == {
        name: shape for name, shape in network.shapes.items() if not name.startswith("generation/")
    }
    assert all(array.dtype == np.float32 for array in flat.values())
    np.testing.assert_array_equal(flat["null_prompt"], np.load(options["null_prompt"]))


@pytest.mark.parametrize("filename", ["sd.safetensors", "sd.ckpt"])
def test_ldm_through_all_layouts_and_back(tmp_path, network, options, filename):
    """LDM -> diffusers -> Flax -> Orbax -> LDM, bit for bit."""
    state = random_state(network, "ldm")
    others = {"cond_stage_model.weight": np.ones(3, np.float32), "betas": np.ones(5, np.float32)}
    if filename.endswith(".ckpt"):
        save_torch(state | others, tmp_path / filename, global_step=1)
    else:
        save_file(state | others, tmp_path / filename)
    config = options["config"]
    run(tmp_path / filename, tmp_path / "a", to="diffusers", config=config)
    run(tmp_path / "a", tmp_path / "b", to="flax", config=config)
    run(tmp_path / "b", tmp_path / "c", **options)
    run(tmp_path / "c", tmp_path / "back.safetensors", to="ldm", config=config)
    assert_same_bits(load_file(tmp_path / "back.safetensors"), state)

    # Diffusers stores the very numbers of the original code, under other names and never transposed.
    diffusers = read_diffusers(tmp_path / "a")
    for theirs, original in {
        "unet/time_embedding.linear_1.weight": "model.diffusion_model.time_embed.0.weight",
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight":
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "unet/up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0.weight":
            "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_out.0.weight",
        "unet/mid_block.resnets.1.conv2.weight": "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "unet/up_blocks.0.upsamplers.0.conv.weight": "model.diffusion_model.output_blocks.1.1.conv.weight",
        "vae/decoder.up_blocks.0.resnets.1.conv1.weight":
            "first_stage_model.decoder.up.1.block.1.conv1.weight",
        "vae/encoder.mid_block.attentions.0.to_k.weight": "first_stage_model.encoder.mid.attn_1.k.weight",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(
            diffusers[theirs], state[original].reshape(diffusers[theirs].shape), err_msg=theirs
        )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_round_trip(tmp_path, network, options, dtype):
    """Halves become float32 for training and come back unchanged."""
    state = random_state(network, "diffusers", dtype=dtype)
    save_diffusers(tmp_path / "sd", state, save_file, SAFETENSORS)
    run(tmp_path / "sd", tmp_path / "ours", **options)
    run(
        tmp_path / "ours",
        tmp_path / "back",
        to="diffusers",
        config=options["config"],
        dtype=np.dtype(dtype).name,
    )
    assert_same_bits(read_diffusers(tmp_path / "back"), state)


def test_old_vae_names(tmp_path, network, options):
    state = random_state(network, "diffusers")
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(name):
        for new, before in renames.items():
            name = name.replace(new, before) if name.startswith("vae/") else name
        return name

    save_diffusers(
        tmp_path / "sd", {old(name): array for name, array in state.items()}, save_file, SAFETENSORS
    )
    run(tmp_path / "sd", tmp_path / "new", to="diffusers", config=options["config"])
    assert_same_bits(read_diffusers(tmp_path / "new"), state)


@pytest.mark.parametrize("wrapped", [False, True])
def test_loki_checkpoint_to_a_run_and_back(tmp_path, network, options, wrapped):
    from loki_jax.training.checkpoint import load_checkpoint

    state = random_state(network, "loki", wrapped=wrapped)
    outer = "model." if wrapped else ""
    legacy = {
        f"{outer}model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": np.ones(
            (32, 16), np.float32
        ),
        f"{outer}model.audio_encoder.weight": np.ones(3, np.float32),
    }
    save_torch(state | legacy, tmp_path / "loki.ckpt", epoch=3, optimizer_states=[])
    save_head(tmp_path / "head.npz", builtin_head())
    run(tmp_path / "loki.ckpt", tmp_path / "run", head=tmp_path / "head.npz", **options)
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert sorted(name for names in record["dropped"].values() for name in names) == sorted(legacy)

    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.config.model.unet.channels == 32 and checkpoint.head.name == builtin_head().name
    assert {name: array.shape for name, array in leaves(checkpoint.params)} == network.shapes
    run(tmp_path / "run", tmp_path / "back.safetensors", to="loki")
    plain = {name.removeprefix(outer): array for name, array in state.items()}
    assert_same_bits(load_file(tmp_path / "back.safetensors"), plain)
    # A run's frozen backbone alone.
    run(tmp_path / "run", tmp_path / "sd", to="diffusers")
    assert read_diffusers(tmp_path / "sd").keys() == random_state(network, "diffusers").keys()


# ------------------------------------------------------------------------------------------- record


def test_record_and_digest(tmp_path, network, options, capsys):
    import hashlib

    state = random_state(network, "ldm")
    others = {"cond_stage_model.a": np.ones(2, np.float32), "logvar": np.ones(2, np.float32)}
    save_file(state | others, tmp_path / "sd.safetensors")
    digest = hashlib.sha256((tmp_path / "sd.safetensors").read_bytes()).hexdigest()
    run(tmp_path / "sd.safetensors", tmp_path / "ours", sha256=digest.upper(), **options)
    printed = capsys.readouterr().out
    assert digest in printed and "1 dropped: text encoder" in printed
    record = json.loads((tmp_path / "ours" / RECORD).read_text())
    assert record["source"]["files"] == [
        {"name": "sd.safetensors", "bytes": (tmp_path / "sd.safetensors").stat().st_size, "sha256": digest}
    ]
    assert record["used"] == len(state)
    assert sorted(name for names in record["dropped"].values() for name in names) == sorted(others)
    new = [name for names in record["new"].values() for name in names]
    assert "null_prompt" in new and "generation/encoder/stem/kernel" in new
    assert not any(name.startswith("generation/unet/") for name in new)
    assert record["null_prompt"]["files"][0]["name"] == "null.npy"

    wrong = "0" * 64
    message = error_of(capsys, tmp_path / "sd.safetensors", tmp_path / "again", sha256=wrong, **options)
    assert wrong in message and digest in message

    run(tmp_path / "ours", tmp_path / "out.safetensors", to="ldm", config=options["config"])
    from safetensors import safe_open

    with safe_open(tmp_path / "out.safetensors", "np") as file:
        exported = json.loads(file.metadata()["conversion"])
    assert exported["dropped"] == {"the null prompt has no place in layout ldm": ["null_prompt"]}


# ------------------------------------------------------------------------------------ refused weights


@pytest.fixture
def diffusers_folder(tmp_path, network):
    return save_diffusers(tmp_path / "sd", random_state(network, "diffusers"), save_file, SAFETENSORS)


def change_unet(folder, change):
    path = folder / "unet" / SAFETENSORS
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_missing_extra_misshapen_and_mistyped_tensors_are_all_named(
    tmp_path, diffusers_folder, options, capsys
):
    def change(state):
        del state["conv_in.bias"]
        state["lora.weight"] = np.ones((3, 4), np.float32)
        state["conv_out.bias"] = np.ones(5, np.float32)
        state["conv_norm_out.bias"] = np.ones(32, np.float64)
        state["conv_norm_out.weight"] = np.ones(32, np.int32)

    change_unet(diffusers_folder, change)
    message = error_of(capsys, diffusers_folder, tmp_path / "ours", **options)
    assert "1 tensors missing:\n  unet/conv_in.bias (32)" in message
    assert "1 tensors of another shape:\n  unet/conv_out.bias: (5,) there, (4,) in this network" in message
    assert (
        "2 tensors of another dtype:\n  unet/conv_norm_out.bias: float64 (32), expected one of float32"
        in message
    )
    assert "unet/conv_norm_out.weight: int32 (32)" in message
    assert "1 tensors that nothing asks for and no rule drops:\n  unet/lora.weight: float32 (3, 4)" in message
    assert str(diffusers_folder) in message


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "dtype"])
@pytest.mark.parametrize(
    "layout, filename", [("ldm", "a.ckpt"), ("loki", "a.ckpt"), ("ldm", "a.safetensors")]
)
def test_each_defect_alone_stops_each_layout(tmp_path, network, options, capsys, kind, layout, filename):
    state = random_state(network, layout)
    name = next(name for name in state if name.endswith("conv_out.bias"))
    if kind == "missing":
        del state[name]
    elif kind == "extra":
        name = "first_stage_model.encoder.surplus"
        state[name] = np.ones(2, np.float32)
    elif kind == "shape":
        state[name] = np.ones(9, np.float32)
    else:
        state[name] = state[name].astype(np.float64)
    if filename.endswith(".ckpt"):
        save_torch(state, tmp_path / filename, epoch=1)
    else:
        save_file(state, tmp_path / filename)
    message = error_of(capsys, tmp_path / filename, tmp_path / "ours", **options)
    assert name in message and message.count("tensors ") == 1


def test_truncated_file(tmp_path, diffusers_folder, options, capsys):
    path = diffusers_folder / "vae" / SAFETENSORS
    path.write_bytes(path.read_bytes()[:-100])
    message = error_of(capsys, diffusers_folder, tmp_path / "ours", **options)
    assert str(path) in message and "cut short" in message


def test_pickle_with_code(tmp_path, network, options, capsys):
    class Code:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    save_torch(random_state(network, "ldm"), tmp_path / "sd.ckpt", callbacks=Code())
    message = error_of(capsys, tmp_path / "sd.ckpt", tmp_path / "ours", **options)
    assert "exec" in message and "Nothing was executed" in message


def test_damage_found_while_writing_leaves_nothing(tmp_path, network, options, capsys):
    """A flipped bit shows only when its tensor is read, after the output was begun."""
    save_torch(random_state(network, "ldm"), tmp_path / "sd.ckpt", epoch=1)
    raw = bytearray((tmp_path / "sd.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "sd.ckpt").write_bytes(raw)
    for target, out in (("orbax", "ours"), ("diffusers", "d"), ("ldm", "l.safetensors")):
        extra = options if target == "orbax" else {"config": options["config"]}
        assert "is damaged" in error_of(capsys, tmp_path / "sd.ckpt", tmp_path / out, to=target, **extra)


def test_another_architecture(tmp_path, diffusers_folder, capsys):
    message = error_of(capsys, diffusers_folder, tmp_path / "ours")  # SD 2.1's sizes
    assert (
        "of another shape" in message
        and "unet/conv_in.weight: (32, 4, 3, 3) there, (320, 4, 3, 3)" in message
    )


@pytest.mark.parametrize("key, value, shown", [
    ("attention_head_dim", [8, 8], "attention_head_dim: [8, 8] there, [2, 4] here"),
    ("attention_head_dim", 8, "attention_head_dim: [8, 8] there"),
    ("norm_num_groups", 16, "norm_num_groups: 16 there, 32 here"),
    ("act_fn", "gelu", "act_fn: gelu there")])  # fmt: skip
def test_settings_of_another_network(tmp_path, network, diffusers_folder, options, capsys, key, value, shown):
    path = diffusers_folder / "unet" / "config.json"
    path.write_text(json.dumps(diffusers_configs(network)["unet"]))
    run(diffusers_folder, tmp_path / "fine", to="diffusers", config=options["config"])
    path.write_text(json.dumps(diffusers_configs(network)["unet"] | {key: value}))
    message = error_of(capsys, diffusers_folder, tmp_path / "ours", **options)
    assert shown in message and "config.json" in message


def test_numbers_that_do_not_fit(tmp_path, diffusers_folder, options, capsys):
    change_unet(diffusers_folder, lambda state: state["conv_in.bias"].__setitem__(0, 1e6))
    message = error_of(
        capsys, diffusers_folder, tmp_path / "h", to="diffusers", config=options["config"], dtype="float16"
    )
    assert "conv_in" in message and "too large for float16" in message


# ------------------------------------------------------------------------------------ refused requests


def test_null_prompt_must_be_given_and_fit(tmp_path, diffusers_folder, options, capsys):
    config = options["config"]
    message = error_of(capsys, diffusers_folder, tmp_path / "ours", config=config)
    assert "no embedding of the empty prompt (1, 77, 16)" in message and "--text-encoder" in message
    np.save(tmp_path / "bad.npy", np.ones((1, 77, 15), np.float32))
    message = error_of(
        capsys, diffusers_folder, tmp_path / "ours", config=config, null_prompt=tmp_path / "bad.npy"
    )
    assert "(1, 77, 15)" in message
    np.save(tmp_path / "code.npy", np.array([{}]), allow_pickle=True)
    message = error_of(
        capsys, diffusers_folder, tmp_path / "ours", config=config, null_prompt=tmp_path / "code.npy"
    )
    assert "code.npy: not a .npy file of numbers" in message
    message = error_of(capsys, diffusers_folder, tmp_path / "ours", config=config, text_encoder=tmp_path)
    assert "not a text_encoder folder" in message


def test_what_the_source_cannot_give(tmp_path, diffusers_folder, options, capsys):
    message = error_of(
        capsys, diffusers_folder, tmp_path / "x.safetensors", to="loki", config=options["config"]
    )
    assert "parameters that the source does not have" in message and "generation/" in message
    save_torch(random_state(tiny_network(), "loki"), tmp_path / "loki.ckpt", epoch=1)
    message = error_of(capsys, tmp_path / "loki.ckpt", tmp_path / "run", **options)
    assert "--head" in message


def test_what_is_no_source(tmp_path, diffusers_folder, options, capsys):
    (tmp_path / "empty").mkdir()
    assert "neither a diffusers folder" in error_of(capsys, tmp_path / "empty", tmp_path / "o", **options)
    assert "no such file" in error_of(capsys, tmp_path / "nowhere.ckpt", tmp_path / "o", **options)
    single = diffusers_folder / "unet" / SAFETENSORS
    assert "give the folder that holds unet/ and vae/" in error_of(capsys, single, tmp_path / "o", **options)
    shutil.move(single, single.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "fp16" in error_of(capsys, diffusers_folder, tmp_path / "o", **options)
    options["config"] = str(tmp_path / "none.json")
    assert "none.json: no such file" in error_of(capsys, tmp_path / "empty", tmp_path / "o", **options)


def test_an_existing_output_stays(tmp_path, diffusers_folder, options, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("kept")
    assert "exists already" in error_of(capsys, diffusers_folder, tmp_path / "ours", **options)
    assert (tmp_path / "ours" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("arguments, message", [
    (["--out", "x.safetensors"], "either SOURCE or --workdir"),
    (["a", "--workdir", "b", "--out", "x.safetensors"], "either SOURCE or --workdir"),
    (["--workdir", "b", "--out", "x"], "the only file format written is .safetensors"),
    (["--workdir", "b", "--to", "ldm", "--out", "x.safetensors"], "give the workdir as SOURCE"),
    (["a", "--to", "ldm", "--out", "x"], "the only file format written is .safetensors"),
    (["a", "--out", "x", "--text-encoder", "t", "--null-prompt", "n"], "exclude each other")])  # fmt: skip
def test_contradicting_options(arguments, message, capsys):
    assert convert.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed


def test_an_unknown_layout(capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main(["a", "--to", "onnx", "--out", "x"])
    assert stopped.value.code == 2
    assert "onnx" in capsys.readouterr().err


def test_a_prediction_that_loki_does_not_start_from_is_noted(tmp_path, diffusers_folder, options, capsys):
    (diffusers_folder / "scheduler").mkdir()
    scheduler = diffusers_folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    run(diffusers_folder, tmp_path / "a", to="diffusers", config=options["config"])
    assert "SD 2.1-base" in capsys.readouterr().out
    scheduler.write_text(json.dumps({"prediction_type": "epsilon"}))
    run(diffusers_folder, tmp_path / "b", to="diffusers", config=options["config"])
    assert "note" not in capsys.readouterr().out


def test_config_files(tmp_path):
    program = tmp_path / "a.py"
    program.write_text("from configs.demo import get_config\n")
    assert layouts.load_config(str(program)).image_size == 64
    program.write_text(
        "def get_config(arg):\n    from configs.hdtf import get_config as g\n    return g(arg)\n"
    )
    assert layouts.load_config(f"{program}:official").sample.spacing == "official"
    with pytest.raises(WeightsError, match="not a config file.*nonsense"):
        layouts.load_config(f"{program}:nonsense")
    program.write_text("x = 1\n")
    with pytest.raises(WeightsError, match="not a config file"):
        layouts.load_config(str(program))


@pytest.mark.parametrize("change, shown", [
    (lambda config: config.pop("model"), "not a config file (not the config of a run: it has no model)"),
    (lambda config: config["model"]["unet"].update(channels="x"), "describes no network"),
    (lambda config: config["driver"].update(arm="none"), "describes no network (ValueError: unknown driver"),
])  # fmt: skip
def test_a_config_that_describes_no_network(tmp_path, diffusers_folder, options, capsys, change, shown):
    config = json.loads((tmp_path / "tiny.json").read_text())
    change(config)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    message = error_of(capsys, diffusers_folder, tmp_path / "ours", **options)
    assert f"tiny.json: {shown}" in message


def run_config(pretrained):
    """A run that starts from a folder; its encoder fits the tiny autoencoder."""
    config = tiny_config()
    config.image_size = 16
    config.model.encoder.widths = (32,)
    config.model.dtype = "float32"
    config.pretrained = str(pretrained)
    return config


@pytest.mark.parametrize("folder, message", [
    ("nowhere", "no converted weights there"),
    ("sd", "not a folder of converted weights .*convert .*sd --out"),
])  # fmt: skip
def test_training_refuses_a_folder_that_was_never_converted(tmp_path, folder, message):
    """The diffusers folder itself is the likely mistake; nothing is initialised before it is noticed."""
    from loki_jax.networks import build_networks
    from loki_jax.training.config import CheckpointError
    from loki_jax.training.init import initial_params

    (tmp_path / "sd" / "unet").mkdir(parents=True)
    config = run_config(tmp_path / folder)
    head = builtin_head()
    with pytest.raises(CheckpointError, match=message):
        initial_params(config, build_networks(config, head), head)


@pytest.mark.slow
def test_training_starts_from_the_folder(tmp_path, network, options):
    """What `config.pretrained` needs is what the program wrote, arrays equal."""
    from loki_jax.networks import build_networks
    from loki_jax.training.init import initial_params

    state = random_state(network, "diffusers")
    save_diffusers(tmp_path / "sd", state, save_file, SAFETENSORS)
    run(tmp_path / "sd", tmp_path / "ours", **options)
    config = run_config(tmp_path / "ours")
    head = builtin_head()
    trained, frozen = initial_params(config, build_networks(config, head), head)
    kernel = parts_of(state)["unet"]["conv_in.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(trained["generation"]["unet"]["conv_in"]["kernel"], kernel)
    np.testing.assert_array_equal(frozen["reference"]["conv_in"]["kernel"], kernel)
    np.testing.assert_array_equal(frozen["null_prompt"], np.load(options["null_prompt"]))
