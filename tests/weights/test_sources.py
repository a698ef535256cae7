"""Readers of foreign files: what torch, safetensors and Flax wrote comes back, and damage is named."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loki_jax.weights import sources
from loki_jax.weights.tensors import TensorInfo, WeightsError
from loki_jax.weights.torch_zip import OUTSIDE
from loki_jax.weights.write import write_flax, write_safetensors

torch = pytest.importorskip("torch")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((2, 3, 3, 3)).astype(np.float16),
        "c.bias": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
    }


def as_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def assert_same(tensors, arrays):
    assert tensors.infos == {n: TensorInfo(a.shape, a.dtype.name) for n, a in arrays.items()}
    for name, array in arrays.items():
        read = tensors.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes(), name


# ------------------------------------------------------------------------------------- safetensors


def test_safetensors(arrays, tmp_path):
    save_file(arrays, tmp_path / "x.safetensors")
    assert_same(sources.open_file(tmp_path / "x.safetensors"), arrays)


def test_our_safetensors_are_read_by_the_library(arrays, tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / "x.safetensors"
    write_safetensors(path, sources.from_arrays(arrays), {"format": "pt"})
    assert_same(sources.open_file(path), arrays)
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    assert all(torch.equal(loaded[name], as_torch(array)) for name, array in arrays.items())


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_safetensors(arrays, tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file(arrays, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="x.safetensors: damaged or cut short.*SHA-256"):
        sources.open_file(path)


def test_sharded(arrays, tmp_path):
    names = list(arrays)
    save_file({n: arrays[n] for n in names[:2]}, tmp_path / "1.safetensors")
    save_file({names[2]: arrays[names[2]]}, tmp_path / "2.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    weight_map = dict.fromkeys(names[:2], "1.safetensors") | {names[2]: "2.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(sources.open_file(index), arrays)

    index.write_text(json.dumps({"weight_map": weight_map | {"d": "2.safetensors"}}))
    with pytest.raises(WeightsError, match="2.safetensors: index and shard disagree on 1 tensors, first d"):
        sources.open_file(index)
    index.write_text(json.dumps({"weight_map": weight_map | {"d": "../2.safetensors"}}))
    with pytest.raises(WeightsError, match="not a file beside the index"):
        sources.open_file(index)
    (tmp_path / "2.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match="2.safetensors: no such file"):
        sources.open_file(index)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="not an index"):
        sources.open_file(index)


# ------------------------------------------------------------------------------------------- torch


def test_torch_state_dict(arrays, tmp_path):
    torch.save({name: as_torch(array) for name, array in arrays.items()}, tmp_path / "x.bin")
    assert_same(sources.open_file(tmp_path / "x.bin"), arrays)


def test_torch_views_parameters_and_scalars(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "transposed": base.T, "slice": base[1:3, 2:5], "step": base[:, ::2], "shared": base,
        "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "long": torch.arange(3),
        "broadcast": torch.ones(1).expand(5), "parameter": torch.nn.Parameter(base + 1),
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    assert_same(
        sources.open_file(tmp_path / "x.pt"),
        {name: np.ascontiguousarray(t.detach().numpy()).reshape(tuple(t.shape)) for name, t in state.items()},
    )


def test_training_checkpoint_with_other_entries(arrays, tmp_path):
    """What Lightning saves beside the weights neither disturbs nor gets lost."""
    moment = torch.ones(3)
    checkpoint = {
        "state_dict": torch.nn.Linear(2, 3).state_dict(),
        "optimizer_states": [{"state": {0: {"exp_avg": moment}}, "param_groups": [{"lr": 1e-4}]}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": None}},
        "hyper_parameters": {"size": torch.Size([1, 2]), "dtype": torch.float32, "np": np.float64(3.0)},
        "global_step": 5,
    }
    torch.save(checkpoint, tmp_path / "x.ckpt")
    tensors = sources.open_file(tmp_path / "x.ckpt")
    extra = f"{OUTSIDE}optimizer_states/0/state/0/exp_avg"
    assert set(tensors.infos) == {"weight", "bias", extra}
    np.testing.assert_array_equal(tensors.read("weight"), checkpoint["state_dict"]["weight"].numpy())
    np.testing.assert_array_equal(tensors.read(extra), moment.numpy())


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


class Attribute:
    def __reduce__(self):
        return (getattr, (torch.Tensor, "numpy"))


@pytest.mark.parametrize(
    "bad, named", [(Code(), "exec"), (Attribute(), "getattr"), (torch.nn.ReLU(), "torch.nn")]
)
@pytest.mark.parametrize("where", ["state_dict", "callbacks"])
def test_a_pickle_with_code_is_refused_unexecuted(tmp_path, bad, named, where):
    torch.save({"state_dict": {"a": torch.ones(1)}} | {where: {"bad": bad}}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=rf"x.ckpt: its pickle names \S*{named}.*Nothing was executed"):
        sources.open_file(tmp_path / "x.ckpt")


def test_legacy_torch_file_and_plain_pickle_are_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="before torch 1.6.*weights_only"):
        sources.open_file(tmp_path / "old.ckpt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(WeightsError, match="no PyTorch zip archive"):
        sources.open_file(tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("a/b.txt", "text")
    with pytest.raises(WeightsError, match="not one of PyTorch"):
        sources.open_file(tmp_path / "other.bin")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_torch_file(tmp_path, share):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match="x.ckpt: damaged or cut short"):
        sources.open_file(path)


def rewritten(path, change):
    """The zip archive with `change(name, bytes)` applied to each record."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_damaged_torch_records(tmp_path):
    path = tmp_path / "x.bin"

    def save():
        torch.save({"a": torch.arange(1000, dtype=torch.float32)}, path)

    save()
    rewritten(path, lambda name, data: data[:-8] if name.endswith("data/0") else data)
    with pytest.raises(WeightsError, match="x.bin: damaged or cut short.*the storage of a has 3992 bytes"):
        sources.open_file(path)
    save()
    rewritten(path, lambda name, data: data[:30] if name.endswith("data.pkl") else data)
    with pytest.raises(WeightsError, match="x.bin: damaged or cut short.*newline"):
        sources.open_file(path)
    save()
    rewritten(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(WeightsError, match="big-endian"):
        sources.open_file(path)
    # One flipped bit among the numbers: the checksum of the record tells.
    save()
    raw = bytearray(path.read_bytes())
    raw[raw.index(struct.pack("<3f", 500, 501, 502))] ^= 1
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match="x.bin: a is damaged"):
        sources.open_file(path).read("a")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(4)}, path)
    # The size of the tensor is the tuple (4,): K\x04\x85; the storage's own 4 stays.
    rewritten(
        path, lambda name, data: data.replace(b"K\x04\x85", b"K\x09\x85") if name.endswith(".pkl") else data
    )
    with pytest.raises(WeightsError, match=r"a tensor of shape \(9,\) reaches beyond its storage"):
        sources.open_file(path)


def test_entries_that_are_no_tensors(tmp_path):
    torch.save({"a": torch.ones(1), "b": 3}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="1 entries are no tensors, first 'b'"):
        sources.open_file(tmp_path / "x.bin")
    torch.save([torch.ones(1)], tmp_path / "y.bin")
    with pytest.raises(WeightsError, match="not a mapping"):
        sources.open_file(tmp_path / "y.bin")


# ------------------------------------------------------------------------------------------- flax


def nested(arrays):
    return {
        "net": {name.replace(".", "_"): array for name, array in arrays.items()},
        "top": np.ones((), np.float32),
    }


def flat(arrays):
    return {f"net/{name.replace('.', '_')}": array for name, array in arrays.items()} | {
        "top": np.ones((), np.float32)
    }


def test_flax_files_of_flax(arrays, tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    (tmp_path / "x.msgpack").write_bytes(serialization.to_bytes(nested(arrays)))
    assert_same(sources.open_file(tmp_path / "x.msgpack"), flat(arrays))


def test_our_flax_files_are_read_by_flax(arrays, tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    tensors = sources.from_arrays(flat(arrays))
    write_flax(tmp_path / "x.msgpack", tensors)
    assert_same(sources.open_file(tmp_path / "x.msgpack"), flat(arrays))
    restored = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    for name, array in nested(arrays)["net"].items():
        np.testing.assert_array_equal(np.asarray(restored["net"][name]), array)


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated_flax_file(arrays, tmp_path, keep):
    tensors = sources.from_arrays(flat(arrays))
    path = tmp_path / "x.msgpack"
    write_flax(path, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="x.msgpack: damaged or cut short.*incomplete input.*SHA-256"):
        sources.open_file(path)


def test_strange_flax_files(arrays, tmp_path):
    path = tmp_path / "x.msgpack"
    for data, message in (
        (b"\x81\xa1a\xc0", "where an array or a map should be"),
        (b"\x81\xa1a\xd4\x05\x00", "extension type 5"),
        (b"\x80\x00", "extra data"),
    ):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            sources.open_file(path)


# ------------------------------------------------------------------------------------------ others


def test_unknown_files(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        sources.open_file(tmp_path / "x.ckpt")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(WeightsError, match="unknown kind of file"):
        sources.open_file(tmp_path / "x.txt")
    with pytest.raises(WeightsError, match="not a finished Orbax checkpoint"):
        sources.open_orbax(tmp_path)


def test_two_names_of_one_weight(arrays):
    with pytest.raises(WeightsError, match="a.weight and b.weight are two names"):
        sources.renamed(sources.from_arrays(arrays), lambda name: name.replace("a.", "b."))
    with pytest.raises(WeightsError, match="3 tensors occur twice"):
        sources.merge(sources.from_arrays(arrays), sources.from_arrays(arrays))
