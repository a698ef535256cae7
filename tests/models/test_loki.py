"""The assembled model, all parameters random: injection, equivariance, null conditions, times, errors."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from ml_collections import ConfigDict

from loki_jax.models.loki import drop_identity, drop_motion, init_params, make_loki
from loki_jax.models.unet import keys_values
from tests.models.weights import quick_jit

B, T, SIZE = 2, 3, 8


def small_config(**changes):
    config = ConfigDict(
        dict(
            latent_channels=12,
            latent_size=SIZE,
            norm_groups=4,
            unet=dict(
                channels=16,
                multipliers=(1, 2),
                num_res_blocks=1,
                attention_levels=(0, 1),
                attention_modes=("spatial", "3d"),
                head_channels=8,
            ),
            encoder=dict(in_channels=5, stem=8, widths=(8, 16)),
            reference=dict(trainable=True),
        )
    )
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def one_level_config(mode="3d", **changes):
    """One level, attention in the middle only: for tests that compile several models."""
    return small_config(
        unet__multipliers=(1,),
        unet__attention_levels=(),
        unet__attention_modes=(mode,),
        encoder__widths=(8, 8),
        **changes,
    )


def random_params(loki, config, seed=7):
    """Every parameter random and of a useful size, the zero-initialised ones too."""
    shapes = jax.eval_shape(lambda key: init_params(loki, config, key), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape) / max(1, np.sqrt(np.prod(p.shape[:-1]))), p.dtype)
    return jax.tree.unflatten(tree, [draw(p) for p in leaves])


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (B, T, SIZE, SIZE, 12))
    timesteps = jax.random.randint(keys[1], (B, T), 0, 1000)
    driver = jax.random.normal(keys[2], (B, T, 4 * SIZE, 4 * SIZE, 5))
    return x, timesteps, driver, jax.random.normal(keys[3], (B, SIZE, SIZE, 12))


@pytest.fixture(scope="module")
def model():
    config = small_config()
    loki = make_loki(config)
    variables = {"params": random_params(loki, config)}
    method = lambda name: quick_jit(lambda *args: loki.apply(variables, *args, method=name))
    return loki, variables, method("encode_condition"), method("reference_features"), method("denoise")


def test_shapes(model):
    loki, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    condition, features = encode(driver), refer(z)
    assert condition.shape == (B, T, SIZE, SIZE, 16)
    # Down: levels 0 and 1; the middle; up: two at level 1, two at level 0.
    assert [f.shape for f in features] == [
        (B, 64, 16),
        (B, 16, 32),
        (B, 16, 32),
        (B, 16, 32),
        (B, 16, 32),
        (B, 64, 16),
        (B, 64, 16),
    ]
    out = denoise(x, timesteps, condition, features)
    assert out.shape == x.shape and out.dtype == jnp.float32


def test_every_feature_and_the_condition_reach_the_output(model):
    _, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    condition, features = encode(driver), refer(z)
    out = denoise(x, timesteps, condition, features)
    for i in range(len(features)):
        changed = tuple(f + 1.0 if i == j else f for j, f in enumerate(features))
        assert jnp.abs(denoise(x, timesteps, condition, changed) - out).max() > 1e-3, i
    assert jnp.abs(denoise(x, timesteps, condition + 1.0, features) - out).max() > 1e-3


def test_keys_and_values_stand_in_for_the_features(model):
    """Projected once, they give what the features give, in attention within frames and over all frames."""
    loki, variables, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    condition, features = encode(driver), refer(z)
    seen = keys_values(loki.generation.unet, variables["params"]["generation"]["unet"], features)
    assert [k.shape for k, _ in seen] == [v.shape for _, v in seen] == [f.shape for f in features]
    out = denoise(x, timesteps, condition, seen)
    np.testing.assert_allclose(out, denoise(x, timesteps, condition, features), atol=2e-5)
    for i in range(len(seen)):
        for part in (0, 1):
            changed = [list(pair) for pair in seen]
            changed[i][part] = changed[i][part] + jax.random.normal(jax.random.key(i), changed[i][part].shape)
            other = denoise(x, timesteps, condition, tuple(map(tuple, changed)))
            assert jnp.abs(other - out).max() > 1e-3, (i, part)
    with pytest.raises(ValueError, match="shorter than"):
        keys_values(loki.generation.unet, variables["params"]["generation"]["unet"], features[:-1])


def test_features_depend_on_the_reference_and_only_on_its_own_sample(model):
    _, _, _, refer, _ = model
    z = inputs()[3]
    features, other = refer(z), refer(z.at[1].add(1.0))
    for i, (a, b) in enumerate(zip(features, other, strict=True)):
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        assert jnp.abs(a[1] - b[1]).max() > 1e-3, i


def test_samples_do_not_mix(model):
    _, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    condition, features = encode(driver), refer(z)
    out = denoise(x, timesteps, condition, features)
    single = denoise(x[:1], timesteps[:1], condition[:1], tuple(f[:1] for f in features))
    np.testing.assert_allclose(single, out[:1], atol=2e-5)


def test_equivariant_to_permuting_frames(model):
    _, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    features, order = refer(z), jnp.array([2, 0, 1])
    out = denoise(x, timesteps, encode(driver), features)
    permuted = denoise(x[:, order], timesteps[:, order], encode(driver[:, order]), features)
    np.testing.assert_allclose(permuted, out[:, order], atol=2e-5)


def test_frames_see_each_other_through_3d_attention_only():
    """A change of one frame reaches the others, unless every level attends within frames."""
    x, timesteps, driver, z = inputs()
    for mode, reaches in (("3d", True), ("spatial", False), ("temporal", True)):
        config = one_level_config(mode)
        loki = make_loki(config)
        params = random_params(loki, config)
        run = quick_jit(loki.apply)
        variables = {"params": params}
        change = jnp.abs(
            run(variables, x.at[:, 0].add(1.0), timesteps, driver, z)
            - run(variables, x, timesteps, driver, z)
        )
        assert change[:, 0].max() > 1e-2
        assert (change[:, 1:].max() > 1e-5) == reaches, mode


def test_timesteps_are_per_frame(model):
    _, _, encode, refer, denoise = model
    x, _, driver, z = inputs()
    features = refer(z)
    condition = encode(driver)
    same = denoise(x, jnp.full((B, T), 500), condition, features)
    one = denoise(x, jnp.full((B, T), 500).at[:, 1].set(20), condition, features)
    change = jnp.abs(one - same).max((0, 2, 3, 4))
    assert change[1] > 5 * change[0] > 0


def test_zero_features_are_not_the_same_as_none(model):
    _, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    condition = encode(driver)
    zero = jax.tree.map(jnp.zeros_like, refer(z))
    difference = denoise(x, timesteps, condition, zero) - denoise(x, timesteps, condition, None)
    assert jnp.abs(difference).max() > 1e-3


def test_drops_are_per_sample(model):
    _, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    features, keep = refer(z), jnp.array([True, False])
    for feature, dropped in zip(features, drop_identity(features, keep), strict=True):
        np.testing.assert_array_equal(dropped[0], feature[0])
        assert not dropped[1].any() and feature[1].any()
    dropped = drop_motion(driver, keep)
    np.testing.assert_array_equal(dropped[0], driver[0])
    assert not dropped[1].any()
    # A zero map still runs through the encoder: its residual is not zero.
    assert jnp.abs(encode(dropped)[1]).max() > 1e-3


@pytest.mark.slow
def test_remat_changes_nothing_but_memory():
    args = inputs()

    def value_and_grads(remat):
        config = one_level_config(remat=remat)
        loki = make_loki(config)
        loss = lambda params: jnp.square(loki.apply({"params": params}, *args)).mean()
        step = quick_jit(jax.value_and_grad(loss))
        params = random_params(loki, config)
        assert ("prevent_cse" in str(jax.make_jaxpr(loss)(params))) == remat
        return step(params)

    plain, again = value_and_grads(False), value_and_grads(True)
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5 * float(jnp.abs(a).max()))
    # Every parameter of the generation branch takes part.
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(plain[1]["generation"]))


def test_starts_as_the_unconditioned_backbone():
    """At initialisation the driver adds nothing and the prediction is zero."""
    config = one_level_config()
    loki = make_loki(config)
    x, timesteps, driver, z = inputs()

    @quick_jit
    def start(key):
        variables = {"params": init_params(loki, config, key)}
        condition = loki.apply(variables, driver, method="encode_condition")
        return condition, loki.apply(variables, x, timesteps, driver, z)

    condition, prediction = start(jax.random.key(0))
    assert not condition.any() and not prediction.any()


def test_compute_dtype_leaves_parameters_in_float32():
    args = inputs()

    def run(dtype):
        config = one_level_config(dtype=dtype)
        loki = make_loki(config)
        params = random_params(loki, config)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        refer = lambda params: loki.apply({"params": params}, args[3], method="reference_features")
        features = jax.eval_shape(refer, params)
        assert {f.dtype for f in features} == {jnp.dtype(dtype)}
        return quick_jit(loki.apply)({"params": params}, *args)

    half, exact = run("bfloat16"), run("float32")
    assert half.dtype == jnp.float32
    assert 0 < jnp.abs(half - exact).max() < 0.1 * jnp.abs(exact).max()


def test_vector_arm():
    config = one_level_config(encoder__in_channels=20)
    config.encoder.kind, config.encoder.hidden = "vector", 32
    loki = make_loki(config)
    encode = quick_jit(lambda params, x: loki.apply({"params": params}, x, method="encode_condition"))
    vector = jax.random.normal(jax.random.key(5), (B, T, 20))
    initial = quick_jit(lambda key: init_params(loki, config, key))(jax.random.key(0))
    assert not encode(initial, vector).any()
    condition = encode(random_params(loki, config), vector)
    assert condition.shape == (B, T, SIZE, SIZE, 16)
    # Constant away from the border, where the last convolution meets its padding.
    inner = condition[:, :, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, jnp.broadcast_to(inner[:, :, :1, :1], inner.shape), atol=1e-5)
    assert jnp.abs(condition[:, 0] - condition[:, 1]).max() > 1e-3


def test_cross_attention_context():
    """Both branches can attend to a context, each to its own."""
    config = one_level_config()
    config.unet.attention_levels = (0,)  # the first feature is taken before any cross-attention
    config.reference.context_dim = 6
    config.unet.context_dim = 4
    loki = make_loki(config)
    params = random_params(loki, config)
    args = inputs()
    contexts = tuple(jax.random.normal(jax.random.key(width), (B, 5, width)) for width in (6, 4))
    run = quick_jit(lambda own, other: loki.apply({"params": params}, *args, own, other))
    out = run(*contexts)
    assert jnp.abs(run(2 * contexts[0], contexts[1]) - out).max() > 1e-3
    assert jnp.abs(run(contexts[0], 2 * contexts[1]) - out).max() > 1e-3
    with pytest.raises(ValueError, match="context is missing"):
        jax.eval_shape(run, None, contexts[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(unet__attention_modes=("spatial",)), "one mode for each of the 2 levels"),
        (dict(unet__attention_modes=("spatial", "2d")), "unknown attention modes"),
        (dict(unet__head_channels=12), "must divide the widths"),
        (dict(norm_groups=32), "norm groups"),
    ],
)
def test_bad_options(changes, message):
    config = small_config(**changes)
    loki = make_loki(config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: init_params(loki, config, key), jax.random.key(0))


def test_bad_inputs(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the functions' own checks are meant
    _, _, encode, refer, denoise = model
    x, timesteps, driver, z = inputs()
    with pytest.raises(ValueError, match="timesteps"):
        denoise(x, timesteps[:, 0], None, None)
    with pytest.raises(ValueError, match="not divisible by 2"):
        denoise(x[:, :, :7], timesteps, None, None)
    with pytest.raises(ValueError, match="condition"):
        denoise(x, timesteps, x, None)
    with pytest.raises(ValueError, match="6 reference features for 7"):
        denoise(x, timesteps, None, refer(z)[:-1])
    with pytest.raises(ValueError, match="stride 4"):
        encode(driver[:, :, :30])
    with pytest.raises(ValueError, match=r"encoder.kind 'text'"):
        config = small_config()
        config.encoder.kind = "text"
        make_loki(config)
