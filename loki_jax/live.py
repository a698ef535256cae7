"""Move a portrait by a webcam, as it happens.

    python -m loki_jax.live --reference portrait.jpg                       # a page shows the portrait
    python -m loki_jax.live --reference portrait.jpg --video clip.mp4      # a file, played at its rate

Look into the camera with a calm face when the program begins: the first frames give the shape of your head
and its neutral pose. The time from a frame's arrival to its picture is measured and shown. See docs/live.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from loki_jax.face.control_options import Controls

if TYPE_CHECKING:
    from loki_jax.video.displays import Display

_SHOWN = 100  # frames over which the figures that are shown are taken


@dataclasses.dataclass(frozen=True)
class LiveOptions:
    reference: str
    """image file"""
    camera: int = 0
    """number of the camera"""
    video: Path | None = None
    """video that is played in place of the camera"""
    out: Literal["page", "window", "virtual"] = "page"
    """a page for the browser of this machine; a window; or a virtual camera (pyvirtualcam)"""
    port: int = 8765
    """of the page"""
    size: int = 384
    """pixels of the picture's longer side; larger pictures take longer"""
    mode: Literal["relative", "absolute"] = "relative"
    """relative: turn from the reference's pose by yours; absolute: take your pose"""
    mirror: bool = False
    """see yourself as in a mirror"""
    head: Path | None = None
    """head asset (default: the built-in head)"""
    face: str = "0"
    """which face of the camera's picture: a number, 0 the largest; left; right; pixels X,Y"""
    reference_face: str | None = None
    """which face of the reference, likewise (default: the only or by far the largest)"""
    controls: Annotated[Controls, tyro.conf.arg(name="")] = Controls(smooth=30.0)
    settings: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set")] = ()
    """slider as NAME=NUMBER, such as smile=0.5 or yaw=10; repeat it for several"""
    loop: bool = False
    """play the video again and again"""
    seconds: float | None = None
    """end after so many seconds (default: with the video, or when Ctrl-C is pressed)"""


def live(options: LiveOptions) -> None:
    """Run until the frames end. Raises the errors of its inputs."""
    import numpy as np

    from loki_jax.face.asset import load_head
    from loki_jax.face.controls import check_sliders, parse_sliders
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.geometry.live import LiveAnimator
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.sources import fit_portrait
    from loki_jax.video import VideoReader, read_image
    from loki_jax.video.image import reduce_picture
    from loki_jax.video.latest import LatestFrame, camera_frames, played_frames

    if options.size < 64:
        raise ValueError(f"--size {options.size}: expected at least 64 pixels")
    sliders = parse_sliders(options.settings)
    pipeline = GeometryPipeline(None if options.head is None else load_head(options.head))
    check_sliders(pipeline.head, sliders)
    if options.video is None:
        frames = camera_frames(options.camera)
    else:
        VideoReader(options.video).close()  # what is wrong with it is said before any work
        frames = played_frames(options.video, options.loop)
    print("preparing (longer the first time)")
    landmarker = default_landmarker()
    portrait = fit_portrait(
        reduce_picture(read_image(options.reference), options.size), pipeline.head, pipeline.size,
        name=options.reference, face=options.reference_face, landmarker=landmarker,
    )  # fmt: skip
    animator = LiveAnimator(
        pipeline, portrait, landmarker,
        mode=options.mode, controls=options.controls, sliders=sliders, face=options.face,
    )  # fmt: skip

    ends = time.perf_counter() + (float("inf") if options.seconds is None else options.seconds)
    latencies: list[float] = []
    with _open_display(options, animator.recentre) as display, LatestFrame(frames) as reader:
        with contextlib.suppress(KeyboardInterrupt):  # how a person ends it
            for frame in reader:
                image = frame.image[:, ::-1] if options.mirror else frame.image
                picture = animator(np.ascontiguousarray(image), frame.seconds)
                display.show(picture, _note(animator.state, latencies[-_SHOWN:]))
                latencies.append(time.perf_counter() - frame.seconds)
                if display.closed or time.perf_counter() > ends:
                    break
    print(f"{reader.read} frames came, {len(latencies)} were shown, {reader.dropped} dropped")
    if latencies:
        print(_note("latency", latencies))


def _note(state: str, latencies: Sequence[float]) -> str:
    """A line for people: what happens, and how long frames take from their arrival to being shown."""
    import numpy as np

    if len(latencies) < 2:
        return state
    middle, slow = 1000 * np.percentile(latencies, (50, 95))
    return f"{state}; {middle:.0f} ms from frame to picture, 95 % below {slow:.0f} ms"


def _open_display(options: LiveOptions, recentre: Callable[[], None]) -> Display:
    from loki_jax.video.displays import VirtualCamera, Window
    from loki_jax.video.page import Page

    if options.out == "window":
        return Window(recentre)
    if options.out == "virtual":
        return VirtualCamera()
    page = Page(options.port, recentre)
    print(f"open {page.address} in a browser; Ctrl-C ends")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = tyro.cli(LiveOptions, prog="python -m loki_jax.live", args=argv, description=__doc__)
    except ValueError as error:  # of `Controls`
        print(f"error: {error}", file=sys.stderr)
        return 1

    from loki_jax.program import run_program

    return run_program(live, options)


if __name__ == "__main__":
    sys.exit(main())
