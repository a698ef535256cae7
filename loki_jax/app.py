"""A page on which a person animates a portrait: upload, move sliders with a live preview, make the video.

    python -m loki_jax.app        # then open the printed address

Needs the extra `app` (Gradio). Pictures stay on this machine. The geometry renderer moves the portrait; no
trained model is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from loki_jax.face.control_options import Controls

if TYPE_CHECKING:
    import numpy as np

    from loki_jax.fitting.landmarker import Landmarker
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.geometry.preview import Preview
    from loki_jax.sources import DrivingClip, Portrait


class Slider(NamedTuple):
    """A slider of the page: of a control (`Controls`), or, where there is none of its name, of the head."""

    name: str
    label: str
    low: int
    high: int
    rest: int


FACE = (
    Slider("smile", "Smile", 0, 1, 0),
    Slider("frown", "Frown", 0, 1, 0),
    Slider("pucker", "Pucker", 0, 1, 0),
    Slider("browInnerUp", "Brows up", 0, 1, 0),
    Slider("browDown", "Brows down", 0, 1, 0),
    Slider("eyeWide", "Wide eyes", 0, 1, 0),
    Slider("eyeBlinkLeft", "Left lid", 0, 1, 0),
    Slider("eyeBlinkRight", "Right lid", 0, 1, 0),
)
TURNS = (
    Slider("yaw", "Turn", -30, 30, 0),
    Slider("pitch", "Nod", -25, 25, 0),
    Slider("roll", "Tilt", -30, 30, 0),
    Slider("gazeYaw", "Look aside", -30, 30, 0),
    Slider("gazePitch", "Look up", -20, 20, 0),
)
SCALES = (
    Slider("expression", "Expression", 0, 2, 1),
    Slider("jaw", "Jaw", 0, 2, 1),
    Slider("lids", "Lids", 0, 2, 1),
    Slider("gaze", "Gaze", 0, 2, 1),
    Slider("pose", "Head", 0, 2, 1),
)
SLIDERS = (*FACE, *TURNS, *SCALES)


@dataclasses.dataclass(frozen=True)
class AppOptions:
    head: Path | None = None
    """head asset (default: the built-in head)"""
    port: int = 7860
    """of the page"""
    preview: int = 384
    """pixels of the preview's longer side"""
    size: int = 1024
    """largest side of results, pixels"""


class Subject(NamedTuple):
    """A portrait, for results, and the small one of the preview."""

    portrait: Portrait
    preview: Preview


def settings_of(values: Sequence[int | float], camera_gaze: bool) -> tuple[Controls, dict[str, float]]:
    """Controls and sliders of the values of `SLIDERS`."""
    by_name = {slider.name: float(value) for slider, value in zip(SLIDERS, values, strict=True)}
    fields = {field.name for field in dataclasses.fields(Controls)}
    own: dict[str, Any] = {name: value for name, value in by_name.items() if name in fields}
    if camera_gaze:
        own["gaze"] = "camera"
    return Controls(**own), {name: value for name, value in by_name.items() if name not in fields and value}


class Studio:
    """What the page does, without the page. Errors of inputs are `ValueError` or `LandmarkError`."""

    def __init__(self, options: AppOptions, pipeline: GeometryPipeline, landmarker: Landmarker, folder: Path):
        self._options, self._pipeline, self._landmarker, self._folder = options, pipeline, landmarker, folder

    def take_portrait(self, path: str) -> Subject:
        """A picture file, made ready."""
        from loki_jax.geometry.preview import Preview
        from loki_jax.sources import fit_portrait
        from loki_jax.video import read_image
        from loki_jax.video.image import reduce_picture

        picture = read_image(path)
        whole, small = (
            fit_portrait(
                reduce_picture(picture, size), self._pipeline.head, self._pipeline.size,
                landmarker=self._landmarker, name="the portrait",
            )
            for size in (self._options.size, self._options.preview)
        )  # fmt: skip
        return Subject(whole, Preview(self._pipeline, small))

    def take_driver(self, path: str) -> DrivingClip:
        """A video file, fitted, with its neutral frame."""
        from loki_jax.sources import fit_clip

        head = self._pipeline.head
        clip = fit_clip(path, head, self._pipeline.size, landmarker=self._landmarker)
        return clip.with_neutral(head)

    def show(
        self,
        subject: Subject,
        clip: DrivingClip | None,
        frame: int,
        camera_gaze: bool,
        values: Sequence[int | float],
    ) -> np.ndarray:
        """The preview (h, w, 3)."""
        controls, sliders = settings_of(values, camera_gaze)
        return subject.preview(controls, sliders, clip, frame)

    def make_picture(
        self,
        subject: Subject,
        clip: DrivingClip | None,
        frame: int,
        camera_gaze: bool,
        values: Sequence[int | float],
    ) -> Path:
        """A PNG file of what the preview shows, at the size of results."""
        from loki_jax.geometry.preview import Preview
        from loki_jax.video import open_output

        picture = self.show(
            Subject(subject.portrait, Preview(self._pipeline, subject.portrait)),
            clip,
            frame,
            camera_gaze,
            values,
        )
        path = self._result("picture.png")
        with open_output(path, Fraction(25)) as writer:
            writer.write(picture)
        return path

    def make_video(
        self,
        subject: Subject,
        clip: DrivingClip,
        smooth: int | float,
        camera_gaze: bool,
        values: Sequence[int | float],
    ) -> Iterator[int | Path]:
        """Numbers of finished frames, then the MP4 file. Nothing is left of a video that is given up."""
        from loki_jax.video import open_output

        controls, sliders = settings_of(values, camera_gaze)
        controls, done = dataclasses.replace(controls, smooth=float(smooth)), 0
        path = self._result("animation.mp4")
        with open_output(path, clip.fps, audio_from=clip.source, audio_start=clip.start) as writer:
            for window in self._pipeline.windows(subject.portrait, clip, controls=controls, sliders=sliders):
                for frame in window.frames:
                    writer.write(frame)
                done += len(window.frames)
                yield done
        yield path

    def _result(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder)) / name


def build_page(studio: Studio) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    from loki_jax.fitting.model_files import LandmarkError

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        """Errors of inputs are shown on the page."""
        try:
            yield
        except (ValueError, LandmarkError) as error:
            raise gr.Error(str(error)) from error

    @told()
    def take_portrait(path: str | None) -> tuple[Subject | None, np.ndarray | None]:
        if path is None:
            return None, None
        subject = studio.take_portrait(path)
        return subject, studio.show(subject, None, 0, False, [slider.rest for slider in SLIDERS])

    @told()
    def take_driver(path: str | None) -> tuple[DrivingClip | None, Any]:
        if path is None:
            return None, gr.update(visible=False, value=0)
        clip = studio.take_driver(path)
        return clip, gr.update(visible=True, maximum=max(1, len(clip.valid) - 1), value=clip.neutral)

    @told()
    def show(
        subject: Subject | None,
        clip: DrivingClip | None,
        frame: int | float,
        camera: bool,
        *values: int | float,
    ) -> Any:
        return None if subject is None else studio.show(subject, clip, int(frame), camera, values)

    @told()
    def make_picture(
        subject: Subject | None,
        clip: DrivingClip | None,
        frame: int | float,
        camera: bool,
        *values: int | float,
    ):
        if subject is None:
            raise gr.Error("Give a portrait first.")
        return gr.update(
            value=str(studio.make_picture(subject, clip, int(frame), camera, values)), visible=True
        )

    def make_video(
        subject: Subject | None,
        clip: DrivingClip | None,
        smooth: int | float,
        camera: bool,
        *values: int | float,
    ):
        if subject is None or clip is None:
            raise gr.Error("Give a portrait and a driver first.")
        with told():
            for done in studio.make_video(subject, clip, smooth, camera, values):
                if isinstance(done, Path):
                    yield str(done), gr.update(value=str(done), visible=True), "Done."
                else:
                    yield gr.skip(), gr.skip(), f"{done} of {len(clip.valid)} frames"

    examples = importlib.resources.files("loki_jax") / "assets" / "examples"
    one_day = 86400  # seconds after which uploads and results are deleted
    with gr.Blocks(
        title="loki_jax", analytics_enabled=False, delete_cache=(3600, one_day), fill_width=True
    ) as page:
        gr.Markdown(
            "## loki_jax\nUse portraits and clips of people who agree to it. Results are tagged as "
            "synthetic. Everything stays on the machine that runs this program."
        )
        subject, clip = gr.State(), gr.State()
        with gr.Row():
            with gr.Column():
                portrait = gr.Image(
                    type="filepath", label="Portrait", sources=["upload", "webcam", "clipboard"], height=260,
                    elem_id="portrait",
                )  # fmt: skip
                gr.Examples([[str(examples / f"portrait_{i}.jpg")] for i in (1, 2)], portrait, label="")
                driver = gr.Video(label="Driver", sources=["upload", "webcam"], height=260, elem_id="driver")
                gr.Examples([[str(examples / "driver.mp4")]], driver, label="")
            with gr.Column():
                preview = gr.Image(
                    label="Preview", format="jpeg", interactive=False, buttons=["fullscreen"],
                    elem_id="preview",
                )  # fmt: skip
                frame = gr.Slider(
                    0, 1, 0, step=1, label="Frame of the driver", visible=False, elem_id="frame"
                )
                sliders = []
                for title, group, opened in (("Face", FACE, True), ("Head and eyes", TURNS, False),
                                             ("How much of the driver", SCALES, False)):  # fmt: skip
                    with gr.Accordion(title, open=opened), gr.Row():
                        sliders += [
                            gr.Slider(s.low, s.high, s.rest, label=s.label, step=(s.high - s.low) / 100,
                                      min_width=190, elem_id=s.name)
                            for s in group
                        ]  # fmt: skip
                camera = gr.Checkbox(False, label="Look into the camera")
                reset = gr.Button("Reset", size="sm")
            with gr.Column():
                smooth = gr.Slider(0, 200, 30, step=5, label="Smoothing, milliseconds of lag")
                with gr.Row():
                    make = gr.Button("Make video", variant="primary", elem_id="make-video")
                    stop = gr.Button("Stop")
                    still = gr.Button("Make picture", elem_id="make-picture")
                said = gr.Markdown(elem_id="said")
                result = gr.Video(label="Result", interactive=False, buttons=[], elem_id="result")
                download = gr.DownloadButton("Download", visible=False, elem_id="download")
        state = [subject, clip, frame, camera, *sliders]
        # The networks serve one caller at a time.
        networks: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1}
        portrait.change(take_portrait, portrait, [subject, preview], **networks)
        driver.change(take_driver, driver, [clip, frame], **networks).then(
            show, state, preview, show_progress="hidden"
        )
        changes = [camera.input, frame.input, *(slider.input for slider in sliders)]
        gr.on(changes, show, state, preview, show_progress="hidden", trigger_mode="always_last")
        reset.click(lambda: [slider.rest for slider in SLIDERS], None, sliders).then(show, state, preview)
        still.click(make_picture, state, download)
        making = make.click(make_video, [subject, clip, smooth, camera, *sliders], [result, download, said])
        stop.click(None, None, None, cancels=[making])
    return page


def run_app(options: AppOptions) -> None:
    """Serve the page until Ctrl-C. Raises the errors of its inputs."""
    from loki_jax.face.asset import load_head
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.geometry.pipeline import GeometryPipeline

    try:
        import gradio  # noqa: F401 (found missing here, before any work)
    except ImportError as error:
        raise ValueError(f"the page needs Gradio ({error}). Run `pip install loki_jax[app]`.") from error
    pipeline = GeometryPipeline(None if options.head is None else load_head(options.head))
    with tempfile.TemporaryDirectory() as folder:
        page = build_page(Studio(options, pipeline, default_landmarker(), Path(folder)))
        try:
            page.launch(server_name="127.0.0.1", server_port=options.port, share=False)
        except OSError as error:
            raise ValueError(f"port {options.port}: cannot be used. Give another --port.") from error


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(AppOptions, prog="python -m loki_jax.app", args=argv, description=__doc__)

    from loki_jax.program import run_program

    return run_program(run_app, options)


if __name__ == "__main__":
    sys.exit(main())
