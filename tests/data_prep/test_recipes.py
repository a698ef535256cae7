"""Recipes of published datasets: small lists in their published form, videos made here, no network."""

import csv
import json
import sys
from fractions import Fraction

import numpy as np
import pytest

from data_prep.dataset.manifest import label_of, read_labels
from data_prep.recipes import hdtf, talkvid
from data_prep.recipes.recipe import (
    RecipeError,
    WantedClip,
    find_video,
    limit_clips,
    parse_time,
    pixel_box,
    youtube_id,
)
from loki_jax.video.reader import MediaError, read_video
from loki_jax.video.writer import write_video

RATE = Fraction(25)


def write_numbered(path, seconds, size=(48, 64), rate=RATE):
    """A video whose grey value counts its frames up to 25, with a bright column on the right."""
    frames = []
    for index in range(int(seconds * rate)):
        frame = np.full((*size, 3), 8 * (index % 25) + 20, np.uint8)
        frame[:, -8:] = 250
        frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, rate, synthetic=False)
    return path


def number_of(frame):
    return round((float(frame[:8, :8].mean()) - 20) / 8)


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    texts = {
        "video_url": "Radio1 https://www.youtube.com/watch?v=AAAAAAAAAAA\nRadio2 https://youtu.be/BBBBBBBBBBB\n"
        "Radio3 https://www.youtube.com/watch?v=CCCCCCCCCCC\n",
        "annotion_time": "Radio1.mp4 00:00-00:01 00:01-00:02 00:09-00:10\nRadio2.mp4 0:00-0:01 oops\n",
        "crop_wh": "Radio1_0.mp4 0 16 8 16\nRadio1_1.mp4 20 12 0 24\nRadio2_0.mp4 5000 40 0 40\n",
        "resolution": "Radio1.mp4 24\nRadio2.mp4 720P\n",
    }
    for part in hdtf.PARTS:
        for name, text in texts.items():
            text = text if part == "RD" else ""
            (folder / f"{part}_{name}.txt").write_text(text)
    (folder / "WDA_video_url.txt").write_text("BarackObama_001 https://youtu.be/DDDDDDDDDDD\n")
    (folder / "WDA_annotion_time.txt").write_text("BarackObama_001.mp4 00:00-00:01\n")
    return folder


def test_hdtf_lists_are_understood(lists):
    videos, failed = hdtf.read_lists(lists)
    assert [video.names for video in videos] == [
        ("RD_Radio1", "Radio1", "AAAAAAAAAAA"),
        ("RD_Radio2", "Radio2", "BBBBBBBBBBB"),
        ("WDA_BarackObama_001", "BarackObama_001", "DDDDDDDDDDD"),
    ]
    first = videos[0].clips[0]
    assert first.box == (0, 8, 16, 16)  # x, y, width, height
    assert (first.clip_id, first.identity, first.start, first.stop, first.box_height) == (
        "RD_Radio1_0", "RD_Radio1", 0, 1, 24,
    )  # fmt: skip
    assert videos[0].clips[1].box == (20, 0, 12, 24) and videos[0].clips[2].box is None
    assert videos[1].clips[0].box_height == 720
    assert videos[2].clips[0].identity == "BarackObama"
    assert dict(failed)["RD_Radio3"] == "the lists give it no times" and "RD_Radio2_1" in dict(failed)
    cut, _ = hdtf.read_lists(lists, crop=False, max_seconds=Fraction(1, 2))
    assert cut[0].clips[1] == WantedClip("RD_Radio1_1", "RD_Radio1", Fraction(1), Fraction(3, 2))
    (lists / "WRA_crop_wh.txt").unlink()
    with pytest.raises(RecipeError, match="WRA_crop_wh.txt: no such list"):
        hdtf.read_lists(lists)


def test_hdtf_clips_are_cut_listed_and_not_made_twice(lists, tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "clips"
    write_numbered(videos / "RD_Radio1.mp4", 3)
    write_numbered(videos / "A talk [BBBBBBBBBBB].mkv", 2)
    command = ["--lists", str(lists), "--videos", str(videos), "--out", str(out), "--workers", "0"]
    assert hdtf.main(command) == 0
    made = {path.stem for path in out.glob("*.mp4")}
    assert made == {"RD_Radio1_0", "RD_Radio1_1"}
    first, second = read_video(out / "RD_Radio1_0.mp4"), read_video(out / "RD_Radio1_1.mp4")
    # Boxes are measured at height 24, the video has 48 lines: x 0..32, y 16..32 and so on.
    assert first.frames.shape == (25, 32, 32, 3) and second.frames.shape == (25, 48, 24, 3)
    assert first.fps == RATE and not first.has_audio
    assert [number_of(frame) for frame in first.frames] == list(range(25))
    assert [number_of(frame) for frame in second.frames] == list(range(25))
    assert second.frames[:, :, -6:].min() > 230  # columns 40..64 hold the bright ones
    with (out / "failed.csv").open() as file:
        reasons = {row["clip"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"RD_Radio1_2", "RD_Radio2_0", "RD_Radio2_1", "RD_Radio3", "WDA_BarackObama_001_0"}
    assert "ends before the clip's start at 9.0 s" in reasons["RD_Radio1_2"]
    assert "lies outside the 64x48 video" in reasons["RD_Radio2_0"]
    assert "no file WDA_BarackObama_001.*" in reasons["WDA_BarackObama_001_0"]
    labels = read_labels(out / "clips.csv")
    label = label_of(labels, out / "RD_Radio1_1.mp4")
    assert (
        label["identity"] == "RD_Radio1" and "AAAAAAAAAAA" in label["source"] and "CC BY" in label["licence"]
    )

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    (out / ".RD_Radio1_2.123.partial.mp4").write_bytes(b"left by a killed run")
    write_numbered(videos / "BarackObama_001.mp4", 1)
    capsys.readouterr()
    assert hdtf.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "WDA_BarackObama_001_0.mp4").is_file() and not list(out.glob(".*"))
    assert "3 clips; 4 failed" in capsys.readouterr().out


DOWNLOADER = """
import shutil, sys
url, out = sys.argv[1:]
if "gone" in url:
    sys.exit("ERROR: Video unavailable")
shutil.copyfile(sys.argv[0].replace("get.py", "source.mp4"), out)
"""


def entry(number, video="AAAAAAAAAAA", person=7, start=0.0, end=1.2):
    return {
        "id": f"video{video}-scene{number}",
        "fps": 25.0,
        "start-time": start,
        "end-time": end,
        "info": {"Person ID": str(person), "Video Link": f"https://www.youtube.com/watch?v={video}"},
    }


def test_talkvid_with_a_downloader(tmp_path, capsys):
    (tmp_path / "get.py").write_text(DOWNLOADER)
    write_numbered(tmp_path / "source.mp4", 3)
    entries = [entry(i, start=0.4 * i, end=0.4 * i + 1) for i in range(3)]  # the third is one too many
    entries += [entry(0, "BBBBBBBBBBB", 8, 0.1, 2.9), entry(0, "gone-gone-g", 9), {"id": "broken"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    out = tmp_path / "clips"
    command = [
        "--lists", str(tmp_path / "list.json"), "--videos", str(tmp_path / "videos"), "--out", str(out),
        "--max-seconds", "2", "--workers", "0", "--discard-videos",
        "--downloader", f"{sys.executable} {tmp_path / 'get.py'} {{url}} {{out}}",
    ]  # fmt: skip
    assert talkvid.main(command) == 0
    clips = {path.stem: read_video(path) for path in out.glob("*.mp4")}
    assert {name: len(clip.frames) for name, clip in clips.items()} == {
        "videoAAAAAAAAAAA-scene0": 25, "videoAAAAAAAAAAA-scene1": 25, "videoBBBBBBBBBBB-scene0": 50,
    }  # fmt: skip
    assert number_of(clips["videoAAAAAAAAAAA-scene1"].frames[0]) == 10  # 0.4 s
    with (out / "failed.csv").open() as file:
        reasons = {row["clip"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"videogone-gone-g-scene0", "broken"}
    assert "ERROR: Video unavailable" in reasons["videogone-gone-g-scene0"]
    assert list((tmp_path / "videos").iterdir()) == []  # discarded
    assert read_labels(out / "clips.csv")["videoBBBBBBBBBBB-scene0.mp4"]["identity"] == "talkvid_8"
    command[-1] = "no-such-program {url}"
    (out / "videoBBBBBBBBBBB-scene0.mp4").unlink()
    assert talkvid.main(command) == 0
    assert "the downloader 'no-such-program' is not installed" in capsys.readouterr().out


def test_talkvid_lists(tmp_path):
    lines = tmp_path / "lines.json"
    lines.write_text("\n".join(json.dumps(entry(i, f"VIDEO{i:06d}", i)) for i in range(4)))
    videos, failed = talkvid.read_lists([lines], max_seconds=None)
    assert len(videos) == 4 and failed == [] and videos[2].clips[0].stop == Fraction(6, 5)
    assert [len(v.clips) for v in limit_clips(videos, 3)] == [1, 1, 1]
    again, failed = talkvid.read_lists([lines, lines])
    assert again == talkvid.read_lists([lines])[0] and len(failed) == 4
    lines.write_text("nothing of the kind")
    with pytest.raises(RecipeError, match="neither a JSON array nor"):
        talkvid.read_lists([lines])
    assert talkvid.main(["--lists", str(tmp_path / "no.json"), "--videos", "v", "--out", "o"]) == 1


def test_times_boxes_and_names(tmp_path):
    assert [parse_time(t) for t in ("01:35", "1:02:03", "7.5")] == [95, 3723, Fraction(15, 2)]
    for text in ("", "a:b", "1:2:3:4", "-3"):
        with pytest.raises(ValueError):
            parse_time(text)
    clip = WantedClip("a", "b", Fraction(0), None, (10, 20, 31, 30), 100)
    assert pixel_box(clip, 200, 300) == (slice(40, 100), slice(20, 82))
    assert pixel_box(clip._replace(box=(-4, 0, 20, 20), box_height=None), 50, 50) == (
        slice(0, 20),
        slice(0, 16),
    )
    assert pixel_box(clip._replace(box=None), 51, 50) == (slice(0, 51), slice(0, 50))
    with pytest.raises(MediaError, match="lies outside"):
        pixel_box(clip, 100, 20)
    (tmp_path / "talk [abc].webm").write_bytes(b"")
    (tmp_path / "notes [abc].txt").write_bytes(b"")
    assert find_video(tmp_path, ["abc"]).name == "talk [abc].webm" and find_video(tmp_path, ["ab"]) is None
    assert find_video(tmp_path / "none", ["abc"]) is None
    for url in ("https://www.youtube.com/watch?x=1&v=abcdefgh-_1", "https://youtu.be/abcdefgh-_1?t=3"):
        assert youtube_id(url) == "abcdefgh-_1"
