"""The page with the stream, read as a browser reads it."""

import io
import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from loki_jax.video import MediaError
from loki_jax.video.page import Page


def parts(stream):
    """The pictures of a multipart stream."""
    while True:
        assert stream.readline() == b"--frame\r\n"
        length = 0
        while (line := stream.readline().strip()) != b"":
            if line.startswith(b"Content-Length: "):
                length = int(line.split()[1])
        yield Image.open(io.BytesIO(stream.read(length)))
        assert stream.readline() == b"\r\n"


def test_the_page_streams_what_is_shown():
    pressed = threading.Event()
    with Page(port=0, recentre=pressed.set) as page:
        page.show(np.full((24, 32, 3), 50, np.uint8), "following; 80 ms")
        html = urllib.request.urlopen(page.address).read().decode()
        assert 'src="stream"' in html and "Generated video" in html
        with urllib.request.urlopen(page.address + "stream") as stream:
            pictures = parts(stream)
            first = next(pictures)
            assert first.size == (32, 24) and abs(np.asarray(first).mean() - 50) < 2
            assert b"synthetic" in first.info["comment"]
            page.show(np.full((24, 32, 3), 200, np.uint8), "following; 90 ms")
            assert abs(np.asarray(next(pictures)).mean() - 200) < 2
        assert json.load(urllib.request.urlopen(page.address + "status")) == {"note": "following; 90 ms"}
        urllib.request.urlopen(urllib.request.Request(page.address + "recentre", method="POST"))
        assert pressed.is_set()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(page.address + "else")
        port = int(page.address.rstrip("/").rpartition(":")[2])
        with pytest.raises(MediaError, match=f"port {port}: cannot be used"):
            Page(port)
