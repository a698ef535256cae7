"""Video and image files in and out."""

from loki_jax.video.files import InputWarning, MediaError
from loki_jax.video.frames import Frames, LazyFrames
from loki_jax.video.image import read_image
from loki_jax.video.reader import Video, VideoReader, read_video, resample_indices, resample_to_fps
from loki_jax.video.reencode import reencode
from loki_jax.video.writer import VideoWriter, check_output, is_tagged_synthetic, write_video

__all__ = [
    "Frames", "InputWarning", "LazyFrames", "MediaError", "Video", "VideoReader", "VideoWriter",
    "check_output", "is_tagged_synthetic", "read_image", "read_video", "reencode", "resample_indices",
    "resample_to_fps", "write_video",
]  # fmt: skip
