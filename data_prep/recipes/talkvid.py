"""TalkVid (Chen et al., 2025) from its published list to clips on disk.

    python -m data_prep.recipes.talkvid --lists LIST.json... --videos VIDEOS --out CLIPS
        [--per-url 2] [--max-seconds 5] [--downloader 'yt-dlp -f "bv*[height<=1080]" -o {out} {url}']

A list is a JSON array (or one object a line) of clips with `id`, `start-time`, `end-time` (seconds) and
`info`, which holds `Video Link` and `Person ID`. At most --per-url clips of one video are taken, in the
order of the list, as the paper does. Videos are looked for in VIDEOS by their YouTube id, also in
brackets, as yt-dlp names them. The list is CC BY-NC 4.0; the videos are their owners'.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.recipes.recipe import (
    RecipeError,
    RecipeOptions,
    WantedClip,
    WantedVideo,
    run_recipe,
    youtube_id,
)

_LICENCE = "TalkVid list CC BY-NC 4.0; video: its owner's terms"


def read_lists(
    paths: Sequence[Path], *, per_url: int = 2, max_seconds: Fraction | None = Fraction(5)
) -> tuple[list[WantedVideo], list[tuple[str, str]]]:
    """The wanted videos, and entries that cannot be used, with the reason.

    Raises:
      RecipeError: a list is missing or no list of clips.
    """
    clips: dict[str, list[WantedClip]] = {}
    failed, seen = [], set()
    for path in paths:
        for number, entry in enumerate(_entries(path), start=1):
            try:
                clip_id = re.sub(r"[^\w.-]", "_", str(entry["id"]))
                info = entry["info"]
                url, person = str(info["Video Link"]), str(info["Person ID"])
                start, stop = _seconds(entry["start-time"]), _seconds(entry["end-time"])
                if not url or not person or stop <= start or start < 0:
                    raise ValueError("it has no link or person, or ends before it begins")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                name = entry.get("id") if isinstance(entry, dict) else None
                failed.append((str(name or f"{path.name}:{number}"), f"not as published: {error!r}"))
                continue
            if clip_id in seen:
                failed.append((clip_id, "its id occurs twice"))
                continue
            taken = clips.setdefault(url, [])
            if len(taken) < per_url:
                seen.add(clip_id)
                if max_seconds is not None:
                    stop = min(stop, start + max_seconds)
                taken.append(WantedClip(clip_id, f"talkvid_{person}", start, stop))
    videos = []
    for url, taken in clips.items():
        name = youtube_id(url) or re.sub(r"[^\w-]", "_", url)
        videos.append(WantedVideo((name,), url, tuple(taken)))
    return videos, failed


def _seconds(value: Any) -> Fraction:
    return Fraction(value).limit_denominator(1_000_000)


def _entries(path: Path) -> list[Any]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such list. Give the JSON file of the published dataset (`--lists`).")
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:
        try:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise RecipeError(
                f"{path}: neither a JSON array nor one JSON object a line ({error})."
            ) from error
    if isinstance(content, dict) and "id" in content:
        content = [content]
    if not isinstance(content, list) or not content:
        raise RecipeError(f"{path}: is no list of clips. Give the JSON file of the published dataset.")
    return content


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """The options of the program.

    Attributes:
      lists: the published JSON files.
      per_url: clips of one video.
      max_seconds: of each clip.
    """

    lists: tuple[Path, ...]
    per_url: int = 2
    max_seconds: cli.Ratio = Fraction(5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_url < 1 or self.max_seconds <= 0:
            raise ValueError("--per-url and --max-seconds must be positive")


def talkvid(options: Options) -> None:
    videos, failed = read_lists(options.lists, per_url=options.per_url, max_seconds=options.max_seconds)
    run_recipe(videos, failed, options, _LICENCE)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "recipes.talkvid", __doc__, argv)
    return cli.run(talkvid, options, f"finished clips are in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
