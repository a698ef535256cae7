"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest

from loki_jax.metrics.image import psnr, ssim


def images(seed):
    generator = np.random.default_rng(seed)
    # Smooth images with noise: SSIM of pure noise would not notice a wrong window.
    y, x = np.mgrid[0:40, 0:52] / 10
    target = 127 + 90 * np.sin(x[..., None] + y[..., None] * [1, 2, 0.5])
    prediction = target + generator.normal(0, 12, target.shape) + 5
    to_uint8 = lambda image: np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return to_uint8(prediction), to_uint8(target)


def test_psnr_matches_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    for seed in range(3):
        prediction, target = images(seed)
        expected = metrics.peak_signal_noise_ratio(target, prediction, data_range=255)
        assert float(psnr(prediction, target)) == pytest.approx(expected, abs=1e-3)


def test_ssim_matches_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    for seed in range(3):
        prediction, target = images(seed)
        expected = metrics.structural_similarity(
            target,
            prediction,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=-1,
        )
        assert float(ssim(prediction, target)) == pytest.approx(expected, abs=1e-4)


def test_batch_axes_and_equal_images():
    pairs = [images(seed) for seed in range(2)]
    predictions, targets = (np.stack(side) for side in zip(*pairs, strict=True))
    for metric in (psnr, ssim):
        batched = np.asarray(metric(predictions, targets))
        assert batched.shape == (2,)
        assert batched == pytest.approx([float(metric(*pair)) for pair in pairs], rel=1e-5)
    assert np.isinf(psnr(targets[0], targets[0]))
    assert float(ssim(targets[0], targets[0])) == pytest.approx(1, abs=1e-6)


def test_range_of_the_images():
    prediction, target = images(0)
    assert float(psnr(prediction / 255.0, target / 255.0, max_value=1.0)) == pytest.approx(
        float(psnr(prediction, target)), abs=1e-3
    )
    assert float(ssim(prediction / 255.0, target / 255.0, max_value=1.0)) == pytest.approx(
        float(ssim(prediction, target)), abs=1e-5
    )


def test_unaligned_images_are_refused():
    prediction, target = images(0)
    with pytest.raises(ValueError, match="one shape"):
        psnr(prediction[:-1], target)
    with pytest.raises(ValueError, match="smaller than"):
        ssim(prediction[:8], target[:8])
