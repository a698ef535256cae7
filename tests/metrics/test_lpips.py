"""LPIPS against the public PyTorch implementation (lpips 0.1.4, with its own heads) on the same trunk."""

import sys
import types

import jax
import numpy as np
import pytest

from loki_jax.downloads import Download, DownloadError, cache_dir, fetch_files
from loki_jax.metrics.lpips import load_lpips, lpips

REFERENCE = Download(
    name="lpips-reference",
    purpose="the public implementation",
    licence="BSD-2-Clause",
    requirement="lpips==0.1.4",
    sha256="fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
    archive_megabytes=0.05,
    megabytes=0.05,
    files={
        "lpips/__init__.py": "36ee004a45e2cc2c5ab47fa3955f00c0e41f6a151ef0249fb6f362533ed58b22",
        "lpips/lpips.py": "780d09b907cb9b661e0ae28b2d163ddfba92f9e870d7feba34d4790cc6590658",
        "lpips/pretrained_networks.py": ("6a27f714c51796db466e86bebba6a617c1bfc4d566f3a1756497629c1248686e"),
        "lpips/trainer.py": "c44726c274bd31ff20cc1491375a3dc930e61e5dc2660a63e863ce607ceac213",
        "lpips/weights/v0.1/alex.pth": ("df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
        "lpips/weights/v0.1/vgg.pth": ("a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    },
)
# The layers of torchvision's `features`: channels of 3 x 3 convolutions and pools, or their arguments.
VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
ALEX = ((3, 64, 11, 4, 2), "pool", (64, 192, 5, 1, 2), "pool", (192, 384, 3, 1, 1), (384, 256, 3, 1, 1),
        (256, 256, 3, 1, 1), "pool")  # fmt: skip


def torch_trunk(name, network):
    """torchvision's `features` with the weights of `network`."""
    torch = pytest.importorskip("torch")
    layers, channels, weights = [], 3, iter(zip(network.kernels, network.biases, strict=True))
    for layer in VGG if name == "vgg" else ALEX:
        if layer == "pool":
            layers.append(torch.nn.MaxPool2d(2 if name == "vgg" else 3, 2))
            continue
        convolution = torch.nn.Conv2d(*((channels, layer, 3, 1, 1) if name == "vgg" else layer))
        channels = convolution.out_channels
        kernel, bias = next(weights)
        convolution.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        convolution.bias.data = torch.from_numpy(bias.copy())
        layers += [convolution, torch.nn.ReLU(inplace=True)]
    return torch.nn.Sequential(*layers)


@pytest.fixture(params=["alex", "vgg"])
def network(request):
    try:
        return load_lpips(request.param)
    except DownloadError as error:
        pytest.skip(f"needs the networks of LPIPS: {error}")


@pytest.fixture
def reference(network, monkeypatch):
    """The public implementation with its own heads, and `network`'s trunk in place of torchvision's."""
    pytest.importorskip("torch")
    folder = cache_dir() / REFERENCE.name / "lpips"
    try:
        files = fetch_files(REFERENCE, folder=folder)
    except DownloadError as error:
        pytest.skip(f"needs the public implementation: {error}")
    trunk = types.SimpleNamespace(features=torch_trunk(network.name, network))
    models = types.ModuleType("torchvision.models")
    models.alexnet = models.vgg16 = lambda **_: trunk
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.syspath_prepend(folder.parent)
    from lpips.lpips import LPIPS

    yield LPIPS(net=network.name, model_path=str(files[network.name]), verbose=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        del sys.modules[name]


def pictures():
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:72, 0:96] / 10
    target = 127 + 90 * np.sin(x[..., None] + y[..., None] * [1, 2, 0.5])
    target = np.stack([target, target[::-1]])
    prediction = target + generator.normal(0, 25, target.shape)
    return [np.clip(image, 0, 255).astype(np.uint8) for image in (prediction, target)]


def test_lpips_matches_the_public_implementation(network, reference):
    torch = pytest.importorskip("torch")
    prediction, target = pictures()
    with torch.no_grad():
        expected = reference(
            *(torch.from_numpy(x.transpose(0, 3, 1, 2) / 127.5 - 1).float() for x in (prediction, target))
        )
    found = jax.jit(lpips)(network, prediction, target)
    # float32 sums in another order.
    np.testing.assert_allclose(found, expected.numpy().ravel(), rtol=1e-4)
    assert 0.1 < found[0] < 2


def test_equal_images_are_at_distance_0_and_shapes_are_checked(network):
    image = pictures()[0][0]
    assert float(lpips(network, image, image)) == 0
    assert lpips(network, image / 255, image * 0.5 / 255, 1.0).shape == ()
    with pytest.raises(ValueError, match="edges at least 64"):
        lpips(network, image[:40], image[:40])
    with pytest.raises(ValueError, match="one shape"):
        lpips(network, image, image[:, :80])
