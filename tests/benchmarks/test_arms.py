"""What `benchmarks/arms.py` concludes from finished runs."""

import numpy as np

from benchmarks.arms import HELD_OUT_SEED, interval, summary
from loki_jax.demo import CLIP_FRAMES, FRAMES, PAIRS, SMALLEST_YAW
from loki_jax.face.builtin import builtin_head
from loki_jax.face.retarget import head_rotation
from loki_jax.synthetic.motion import synth_motion


def runs(values):
    """Results of one arm: values (seeds, pairs) as HPF; HEF a tenth of it, PSNR 30 minus it."""
    row = lambda x: {"hpf": float(x), "hef": float(x) / 10, "psnr": 30 - float(x)}
    return [{"pairs": [{"generated": row(x), "static": row(10.0)} for x in seed]} for seed in values]


def test_intervals_are_those_of_a_bootstrap():
    rng = np.random.default_rng(0)
    values = np.random.default_rng(1).normal(3, 1, (4, 50))
    mean, low, high = interval(values, rng)
    assert mean == values.mean() and low < mean < high
    # Pairs are drawn within drawn seeds: the spread of a mean of 50 pairs, at least.
    assert 0.2 < high - low < 1.0
    np.testing.assert_allclose(interval(np.full((3, 8), 2.0), rng), [2, 2, 2])


def test_arms_are_compared_in_the_same_seeds_and_pairs():
    base = np.random.default_rng(2).normal(2, 0.5, (3, 8))
    found = summary({"full": runs(base), "warp": runs(base - 0.25)})
    assert found["full"]["seeds"] == 3 and "hpf_minus_full" not in found["full"]
    np.testing.assert_allclose(found["warp"]["hpf_minus_full"], [-0.25] * 3, atol=1e-9)
    np.testing.assert_allclose(found["warp"]["psnr_minus_full"], [0.25] * 3, atol=1e-9)
    np.testing.assert_allclose(found["full"]["hpf_of_still"], base.mean() / 10)
    np.testing.assert_allclose(found["full"]["hef"][0], base.mean() / 10)


def test_an_unfinished_seed_counts_for_its_arm_alone():
    base = np.full((2, 8), 2.0)
    found = summary({"full": runs(base), "flow": runs(base[:1])})
    assert (found["full"]["seeds"], found["flow"]["seeds"]) == (2, 1)
    np.testing.assert_allclose(found["flow"]["hef_minus_full"], [0, 0, 0], atol=1e-12)


def test_the_held_out_drivers_turn():
    """`held_out_pairs` refuses drivers that hardly turn; the seed gives none."""
    head = builtin_head()
    for index in range(PAIRS, 2 * PAIRS):
        seed = HELD_OUT_SEED * 1_000_000 + index
        motion = synth_motion(head, seed * 1000, CLIP_FRAMES)
        forward = np.asarray(head_rotation(motion))[:, :, 2]
        yaw = np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))
        assert max(yaw[i : i + FRAMES].std() for i in range(CLIP_FRAMES - FRAMES + 1)) >= SMALLEST_YAW
