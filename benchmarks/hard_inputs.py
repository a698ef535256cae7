"""Hard and bad portraits through `animate`: a sensible picture, or one clear message.

    python benchmarks/hard_inputs.py --portraits A.jpg B.jpg ... --clip CLIP --out FOLDER

Every portrait as it is, and the first one changed: cut at the border, tiny, huge, grey, transparent, upside
down, blurred, dark, damaged and so on. Each is animated by the geometry renderer at eight times spread over
the clip. FOLDER gets one contact sheet for each that is animated. A traceback is a failure. The last line is
one JSON object.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.data.schema import DatasetError
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.problem import FitError
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import retarget_clip
from loki_jax.sources import fit_clip, fit_portrait
from loki_jax.video import MediaError

OURS = (MediaError, LandmarkError, FitError, DatasetError)
FRAMES = 8


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scaled(image: Image.Image, side: int) -> Image.Image:
    factor = side / max(image.size)
    return image.resize([max(1, round(s * factor)) for s in image.size], Image.Resampling.LANCZOS)


def variants(image: Image.Image, box: tuple[float, float, float, float]) -> dict[str, bytes]:
    """Files by name; `box` is around the head: x0, y0, x1, y1."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    png = lambda picture: encoded(picture, "PNG")
    crop = lambda *edges: png(image.crop([round(e) for e in edges]))
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.radial_gradient("L").resize(image.size))
    wide = Image.new("RGB", (6 * image.width, image.height), (90, 120, 90))
    wide.paste(image, (4 * image.width, 0))
    masked = image.copy()
    masked.paste((60, 90, 160), [round(v) for v in (x0, y0 + 0.55 * height, x1, y1)])
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return {
        "cut at the left.png": crop(x0 + 0.35 * width, 0, image.width, image.height),
        "cut at the top.png": crop(0, y0 + 0.3 * height, image.width, image.height),
        "face alone.png": crop(x0 + 0.2 * width, y0 + 0.2 * height, x1 - 0.2 * width, y1 - 0.1 * height),
        "face of 64 pixels.png": png(scaled(image, round(64 * max(image.size) / width))),
        "12 pixels.png": png(scaled(image, 12)),
        "6000 pixels.jpg": encoded(scaled(image, 6000), "JPEG"),
        "panorama.jpg": encoded(wide, "JPEG"),
        "grey.png": png(image.convert("L")),
        "grey, 16 bits.png": png(grey16),
        "CMYK.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "alpha.png": png(alpha),
        "upside down.png": png(image.rotate(180)),
        "on its side.png": png(image.rotate(90, expand=True)),
        "mirrored.png": png(ImageOps.mirror(image)),
        "blurred.png": png(image.filter(ImageFilter.GaussianBlur(width / 40))),
        "dark.png": png(image.point(lambda v: v // 8)),
        "contours.png": png(image.convert("L").filter(ImageFilter.CONTOUR)),
        "covered mouth.png": png(masked),
        "noise.png": png(Image.fromarray(noise)),
        "no face.png": png(Image.new("RGB", (400, 300), (120, 130, 140))),
        "cut file.jpg": encoded(image, "JPEG")[:3000],
        "empty.png": b"",
        "text.png": b"not a picture",
    }


def outcome(path: Path, animate: Callable[[Path], np.ndarray], out: Path) -> str:
    """ "animated", or the message of an error of ours; anything else is raised."""
    try:
        frames = animate(path)
    except OURS as error:
        return str(error)
    scaled(Image.fromarray(np.concatenate(list(frames), axis=1)), 2400).save(out / f"{path.stem}.png")
    return "animated"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--portraits", type=Path, nargs="+", required=True)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    enable_compile_cache()
    (args.out / "inputs").mkdir(parents=True, exist_ok=True)
    pipeline = GeometryPipeline()
    clip = fit_clip(args.clip, pipeline.head, 256)
    clip = clip.with_neutral(pipeline.head)
    spread = np.linspace(0, len(clip.frames) - 1, FRAMES).round().astype(int)

    def animate(path: Path) -> np.ndarray:
        portrait = fit_portrait(str(path), pipeline.head, pipeline.size)
        target = retarget_clip(pipeline.head, clip, portrait)
        return pipeline.prepare(portrait)(jax.tree.map(lambda x: jnp.asarray(x)[spread], target))

    first = args.portraits[0]
    image = Image.open(first).convert("RGB")
    head = fit_portrait(str(first), pipeline.head, pipeline.size)
    paths = list(args.portraits)
    for name, content in variants(image, tuple(map(float, head.crop))).items():
        paths.append(args.out / "inputs" / name)
        paths[-1].write_bytes(content)
    results = {}
    for path in paths:
        results[path.name] = outcome(path, animate, args.out)
        print(f"{path.name}: {results[path.name]}", flush=True)
    animated = sum(result == "animated" for result in results.values())
    print(json.dumps({"inputs": len(results), "animated": animated, "refused": len(results) - animated}))


if __name__ == "__main__":
    main()
