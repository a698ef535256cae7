"""A small dataset of synthetic heads, for tests of programs."""

from data_prep import synth


def write_clips(folder, identities=2, frames=5, size=64, seed=21):
    """Write a dataset of one clip for each identity and return the sources FOLDER:CLIP_ID of its clips."""
    options = {
        "--out": folder, "--identities": identities, "--frames": frames, "--size": size, "--seed": seed,
        "--clips-per-identity": 1, "--validation": 0,
    }  # fmt: skip
    assert synth.main([str(part) for option in options.items() for part in option]) == 0
    return [f"{folder}:synth-{seed * 1_000_000 + i:08d}-0" for i in range(identities)]
