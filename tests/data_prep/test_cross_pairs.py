"""Pairs for cross-identity supervision: another person performs each clip."""

import numpy as np
import pytest

from data_prep.cross_pairs import main
from data_prep.dataset.pairs import perform
from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.data.windows import make_dataset
from loki_jax.sources import load_portrait
from tests.synthetic.synthetic_clips import write_clips
from tests.training.tiny_run import write_shards

FRAMES = 3

pytestmark = pytest.mark.usefixtures("few_optimizations")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_clips(folder / "shards", frames=FRAMES)
    assert main(["--shards", str(folder / "shards"), "--out", str(folder / "pairs")]) == 0
    return folder / "pairs"


def test_each_clip_is_performed_by_another_person(pairs):
    dataset = open_dataset(pairs)
    clips = {clip.clip_id: clip for clip in dataset.clips}
    assert len(clips) == 4
    for driver in (clip for clip in dataset.clips if "drives" in clip.extra):
        driven = clips[driver.extra["drives"]]
        mine, theirs = (dataset.stored_clip(clip) for clip in (driver, driven))
        assert np.abs(mine.coefficients.betas - theirs.coefficients.betas).max() > 0.1
        for a, b in zip(mine.coefficients[1:], theirs.coefficients[1:], strict=True):
            np.testing.assert_array_equal(a, b)
        assert driver.identity != driven.identity and driver.split == driven.split
        frames = [dataset.read_clip(clip)[0].image.astype(int) for clip in (driver, driven)]
        assert np.abs(frames[0] - frames[1]).mean() > 10


def test_windows_have_the_driver_of_their_clip_and_their_frames(pairs, tmp_path):
    dataset = open_dataset(pairs)
    of = {clip.clip_index: clip for clip in dataset.clips}
    crossed = make_dataset(pairs, 2, 2, cross_share=1.0)[0]
    for row in range(2):
        clip = of[int(crossed.clip_index[row])]
        assert "drives" not in clip.extra  # who drives is never generated
        driver = next(other for other in dataset.clips if other.extra.get("drives") == clip.clip_id)
        records = dataset.read_clip(driver)
        for t, number in enumerate(crossed.frame_index[row]):
            np.testing.assert_array_equal(crossed.driver.frames[row, t], records[number].image)
            np.testing.assert_array_equal(crossed.driver.crop[row, t], records[number].crop)
    plain, half = make_dataset(pairs, 2, 2)[0], make_dataset(pairs, 2, 64, cross_share=0.5)[0]
    assert plain.driver is None
    own = (half.driver.frames == half.frames).all((1, 2, 3, 4))
    assert 0.2 < own.mean() < 0.8
    with pytest.raises(DatasetError, match=r"clips of split 'train' have no driver.*cross_pairs"):
        make_dataset(write_shards(tmp_path / "noise"), 2, 2, cross_share=1.0)


def test_real_clips_need_portraits(tmp_path, capsys):
    noise = write_shards(tmp_path / "noise")
    assert main(["--shards", str(noise), "--out", str(tmp_path / "out")]) == 1
    assert "Give --portraits" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_portrait_performs_a_clip(pairs):
    """The geometry renderer turns the portrait's head as the clip's."""
    dataset = open_dataset(pairs)
    head, first, other = dataset.head(), dataset.clips[0], dataset.clips[2]
    portrait = load_portrait(f"{pairs}:{other.clip_id}", head, 64)
    clip = perform(head, dataset.stored_clip(first), first, portrait, 32)
    images = list(clip.images)
    assert len(images) == FRAMES and images[0].shape == (32, 32, 3) and images[0].std() > 10
    theirs = dataset.stored_clip(first).coefficients
    np.testing.assert_allclose(clip.coefficients.expression, theirs.expression)
    np.testing.assert_allclose(clip.coefficients.rot, theirs.rot, atol=1e-5)
    np.testing.assert_allclose(clip.coefficients.betas[0], portrait.coefficients.betas)
