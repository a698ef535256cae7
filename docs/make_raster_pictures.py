"""Draws the pictures of docs/rasteriser.md with the built-in head.

python docs/make_raster_pictures.py [--out docs/images]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from loki_jax import driver, raster
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import make_identity, mesh_faces, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients

SIZE = 256
_STATIC = ("size", "cull", "smooth_silhouettes", "supersample")
render = jax.jit(raster.render, static_argnames=_STATIC)
driver_map = jax.jit(driver.driver_map, static_argnames="size")
ndc_vertices = jax.jit(driver.ndc_vertices)


def scene(head, turn: float = 0.45):
    """Identity, coefficients of two frames (neutral, expressive), camera and crop box."""
    expression = np.zeros((2, head.n_expression), np.float32)
    for name in ("browInnerUp", "mouthSmileLeft", "mouthSmileRight"):
        expression[1, head.expression_names.index(name)] = 0.8
    zeros = jnp.zeros((2, 3))
    coefficients = Coefficients(
        shape=jnp.zeros((2, head.n_shape)),
        expression=jnp.asarray(expression),
        rot=jnp.tile(jnp.array([0.1, turn, 0.0]), (2, 1)),
        tra=jnp.tile(jnp.array([0.0, 0.0, -1.2]), (2, 1)),
        neck=zeros,
        jaw=jnp.array([[0.0, 0.0, 0.0], [0.25, 0.0, 0.0]]),
        eyes=zeros,
    )
    camera = Camera(jnp.array([600.0, 600.0, 256.0, 256.0]), jnp.eye(4))
    identity = jax.jit(make_identity)(head, coefficients.betas)

    shown = np.flatnonzero(np.asarray(mesh_render_mask(head)))

    @jax.jit
    def box(identity, coefficients, camera):
        world = world_vertices(head, identity, coefficients)
        pixels = project(camera_from_world(world, camera), camera)
        return crop_box(pixels[:, shown].reshape(-1, 2), scale=1.1)

    return identity, coefficients, camera, box(identity, coefficients, camera)


def panels(images, titles, path, columns=None, dpi=110, **show):
    """A sheet of pictures with titles."""
    columns = columns or len(images)
    rows = -(-len(images) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(columns * 2.1, rows * 2.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image, interpolation="nearest", **show)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)


def on_white(image, coverage):
    return np.clip(np.asarray(image) + (1 - np.asarray(coverage)[..., None]), 0, 1)


def shading(vertices, faces):
    """Grey per vertex from its normal in NDC, lit from the viewer's upper left."""
    corners = vertices[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    sums = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(sums, faces[:, k], normal)
    sums = sums / np.maximum(np.linalg.norm(sums, axis=-1, keepdims=True), 1e-20)
    light = np.array([0.4, 0.5, -0.8]) / np.linalg.norm([0.4, 0.5, -0.8])
    lit = np.abs(sums @ light)
    return np.tile((0.25 + 0.7 * lit)[:, None], (1, 3)).astype(np.float32)


def draw_channels(head, given, out):
    image = np.asarray(driver_map(head, *given, size=SIZE))[0]
    covered = (image != 0).any(-1)
    sheet, titles = [], []
    for axis, name in enumerate("xyz"):
        for part, offset in (("sin", 0), ("cos", 7)):
            for k in range(7):
                channel = np.where(covered, image[..., 14 * axis + offset + k], np.nan)
                sheet.append(channel[::2, ::2])
                titles.append(f"{14 * axis + offset + k}: {part} {2**k} {name}")
    panels(sheet, titles, out / "raster_channels.png", columns=7, dpi=70, cmap="RdBu", vmin=-1, vmax=1)


def draw_deformation(head, given, out):
    maps = np.asarray(driver_map(head, *given, size=SIZE))
    faces, vertices = np.asarray(mesh_faces(head)), np.asarray(ndc_vertices(head, *given))
    grey = np.stack([shading(v * [1, 1, 1 / 300], faces) for v in vertices])
    drawn = render(vertices, faces, grey, SIZE, smooth_silhouettes=True)
    plain = on_white(drawn.image, drawn.coverage)
    images = [plain[0], plain[1]]
    offsets = np.where((maps[1] != 0).any(-1)[..., None], maps[1, ..., 42:], np.nan)
    figure, axes = pyplot.subplots(1, 5, figsize=(11, 2.5), layout="constrained")
    for axis, image, title in zip(axes, images, ("neutral", "jaw, brows, smile"), strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=9)
    for axis, k, name in zip(axes[2:], range(3), ("x (subject's left)", "y (up)", "z (out)"), strict=True):
        shown = axis.imshow(offsets[..., k], cmap="RdBu", vmin=-1.5, vmax=1.5)
        axis.set_title(f"{42 + k}: {name}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.8, label="offset / 10.4 mm")
    figure.savefig(out / "raster_deformation.png", dpi=110)
    pyplot.close(figure)


def draw_culling(head, given, out):
    """A head without its front: the inside of its back is seen, or culled; and what masks leave."""
    faces, vertices = np.asarray(mesh_faces(head)), np.asarray(ndc_vertices(head, *given))[0]
    colours = shading(vertices * [1, 1, 1 / 300], faces)
    template = np.asarray(head.template)
    open_faces = faces[~(template[faces][:, :, 2] > 0.03).any(-1)]
    mask = template[:, 1] > -0.02
    draw = lambda mesh, **options: render(vertices, mesh, colours, SIZE, smooth_silhouettes=True, **options)
    results = [
        draw(faces),
        draw(open_faces, cull=False),
        draw(open_faces, cull=True),
        draw(faces, vertex_mask=mask),
    ]
    found = jax.jit(raster.rasterize, static_argnums=2)(vertices, faces, SIZE)
    images = [on_white(r.image, r.coverage) for r in results]
    palette = np.random.default_rng(3).uniform(0.2, 1, (len(faces), 3))
    ids = np.where(np.asarray(found.covered)[..., None], palette[np.asarray(found.face)], 1)
    depth = np.asarray(found.depth)
    seen = np.isfinite(depth)
    near, far = depth[seen].min(), depth[seen].max()
    depth = np.where(seen, 1 - 0.8 * (depth - near) / (far - near), 1)
    images += [ids, np.repeat(depth[..., None], 3, -1)]
    titles = ["whole head", "front cut away, cull=False", "the same, cull=True", "vertex_mask: upper half"]
    titles += ["face ids", "depth"]
    panels(images, titles, out / "raster_culling.png", columns=3)


def draw_antialias(head, given, out):
    faces, vertices = np.asarray(mesh_faces(head)), np.asarray(ndc_vertices(head, *given))[0]
    colours = shading(vertices * [1, 1, 1 / 300], faces)
    size = 40
    cases = [
        ("plain", {}),
        ("antialias", {"smooth_silhouettes": True}),
        ("supersample=2", {"supersample": 2}),
        ("both", {"smooth_silhouettes": True, "supersample": 2}),
        ("reference, supersample=16", {"supersample": 16}),
    ]
    images = []
    for _, options in cases:
        result = render(vertices, faces, colours, size, **options)
        images.append(on_white(result.image, result.coverage))
    panels(images, [name for name, _ in cases], out / "raster_antialias.png")


def draw_gradients(head, given, out):
    """What each pixel says to a shift of the mesh, against differences of a fine reference."""
    faces, vertices = np.asarray(mesh_faces(head)), np.asarray(ndc_vertices(head, *given))[0]
    colours = shading(vertices * [1, 1, 1 / 300], faces)[:, :1]
    size = 64
    right = jnp.asarray(np.tile(np.float32([-1, 0, 0]), (len(vertices), 1))) * (2 / size)

    def change(**options):
        draw = lambda v: raster.render(v, faces, colours, size, **options).image
        return np.asarray(jax.jit(lambda v: jax.jvp(draw, (v,), (right,))[1])(vertices))[..., 0]

    fine = lambda v: np.asarray(render(v, faces, colours, size, supersample=16).image)[..., 0]
    reference = fine(vertices + 0.5 * right) - fine(vertices - 0.5 * right)
    images = [
        fine(vertices) + (fine(vertices) == 0),
        change(),
        change(smooth_silhouettes=True),
        change(smooth_silhouettes=True, supersample=2),
        reference,
    ]
    titles = ["picture", "interpolation alone", "with antialias", "and supersample=2", "finite difference"]
    figure, axes = pyplot.subplots(1, 5, figsize=(11.5, 2.6), layout="constrained")
    for axis, image, title in zip(axes, images, titles, strict=True):
        limit, colours = ((0, 1), "gray") if title == "picture" else ((-0.5, 0.5), "RdBu")
        shown = axis.imshow(image, cmap=colours, vmin=limit[0], vmax=limit[1], interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.8, label="per pixel of shift to the right")
    figure.savefig(out / "raster_gradients.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    drawings = {
        "deformation": draw_deformation,
        "channels": draw_channels,
        "culling": draw_culling,
        "antialias": draw_antialias,
        "gradients": draw_gradients,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--only", nargs="+", choices=tuple(drawings), default=tuple(drawings))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = builtin_head()
    identity, coefficients, camera, crop = scene(head)
    neutral = lambda tree: jax.tree.map(lambda v: v[:1], tree)
    for name in arguments.only:
        both = name == "deformation"
        first = (identity, coefficients) if both else (neutral(identity), neutral(coefficients))
        drawings[name](head, (*first, camera, crop), arguments.out)


if __name__ == "__main__":
    main()
