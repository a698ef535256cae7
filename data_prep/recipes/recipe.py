"""What the recipes of published datasets share: from lists of (video, times, box) to clips on disk.

Nothing is downloaded by this package itself: the videos are files that the user has, or come from a
command that the user gives. Every clip is written atomically; those that are there are not made
again, and those that cannot be made are listed with the reason in `failed.csv`. `clips.csv` beside the
clips holds identities, sources and licences for `python -m data_prep.build --identities`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.dataset.options import VIDEO_SUFFIXES, available_cores
from data_prep.dataset.workers import Died, Progress, remove_partials, run_parallel
from loki_jax.io import atomic_path
from loki_jax.video import MediaError, VideoReader, write_video

_SHORTEST = Fraction(16, 25)  # a window of training


class RecipeError(ValueError):
    """Lists are missing or not as published; the message names file, line and remedy."""


class WantedClip(NamedTuple):
    """A part of a video.

    Attributes:
      clip_id: name of the clip's file.
      identity: who it shows.
      start, stop: seconds from the first picture; stop None: to the end.
      box: x, y, width, height in pixels of a frame of height `box_height`; None: the whole frame.
      box_height: None: that of the frame.
    """

    clip_id: str
    identity: str
    start: Fraction
    stop: Fraction | None
    box: tuple[int, int, int, int] | None = None
    box_height: int | None = None


class WantedVideo(NamedTuple):
    """A published video and the clips that are wanted of it.

    Attributes:
      names: names that its file may have, without suffix; files whose name holds "[NAME]" count too.
      url: where it is published.
    """

    names: tuple[str, ...]
    url: str
    clips: tuple[WantedClip, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How videos are got and where clips go.

    Attributes:
      videos: folder of the published videos.
      out: folder of the clips to make.
      downloader: command that gets a video which is not in --videos, e.g.
        'yt-dlp -f bv*[height<=1080] -o {out} {url}'.
      timeout: seconds that a download may take.
      discard_videos: delete downloaded videos once their clips are cut.
      limit: only the first so many clips.
      workers: videos worked on at a time.
    """

    videos: Path
    out: Path
    downloader: str | None = None
    timeout: float = 3600.0
    discard_videos: bool = False
    limit: int | None = None
    workers: int = dataclasses.field(default_factory=available_cores)

    def __post_init__(self) -> None:
        if self.workers < 0 or self.timeout <= 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("--workers must not be negative, --timeout and --limit must be positive")
        if self.downloader is not None and "{url}" not in self.downloader:
            raise ValueError("--downloader must hold {url}, and {out} where it takes the file to write")

    def clip_file(self, clip: WantedClip) -> Path:
        return self.out / f"{clip.clip_id}.mp4"


def youtube_id(url: str) -> str | None:
    """The id in a YouTube address, or None."""
    found = re.search(r"(?:[?&]v=|youtu\.be/|/shorts/|/embed/)([\w-]{11})", url)
    return found[1] if found else None


def parse_time(text: str) -> Fraction:
    """Seconds of "H:MM:SS", "MM:SS" or "SS", fractions allowed. Raises ValueError for anything else."""
    seconds = Fraction(0)
    for part in text.strip().split(":"):
        seconds = 60 * seconds + Fraction(part.strip())
    if seconds < 0 or text.count(":") > 2:
        raise ValueError(f"{text!r} is no time")
    return seconds


def find_video(folder: Path, names: Sequence[str]) -> Path | None:
    """The video file of one of these names in a folder, or one called "anything [NAME].suffix"."""
    for name in names:
        for suffix in VIDEO_SUFFIXES:
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    tags = [f"[{name}]" for name in names]
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in VIDEO_SUFFIXES and any(tag in path.name for tag in tags):
            return path
    return None


def download(options: RecipeOptions, video: WantedVideo) -> Path:
    """Run the user's command for a video; `{url}` and `{out}` in it are replaced.

    Raises:
      MediaError: there is no command, it cannot be run, fails, or leaves no video.
    """
    if options.downloader is None:
        raise MediaError(f"no file {video.names[0]}.* in {options.videos} ({video.url})")
    target = str(options.videos / f"{video.names[-1]}.mp4")
    words = [
        word.replace("{url}", video.url).replace("{out}", target) for word in shlex.split(options.downloader)
    ]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=options.timeout, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise MediaError(
            f"{video.url}: the downloader {words[0]!r} is not installed (`--downloader`)."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MediaError(f"{video.url}: the download took more than {options.timeout:.0f} s.") from error
    found = find_video(options.videos, video.names)
    if done.returncode != 0 or found is None:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise MediaError(f"{video.url}: the download failed with status {done.returncode}: {last[0][:300]}")
    return found


def pixel_box(clip: WantedClip, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a frame that a clip shows: even sizes, within the frame.

    Raises:
      MediaError: the box lies outside.
    """
    if clip.box is None:
        return slice(0, height), slice(0, width)
    scale = Fraction(1) if clip.box_height is None else Fraction(height, clip.box_height)
    x, y, w, h = (round(value * scale) for value in clip.box)
    x0, x1, y0, y1 = max(0, x), min(width, x + w), max(0, y), min(height, y + h)
    x1, y1 = x1 - (x1 - x0) % 2, y1 - (y1 - y0) % 2
    if x1 - x0 < w / 2 or y1 - y0 < h / 2 or x1 <= x0 or y1 <= y0:
        raise MediaError(
            f"the published box {clip.box} (for height {clip.box_height}) lies outside the "
            f"{width}x{height} video. It may be another version of the video."
        )
    return slice(y0, y1), slice(x0, x1)


def cut_clip(video: Path, clip: WantedClip, out: Path) -> None:
    """Write a part of a video, at its exact frame rate and without its sound.

    Raises:
      MediaError: the video cannot be read, is shorter, or the box lies outside.
    """
    with VideoReader(video, start=clip.start, stop=clip.stop) as reader:
        frames = iter(reader)
        first = next(frames, None)
        if first is None:
            raise MediaError(
                f"{video}: ends before the clip's start at {float(clip.start):.1f} s. It may be another "
                "version."
            )
        rows, columns = pixel_box(clip, *first.shape[:2])

        def cropped() -> Iterator[np.ndarray]:
            count = 0
            for frame in itertools.chain([first], frames):
                count += 1
                yield np.ascontiguousarray(frame[rows, columns])
            if count / reader.fps < _SHORTEST:
                raise MediaError(
                    f"{video}: has only {count} frames from {float(clip.start):.1f} s on. It may be "
                    "another version."
                )

        write_video(out, cropped(), reader.fps, synthetic=False)


def make_cutter(options: RecipeOptions) -> Callable[[WantedVideo], list[tuple[str, str]]]:
    """The work on one video: get it, cut its clips; returns (clip id, reason) of those that failed."""

    def work(video: WantedVideo) -> list[tuple[str, str]]:
        missing = [clip for clip in video.clips if not options.clip_file(clip).is_file()]
        if not missing:
            return []
        path = find_video(options.videos, video.names)
        downloaded = path is None
        try:
            if path is None:
                path = download(options, video)
        except MediaError as error:
            return [(clip.clip_id, str(error)) for clip in missing]
        failed = []
        for clip in missing:
            try:
                cut_clip(path, clip, options.clip_file(clip))
            except MediaError as error:
                failed.append((clip.clip_id, str(error)))
            except Exception as error:  # listed: thousands of other clips must not wait for this one
                failed.append((clip.clip_id, f"{type(error).__name__}: {error}"))
        if downloaded and options.discard_videos and not failed:
            path.unlink(missing_ok=True)
        return failed

    return work


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file, atomically."""
    with atomic_path(path, durable=True) as partial, partial.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def limit_clips(videos: Sequence[WantedVideo], limit: int | None) -> list[WantedVideo]:
    """The videos of the first `limit` clips."""
    chosen, left = [], limit
    for video in videos:
        clips = video.clips if left is None else video.clips[:left]
        if clips:
            chosen.append(video._replace(clips=clips))
        left = None if left is None else left - len(clips)
    return chosen


def run_recipe(
    videos: Sequence[WantedVideo], failed: Sequence[tuple[str, str]], options: RecipeOptions, licence: str
) -> None:
    """Make the clips that are not there yet, and the tables of clips and failures.

    Args:
      failed: clips that the lists themselves rule out, with the reason.

    Raises:
      RecipeError: there are no clips.
      WorkerError: the processes cannot be started.
    """
    videos = limit_clips(videos, options.limit)
    for folder in (options.out, options.videos):
        folder.mkdir(parents=True, exist_ok=True)
    remove_partials(options.out)
    progress = Progress(sum(len(video.clips) for video in videos))
    reasons = list(failed)
    try:
        for index, result in run_parallel(functools.partial(make_cutter, options), videos, options.workers):
            video = videos[index]
            clips = len(video.clips)
            if isinstance(result, Died):
                result = [(clip.clip_id, str(result)) for clip in video.clips]
            reasons += result
            progress.advance(clips)
            print(
                f"{progress} {video.names[0]}: {clips - len(result)} of {clips} clips, "
                f"{3600 * progress.done / progress.seconds:.0f} clips/h, {progress.seconds_left:.0f} s left",
                flush=True,
            )
            for clip_id, reason in result:
                print(f"  failed: {clip_id}: {reason}", flush=True)
    finally:
        there = [
            (f"{clip.clip_id}.mp4", clip.identity, video.url, licence)
            for video in videos
            for clip in video.clips
            if options.clip_file(clip).is_file()
        ]
        clips_table, failed_table = options.out / "clips.csv", options.out / "failed.csv"
        write_table(clips_table, ("clip", "identity", "source", "licence"), there)
        write_table(failed_table, ("clip", "reason"), sorted(reasons))
    print(f"{options.out}: {len(there)} clips; {len(reasons)} failed, see {failed_table}")
    if not there:
        raise RecipeError(f"{options.out}: no clip could be made; {failed_table} lists why.")
    print(f"next: python -m data_prep.build --clips {options.out} --identities {clips_table} ...")
