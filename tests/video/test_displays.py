"""Where live frames are shown."""

import os
import sys
import types

import numpy as np
import pytest

from loki_jax.video import MediaError
from loki_jax.video.displays import VirtualCamera, Window

PICTURE = np.full((24, 32, 3), 90, np.uint8)


def test_a_window_shows_frames_and_can_be_closed():
    pytest.importorskip("tkinter", reason="needs a Python with Tk")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        pytest.skip("needs a desktop (`xvfb-run pytest`)")
    with Window() as window:
        for level in (10, 200):
            window.show(np.full_like(PICTURE, level), "following; 80 ms")
        shown = window._picture
        assert (shown.width(), shown.height()) == (32, 24) and window._root.title() == "following; 80 ms"
        assert not window.closed
        window._root.tk.call(*window._root.protocol("WM_DELETE_WINDOW").split())
        assert window.closed


def test_the_virtual_camera_gets_the_frames(monkeypatch):
    sent = []

    class Camera:
        def __init__(self, width, height, fps):
            self.size = (width, height)

        def send(self, picture):
            sent.append((self.size, picture))

        def close(self):
            sent.append("closed")

    monkeypatch.setitem(sys.modules, "pyvirtualcam", types.SimpleNamespace(Camera=Camera))
    with VirtualCamera() as camera:
        camera.show(PICTURE, "")
    assert sent == [((32, 24), PICTURE), "closed"]


def test_without_a_device_the_cure_is_named(monkeypatch):
    def missing(*_):
        raise RuntimeError("no device")

    monkeypatch.setitem(sys.modules, "pyvirtualcam", types.SimpleNamespace(Camera=missing))
    with (
        pytest.raises(MediaError, match="no virtual camera .no device.. Install OBS"),
        VirtualCamera() as camera,
    ):
        camera.show(PICTURE, "")
