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

import dataclasses
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from data_prep import cli
from data_prep.recipes.recipe import (
    RecipeError,
    RecipeOptions,
    WantedClip,
    WantedVideo,
    parse_time,
    run_recipe,
    youtube_id,
)

PARTS: tuple[Literal["RD", "WDA", "WRA"], ...] = ("RD", "WDA", "WRA")
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


def _box(
    values: Sequence[str], height: tuple[int, list[str]] | None
) -> tuple[tuple[int, int, int, int], int | None]:
    """x, y, width, height of a line of the list, and the height at which they were measured."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """The options of the program.

    Attributes:
      lists: folder of the published lists.
      parts: parts of the dataset.
      crop: cut the published boxes out (--no-crop: keep whole frames).
      max_seconds: of each clip; clips are up to minutes long.
    """

    lists: Path
    parts: tuple[Literal["RD", "WDA", "WRA"], ...] = PARTS
    crop: bool = True
    max_seconds: cli.Ratio | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError("--max-seconds must be positive")


def hdtf(options: Options) -> None:
    videos, failed = read_lists(
        options.lists, options.parts, crop=options.crop, max_seconds=options.max_seconds
    )
    run_recipe(videos, failed, options, _LICENCE)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "recipes.hdtf", __doc__, argv)
    return cli.run(hdtf, options, f"finished clips are in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
