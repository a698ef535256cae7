"""A page on this machine that shows frames as they come (MJPEG)."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from loki_jax.video.files import MediaError
from loki_jax.video.writer import SYNTHETIC_TAG

_BOUNDARY = "frame"
_QUALITY = 85
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>loki_jax live</title>
<style>
  body { background: #16181d; color: #e8e8e8; font: 16px sans-serif; text-align: center; margin: 2em }
  img { max-width: 95vw; max-height: 75vh; border-radius: 8px }
  button { font: inherit; padding: .5em 1em; border: 0; border-radius: 6px }
</style></head>
<body><img src="stream" alt="the portrait"><p id="note">waiting for frames</p>
<button onclick="fetch('recentre', {method: 'POST'})">This is my neutral face</button>
<p><small>Generated video.</small></p>
<script>
  setInterval(async () => { note.textContent = (await (await fetch('status')).json()).note }, 500)
</script></body></html>
"""


class Page:
    """Serves frames to browsers: a page at /, the stream at /stream, the note at /status. A context manager.

    Every browser gets the latest frame; a slow one misses some.

    Args:
      port: 0: any free one.
      recentre: called in another thread when the button of the page is pressed.

    Attributes:
      address: where the page is.
      closed: False; a page is open until the program ends.

    Raises:
      MediaError: the port is taken.
    """

    closed = False

    def __init__(self, port: int = 8765, recentre: Callable[[], None] = lambda: None):
        self._latest, self._number, self._note = b"", 0, "waiting for frames"
        self._change, self._ended = threading.Condition(), False
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    self._send("text/html; charset=utf-8", _PAGE.encode())
                elif self.path == "/status":
                    self._send("application/json", json.dumps({"note": page._note}).encode())
                elif self.path == "/stream":
                    self._stream()
                else:
                    self.send_error(404)

            def do_POST(self) -> None:
                if self.path != "/recentre":
                    self.send_error(404)
                    return
                recentre()
                self._send("text/plain", b"")

            def _send(self, kind: str, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                number = 0
                while (found := page._next(number)) is not None:
                    number, picture = found
                    head = (
                        f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    )
                    try:
                        self.wfile.write(head.encode() + picture + b"\r\n")
                    except OSError:  # the browser has gone
                        return

            def log_message(self, *_: object) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise MediaError(
                f"port {port}: cannot be used ({error.strerror}). Give another --port."
            ) from error
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Page:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._ended = True
            self._change.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def show(self, picture: UInt8[np.ndarray, "h w 3"], note: str) -> None:
        """Show a frame and a line of text."""
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "JPEG", quality=_QUALITY, comment=SYNTHETIC_TAG)
        with self._change:
            self._latest, self._number, self._note = encoded.getvalue(), self._number + 1, note
            self._change.notify_all()

    def _next(self, number: int) -> tuple[int, bytes] | None:
        """A frame later than that number; None when there are no more."""
        with self._change:
            self._change.wait_for(lambda: self._number > number or self._ended)
            return None if self._ended else (self._number, self._latest)
