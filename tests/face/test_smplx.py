"""Our skinning against smplx.FLAME itself, both reading one synthetic pickle in FLAME's format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.rotation import matrix_from_rotvec
from loki_jax.face.skinning import head_vertices, make_identity, skin
from tests.face.smplx_oracle import N_VERTICES, TOLERANCE, both_models, random_coefficients


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("torch", reason="needs the test extra: pip install -e '.[test]'")
    pytest.importorskip("smplx", reason="needs the test extra: pip install -e '.[test]'")
    return both_models(tmp_path_factory.mktemp("flame"))


def theirs_of(model, **given):
    import torch

    with torch.no_grad():
        tensors = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in given.items()}
        return model(**tensors).vertices.numpy()


def test_posed_heads_match_smplx_live(models):
    head, theirs = models
    given = random_coefficients(4)
    expected = theirs_of(
        theirs,
        betas=given.betas,
        expression=given.expression,
        global_orient=given.rot,
        transl=given.tra,
        neck_pose=given.neck,
        jaw_pose=given.jaw,
        leye_pose=given.eyes,
        reye_pose=given.eyes,
    )
    draw = jax.jit(lambda given: head_vertices(head, make_identity(head, given.betas), given))
    found = np.asarray(draw(given))
    assert found.shape == (4, N_VERTICES + 200, 3)
    np.testing.assert_allclose(found[:, :N_VERTICES], expected, atol=TOLERANCE)
    neutral = np.asarray(make_identity(head, given.betas[0]).vertices)[:N_VERTICES]
    assert np.abs(expected - neutral).max() > 0.02


def test_all_five_joints_match_smplx_live(models):
    head, theirs = models
    given = random_coefficients(2)
    turns = np.random.default_rng(5).normal(size=(2, 5, 3)).astype(np.float32) * 0.4
    names = ("global_orient", "neck_pose", "jaw_pose", "leye_pose", "reye_pose")
    poses = {name: turns[:, k] for k, name in enumerate(names)}
    nowhere = np.zeros((2, 3))
    expected = theirs_of(theirs, betas=given.betas, expression=given.expression, transl=nowhere, **poses)
    found = jax.jit(
        lambda shape, expression, turns: skin(
            head, make_identity(head, shape), expression, matrix_from_rotvec(turns)
        )
    )(given.betas, given.expression, jnp.asarray(turns))
    np.testing.assert_allclose(found[:, :N_VERTICES], expected, atol=TOLERANCE)
