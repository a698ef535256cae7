"""The page: what its buttons and sliders do, and a browser that uses it."""

import importlib.resources
import shutil
import time

import jax
import numpy as np
import pytest
from PIL import Image

from loki_jax.app import FACE, SLIDERS, AppOptions, Studio, build_page, main, settings_of
from loki_jax.face.builtin import builtin_head
from loki_jax.face.controls import Controls, check_sliders
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import Window, retarget_clip
from loki_jax.video import LazyFrames, is_tagged_synthetic, read_image, write_video
from tests.fitting.known_face import RATE, KnownFace, N, frames_showing, true_coefficients, true_points

EXAMPLES = importlib.resources.files("loki_jax") / "assets" / "examples"
REST = [slider.rest for slider in SLIDERS]


class Painter(GeometryPipeline):
    """Paints the head's yaw as a grey value."""

    def prepare(self, portrait, relight=False, grid=None):
        def render(target):
            turned = np.degrees(np.asarray(target.rot)[:, 1] - np.asarray(portrait.coefficients.rot)[1])
            level = np.clip(100 + 4 * turned, 0, 255).astype(np.uint8)
            return np.broadcast_to(level[:, None, None, None], (len(level), *portrait.picture.shape))

        return render

    def windows(self, portrait, clip, **options):
        moved = retarget_clip(self.head, clip, portrait, **options)
        for start in range(0, len(clip.valid), 16):
            part = jax.tree.map(lambda x, start=start: x[start : start + 16], moved)
            frames = self.prepare(portrait)(part)
            yield Window(frames, frames[:, :8, :8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    Image.fromarray(frames_showing([0])[0]).save(folder / "portrait.png")
    write_video(folder / "clip.mp4", frames_showing(range(N)), RATE)
    return folder


@pytest.fixture(scope="module")
def studio(folder):
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    return Studio(AppOptions(preview=64, size=128), Painter(head), networks, folder)


@pytest.fixture(scope="module")
def subject(studio, folder):
    return studio.take_portrait(str(folder / "portrait.png"))


@pytest.fixture(scope="module")
def clip(studio, folder):
    return studio.take_driver(str(folder / "clip.mp4"))


def values(**changed):
    return [changed.get(slider.name, slider.rest) for slider in SLIDERS]


def test_sliders_are_controls_or_names_of_the_head():
    assert settings_of(REST, False) == (Controls(), {})
    controls, sliders = settings_of(values(pose=0.5, yaw=10, smile=0.4, gazeYaw=-5), True)
    assert controls == Controls(pose=0.5, yaw=10.0, gaze="camera") and sliders == {
        "smile": 0.4,
        "gazeYaw": -5,
    }
    check_sliders(builtin_head(), {slider.name: 1.0 for slider in FACE})


def test_the_preview_follows_sliders_and_the_drivers_frame(studio, subject, clip):
    still = studio.show(subject, None, 0, False, REST)
    assert still.shape == (48, 64, 3) and abs(int(still[0, 0, 0]) - 100) < 2
    assert int(studio.show(subject, None, 0, False, values(yaw=20))[0, 0, 0]) == pytest.approx(180, abs=3)
    shown = [int(studio.show(subject, clip, frame, False, REST)[0, 0, 0]) for frame in range(N)]
    assert shown[clip.neutral] == pytest.approx(100, abs=2) and np.ptp(shown) > 60
    frozen = [int(studio.show(subject, clip, frame, False, values(pose=0))[0, 0, 0]) for frame in (0, N - 1)]
    assert frozen == [100, 100]


def test_results_are_whole_tagged_files(studio, subject, clip):
    picture = studio.make_picture(subject, None, 0, False, values(yaw=20))
    assert is_tagged_synthetic(picture) and read_image(picture).shape == (96, 128, 3)
    *counts, video = studio.make_video(subject, clip, 0.0, False, values(pose=0.5))
    frames = LazyFrames(video)
    assert counts == [N] and len(frames) == N and frames.fps == RATE and is_tagged_synthetic(video)
    levels = [float(frame.mean()) for frame in frames]
    expected = [float(studio.show(subject, clip, k, False, values(pose=0.5)).mean()) for k in range(N)]
    np.testing.assert_allclose(levels, expected, atol=4)


def test_a_video_that_is_given_up_leaves_nothing(studio, subject, clip, folder):
    before = {path for path in folder.rglob("*") if path.is_file()}
    making = studio.make_video(subject, clip, 0.0, False, REST)
    next(making)
    making.close()
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_the_page_is_built_and_says_what_is_missing(studio, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="needs the app extra (Gradio)")
    page = build_page(studio)
    labels = {block.label for block in page.blocks.values() if hasattr(block, "label")}
    assert {slider.label for slider in SLIDERS} <= labels
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main([]) == 1
    assert "pip install loki_jax[app]" in capsys.readouterr().err


# --- a browser -------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs Chromium and ChromeDriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "window-size=1500,1150",
    ):
        options.add_argument(f"--{argument}")  # fmt: skip
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_a_person_uploads_slides_generates_and_downloads(browser, landmarker, tmp_path):
    """docs/images/app.jpg is its last screenshot."""
    pytest.importorskip("gradio", reason="needs the app extra (Gradio)")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page = build_page(Studio(AppOptions(), GeometryPipeline(), landmarker, tmp_path))
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)

    def find(selector, seconds=30):
        return WebDriverWait(browser, seconds).until(lambda b: b.find_elements(By.CSS_SELECTOR, selector))[0]

    def preview():
        return find("#preview img", 240).get_attribute("src")

    def slide(name, value):
        """Move a slider; seconds until the preview is another one."""
        before, began = preview(), time.perf_counter()
        browser.execute_script(
            "const [slider, value] = arguments; slider.value = value;"
            "for (const name of ['input', 'pointerup'])"
            "  slider.dispatchEvent(new Event(name, {bubbles: true}))",
            find(f"#{name} input[type=range]"), str(value),
        )  # fmt: skip
        WebDriverWait(browser, 60, poll_frequency=0.01).until(lambda _: preview() != before)
        return time.perf_counter() - began

    try:
        browser.get(address)
        find("#portrait input[type=file]").send_keys(str(EXAMPLES / "portrait_2.jpg"))
        preview()
        slide("smile", 0.2)  # compiles what is left
        seconds = [slide("smile", value) for value in (0.8, 0.6, 0.4, 0.3)]
        print("seconds from slider to preview:", seconds)
        find("#driver input[type=file]").send_keys(str(EXAMPLES / "driver.mp4"))
        WebDriverWait(browser, 120).until(lambda _: find("#frame").is_displayed())
        slide("frame", 33)
        find("#make-video").click()
        WebDriverWait(browser, 300).until(lambda _: find("#said").text == "Done.")
        find("#result video")
        time.sleep(2)  # the picture of the video
        browser.save_screenshot(str(tmp_path / "page.png"))
        find("#download").click()
        files = lambda: list((tmp_path / "downloads").glob("*.mp4"))
        WebDriverWait(browser, 30).until(lambda _: files())
        assert len(LazyFrames(files()[0])) == 64 and is_tagged_synthetic(files()[0])
        assert np.median(seconds) < 0.3, seconds
    finally:
        page.close()
