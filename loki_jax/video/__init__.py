"""Video and image files in and out."""

from loki_jax.video.audio import has_audio
from loki_jax.video.files import InputWarning, MediaError
from loki_jax.video.frames import Frames, LazyFrames
from loki_jax.video.image import read_image
from loki_jax.video.outputs import check_frames_output, keeps_sound, open_output
from loki_jax.video.reader import Video, VideoReader, read_video, resample_indices, resample_to_fps
from loki_jax.video.reencode import reencode
from loki_jax.video.writer import VideoWriter, check_output, is_tagged_synthetic, write_video

__all__ = [
    "Frames", "InputWarning", "LazyFrames", "MediaError", "Video", "VideoReader", "VideoWriter",
    "check_frames_output", "check_output", "has_audio", "is_tagged_synthetic", "keeps_sound", "open_output",
    "read_image", "read_video", "reencode", "resample_indices", "resample_to_fps", "write_video",
]  # fmt: skip
