"""What the recipes of published datasets share: from lists of (video, times, box) to clips on disk.

Nothing is downloaded by this package itself: the videos are files that the user has, or come from a
command that the user gives. Every clip appears whole or not at all; those that are there are not made
again, and those that cannot be made are listed with the reason in `failed.csv`. `clips.csv` beside the
clips holds identities, sources and licences for `python -m data_prep.build --identities`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.dataset.clip_file import remove_partials
from data_prep.dataset.workers import Died, WorkerError, run_parallel
from loki_jax.io import atomic_path
from loki_jax.video.reader import MediaError, VideoReader
from loki_jax.video.writer import write_video

CLIPS_TABLE = "clips.csv"

FAILED_TABLE = "failed.csv"

_SUFFIXES = (".mp4", ".mkv", ".webm", ".m4v", ".mov", ".avi")

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
        for suffix in _SUFFIXES:
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    tags = [f"[{name}]" for name in names]
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in _SUFFIXES and any(tag in path.name for tag in tags):
            return path
    return None


def download(command: str, video: WantedVideo, folder: Path, timeout: float) -> Path:
    """Run the user's command for a video; `{url}` and `{out}` in it are replaced.

    Raises:
      MediaError: the command cannot be run, fails, or leaves no video.
    """
    target = folder / f"{video.names[-1]}.mp4"
    words = [word.replace("{url}", video.url).replace("{out}", str(target)) for word in shlex.split(command)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise MediaError(
            f"{video.url}: the downloader {words[0]!r} is not installed (`--downloader`)."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MediaError(f"{video.url}: the download took more than {timeout:.0f} s.") from error
    found = find_video(folder, video.names)
    if done.returncode != 0 or found is None:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise MediaError(f"{video.url}: the download failed with status {done.returncode}: {said[0][:300]}")
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
            f"{width}x{height} video. "
            "It may be another version of the video."
        )
    return slice(y0, y1), slice(x0, x1)


def cut_clip(video: Path, clip: WantedClip, out: Path) -> None:
    """Write a part of a video, at its exact frame rate and without its sound.

    Raises:
      MediaError: the video cannot be read, is shorter, or the box lies outside.
    """
    with VideoReader(video, start=clip.start, stop=clip.stop) as reader:

        def frames():
            rows = columns = None
            for frame in reader:
                if rows is None:
                    rows, columns = pixel_box(clip, *frame.shape[:2])
                yield np.ascontiguousarray(frame[rows, columns])

        shown = frames()
        first = next(shown, None)
        if first is None:
            raise MediaError(
                f"{video}: ends before the clip's start at {float(clip.start):.1f} s. It may be another "
                "version."
            )
        count = 1

        def counted():
            nonlocal count
            yield first
            for frame in shown:
                count += 1
                yield frame
            if count / reader.fps < _SHORTEST:
                raise MediaError(
                    f"{video}: has only {count} frames from {float(clip.start):.1f} s on. It may be "
                    "another version."
                )

        write_video(out, counted(), reader.fps, synthetic=False)


class Job(NamedTuple):
    """How videos are got and where clips go."""

    videos: Path
    out: Path
    downloader: str | None
    timeout: float
    discard: bool


def make_cutter(job: Job) -> Callable[[WantedVideo], list[tuple[str, str]]]:
    """The work on one video: get it, cut its clips; returns (clip id, reason) of those that failed."""

    def work(video: WantedVideo) -> list[tuple[str, str]]:
        missing = [clip for clip in video.clips if not (job.out / f"{clip.clip_id}.mp4").is_file()]
        if not missing:
            return []
        downloaded = False
        path = find_video(job.videos, video.names)
        if path is None:
            if job.downloader is None:
                reason = f"no file {video.names[0]}.* in {job.videos} ({video.url})"
                return [(clip.clip_id, reason) for clip in missing]
            try:
                path, downloaded = download(job.downloader, video, job.videos, job.timeout), True
            except MediaError as error:
                return [(clip.clip_id, str(error)) for clip in missing]
        failed = []
        for clip in missing:
            try:
                cut_clip(path, clip, job.out / f"{clip.clip_id}.mp4")
            except Exception as error:  # listed: thousands of other clips must not wait for this one
                known = isinstance(error, MediaError)
                failed.append((clip.clip_id, str(error) if known else f"{type(error).__name__}: {error}"))
        if downloaded and job.discard and not failed:
            path.unlink(missing_ok=True)
        return failed

    return work


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file, whole or not at all."""
    with atomic_path(path, durable=True) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def run_recipe(
    videos: Sequence[WantedVideo],
    job: Job,
    *,
    licence: str,
    workers: int,
    failed: Sequence[tuple[str, str]] = (),
    log: Callable[[str], None] = print,
) -> tuple[int, list[tuple[str, str]]]:
    """Make the clips that are not there yet; returns how many there are, and those that failed.

    Args:
      failed: clips that the lists themselves rule out, with the reason.

    Raises:
      WorkerError: the processes cannot be started.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    job.videos.mkdir(parents=True, exist_ok=True)
    remove_partials(job.out)
    total = sum(len(video.clips) for video in videos)
    reasons, done, started = list(failed), 0, time.monotonic()
    try:
        for index, result in run_parallel(functools.partial(make_cutter, job), videos, workers):
            video = videos[index]
            if isinstance(result, Died):
                result = [(clip.clip_id, str(result)) for clip in video.clips]
            reasons += result
            done += len(video.clips)
            seconds = time.monotonic() - started
            log(
                f"[{done}/{total}] {video.names[0]}: {len(video.clips) - len(result)} of "
                f"{len(video.clips)} clips, "
                f"{3600 * done / max(seconds, 1e-9):.0f} clips/h, {seconds / done * (total - done):.0f} s "
                "left"
            )
            for clip_id, reason in result:
                log(f"  failed: {clip_id}: {reason}")
    finally:
        there = [
            (f"{clip.clip_id}.mp4", clip.identity, video.url, licence)
            for video in videos
            for clip in video.clips
            if (job.out / f"{clip.clip_id}.mp4").is_file()
        ]
        write_table(job.out / CLIPS_TABLE, ("clip", "identity", "source", "licence"), there)
        write_table(job.out / FAILED_TABLE, ("clip", "reason"), sorted(reasons))
    return len(there), sorted(reasons)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that all recipes share."""
    parser.add_argument("--videos", type=Path, required=True, help="folder of the published videos")
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips to make")
    parser.add_argument(
        "--downloader", metavar="COMMAND",
        help="gets a video that is not in --videos, e.g. 'yt-dlp -f bv*[height<=1080] -o {out} {url}'",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a download may take")
    parser.add_argument(
        "--discard-videos", action="store_true", help="delete downloaded videos once their clips are cut"
    )
    parser.add_argument("--limit", type=int, help="only the first so many clips")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="videos worked on at a time")


def check_recipe_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.workers < 0 or args.timeout <= 0 or (args.limit is not None and args.limit < 1):
        parser.error("--workers must not be negative, --timeout and --limit must be positive")
    if args.downloader is not None and "{url}" not in args.downloader:
        parser.error("--downloader must hold {url}, and {out} where it takes the file to write")


def limit_clips(videos: Sequence[WantedVideo], limit: int | None) -> list[WantedVideo]:
    """The videos of the first `limit` clips."""
    chosen, left = [], limit
    for video in videos:
        clips = video.clips if left is None else video.clips[:left]
        if clips:
            chosen.append(video._replace(clips=clips))
        left = None if left is None else left - len(clips)
    return chosen


def finish(
    args: argparse.Namespace,
    read: Callable[[], tuple[list[WantedVideo], list[tuple[str, str]]]],
    licence: str,
) -> int:
    """The common rest of the programs; returns the exit status."""
    try:
        videos, failed = read()
        job = Job(args.videos, args.out, args.downloader, args.timeout, args.discard_videos)
        there, failed = run_recipe(
            limit_clips(videos, args.limit), job, licence=licence, workers=args.workers, failed=failed,
            log=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (RecipeError, WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nstopped; finished clips are in {args.out}. Run the same command again to go on.",
            file=sys.stderr,
        )
        return 130
    print(f"{args.out}: {there} clips; {len(failed)} failed, see {args.out / FAILED_TABLE}")
    print(f"next: python -m data_prep.build --clips {args.out} --identities {args.out / CLIPS_TABLE} ...")
    return 0 if there else 1
