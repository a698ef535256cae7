"""Frames as they come: the latest one counts, nothing is queued."""

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest

from loki_jax.video import MediaError, write_video
from loki_jax.video.latest import LatestFrame, camera_frames, played_frames


def numbered(count, interval):
    """Frames whose value is their number, at equal times."""
    for number in range(count):
        yield np.full((2, 2, 3), number, np.uint8)
        time.sleep(interval)


def test_a_slow_reader_gets_new_frames_and_drops_the_rest():
    numbers, ages = [], []
    with LatestFrame(numbered(60, 0.005)) as reader:
        for frame in reader:
            numbers.append(int(frame.image[0, 0, 0]))
            ages.append(time.perf_counter() - frame.seconds)
            time.sleep(0.03)
    assert numbers == sorted(set(numbers)) and len(numbers) < 40
    assert reader.read == 60 and reader.dropped == 60 - len(numbers)
    # However slow the reader, its frames are about as old as their interval.
    assert np.median(ages) < 0.02


def test_a_fast_reader_gets_every_frame():
    with LatestFrame(numbered(20, 0.01)) as reader:
        assert len(list(reader)) == 20
    assert reader.dropped == 0


def test_what_the_source_raises_reaches_the_reader():
    def broken():
        yield np.zeros((2, 2, 3), np.uint8)
        time.sleep(0.05)
        raise MediaError("camera 0: stopped")

    with LatestFrame(broken()) as reader:
        next(reader)
        with pytest.raises(MediaError, match="camera 0: stopped"):
            next(reader)


def test_leaving_early_closes_the_source():
    closed = []

    def endless():
        try:
            while True:
                yield np.zeros((2, 2, 3), np.uint8)
                time.sleep(0.001)
        finally:
            closed.append(True)

    with LatestFrame(endless()) as reader:
        next(reader)
    assert closed == [True]


def test_a_file_is_played_at_its_rate_and_again(tmp_path):
    write_video(tmp_path / "clip.mp4", np.zeros((10, 16, 16, 3), np.uint8), Fraction(50))
    began, times = time.perf_counter(), []
    for _ in played_frames(tmp_path / "clip.mp4"):
        times.append(time.perf_counter())
    assert len(times) == 10 and 0.17 < times[-1] - began < 1
    assert len(list(itertools.islice(played_frames(tmp_path / "clip.mp4", loop=True), 25))) == 25


def test_no_camera_is_one_clear_error(monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="needs the prep extra (OpenCV)")

    class Nothing:
        def __init__(self, _):
            self.released = False

        set = release = lambda *_: None

        def read(self):
            return False, None

    monkeypatch.setattr(cv2, "VideoCapture", Nothing)
    with pytest.raises(MediaError, match="camera 3: gives no picture"):
        next(camera_frames(3))
