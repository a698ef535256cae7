"""Sixty inputs that are wrong or unusual, all in one batch with good clips: nothing stops the batch."""

import json
import re

import pytest

from data_prep.build import BuildSettings, build_dataset
from loki_jax.data.records import open_dataset
from loki_jax.head.builtin import builtin_head
from tests.data_prep.bad_inputs import CASES, SPEECH, video
from tests.data_prep.known_face import KnownFace, N, true_coefficients, true_points

GOOD = ("a first good one", "the last good one")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """(clip names by case, rows of accepted clips, reasons of rejected ones, lines of progress, dataset)."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = {GOOD[0]: video("good1.mp4", SPEECH)(folder)}
    for name, (make, _) in CASES.items():
        paths[name] = make(folder)
    paths[GOOD[1]] = video("good2.mp4", SPEECH[::-1])(folder)
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    settings = BuildSettings(size=32, overlay=0, max_bytes=400 * 2**20, validation=0.1)
    out, lines = tmp_path_factory.mktemp("out") / "shards", []
    summary = build_dataset(list(paths.values()), head, out, lambda: networks, settings, say=lines.append)
    manifest = json.loads((out / "manifest.json").read_text())
    by_file = {entry["file"]: entry["clip"] for entry in manifest["clips"] + manifest["rejected"]}
    names = {case: by_file[path.name] for case, path in paths.items()}
    accepted = {row["clip"]: row for row in summary["clips"]}
    rejected = {row["clip"]: row["reason"] for row in summary["rejected"]}
    return names, accepted, rejected, lines, open_dataset(out), manifest


def test_there_are_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_each_is_built_or_rejected_by_name(batch, case):
    names, accepted, rejected, _, _, manifest = batch
    expected = CASES[case][1]
    if expected is None:
        assert names[case] in accepted, rejected.get(names[case])
        assert accepted[names[case]]["frames"] >= N
        return
    reason = rejected[names[case]]
    assert re.search(expected, reason), reason
    assert "\n" not in reason and len(reason) < 500
    entry = next(entry for entry in manifest["rejected"] if entry["clip"] == names[case])
    assert entry["file"] in reason and "transient" not in entry  # no surprise inside the program


def test_the_rest_of_the_batch_goes_on(batch):
    names, accepted, rejected, lines, dataset, _ = batch
    assert set(names) == {*CASES, *GOOD}
    assert len(accepted) + len(rejected) == len(names)
    for good in GOOD:
        assert accepted[names[good]]["frames"] == N
    assert {clip.clip_id for clip in dataset.clips} == set(accepted)
    assert sum("rejected: " in line for line in lines) == len(rejected)


def test_resampled_clips_keep_their_time(batch):
    names, accepted, _, _, _, _ = batch
    frames = {case: accepted[names[case]]["frames"] for case, (_, reason) in CASES.items() if reason is None}
    assert frames["50 frames a second"] == N and frames["one frame a second"] == 50
    assert frames["29.97 frames a second"] == 17  # 20 frames at 30000/1001 are 0.667 s
    assert frames["pauses of a screen recording"] >= 19  # 0.74 s and the last picture
    facts = {case: accepted[names[case]]["video"] for case in frames}
    assert facts["variable frame rate"]["variable_rate"] is False  # 12 ms late is less than half a frame
    assert facts["pauses of a screen recording"]["variable_rate"] is True
    assert facts["29.97 frames a second"]["fps"] == "30000/1001"
    assert facts["10-bit"]["pixel_format"] == "yuv420p10le"
