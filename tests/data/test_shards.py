"""The record schema: what is written comes back, and damage is named."""

import json
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from loki_jax.data import schema
from loki_jax.data import writer as records
from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.data.writer import write_dataset
from loki_jax.face.asset import save_head
from tests.data.clips import SIZE, make_clip, small_head

LENGTHS = (5, 9, 7, 4)


def clips(**options):
    return [make_clip(i, n, "validation" if i == 2 else "train", **options) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shards"
    # Small shards: each clip of the training split gets its own.
    write_dataset(path, small_head(), iter(clips(latents=True)), SIZE, shard_bytes=2000)
    return path


def test_everything_comes_back(written):
    dataset = open_dataset(written)
    assert [clip.clip_id for clip in dataset.clips] == ["clip0", "clip1", "clip2", "clip3"]
    assert dataset.metadata.records == {"train": 18, "validation": 7}
    assert len([name for name in dataset.metadata.shards if "-train." in name]) == 3
    first = {clip.clip_id: clip.first_record for clip in dataset.clips}
    assert first == {"clip0": 0, "clip1": 5, "clip2": 0, "clip3": 14}
    for row, clip in zip(dataset.clips, clips(latents=True), strict=True):
        assert (row.identity, row.source, row.licence, row.extra) == (
            clip.identity, clip.source, clip.licence, clip.extra,
        )  # fmt: skip
        assert row.fps == Fraction(30000, 1001) and row.fit_quality == 1.25
        frames = dataset.read_clip(row)
        assert [f.frame_index for f in frames] == list(range(row.length))
        assert {f.clip_index for f in frames} == {row.clip_index}
        for index, (frame, image) in enumerate(zip(frames, clip.images, strict=True)):
            np.testing.assert_array_equal(frame.image, image)  # PNG is lossless
            np.testing.assert_array_equal(
                frame.coefficients.betas, clip.coefficients.betas.astype(np.float32)
            )
            for name in ("expression", "rot", "tra", "neck", "jaw", "eyes"):
                expected = getattr(clip.coefficients, name)[index].astype(np.float32)
                np.testing.assert_array_equal(getattr(frame.coefficients, name), expected)
            np.testing.assert_array_equal(frame.camera.intrinsics, clip.camera.intrinsics.astype(np.float32))
            np.testing.assert_array_equal(frame.camera.extrinsics, np.eye(4, dtype=np.float32))
            np.testing.assert_array_equal(frame.crop, clip.crop.astype(np.float32))
            assert frame.confidence == pytest.approx(clip.confidence[index], rel=1e-6)
            for name in ("latent_mean", "latent_logvar"):
                expected = getattr(clip, name)[index].astype(ml_dtypes.bfloat16)
                np.testing.assert_array_equal(getattr(frame, name), expected)


def test_partial_clip_and_random_access(written):
    dataset = open_dataset(written)
    clip = dataset.clips[1]
    frames = dataset.read_clip(clip, 3, 6)
    assert [int(f.image[0, 0, 1]) for f in frames] == [3, 4, 5]
    assert [int(f.image[0, 0, 0]) for f in dataset.read("train", [17, 0, 6])] == [3, 0, 1]
    assert dataset.read("train", [4], with_image=False)[0].image is None
    with pytest.raises(IndexError, match="has 9 frames"):
        dataset.read_clip(clip, 5, 10)


def test_any_tfds_user_can_read_it(written):
    source = tfds.builder_from_directory(written).as_data_source("validation")
    assert len(source) == 7
    example = source[4]
    assert example["clip_id"] == b"clip2" and example["frame_index"] == 4
    assert tuple(example["image"][0, 0]) == (2, 4, 7)
    assert example["latent_mean"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(example["expression"], 2.04, rtol=1e-6)


def test_tfds_data_source_finds_it_by_name(tmp_path):
    write_dataset(tmp_path / "loki" / "1.0.0", small_head(), clips(), SIZE)
    assert len(tfds.data_source("loki", split="train", data_dir=tmp_path)) == 18


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
    # Hides both from the import system: a machine without them, whatever is installed here.
    program = """
import sys
class Hide:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("tensorflow", "torch")
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
sys.path.insert(0, sys.argv[2])
from tests.data.clips import SIZE, make_clip, small_head
from loki_jax.data.iterator import iterate
from loki_jax.data.windows import make_dataset
from loki_jax.data.writer import write_dataset
write_dataset(sys.argv[1], small_head(), [make_clip(0, 6, latents=True)], SIZE)
batch = next(iterate(make_dataset(sys.argv[1], 4, 2, seed=0)))
assert batch.frames.shape == (2, 4, SIZE, SIZE, 3)
import tensorflow_datasets as tfds  # plain, as somebody without this package reads it
source = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
assert len(source) == 6 and source[5]["image"].shape == (SIZE, SIZE, 3) and source[5]["frame_index"] == 5
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "shards"), str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, small_head(), clips(latents=True), SIZE)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_another_process_gives_the_same_bytes(tmp_path):
    # Maps in protocol buffers are ordered anew in every process if one does not take care.
    program = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.data.clips import SIZE, make_clip, small_head
from loki_jax.data.writer import write_dataset
write_dataset(sys.argv[1], small_head(), [make_clip(0, 6, latents=True)], SIZE)
"""
    shards = []
    for name in ("a", "b", "c"):
        root = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name), root], check=True)
        (shard,) = (tmp_path / name).glob("loki-train*")
        shards.append(shard.read_bytes())
    assert shards[0] == shards[1] == shards[2]


def test_a_stored_clip_can_be_written_again(written, tmp_path):
    dataset = open_dataset(written)
    write_dataset(
        tmp_path / "again", small_head(), map(dataset.stored_clip, dataset.clips), SIZE, shard_bytes=2000
    )
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_jpeg_and_encoded_images(tmp_path):
    smooth = np.broadcast_to(np.linspace(0, 255, SIZE, dtype=np.uint8)[:, None, None], (SIZE, SIZE, 3)).copy()
    write_dataset(
        tmp_path / "jpeg", small_head(), [make_clip(0, 4, images=[smooth] * 4)], SIZE, image_format="jpeg"
    )
    frame = open_dataset(tmp_path / "jpeg").read("train", [2])[0]
    assert np.abs(frame.image.astype(int) - smooth).max() <= 3
    ready = [records.encode_image(smooth, "png")] * 4
    write_dataset(tmp_path / "png", small_head(), [make_clip(0, 4, images=ready)], SIZE)
    np.testing.assert_array_equal(open_dataset(tmp_path / "png").read("train", [1])[0].image, smooth)


def test_latents_without_images_and_per_frame_boxes(tmp_path):
    boxes = np.array([[0, 0, 10 + i, 12 + i] for i in range(5)], np.float32)
    write_dataset(
        tmp_path / "d", small_head(), [make_clip(0, 5, latents=True, images=False, crop=boxes)], SIZE
    )
    dataset = open_dataset(tmp_path / "d")
    assert dataset.metadata.image_format is None and dataset.metadata.latent_shape == (2, 2, 4)
    frames = dataset.read("train", range(5))
    assert frames[0].image is None
    np.testing.assert_array_equal([f.crop for f in frames], boxes)


def test_clips_are_streamed_one_at_a_time(tmp_path):
    log = []

    def source():
        for number in range(4):
            log.append(("made", number))
            yield make_clip(number, 3)

    write_dataset(
        tmp_path / "d",
        small_head(),
        source(),
        SIZE,
        progress=lambda row: log.append(("wrote", row.clip_index)),
    )
    assert log == [(what, number) for number in range(4) for what in ("made", "wrote")]


def test_open_dataset_can_be_pickled(written):
    dataset = open_dataset(written)
    dataset.read("train", [0])
    again = pickle.loads(pickle.dumps(dataset))
    assert again.read("train", [7])[0].image[0, 0, 1] == 2


def test_split_is_a_function_of_the_identity():
    splits = [schema.assign_split(f"speaker{i}", 0.1) for i in range(4000)]
    assert splits == [schema.assign_split(f"speaker{i}", 0.1) for i in range(4000)]
    assert 0.08 < splits.count("validation") / 4000 < 0.12
    assert splits != [schema.assign_split(f"speaker{i}", 0.1, seed=1) for i in range(4000)]


def picture(size=SIZE, dtype=np.uint8):
    return np.zeros((size, size, 3), dtype)


FIVE_EXPRESSIONS = make_clip(0, 4).coefficients._replace(expression=np.zeros((4, 5)))

# What is wrong: (length, changed fields, message).
BAD_CLIPS = {
    "wrong number of expressions": (4, {"coefficients": FIVE_EXPRESSIONS}, "expression has shape"),
    "not finite": (4, {"confidence": np.array([1, np.nan, 1, 1])}, "confidence holds values .* not finite"),
    "image of another size": (1, {"images": [picture(8)]}, "frame 0 is uint8"),
    "float image": (1, {"images": [picture(dtype=float)]}, "frame 0 is float64"),
    "too few images": (3, {"images": [picture()] * 2}, "3 frames of coefficients but 2 images"),
    "too many images": (3, {"images": [picture()] * 5}, "but more images"),
    "no frames": (0, {}, "has no frames"),
    "empty box": (3, {"crop": np.array([5, 5, 5, 9.0])}, "crop box is empty"),
    "unknown split": (3, {"split": "test"}, "split 'test'"),
    "float rate": (3, {"fps": 29.97}, "fractions.Fraction"),
    "half latents": (3, {"latents": True, "latent_logvar": None}, "latents have shapes"),
    "nothing to see": (3, {"images": False}, "neither images nor latents"),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips_are_refused_and_nothing_is_left(tmp_path, case):
    length, changes, message = BAD_CLIPS[case]
    with pytest.raises(DatasetError, match=message):
        write_dataset(tmp_path / "d", small_head(), [make_clip(0, length, **changes)], SIZE)
    assert list(tmp_path.iterdir()) == []


def test_clips_that_do_not_fit_together_are_refused(tmp_path):
    cases = {
        "occurs twice": [make_clip(0, 3), make_clip(0, 3)],
        "in both splits": [make_clip(0, 3), make_clip(1, 3, "validation", identity="person0")],
        "some clips have images": [
            make_clip(0, 3, latents=True),
            make_clip(1, 3, latents=True, images=False),
        ],
        "as in the first clip": [make_clip(0, 3, latents=True), make_clip(1, 3)],
        "no clip to write": [],
    }
    for message, given in cases.items():
        with pytest.raises(DatasetError, match=message):
            write_dataset(tmp_path / "d", small_head(), given, SIZE)
    with pytest.raises(DatasetError, match="image_format"):
        write_dataset(tmp_path / "d", small_head(), [make_clip(0, 3)], SIZE, image_format="webp")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_the_old_dataset(tmp_path):
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 3)], SIZE)

    def interrupted():
        yield make_clip(1, 3)
        raise KeyboardInterrupt

    with pytest.raises(DatasetError, match="exists already"):
        write_dataset(tmp_path / "d", small_head(), [make_clip(1, 3)], SIZE)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", small_head(), interrupted(), SIZE, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert open_dataset(tmp_path / "d").clips[0].clip_id == "clip0"
    write_dataset(tmp_path / "d", small_head(), [make_clip(1, 3)], SIZE, overwrite=True)
    assert open_dataset(tmp_path / "d").clips[0].clip_id == "clip1"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_only_datasets_are_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="is not a dataset"):
        write_dataset(tmp_path / "thesis", small_head(), [make_clip(0, 3)], SIZE, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").exists()
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", small_head(), [make_clip(0, 3)], SIZE)
    assert len(open_dataset(tmp_path / "empty").clips) == 1


def damage(path, how):
    shard = sorted(path.glob("loki-train*"))[0]
    if how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif how == "missing shard":
        shard.unlink()
    elif how == "other schema":
        text = json.loads((path / "metadata.json").read_text())
        (path / "metadata.json").write_text(json.dumps(text | {"schema_version": 99}))
    elif how == "other head":
        save_head(path / "head.npz", small_head(name="another"))
    elif how == "missing head":
        (path / "head.npz").unlink()
    elif how == "missing clips":
        (path / "clips.json").unlink()
    elif how == "damaged clips":
        (path / "clips.json").write_text("[{")
    elif how == "rows without fps":
        (path / "clips.json").write_text('[{"clip_index": 0}]')
    elif how == "not a dataset":
        (path / "dataset_info.json").unlink()
    return shard


DAMAGES = {
    "truncated shard": r"loki-train\.array_record-00000-of-0000.: has \d+ bytes, \d+ were written",
    "missing shard": "shard is missing",
    "other schema": "metadata.json: schema version 99, this loki_jax reads 1",
    "other head": "head.npz: SHA-256",
    "missing head": "head asset is missing",
    "missing clips": "clips.json: no such file",
    "damaged clips": r"clips.json: damaged \(JSONDecodeError",
    "rows without fps": "clips.json: damaged",
    "not a dataset": "holds no dataset_info.json",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named(tmp_path, how):
    path = tmp_path / "d"
    write_dataset(path, small_head(), [make_clip(0, 6)], SIZE)
    damage(path, how)
    with pytest.raises(DatasetError, match=DAMAGES[how]) as error:
        open_dataset(path)
    assert str(path) in str(error.value)


# What is wrong: (file, its new text, or None to remove it; what the message says of the file).
DAMAGED_FILES = {
    "empty info": ("dataset_info.json", "{}", "damaged"),
    "cut info": ("dataset_info.json", '{"name": "lo', "damaged"),
    "missing features": ("features.json", None, "no such file"),
    "cut features": ("features.json", '{"featuresDict": {"feat', "damaged"),
    "empty features": ("features.json", "{}", "damaged"),
    "empty metadata": ("metadata.json", "{}", "damaged .KeyError"),
    "list as metadata": ("metadata.json", "[1, 2]", "damaged"),
    "cut metadata": ("metadata.json", '{"schema_version": 1, "he', "damaged"),
    "binary clips": ("clips.json", "\x00\x01", "damaged"),
    "no clips": ("clips.json", "[]", "damaged"),
    "number as clips": ("clips.json", "3", "damaged"),
}


@pytest.mark.parametrize("what", DAMAGED_FILES)
def test_a_damaged_description_is_named(tmp_path, what):
    name, text, message = DAMAGED_FILES[what]
    path = tmp_path / "d"
    write_dataset(path, small_head(), [make_clip(0, 6)], SIZE)
    if text is None:
        (path / name).unlink()
    else:
        (path / name).write_text(text)
    with pytest.raises(DatasetError, match=f"^{path / name}: {message}") as error:
        open_dataset(path)
    assert "\n" not in str(error.value)


def test_metadata_and_clip_table_must_agree_with_the_shards(tmp_path):
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 6), make_clip(1, 7)], SIZE)
    for name, old, new in (
        ("clips.json", '"length": 6', '"length": 5'),
        ("clips.json", '"first_record": 6', '"first_record": 5'),
        ("clips.json", '"split": "train"', '"split": "test"'),
        ("clips.json", "[30000, 1001]", "[30000, 0]"),
        ("metadata.json", '"train": 13', '"train": 12'),
        ("metadata.json", '"n_shape"', '"n_shapes"'),
        ("metadata.json", '"head_name": "small"', '"head_name": true'),
        ("clips.json", '"identity": "', '"identity": 1, "source": "'),
    ):
        path = tmp_path / "d" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(DatasetError, match=f"^{path}: damaged"):
            open_dataset(tmp_path / "d")
        path.write_text(text)
    assert len(open_dataset(tmp_path / "d").clips) == 2


FAULTS = Path(__file__).with_name("faults")


@pytest.mark.parametrize("case", sorted(path.name for path in FAULTS.iterdir()))
def test_mutated_descriptions_are_refused(tmp_path, case):
    """Files of a dataset as a fuzzer changed them; each made a foreign exception in version 0.1.0."""
    write_dataset(tmp_path / "d", small_head(), [make_clip(0, 6), make_clip(1, 5, "validation")], SIZE)
    for file in (FAULTS / case).iterdir():
        (tmp_path / "d" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        DatasetError, match=f"^{tmp_path / 'd'}/(features|dataset_info).json: damaged"
    ) as error:
        dataset = open_dataset(tmp_path / "d")
        for clip in dataset.clips:
            dataset.read_clip(clip)
    assert "\n" not in str(error.value)


def test_missing_folder_and_foreign_head(tmp_path):
    with pytest.raises(DatasetError, match="no such dataset folder"):
        open_dataset(tmp_path / "nowhere")
    metadata = write_dataset(tmp_path / "d", small_head(), [make_clip(0, 6)], SIZE)
    assert open_dataset(tmp_path / "d", metadata.head_sha256).head().name == "small"
    with pytest.raises(DatasetError, match="was made with the head 'small'"):
        open_dataset(tmp_path / "d", "0" * 64)
    with pytest.raises(DatasetError, match="no split 'validation'"):
        open_dataset(tmp_path / "d").read("validation", [0])


def test_changed_bytes_of_the_same_length_are_noticed_on_reading(tmp_path):
    path = tmp_path / "d"
    write_dataset(path, small_head(), [make_clip(0, 6)], SIZE)
    shard = next(path.glob("loki-train*"))
    data = bytearray(shard.read_bytes())
    data[2000:2600] = bytes(600)
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=f"{shard.name} record 1 .clip 'clip0', frame 1.*hash mismatch"):
        open_dataset(path).read("train", range(6))
