"""Probes find what is there, and nothing where nothing is."""

import numpy as np
import pytest

from loki_jax.evidence.arithmetic import arithmetic
from loki_jax.evidence.orthogonality import Corpus, _after_similarity, correlation
from loki_jax.evidence.probes import classify, linear_probe, train_convolutional
from loki_jax.evidence.response import Seen, make_person
from loki_jax.face.builtin import builtin_head


def test_a_linear_probe_tells_what_can_be_told():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 20)
    places = rng.standard_normal((5, 30))
    noisy = lambda: places[labels] + 0.3 * rng.standard_normal((100, 30))
    assert np.mean(linear_probe(noisy(), labels, noisy()) == labels) > 0.95
    empty = lambda: rng.standard_normal((100, 30))
    assert np.mean(linear_probe(empty(), labels, empty()) == labels) < 0.45


def test_a_convolutional_probe_tells_what_can_be_told():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 24)
    signs = rng.standard_normal((3, 1, 1, 2))

    def maps():
        return (signs[labels] + 0.5 * rng.standard_normal((72, 16, 16, 2))).astype(np.float32)

    network = train_convolutional(maps(), labels, steps=60)
    assert np.mean(classify(network, maps()) == labels) > 0.9


def test_correlation_finds_a_link_between_shape_and_motion():
    head, rng = builtin_head(), np.random.default_rng(0)
    person = np.repeat(np.arange(12), 2)
    mixing = rng.standard_normal((head.n_shape, head.n_expression)).astype(np.float32)
    clips, linked = [], []
    for index, who in enumerate(person):
        made = make_person(head, 50 + int(who), 3, motion_seed=100 + index)
        clips.append(Seen(made.coefficients, made.camera, np.ones(3, bool)))
        own = made.coefficients
        moved = own._replace(expression=own.betas @ mixing)
        linked.append(clips[-1]._replace(coefficients=moved))
    free = correlation(Corpus(clips, person, [slice(0, 0)] * 24))
    tied = correlation(Corpus(linked, person, [slice(0, 0)] * 24))
    assert free["mean"] < 1.1 * free["shuffled_95"]
    assert tied["mean"] > free["mean"] and tied["mean"] > tied["shuffled_95"]


def test_residuals_ignore_a_similarity():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((30, 3))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    assert _after_similarity(points, 1.7 * points @ turn + 3).max() < 1e-9


def test_arithmetic_of_the_paper():
    found = arithmetic()
    assert found["parameters"]["at inference"] == 1_772_443_375
    assert found["below_x_portrait"]["all at inference"] == pytest.approx(0.423, abs=5e-4)
    assert found["clips"]["windows_seen"] == 480_000
