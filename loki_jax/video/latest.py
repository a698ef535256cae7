"""Frames as they come: from a camera, or from a file that is played at its rate. Only the latest counts."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from loki_jax.video.files import MediaError
from loki_jax.video.reader import VideoReader

Pictures = Generator[UInt8[np.ndarray, "h w 3"], None, None]


class TimedFrame(NamedTuple):
    """A frame, RGB, and the time on `time.perf_counter` at which it was there, seconds."""

    image: UInt8[np.ndarray, "h w 3"]
    seconds: float


def camera_frames(index: int) -> Pictures:
    """Frames of a camera, by OpenCV's number.

    Raises:
      MediaError: OpenCV is missing, there is no such camera, or it stops.
    """
    try:
        import cv2
    except ImportError as error:
        raise MediaError(f"a camera needs OpenCV ({error}). Run `pip install loki_jax[prep]`.") from error
    camera = cv2.VideoCapture(index)
    try:
        camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        good, frame = camera.read()
        if not good:
            raise MediaError(
                f"camera {index}: gives no picture. Connect it, end other programs that use it, or give "
                "another number."
            )
        while good:
            yield np.ascontiguousarray(frame[..., ::-1])
            good, frame = camera.read()
        raise MediaError(f"camera {index}: stopped. Connect it again.")
    finally:
        camera.release()


def played_frames(path: str | os.PathLike, loop: bool = False) -> Pictures:
    """Frames of a video at the times at which a player would show them.

    Raises:
      MediaError: as `VideoReader`.
    """
    while True:
        began = time.perf_counter()
        with VideoReader(path) as reader:
            for number, frame in enumerate(reader):
                wait = began + float(number / reader.fps) - time.perf_counter()
                if wait > 0:
                    time.sleep(wait)
                yield frame
        if not loop:
            return


class LatestFrame:
    """Reads frames in a thread of its own and gives out the latest; what nobody took in time is dropped.

    A context manager, and an iterator of `TimedFrame`. It waits for a frame that it has not given yet, ends
    with the frames, and raises what their source raises.

    Attributes:
      read: number of frames that came.
      dropped: of these, how many were replaced by a later one before anybody took them.
    """

    def __init__(self, frames: Pictures):
        self.read = self.dropped = 0
        self._frames = frames
        self._latest: TimedFrame | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> LatestFrame:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._ended = True
        self._thread.join(timeout=5)

    def __iter__(self) -> Iterator[TimedFrame]:
        return self

    def __next__(self) -> TimedFrame:
        with self._change:
            self._change.wait_for(lambda: self._latest is not None or self._ended)
            frame, self._latest = self._latest, None
        if frame is not None:
            return frame
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _fill(self) -> None:
        try:
            with contextlib.closing(self._frames) as frames:
                for image in frames:
                    frame = TimedFrame(image, time.perf_counter())
                    with self._change:
                        if self._ended:
                            return
                        self.read += 1
                        self.dropped += self._latest is not None
                        self._latest = frame
                        self._change.notify()
        except Exception as error:
            self._error = error
        finally:
            with self._change:
                self._ended = True
                self._change.notify()
