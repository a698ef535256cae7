"""What each config and variant changes, key by key, and that nothing else differs."""

import pytest

from configs import ablations, common, demo, demo_svp, hdtf, svp, talkvid


def flat(config, prefix=""):
    keys = {}
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            keys |= {f"{key}.{k}": v for k, v in flat(common.ConfigDict(value)).items()}
        else:
            keys[key] = value
    return keys


def differences(config, base):
    a, b = flat(config), flat(base)
    assert a.keys() == b.keys()  # a variant invents no key
    return {key: (b[key], a[key]) for key in a if a[key] != b[key]}


# Key: (ours, the public code's, row of method, section 11 or other source).
OFFICIAL = {
    "dropout.null_reference": ("features", "latent", "row 1: a lost identity is a zero latent in training"),
    "dropout.identity": (0.05, 0.0, "row 2: identity and motion are dropped together only"),
    "dropout.motion": (0.05, 0.0, "row 2"),
    "dropout.null_gradient": (False, True, "section 1: the encoder sees the zero map like any other"),
    "driver.neck": (True, False, "row 3: the neck never reaches the driver map"),
    "sample.pose": ("relative", "absolute", "row 5"),
    "data.fixed_reference": (False, True, "row 6"),
    "sample.spacing": ("leading", "official", "row 7 and section 7: the public sampler's steps"),
    "ema_decay": (0.9999, 0.0, "row 12: no moving average"),
    "model.autoencoder.sample_reference": (False, True, "row 14: the reference latent is a random draw"),
    "optimizer.clip_norm": (1.0, 0.0, "section 2: the public recipe clips nothing; clipping is our addition"),
}
# Rows whose public choice is the base already, or is no matter of the config.
SAME = {
    "dropout.both": 0.1,  # row 2
    "diffusion.prediction": "epsilon",  # row 7
    "diffusion.rescale_zero_snr": True,
    "diffusion.max_beta": 0.99,
    "model.unet.context_dim": None,  # row 8: cross-attention removed
    "model.unet.attention_modes": ("spatial", "3d", "3d", "3d"),  # row 9
    "diffusion.shift_frames": 15,  # row 16
    "diffusion.min_snr_gamma": 0.0,
    # Section 2: AdamW, constant 1e-4, default weight decay, 30,000 steps, 16 windows.
    "optimizer.learning_rate": 1e-4, "optimizer.decay": "constant", "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.01, "optimizer.weight_decay_on": "all", "steps": 30_000, "batch_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("module", [hdtf, talkvid])
def test_official_is_the_public_code_and_nothing_else(module):
    found = differences(module.get_config("official"), module.get_config())
    assert found == {key: (ours, public) for key, (ours, public, _) in OFFICIAL.items()}
    config = flat(module.get_config("official"))
    assert {key: config[key] for key in SAME} == SAME


@pytest.mark.parametrize("module", [hdtf, talkvid])
def test_zero_snr_is_lin_et_al_and_nothing_else(module):
    assert differences(module.get_config("zero_snr"), module.get_config()) == {
        "diffusion.prediction": ("epsilon", "v"),
        "diffusion.max_beta": (0.99, 1.0),
        "sample.spacing": ("leading", "trailing"),
    }


@pytest.mark.parametrize("arm", ["no_posenc", "no_deform", "flame_vector"])
def test_an_ablation_changes_the_driver_map_alone(arm):
    assert differences(ablations.get_config(arm), talkvid.get_config()) == {"driver.arm": ("full", arm)}
    assert differences(ablations.get_config(), talkvid.get_config()) == {}


def test_full_size_configs_differ_from_the_base_in_how_data_is_read_only():
    assert differences(hdtf.get_config(), common.base_config()) == {}
    assert differences(talkvid.get_config(), common.base_config()) == {"data.workers": (0, 8)}


@pytest.mark.parametrize("module", [hdtf, talkvid, ablations, demo, svp, demo_svp])
def test_an_unknown_variant_is_an_error(module):
    with pytest.raises(ValueError, match="'offical' is not one of"):
        module.get_config("offical")


def test_every_key_has_a_config_of_its_own():
    """Changing one config leaves the next one alone."""
    first = hdtf.get_config("official")
    first.model.unet.channels = 1
    assert hdtf.get_config().model.unet.channels == 320 and hdtf.get_config().dropout.identity == 0.05


@pytest.mark.parametrize("module", [hdtf, talkvid])
@pytest.mark.parametrize("arm", ["flow", "warp"])
def test_flow_and_warp_are_driver_arms(module, arm):
    assert differences(module.get_config(arm), module.get_config()) == {"driver.arm": ("full", arm)}


@pytest.mark.parametrize("module, base", [(svp, talkvid), (demo_svp, demo)])
def test_svp_changes_what_frames_see_of_each_other_and_the_guidance(module, base):
    plain = base.get_config()
    assert differences(module.get_config("loki_driver"), plain) == {
        "history.frames": (0, 3),
        "sample.fusion": ((), (2.0, 2.5, 1.0)),
        "model.unet.attention_modes": (
            plain.model.unet.attention_modes,
            tuple(mode.replace("3d", "full") for mode in plain.model.unet.attention_modes),
        ),
    }
