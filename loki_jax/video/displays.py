"""Where live frames are shown: a window, or a virtual camera that other programs see. A page: `page`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from loki_jax.video.files import MediaError


@runtime_checkable
class Display(Protocol):
    """Shows frames one by one; a context manager. `closed`: somebody closed it."""

    closed: bool

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, picture: UInt8[np.ndarray, "h w 3"], note: str) -> None: ...


class Window:
    """A window of this desktop (Tk); the note is its title. The space bar calls `recentre`.

    Raises:
      MediaError: there is no desktop, or Python has no Tk.
    """

    def __init__(self, recentre: Callable[[], None] = lambda: None):
        try:
            import tkinter
        except ImportError as error:
            raise MediaError(
                f"--out window needs Tk ({error}). Install python3-tk, or use --out page."
            ) from error
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise MediaError(f"--out window needs a desktop ({error}). Use --out page.") from error
        self.closed = False
        self._picture: Any = None
        self._label = tkinter.Label(self._root)
        self._label.pack()
        self._root.bind("<space>", lambda _: recentre())
        self._root.protocol("WM_DELETE_WINDOW", self._close)

    def _close(self) -> None:
        self.closed = True

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._root.destroy()

    def show(self, picture: UInt8[np.ndarray, "h w 3"], note: str) -> None:
        """Show a frame."""
        from PIL import ImageTk

        if self._picture is None:  # kept here, since Tk keeps no reference
            self._picture = ImageTk.PhotoImage(Image.fromarray(picture))
            self._label.configure(image=self._picture)
        self._picture.paste(Image.fromarray(picture))
        self._root.title(note)
        self._root.update()


class VirtualCamera:
    """A camera for other programs, such as a video call, by pyvirtualcam; opened with the first frame.

    Raises:
      MediaError: pyvirtualcam or the device that it needs (OBS, or on Linux v4l2loopback) is missing.
    """

    closed = False

    def __init__(self, fps: float = 25.0):
        try:
            import pyvirtualcam
        except ImportError as error:
            raise MediaError(
                f"--out virtual needs pyvirtualcam ({error}). Run `pip install loki_jax[live]`."
            ) from error
        self._module, self._fps = pyvirtualcam, fps
        self._camera: Any = None

    def __enter__(self) -> VirtualCamera:
        return self

    def __exit__(self, *_: object) -> None:
        if self._camera is not None:
            self._camera.close()

    def show(self, picture: UInt8[np.ndarray, "h w 3"], note: str) -> None:
        """Send a frame."""
        if self._camera is None:
            height, width = picture.shape[:2]
            try:
                self._camera = self._module.Camera(width, height, self._fps)
            except RuntimeError as error:
                raise MediaError(
                    f"no virtual camera ({error}). Install OBS (on Linux v4l2loopback), or use --out page."
                ) from error
        self._camera.send(picture)
