"""Colours, light and background for the built-in head.

An `Appearance` is everything that turns coefficients into pixels besides geometry: it is a pytree, so
renders can be jitted, batched and differentiated. Identities come from an integer seed through
numpy's PCG64, so every machine and process draws the same ones; `sample_shape` and
`sample_appearance` of one seed belong together (hair has volume in the first and colour in the
second). `loki_jax.synthetic.shading.render` draws them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from loki_jax.arrays import ArrayLike
from loki_jax.face import builtin
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import BuiltinMesh, bump, hairline, smoothstep


class Appearance(NamedTuple):
    """The look of a head under one lighting; colours are linear factors in [0, 1] display units.

    Attributes:
      albedo: colour of each vertex, occlusion in creases and mouth included.
      light: unit vector from the head towards the lamp, world frame (it does not turn with the head).
      ambient, diffuse: colours of the light from everywhere and from the lamp.
      background: two colours that the wave blends.
      background_wave: (wx, wy, phase): blend 0.5 + 0.5 sin(wx x + wy y + phase), x and y in [-1, 1]
        over the crop (+x left, +y up); slow waves are plain gradients.
    """

    albedo: Float[ArrayLike, "*b V 3"]
    light: Float[ArrayLike, "*b 3"]
    ambient: Float[ArrayLike, "*b 3"]
    diffuse: Float[ArrayLike, "*b 3"]
    background: Float[ArrayLike, "*b 2 3"]
    background_wave: Float[ArrayLike, "*b 3"]


class _Style(NamedTuple):
    """Hair of one identity: cut and volume, drawn from a stream of its own."""

    cut: str  # "bald", "short", "receding", "fringe" or "long"
    top: float  # coefficients of the hair axes
    sides: float
    length: float


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Independent PCG64 streams of one identity: 0 style, 1 shape, 2 appearance."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(seed), stream])))


def _sample_style(seed: int) -> _Style:
    rng = _generator(seed, 0)
    cuts = ("bald", "short", "receding", "fringe", "long")
    cut = cuts[int(np.searchsorted([0.10, 0.42, 0.52, 0.74], rng.random()))]
    u = rng.random(3)
    if cut == "bald":
        return _Style(cut, -0.3, -0.3, -0.3)
    if cut == "receding":
        return _Style(cut, 0.2 + 0.8 * u[0], 0.3 + 1.0 * u[1], -0.3)
    length = -0.2
    if cut == "long":
        length = 1.2 + 1.6 * u[2]
    elif cut == "fringe" and u[2] > 0.6:
        length += u[2]
    return _Style(cut, 0.4 + 2.4 * u[0] ** 1.5, 0.3 + 2.0 * u[1], length)


def sample_shape(seed: int, head: HeadAsset) -> Float[np.ndarray, " n_shape"]:
    """Identity coefficients of an identity seed: standard normal, clipped at 2.2, with the hair of its cut.

    Raises:
      ValueError: `head` is not the built-in head.
    """
    _require_builtin(head)
    style = _sample_style(seed)
    shape = np.clip(_generator(seed, 1).standard_normal(head.n_shape), -2.2, 2.2)
    for name, value in (("hair_top", style.top), ("hair_sides", style.sides), ("hair_length", style.length)):
        shape[head.shape_names.index(name)] = value
    return shape.astype(np.float32)


# Palettes (display colours); a draw blends two neighbours.
_SKIN = np.array([
    (0.96, 0.81, 0.73), (0.91, 0.73, 0.62), (0.83, 0.62, 0.49),
    (0.70, 0.49, 0.36), (0.52, 0.34, 0.24), (0.35, 0.22, 0.16),
])  # fmt: skip

_HAIR = np.array([
    (0.05, 0.04, 0.05), (0.13, 0.08, 0.06), (0.27, 0.16, 0.09),
    (0.45, 0.20, 0.10), (0.60, 0.43, 0.24), (0.82, 0.68, 0.42),
])  # fmt: skip

_GREY_HAIR = np.array([(0.38, 0.38, 0.40), (0.62, 0.62, 0.64), (0.86, 0.85, 0.83)])

_DYED_HAIR = np.array([(0.20, 0.28, 0.62), (0.62, 0.20, 0.42), (0.18, 0.46, 0.36), (0.68, 0.14, 0.12)])

_IRIS = np.array([
    (0.16, 0.09, 0.05), (0.36, 0.21, 0.09), (0.36, 0.38, 0.16),
    (0.30, 0.46, 0.36), (0.26, 0.44, 0.62), (0.46, 0.52, 0.56),
])  # fmt: skip


def _blend(palette, position):
    """Colour at `position` in [0, 1] along a palette."""
    at = position * (len(palette) - 1)
    low = min(int(at), len(palette) - 2)
    return palette[low] + (at - low) * (palette[low + 1] - palette[low])


def _hue(rng, low, high):
    """A colour of random hue with value in [low, high]."""
    value = low + (high - low) * rng.random()
    saturation, angle = 0.75 * rng.random(), 2 * np.pi * rng.random()
    wheel = 0.5 + 0.5 * np.cos(angle - np.array([0.0, 2.0, 4.0]) * np.pi / 3)
    return value * (1 - saturation * (1 - wheel))


def sample_appearance(seed: int, head: HeadAsset, mesh: BuiltinMesh | None = None) -> Appearance:
    """Skin, lips, eyes, brows, hair, beard, clothes, light and background of an identity seed.

    Args:
      mesh: `builtin_mesh()`, for callers that sample many and build it once.

    Raises:
      ValueError: `head` is not the built-in head (other heads have no regions to paint), or that of
        another version.
    """
    _require_builtin(head)
    mesh = builtin.builtin_mesh() if mesh is None else mesh
    if len(mesh.vertices) != head.template.shape[0]:
        raise ValueError(
            "head asset 'builtin' was made by another version; "
            "rebuild it with `python -m data_prep.head_asset builtin`"
        )
    rng = _generator(seed, 2)
    albedo = _paint(mesh, _sample_style(seed), rng)
    angle, height = rng.uniform(-1.1, 1.1), rng.uniform(0.1, 0.75)
    light = np.array([np.sin(angle) * np.cos(height), np.sin(height), np.cos(angle) * np.cos(height)])
    warmth = rng.uniform(-0.05, 0.05) * np.array([1.0, 0.0, -1.0])
    ambient = rng.uniform(0.42, 0.62)
    diffuse = (1.12 - ambient) * rng.uniform(0.85, 1.05)
    background = np.stack([_hue(rng, 0.10, 0.95), _hue(rng, 0.10, 0.95)])
    # Often one colour in two shades, as an indoor wall is.
    if rng.random() < 0.5:
        background[1] = background[0] * rng.uniform(0.6, 0.95)
    wave = np.array([rng.uniform(-2.5, 2.5), rng.uniform(-2.5, 2.5), rng.uniform(0, 2 * np.pi)])
    fields = (albedo, light, ambient * (1 - warmth), diffuse * (1 + warmth), background, wave)
    return Appearance(*(np.asarray(field, np.float32) for field in fields))


def _require_builtin(head: HeadAsset) -> None:
    if head.name != builtin.NAME:
        raise ValueError(f"appearances are painted on the built-in head only, not on {head.name!r}")


def _over(base, colour, opacity):
    """`colour` painted over `base`; the opacity of each vertex is clipped to [0, 1]."""
    return base + np.clip(opacity, 0, 1)[:, None] * (colour - base)


def _paint(mesh: BuiltinMesh, style: _Style, rng: np.random.Generator) -> Float[np.ndarray, "V 3"]:
    """Vertex colours of one identity."""
    x, y, z = mesh.vertices.T
    ax = np.abs(x)
    skin_part = mesh.part == builtin.SKIN
    front = smoothstep(-0.01, 0.03, z)

    # Skin with blood in cheeks, nose and ears.
    skin = np.clip(_blend(_SKIN, rng.random()) * rng.uniform(0.94, 1.06), 0, 1)
    ruddy = skin * [1.02, 0.80, 0.78]
    colour = np.broadcast_to(skin, (len(x), 3)).copy()
    blood = rng.uniform(0.1, 0.8)
    cheeks_and_nose = bump(x, y, 0.040, -0.018, 0.014, 0.012) + bump(x, y, 0, -0.026, 0.010, 0.008)
    colour = _over(colour, ruddy, blood * front * cheeks_and_nose)
    colour = _over(colour, ruddy, 0.5 * (mesh.part == builtin.EAR))
    # Occlusion: sockets, nostrils, under the lower lip, the ear's bowl.
    colour *= 1 - 0.22 * (skin_part * front * bump(x, y, 0.0185, 0.012, 0.006, 0.008))[:, None]
    colour *= 1 - 0.62 * (skin_part * front * bump(x, y, 0.0068, -0.0355, 0.0034, 0.0024))[:, None]
    colour *= 1 - 0.15 * (skin_part * front * bump(x, y, 0, -0.0735, 0.012, 0.0035))[:, None]
    colour *= 1 - 0.35 * ((mesh.part == builtin.EAR) & (mesh.depth >= 4))[:, None]
    crease = skin_part & (mesh.eye_ring == 2) & (y > builtin.EYE[1] + 0.003)
    colour *= 1 - 0.25 * crease[:, None]

    # Hair, brows, beard.
    draw = rng.random()
    if draw < 0.80:
        hair = _blend(_HAIR, rng.random() ** 1.3)
    elif draw < 0.95:
        hair = _blend(_GREY_HAIR, rng.random())
    else:
        hair = _DYED_HAIR[rng.integers(len(_DYED_HAIR))]
    natural = hair if draw < 0.95 else _HAIR[1]
    brow_colour = np.clip(natural * rng.uniform(0.45, 0.85), 0.02, 0.5)
    brow_curve = np.interp(ax, builtin.BROW[:, 0], builtin.BROW[:, 1])
    thickness = rng.uniform(0.0018, 0.0042) * (0.25 + 0.75 * smoothstep(0.060, 0.044, ax))
    brow = (
        smoothstep(thickness + 0.0022, thickness, np.abs(y - brow_curve))
        * smoothstep(0.0060, 0.0100, ax)
        * smoothstep(0.0590, 0.0520, ax)
    )
    opacity = rng.uniform(0.75, 1.0) * brow * front * skin_part * (mesh.eye_ring < 0)
    colour = _over(colour, brow_colour, opacity)
    colour = _paint_beard(mesh, colour, natural, rng)
    streak = np.sin(mesh.phi * rng.integers(5, 12) + 40 * mesh.v + rng.uniform(0, 6))
    streak = 1 + 0.10 * streak * rng.random()
    scalp = _hair_mask(mesh, style, rng)
    strength = 0.35 * rng.random() if style.cut == "bald" else 1.0
    colour = _over(colour, np.clip(hair * streak[:, None], 0, 1), strength * scalp)

    # Lips; their meeting line is dark.
    tints = np.array([skin * [0.86, 0.62, 0.60], skin * [0.86, 0.48, 0.50], [0.72, 0.20, 0.24]])
    tint = _blend(tints, rng.random() ** 2)
    lip = np.abs(mesh.lip)
    on_lip = skin_part & (lip >= 1) & (lip <= 3)
    colour = _over(colour, tint, np.where(lip == 3, 0.75, 1.0) * on_lip)
    colour *= 1 - 0.55 * (skin_part & (lip == 1))[:, None]

    # Mouth and teeth.
    cavity = mesh.part == builtin.CAVITY
    depth = np.array([1.0, 0.8, 0.55, 0.36, 0.22, 0.16])[np.minimum(mesh.depth, 5)]
    colour = np.where(cavity[:, None], np.array([0.50, 0.17, 0.17]) * depth[:, None], colour)
    tongue = cavity & (mesh.lip < 0) & (mesh.depth == 3) & (ax < 0.018)
    colour = np.where(tongue[:, None], [0.48, 0.20, 0.20], colour)
    teeth = np.isin(mesh.part, [builtin.UPPER_TEETH, builtin.LOWER_TEETH])
    enamel = np.array([0.95, 0.93, 0.87]) * rng.uniform(0.90, 1.0)
    enamel = enamel * (1 - 0.45 * smoothstep(0.010, 0.024, ax))[:, None]
    enamel = np.where((mesh.depth == 0)[:, None], [0.62, 0.30, 0.30], enamel)
    colour = np.where(teeth[:, None], enamel, colour)

    # Eyes: sclera darker under the upper lid and in the corners; dark lashes.
    ball = mesh.part == builtin.EYEBALL
    dx, dy = ax - builtin.EYE[0], y - builtin.EYE[1]
    shade = 1 - 0.18 * smoothstep(0.002, 0.007, dy) - 0.20 * smoothstep(0.007, 0.013, np.abs(dx))
    iris = np.clip(_blend(_IRIS, rng.random()) * rng.uniform(0.85, 1.15), 0, 1)
    eye = np.where((mesh.depth <= 3)[:, None], iris, np.array([0.93, 0.92, 0.90]) * shade[:, None])
    eye = np.where((mesh.depth == 3)[:, None], iris * 0.6, eye)
    eye = np.where((mesh.depth <= 1)[:, None], 0.02, eye)
    colour = np.where(ball[:, None], eye, colour)
    lash, lash_colour = rng.uniform(0.55, 0.95), np.array([0.06, 0.04, 0.04])
    upper = dy > 0.001
    colour = _over(colour, lash_colour, (mesh.part == builtin.LID_RIM) * np.where(upper, 0.9, 0.35))
    opacity = lash * (skin_part & (mesh.eye_ring == 0)) * np.where(upper, 1.0, 0.35)
    colour = _over(colour, lash_colour, opacity)

    # Clothes.
    dip = np.maximum(np.cos(mesh.phi), 0) ** 4
    neckline = rng.uniform(-0.235, -0.192) + rng.uniform(-0.35, 0.1) * 0.10 * dip
    covered = skin_part * smoothstep(neckline + 0.008, neckline - 0.008, mesh.v) * (mesh.v < -0.1)
    colour = _over(colour, _hue(rng, 0.08, 0.95), covered)
    return np.clip(colour, 0.0, 1.0)


def _paint_beard(mesh, colour, hair, rng):
    """Stubble, moustache or full beard on about 30 % of the identities."""
    x, y, z = mesh.vertices.T
    kind = rng.random()
    strength = rng.uniform(0.45, 0.9)
    if kind > 0.30:
        return colour
    skin_part = (mesh.part == builtin.SKIN) & (np.abs(mesh.lip) != 1) & (np.abs(mesh.lip) != 2)
    jaw = smoothstep(-0.040, -0.058, y + 0.35 * np.maximum(np.abs(x) - 0.03, 0) * -1) * smoothstep(
        1.55, 1.35, mesh.phi
    )
    jaw = jaw * smoothstep(-0.155, -0.135, mesh.v)
    moustache = bump(x, y, 0, -0.0465, 0.017, 0.0038) + bump(x, y, 0.024, -0.053, 0.006, 0.006)
    goatee = bump(x, y, 0, -0.090, 0.016, 0.014)
    weight = jaw + moustache if kind < 0.18 else (moustache if kind < 0.24 else moustache + goatee)
    if kind < 0.08:
        strength *= 0.5  # stubble
    weight = np.clip(weight, 0, 1) * strength * skin_part * smoothstep(-0.02, 0.02, z)
    return _over(colour, np.clip(hair * 0.9, 0, 1), weight)


def _hair_mask(mesh, style, rng):
    """Share of hair colour at each vertex for one cut."""
    phi, v = mesh.phi, mesh.v
    line = hairline(phi) + rng.uniform(-0.006, 0.008)
    if style.cut == "fringe":
        line = line - rng.uniform(0.022, 0.040) * smoothstep(1.05, 0.55, phi)
    if style.cut == "receding":
        line = line + 0.045 * np.exp(-0.5 * ((phi - 0.55) / 0.35) ** 2) + 0.018 * (phi < 0.9)
    mask = smoothstep(line - 0.005, line + 0.006, v)
    if style.length > 0.1:
        reach = rng.uniform(-0.205, -0.120) if style.cut == "long" else -0.10
        low = smoothstep(1.28, 1.46, phi) * smoothstep(reach - 0.008, reach + 0.008, v)
        mask = np.maximum(mask, low)
    return mask * (mesh.part == builtin.SKIN)
