"""Files that a batch of clips may hold by mistake, made on the spot, and what must become of each.

`CASES` maps a name to (maker, expected). The maker writes one file into a folder and returns its path.
`expected` is a pattern of the rejection's reason, or None where the clip must be built.
"""

import io
import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from tests.fitting.known_face import HEIGHT, RATE, WIDTH, N, frames_showing
from tests.video.test_hdr import pq_signal

SPEECH = list(range(N))
_ROTATION_90 = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)


def encode(path, frames, rate=RATE, codec="libx264", pixels="yuv420p", times=None, audio=False, **settings):
    """Write a video with the given codec; `settings` are set on the codec context."""
    options = settings.pop("options", {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = pixels
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for index, image in enumerate(frames):
            mode = {2: "gray", 3: "rgb24", 4: "rgba"}[image.ndim if image.ndim == 2 else image.shape[-1]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=mode)
            frame.pts = index if times is None else int(times[index] * 1000)
            frame.time_base = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            samples = np.zeros((1, 1024), np.float32)
            for index in range(10):
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, index * 1024
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def video(name, indices=SPEECH, change=lambda frames: frames, **options):
    """A maker of a clip that shows the frames `indices` of the known face."""

    def make(folder):
        return encode(folder / name, change(np.array(frames_showing(indices))), **options)

    return make


def bt2020_light(frames):
    """Light of sRGB frames, with the primaries of BT.2020; 1 is white."""
    values = frames / 255.0
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    return light @ matrix.T


def as_pq(frames):
    """sRGB frames as PQ signals, their white at 203 candela a square metre."""
    return np.rint(255 * pq_signal(203 * bt2020_light(frames))).astype(np.uint8)


def as_hlg(frames):
    """sRGB frames as HLG signals (ITU-R BT.2100), their white at three quarters, 203 candela of 1000."""
    display = 0.203 * bt2020_light(frames)
    luminance = np.maximum(display @ [0.2627, 0.6780, 0.0593], 1e-6)[..., None]
    scene = display * luminance ** (1 / 1.2 - 1)
    high = 0.17883277 * np.log(np.maximum(12 * scene, 1) - 0.28466892) + 0.55991073
    return np.rint(255 * np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)).astype(np.uint8)


def raw(name, data):
    def make(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return make


def damaged(name, damage, **options):
    """A maker of a good clip whose bytes were changed."""

    def make(folder):
        path = video(name, **options)(folder)
        data = damage(bytearray(path.read_bytes()))
        path.write_bytes(bytes(data))
        return path

    return make


def picture(name, mode="RGB", size=(WIDTH, HEIGHT), **options):
    def make(folder):
        Image.new(mode, size).save(folder / name, **options)
        return folder / name

    return make


def turned_right():
    """EXIF data that ask for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def sound_only(name, cover=False):
    def make(folder):
        with av.open(str(folder / name), "w") as container:
            sound = container.add_stream("aac", rate=16000)
            if cover:
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32)).save(buffer, "JPEG")
                image = container.add_stream("mjpeg", rate=1)
                image.width = image.height = 32
                image.pix_fmt = "yuvj420p"
                image.disposition = av.stream.Disposition.attached_pic
                packet = av.Packet(buffer.getvalue())
                packet.stream, packet.pts, packet.dts, packet.time_base = image, 0, 0, Fraction(1, 1)
                container.mux(packet)
            for index in range(20):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                frame.sample_rate, frame.pts = 16000, index * 1024
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        return folder / name

    return make


def rotated(name, matrix=_ROTATION_90):
    """A clip whose container says that it is to be turned; the stored frames are turned the other way."""

    def turn(data):
        # The track header's matrix is the only place where it stands.
        at = data.index(b"tkhd") + 4
        version = data[at]
        matrix_at = at + (52 if version == 1 else 40)
        data[matrix_at : matrix_at + 36] = struct.pack(">9i", *matrix)
        return data

    return damaged(name, turn, change=lambda frames: np.rot90(frames, 1, axes=(1, 2)))


def linked(name):
    def make(folder):
        (folder / name).symlink_to(folder / "nowhere.mp4")
        return folder / name

    return make


def a_folder(name):
    def make(folder):
        (folder / name).mkdir()
        return folder / name

    return make


def changing_size(name):
    """Two H.264 streams of different size, one after the other."""

    def make(folder):
        parts = []
        for index, scale in enumerate((1, 2)):
            frames = np.repeat(np.repeat(frames_showing(SPEECH[:8]), scale, 1), scale, 2)
            part = encode(folder / f"part{index}.h264", frames)
            parts.append(part.read_bytes())
            part.unlink()
        (folder / name).write_bytes(b"".join(parts))
        return folder / name

    return make


def bigger(frames, height, width):
    """The frames in the corner of a larger one of the same grey."""
    return np.pad(frames, ((0, 0), (0, height - HEIGHT), (0, width - WIDTH), (0, 0)), mode="edge")


def alpha(frames, value=255):
    return np.concatenate([frames, np.full((*frames.shape[:3], 1), value, np.uint8)], axis=-1)


def zeroed(data, start, stop):
    first, last = int(start * len(data)), int(stop * len(data))
    data[first:last] = bytes(last - first)
    return data


GONE, READ = r"no face found", None
SHORT = r"visible for \d+ frames in a row"
UNREADABLE = r"not a readable video|truncated|damaged|holds no frames|no video track"

CASES = {
    # Not a video at all.
    "zero bytes": (raw("zero.mp4", b""), r"empty \(0 bytes\)"),
    "one byte": (raw("one.mp4", b"x"), UNREADABLE),
    "random bytes": (raw("noise.mp4", np.random.default_rng(0).bytes(5000)), UNREADABLE),
    "text called mp4": (raw("text.mp4", b"not a video\n" * 100), UNREADABLE),
    "web page called mp4": (raw("page.mp4", b"<!DOCTYPE html><html>404</html>"), UNREADABLE),
    "json called mov": (raw("data.mov", b'{"a": 1}'), UNREADABLE),
    "zip called mp4": (raw("zip.mp4", b"PK\x03\x04" + bytes(200)), UNREADABLE),
    "pdf called mkv": (raw("pdf.mkv", b"%PDF-1.7\n" + bytes(300)), UNREADABLE),
    "zeros": (raw("zeros.mp4", bytes(4096)), UNREADABLE),
    "folder called mp4": (a_folder("folder.mp4"), r"a folder without pictures"),
    "broken link": (linked("link.mp4"), r"no such video file"),
    "audio only": (sound_only("sound.mp4"), r"no video track, only audio"),
    "audio with a cover picture": (sound_only("cover.mp4", cover=True), r"no video track, only audio"),
    # Pictures.
    "png picture": (picture("still.png"), SHORT + "|" + GONE),
    "jpeg picture": (picture("still.jpg"), SHORT + "|" + GONE),
    "png called mp4": (
        picture("still.mp4", size=(64, 64), format="PNG"), SHORT + "|" + GONE + "|" + UNREADABLE,
    ),
    "16-bit picture": (picture("deep.png", mode="I;16"), SHORT + "|" + GONE),
    "portrait with EXIF rotation": (picture("exif.jpg", exif=turned_right()), SHORT + "|" + GONE),
    "gif of one picture": (picture("still.gif", mode="L"), SHORT + "|" + GONE),
    # Damage.
    "first half": (damaged("half.mp4", lambda d: d[: len(d) // 2]), UNREADABLE),
    "first tenth": (damaged("tenth.mp4", lambda d: d[: len(d) // 10]), UNREADABLE),
    "last half": (damaged("tail.mp4", lambda d: d[len(d) // 2 :]), UNREADABLE),
    "half of a Matroska file": (damaged("half.mkv", lambda d: d[: len(d) // 2]), UNREADABLE),
    "half of an AVI file": (
        damaged("half.avi", lambda d: d[: len(d) // 2], codec="mpeg4"), UNREADABLE + "|" + SHORT,
    ),
    "header zeroed": (damaged("head.mp4", lambda d: zeroed(d, 0, 0.02)), UNREADABLE),
    "index zeroed": (damaged("index.mp4", lambda d: zeroed(d, 0.7, 1)), UNREADABLE),
    "pictures zeroed": (
        damaged("blank.mp4", lambda d: zeroed(d, 0.4, 0.5)), r"damaged after \d+ frames",
    ),
    "box sizes garbled": (
        damaged("boxes.mp4", lambda d: d[:1000] + b"\xff" * 200 + d[1200:]), UNREADABLE + "|" + SHORT,
    ),
    "garbage behind the end": (damaged("more.mp4", lambda d: d + b"garbage" * 50), READ),
    "size changes on the way": (changing_size("sizes.h264"), r"changes size from 128x96 to 256x192"),
    # Time.
    "one frame": (video("single.mp4", [3]), SHORT + r"|no face"),
    "two frames": (video("two.mp4", [3, 4]), SHORT),
    "too short by one": (video("short.mp4", SPEECH[:-1]), SHORT),
    "variable frame rate": (
        video("variable.mkv", SPEECH, times=[0.04 * i + 0.012 * (i % 3 == 1) for i in range(N)]), READ,
    ),
    "pauses of a screen recording": (
        video("screen.mkv", SPEECH[:8], times=[0, 0.04, 0.2, 0.24, 0.5, 0.54, 0.7, 0.74]), READ,
    ),
    "50 frames a second": (video("fast.mp4", np.repeat(SPEECH, 2), rate=Fraction(50)), READ),
    "29.97 frames a second": (
        video("ntsc.mp4", np.arange(20) * N // 20, rate=Fraction(30000, 1001)), READ,
    ),
    "one frame a second": (video("slow.mp4", [7, 8], rate=Fraction(1)), READ),
    "starts in the middle of time": (
        video("late.mkv", SPEECH, times=[100 + 0.04 * i for i in range(N)]), READ,
    ),
    # Who is to be seen.
    "no face": (video("nobody.mp4", [-1] * N), GONE),
    "face comes late": (video("entrance.mp4", [-1] * 6 + SPEECH), READ),
    "face leaves": (video("exit.mp4", SPEECH[:8] + [-1] * 12), SHORT),
    "face comes and goes": (video("flicker.mp4", ([-1] * 4 + SPEECH[:4]) * 4), SHORT),
    "white": (video("white.mp4", change=lambda f: np.full_like(f, 255)), GONE),
    "two files with the same content": (video("again.mp4", SPEECH), r"has the same content as good1.mp4"),
    # Pixels.
    "odd size": (
        video("odd.mkv", change=lambda f: bigger(f, HEIGHT + 1, WIDTH + 1), codec="ffv1", pixels="bgr0"),
        READ,
    ),
    "8K": (
        video("8k.mp4", SPEECH[:4], change=lambda f: bigger(f, 4320, 7680), codec="mpeg4"),
        SHORT,
    ),
    "portrait format": (video("tall.mp4", change=lambda f: bigger(f, 256, WIDTH)), READ),
    "grayscale": (video("grey.mkv", change=lambda f: f, codec="ffv1", pixels="gray"), READ),
    "16-bit": (video("deep.mkv", codec="ffv1", pixels="gray16le"), READ),
    "10-bit": (
        video("ten.mp4", codec="libx265", pixels="yuv420p10le", options={"x265-params": "log-level=none"}),
        READ,
    ),
    "4:4:4": (video("full.mp4", pixels="yuv444p"), READ),
    "alpha": (video("alpha.mov", change=alpha, codec="qtrle", pixels="argb"), READ),
    "all transparent": (
        video("clear.mov", change=lambda f: alpha(f, 0), codec="qtrle", pixels="argb"), GONE,
    ),
    "turned by a flag": (rotated("turned.mp4"), READ),
    "pixels that are not square": (
        video("wide.mp4", change=lambda f: f[:, :, ::2], sample_aspect_ratio=Fraction(2, 1)), READ,
    ),
    "HDR10": (video("pq.mp4", change=as_pq, color_trc=16, color_primaries=9, colorspace=9), READ),
    "HLG": (video("hlg.mp4", change=as_hlg, color_trc=18, color_primaries=9, colorspace=9), READ),
    "limited and full range": (video("range.mp4", pixels="yuvj420p"), READ),
    "with sound": (video("sound_too.mp4", audio=True), READ),
    "other suffix": (video("clip.webm", codec="libvpx-vp9", options={"deadline": "realtime"}), READ),
    "capital suffix": (video("CLIP.MP4", [1, *SPEECH]), READ),
    "name with spaces and accents": (video("été à la mer 100%.mp4", [2, 1, *SPEECH]), READ),
}  # fmt: skip
