"""HDTF (Zhang et al., CVPR 2021) from its published lists to clips on disk.

    python -m data_prep.recipes.hdtf --lists HDTF_dataset --videos VIDEOS --out CLIPS
        [--downloader 'yt-dlp -f "bv*[height<=1080]" -o {out} {url}']

LISTS is the folder `HDTF_dataset` of the authors' repository. For each part xx of RD, WDA, WRA it holds
  xx_video_url.txt       NAME URL
  xx_annotion_time.txt   NAME.mp4 MM:SS-MM:SS ...      one clip for each pair of times
  xx_crop_wh.txt         NAME_INDEX.mp4 X WIDTH Y HEIGHT
  xx_resolution.txt      NAME.mp4 HEIGHT               the height that boxes are measured at
Videos are looked for in VIDEOS as xx_NAME.*, NAME.*, or any name with the video's id in brackets, as
yt-dlp makes it. Clips without a box are made from whole frames. The lists are CC BY 4.0; the videos
are their owners'.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from data_prep.recipes.recipe import (
    RecipeError,
    WantedClip,
    WantedVideo,
    add_recipe_arguments,
    check_recipe_arguments,
    finish,
    parse_time,
    youtube_id,
)

PARTS = ("RD", "WDA", "WRA")

_LICENCE = "HDTF lists CC BY 4.0; video: its owner's terms"


def read_lists(
    folder: Path, parts: Sequence[str] = PARTS, *, crop: bool = True, max_seconds: Fraction | None = None
) -> tuple[list[WantedVideo], list[tuple[str, str]]]:
    """The wanted videos, and clips that the lists do not define well, with the reason.

    Args:
      crop: cut the published boxes out.
      max_seconds: use no more than so much of each clip.

    Raises:
      RecipeError: a list is missing or a line is not as published.
    """
    videos, failed = [], []
    for part in parts:
        urls = _read_table(folder / f"{part}_video_url.txt")
        times = _read_table(folder / f"{part}_annotion_time.txt")
        boxes = _read_table(folder / f"{part}_crop_wh.txt")
        heights = _read_table(folder / f"{part}_resolution.txt", required=False)
        for name, (number, values) in urls.items():
            if not values:
                raise RecipeError(f"{folder / f'{part}_video_url.txt'}: line {number} holds no URL.")
            called, url = f"{part}_{name}", values[0]
            if name not in times:
                failed.append((called, "the lists give it no times"))
                continue
            clips = []
            for index, interval in enumerate(times[name][1]):
                clip_id = f"{called}_{index}"
                try:
                    start, stop = map(parse_time, interval.split("-"))
                    if stop <= start:
                        raise ValueError(f"{interval!r} ends before it begins")
                    box, height = None, None
                    if crop and f"{name}_{index}" in boxes:
                        box, height = _box(boxes[f"{name}_{index}"][1], heights.get(name))
                except ValueError as error:
                    failed.append((clip_id, f"not as published: {error}"))
                    continue
                if max_seconds is not None:
                    stop = min(stop, start + max_seconds)
                clips.append(WantedClip(clip_id, identity_of(part, name), start, stop, box, height))
            if clips:
                names = (called, name) + ((video_id,) if (video_id := youtube_id(url)) else ())
                videos.append(WantedVideo(names, url, tuple(clips)))
    return videos, failed


def identity_of(part: str, name: str) -> str:
    """The person: names end in the number of their video, except the radio shows, whose guests change."""
    person = re.sub(r"[_\d]+$", "", name)
    return f"{part}_{name}" if part == "RD" or not person else person


def _box(values: Sequence[str], height: tuple[int, list[str]] | None):
    if len(values) != 4:
        raise ValueError(f"the box {' '.join(values)!r} has not four numbers")
    x, w, y, h = map(int, values)
    if w <= 0 or h <= 0:
        raise ValueError(f"the box {' '.join(values)!r} is empty")
    lines = None
    if height is not None and height[1]:
        # "720", "720P" or "1280x720".
        lines = int(re.findall(r"\d+", height[1][0])[-1])
    return (x, y, w, h), lines


def _read_table(path: Path, required: bool = True) -> dict[str, tuple[int, list[str]]]:
    """First word of each line without .mp4 -> (line number, other words)."""
    if not path.is_file():
        if not required:
            return {}
        raise RecipeError(
            f"{path}: no such list. `--lists` is the folder HDTF_dataset of the authors' repository."
        )
    table: dict[str, tuple[int, list[str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if words := line.split():
            table[words[0].removesuffix(".mp4")] = (number, words[1:])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.recipes.hdtf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lists", type=Path, required=True, help="folder of the published lists")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--no-crop", action="store_true", help="keep whole frames")
    parser.add_argument("--max-seconds", type=Fraction, help="of each clip; clips are up to minutes long")
    add_recipe_arguments(parser)
    args = parser.parse_args(argv)
    check_recipe_arguments(parser, args)
    if args.max_seconds is not None and args.max_seconds <= 0:
        parser.error("--max-seconds must be positive")
    read = lambda: read_lists(args.lists, args.parts, crop=not args.no_crop, max_seconds=args.max_seconds)
    return finish(args, read, _LICENCE)


if __name__ == "__main__":
    sys.exit(main())
