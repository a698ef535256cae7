"""How many decoded pictures are held at a time."""

from __future__ import annotations

import weakref

from loki_jax.video import VideoReader, frames


class LiveFrames:
    """Counts the pictures that readers have converted and that something still refers to.

    Attributes:
      alive: now.
      peak: at most, since it was made.
      decoded: all of them.
    """

    def __init__(self, monkeypatch, kept_bytes: int):
        """`kept_bytes`: what a `LazyFrames` may keep."""
        self.alive = self.peak = self.decoded = 0
        to_rgb = VideoReader.to_rgb

        def counted(reader, picture):
            frame = to_rgb(reader, picture)
            self.alive += 1
            self.decoded += 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(frame, self._gone)
            return frame

        monkeypatch.setattr(VideoReader, "to_rgb", counted)
        monkeypatch.setattr(frames, "_KEPT_BYTES", kept_bytes)

    def _gone(self) -> None:
        self.alive -= 1
