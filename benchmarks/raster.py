"""The driver map against a plain copy of its bytes and against an all-pairs rasteriser.

    python benchmarks/raster.py [--quick] [--out cost.png]

A mesh of FLAME's size (5,223 vertices, 10,320 faces) covers about 40 % of a 512 x 512 frame. All
times of a ratio are taken in turns in this run; each ratio is one of medians. Compare only ratios:
absolute times depend on the machine. Every call writes over its own last result (a donated buffer), as
in a train step, where the map is an intermediate array. Without that, most of a copy's time on
a CPU are the operating system's, which hands out 47 MB of new pages; ratios so measured are
`map_over_copy_new_pages` and `all_pairs_over_ours_new_pages`. The last line of the output is one JSON
object:

  map_over_copy         full 45-channel float32 map over a jitted copy of an array of its size
  all_pairs_over_ours   the same map, its faces found by testing all faces at all pixels (the best of
                        three chunk sizes), over ours
  faces40k_over_10k     the map with four times the faces over the map
  peak_temp_mb          temporaries of 16 frames' maps, from the compiled program
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from loki_jax import driver, raster
from loki_jax.driver.encoding import EXPRESSION_SCALE

SIZE = 512
FLAME_VERTICES = 5223
MAIN_FACES = (60, 86)  # rings, sectors: 10,320 faces, FLAME's 9,976 and 340 of the inner mouth
FACES_40K = (120, 172)
FACE_COUNTS = {"1k": (20, 25), "3k": (35, 43), "10k": MAIN_FACES, "40k": FACES_40K, "100k": (190, 263)}
PIXEL_SIDES = (128, 256, 512, 1024)
BATCHES = (1, 4, 16)
CHUNKS = (4, 16, 64)  # faces that the all-pairs version tests at a time
COVERAGE = 0.4


def egg(rings: int, sectors: int, n_vertices: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A bumpy closed egg of 2 x rings x sectors faces over 40 % of the frame, in NDC.

    `n_vertices` pads with vertices that no face uses.
    """
    polar = np.pi * (np.arange(rings) + 0.5) / rings
    azimuth = 2 * np.pi * np.arange(sectors) / sectors
    direction = np.stack(
        [
            np.outer(np.sin(polar), np.cos(azimuth)),
            np.outer(np.cos(polar), np.ones(sectors)),
            np.outer(np.sin(polar), np.sin(azimuth)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    direction = np.concatenate([direction, [[0, 1, 0], [0, -1, 0]]])
    bumps = 1 + 0.02 * np.sin(11 * direction[:, 0] + 7 * direction[:, 1]) * np.sin(9 * direction[:, 2])
    # An ellipse of half axes a and 1.3 a covers pi 1.3 a^2 / 4 of the frame.
    half = np.sqrt(4 * COVERAGE / (np.pi * 1.3))
    vertices = direction * bumps[:, None] * half * [1, 1.3, 1] + [0, 0, 5]
    i, j = np.meshgrid(np.arange(rings - 1), np.arange(sectors), indexing="ij")
    a, b = i * sectors + j, i * sectors + (j + 1) % sectors
    a, b, c, d = (v.ravel() for v in (a, b, a + sectors, b + sectors))
    ring = np.arange(sectors)
    top, bottom = rings * sectors, rings * sectors + 1
    low = (rings - 1) * sectors
    faces = np.concatenate(
        [
            np.stack([a, b, c], -1),
            np.stack([b, d, c], -1),
            np.stack([np.full(sectors, top), (ring + 1) % sectors, ring], -1),
            np.stack([np.full(sectors, bottom), low + ring, low + (ring + 1) % sectors], -1),
        ]
    )
    spare = max((n_vertices or 0) - len(vertices), 0)
    return np.pad(vertices, ((0, spare), (0, 0))).astype(np.float32), faces.astype(np.int32)


def frames_of(vertices: np.ndarray, count: int) -> np.ndarray:
    """`count` slightly moved copies (count, V, 3)."""
    return vertices + 0.01 * np.random.default_rng(0).normal(size=(count, 1, 3)).astype(np.float32)


def our_map(vertices, faces, canonical, offsets, size: int):
    mask = jnp.ones(vertices.shape[-2], bool)
    inputs = driver.DriverInputs(faces, canonical, vertices, offsets)
    return driver.map_of_mesh(vertices, mask, inputs, size)


def all_pairs_faces(vertices, faces, size: int, chunk: int):
    """Nearest face at every pixel by testing every face at every pixel, `chunk` faces at a time."""
    centre = jnp.asarray(1 - (2 * np.arange(size) + 1) / size, jnp.float32)
    px, py = centre[None, :], centre[:, None]
    pad = -len(faces) % chunk
    corners = jnp.pad(vertices[faces], ((0, pad), (0, 0), (0, 0))).reshape(-1, chunk, 3, 3)

    def test_chunk(state, given):
        depth, best = state
        corner, number = given
        x, y, z = (corner[..., axis][..., None, None] for axis in range(3))  # (chunk, 3, 1, 1)
        area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (y[:, 1] - y[:, 0]) * (x[:, 2] - x[:, 0])
        edges = [
            (x[:, b] - x[:, a]) * (py - y[:, a]) - (y[:, b] - y[:, a]) * (px - x[:, a])
            for a, b in ((1, 2), (2, 0), (0, 1))
        ]
        inside = (area < 0) & (edges[0] <= 0) & (edges[1] <= 0) & (edges[2] <= 0)
        plane = sum(edge * z[:, k] for k, edge in enumerate(edges)) / jnp.where(area == 0, 1, area)
        plane = jnp.where(inside, plane, jnp.inf)
        nearest = jnp.argmin(plane, axis=0)
        value = jnp.min(plane, axis=0)
        closer = value < depth
        return (jnp.where(closer, value, depth), jnp.where(closer, number[nearest], best)), None

    start = jnp.full((size, size), jnp.inf, jnp.float32), jnp.full((size, size), -1, jnp.int32)
    numbers = jnp.arange(len(faces) + pad, dtype=jnp.int32).reshape(-1, chunk)
    (_, best), _ = jax.lax.scan(test_chunk, start, (corners, numbers))
    return best


def all_pairs_map(vertices, faces, canonical, offsets, size: int, chunk: int):
    face = all_pairs_faces(vertices, faces, size, chunk)
    fragments = raster.locate(vertices, faces, face)
    return driver.encode_map(fragments, driver.DriverInputs(faces, canonical, vertices, offsets))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(call, clock: str) -> float:
    start = CLOCKS[clock]()
    jax.block_until_ready(call())
    return CLOCKS[clock]() - start


def medians(calls: dict, repeats: int, clock: str) -> dict[str, float]:
    """Median seconds of each call, taken in turns after a first one that compiles."""
    for call in calls.values():
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, clock))
    return {name: float(np.median(values)) for name, values in times.items()}


def in_place(function, *arguments):
    """A call of the jitted function that writes over what it returned last."""
    step = jax.jit(lambda _, *given: function(*given), donate_argnums=0, keep_unused=True)
    result = [jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *arguments))]

    def call():
        result[0] = step(result[0], *arguments)
        return result[0]

    return call


def ready(size: int, mesh: tuple[int, int], batch: int | None = None):
    """Calls that draw the map of a mesh and that copy as many bytes, and the covered share."""
    vertices, faces = egg(*mesh, n_vertices=FLAME_VERTICES)
    rng = np.random.default_rng(1)
    canonical = jnp.asarray(driver.canonical_positions(jnp.asarray(vertices)))
    given = vertices if batch is None else frames_of(vertices, batch)
    offsets = rng.normal(size=given.shape).astype(np.float32) * EXPRESSION_SCALE
    arguments = (jnp.asarray(given), jnp.asarray(faces), canonical, jnp.asarray(offsets))
    draw = partial(our_map, size=size)
    fresh, copy = jax.jit(draw), jax.jit(jnp.copy)
    image = fresh(*arguments)
    covered = float((np.asarray(image[..., 7]) != 0).mean())
    calls = {
        "map": in_place(draw, *arguments),
        "copy": in_place(jnp.copy, image),
        "map_new_pages": lambda: fresh(*arguments),
        "copy_new_pages": lambda: copy(image),
    }
    return calls, covered


def map_figures(repeats: int, clock: str, size: int = SIZE) -> dict:
    """The map against a copy of its bytes, and with four times the faces."""
    calls, covered = ready(size, MAIN_FACES)
    calls["map_40k"] = ready(size, FACES_40K)[0]["map"]
    found = medians(calls, repeats, clock)
    return {
        "map_over_copy": found["map"] / found["copy"],
        "map_over_copy_new_pages": found["map_new_pages"] / found["copy_new_pages"],
        "faces40k_over_10k": found["map_40k"] / found["map"],
        "coverage": covered,
    }


def all_pairs_figures(repeats: int, clock: str, size: int = SIZE) -> dict:
    """The all-pairs map, with its best chunk size, against ours."""
    calls, _ = ready(size, MAIN_FACES)
    vertices, faces = egg(*MAIN_FACES, n_vertices=FLAME_VERTICES)
    vertices, faces = jnp.asarray(vertices), jnp.asarray(faces)
    arguments = (vertices, faces, driver.canonical_positions(vertices), jnp.zeros_like(vertices))
    draw = {chunk: partial(all_pairs_map, size=size, chunk=chunk) for chunk in CHUNKS}
    all_pairs = {chunk: in_place(draw[chunk], *arguments) for chunk in CHUNKS}
    # Once per chunk size to compile and once to find the best, then in turns with ours.
    for call in all_pairs.values():
        differs = np.abs(np.asarray(call()) - np.asarray(calls["map"]()))[..., :42].max(-1) > 1e-3
        if np.mean(differs) > 0.01:
            raise SystemExit("the two rasterisers draw different pictures: their times are not comparable")
    best = min(CHUNKS, key=lambda chunk: seconds(all_pairs[chunk], clock))
    fresh = jax.jit(draw[best])
    turns = {
        "all_pairs": all_pairs[best],
        "map": calls["map"],
        "all_pairs_new_pages": lambda: fresh(*arguments),
        "map_new_pages": calls["map_new_pages"],
        "search": in_place(partial(raster.nearest_faces, size=size), vertices, faces),
    }
    found = medians(turns, max(5, repeats // 3), clock)
    return {
        "all_pairs_over_ours": found["all_pairs"] / found["map"],
        "all_pairs_over_ours_new_pages": found["all_pairs_new_pages"] / found["map_new_pages"],
        "all_pairs_over_our_search": found["all_pairs"] / found["search"],
        "all_pairs_chunk": best,
        "search_share_of_map": found["search"] / found["map"],
    }


def peak_temporaries(frames: int = 16, size: int = SIZE) -> dict[str, float]:
    """Megabytes of temporaries of 16 frames' maps and of their fragments alone, from XLA's analysis."""
    vertices, faces = egg(*MAIN_FACES, n_vertices=FLAME_VERTICES)
    shape = jax.ShapeDtypeStruct((frames, *vertices.shape), jnp.float32)
    flat = jax.ShapeDtypeStruct(vertices.shape, jnp.float32)
    megabytes = lambda lowered: lowered.compile().memory_analysis().temp_size_in_bytes / 1e6
    whole = jax.jit(our_map, static_argnames="size").lower(shape, faces, flat, shape, size=size)
    fragments = jax.jit(raster.rasterize, static_argnames="size").lower(shape, faces, size=size)
    return {"peak_temp_mb": megabytes(whole), "peak_temp_fragments_mb": megabytes(fragments)}


def sweep(repeats: int, quick: bool, clock: str) -> list[dict]:
    """Map and copy over image sizes, meshes and batches, one at a time from the main case."""
    sides = PIXEL_SIDES[:2] if quick else PIXEL_SIDES
    meshes = ("1k", "10k") if quick else tuple(FACE_COUNTS)
    batches = BATCHES[:2] if quick else BATCHES
    base = 128 if quick else SIZE
    cases = [("pixels", side, MAIN_FACES, None) for side in sides]
    cases += [("faces", base, FACE_COUNTS[name], None) for name in meshes]
    cases += [("batch", 128 if quick else 256, MAIN_FACES, batch) for batch in batches]
    rows = []
    for what, side, mesh, batch in cases:
        calls, covered = ready(side, mesh, batch)
        found = medians({name: calls[name] for name in ("map", "copy")}, repeats, clock)
        row = {
            "sweep": what,
            "size": side,
            "faces": 2 * mesh[0] * mesh[1],
            "batch": batch or 1,
            "map_over_copy": found["map"] / found["copy"],
            "map_s": found["map"],
            "copy_s": found["copy"],
        }
        print(
            f"{what:7s} {side:5d} px {row['faces']:7d} faces {row['batch']:3d} frames, "
            f"{100 * covered:.0f} % covered: map / copy {row['map_over_copy']:.1f}",
            flush=True,
        )
        rows.append(row)
    return rows


def plot(rows: list[dict], path: str) -> None:
    """Cost against pixels and against faces, each over the cost at its first point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, what, label in zip(axes, ("pixels", "faces"), ("pixels", "faces"), strict=True):
        chosen = [row for row in rows if row["sweep"] == what]
        across = np.array([row["size"] ** 2 if what == "pixels" else row["faces"] for row in chosen])
        unit = chosen[0]["map_s"]
        axis.loglog(across, [row["map_s"] / unit for row in chosen], "o-", label="full map")
        axis.loglog(across, [row["copy_s"] / unit for row in chosen], "s-", label="copy of its bytes")
        axis.loglog(across, across / across[0], ":", color="grey", label=f"in proportion to {label}")
        axis.set(xlabel=label, ylabel="time over the first map's")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("10,320 faces", fontsize=10)
    axes[1].set_title(f"{chosen[0]['size']} x {chosen[0]['size']} pixels", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small images and few repeats: a smoke test")
    parser.add_argument("--out", help="file for the plot of cost against pixels and faces (.png)")
    parser.add_argument("--repeats", type=int, default=None, help="times each call is measured")
    parser.add_argument("--no-sweep", action="store_true", help="only the figures of the last line")
    clock_help = "cpu: processor time of this process, for machines that others use too"
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=clock_help)
    arguments = parser.parse_args()
    repeats = arguments.repeats or (3 if arguments.quick else 15)
    rows = [] if arguments.no_sweep else sweep(max(3, repeats // 2), arguments.quick, arguments.clock)
    if arguments.out:
        if not rows:
            parser.error("--out needs the sweep: leave out --no-sweep")
        plot(rows, arguments.out)
    size = 128 if arguments.quick else SIZE
    result = {"size": size, "clock": arguments.clock, "device": jax.devices()[0].device_kind}
    for part in (
        lambda: peak_temporaries(size=size),
        lambda: map_figures(repeats, arguments.clock, size),
        lambda: all_pairs_figures(repeats, arguments.clock, size),
    ):
        found = {key: round(v, 3) if isinstance(v, float) else v for key, v in part().items()}
        print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
        result |= found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
