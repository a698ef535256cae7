"""Identity and expression axes and skinning weights of the built-in head.

Each axis is a smooth displacement field of the template, written down as bumps in the face's frontal
plane. Eyeballs move rigidly, and the lids with them, so that they stay on each other under every
identity; a unit of an identity axis is one standard deviation, a unit of an expression axis the full
expression (names as in ARKit). "Left" is the subject's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from loki_jax.face.builtin import (
    CAVITY,
    EAR,
    EYE,
    EYE_RADIUS,
    EYEBALL,
    LID_RIM,
    LOWER_TEETH,
    MOUTH_Y,
    SKIN,
    UPPER_TEETH,
    BuiltinMesh,
    bump,
    hairline,
    smoothstep,
)
from tools.builtin_head.mesh import LID_THICKNESS, LID_WEIGHT, MOUTH_HALF_WIDTH, lid_edges, lid_z

_Field = Callable[[np.ndarray], np.ndarray]  # positions (n, 3) -> displacements (n, 3)


def _vector(dx=0.0, dy=0.0, dz=0.0):
    return np.stack(np.broadcast_arrays(np.asarray(dx, float), dy, dz), -1)


def _front(p):
    """1 on the face, 0 behind the ears."""
    return smoothstep(-0.025, 0.030, p[:, 2])


def _head(p):
    """1 on the head, 0 on the lower neck and the shoulders."""
    return smoothstep(-0.165, -0.105, p[:, 1] - 0.35 * np.minimum(p[:, 2], 0.0))


def _outward(p):
    """Unit vectors away from the middle of the skull."""
    d = p - np.array([0.0, 0.025, -0.012])
    return d / np.maximum(np.linalg.norm(d, axis=-1, keepdims=True), 1e-6)


def _identity_fields() -> dict[str, _Field]:
    """Displacement per standard deviation of every identity axis but those of lids, ears and hair."""

    def front_bump(p, x0, y0, sx, sy):
        return _front(p) * bump(p[:, 0], p[:, 1], x0, y0, sx, sy)

    def side(p):
        # Sign of x, smooth across the midline.
        return np.tanh(p[:, 0] / 0.004)

    return {
        "head_width": lambda p: _vector(dx=0.030 * p[:, 0] * _head(p)),
        "head_height": lambda p: _vector(dy=0.035 * np.maximum(p[:, 1] - 0.02, 0)),
        "head_depth": lambda p: _vector(dz=0.035 * p[:, 2] * _head(p)),
        "face_length": lambda p: _vector(
            dy=-0.0045 * smoothstep(0.015, -0.100, p[:, 1]) * _front(p) * smoothstep(-0.19, -0.12, p[:, 1])
        ),
        "jaw_width": lambda p: _vector(
            dx=0.065
            * p[:, 0]
            * np.exp(-0.5 * ((p[:, 1] + 0.072) / 0.024) ** 2)
            * smoothstep(-0.05, 0.01, p[:, 2])
        ),
        "chin_length": lambda p: _vector(dy=-0.0030 * front_bump(p, 0, -0.104, 0.022, 0.014)),
        "chin_projection": lambda p: _vector(dz=0.0032 * front_bump(p, 0, -0.096, 0.020, 0.014)),
        "chin_width": lambda p: _vector(dx=0.0030 * side(p) * front_bump(p, 0.020, -0.096, 0.010, 0.012)),
        "nose_length": lambda p: _vector(dy=-0.0024 * front_bump(p, 0, -0.030, 0.016, 0.011)),
        "nose_width": lambda p: _vector(dx=0.110 * p[:, 0] * front_bump(p, 0, -0.031, 0.018, 0.010)),
        "nose_bridge": lambda p: _vector(dz=0.0020 * front_bump(p, 0, 0.000, 0.008, 0.014)),
        "nose_tip": lambda p: _vector(dz=0.0026 * front_bump(p, 0, -0.026, 0.011, 0.009)),
        "nose_turned_up": lambda p: _vector(dy=0.0018 * front_bump(p, 0, -0.025, 0.008, 0.006)),
        "eye_spacing": lambda p: _vector(dx=0.0014 * side(p) * front_bump(p, 0.0315, 0.010, 0.014, 0.016)),
        "eye_height": lambda p: _vector(dy=0.0013 * front_bump(p, 0.0315, 0.012, 0.020, 0.020)),
        "eye_depth": lambda p: _vector(dz=-0.0013 * front_bump(p, 0.0315, 0.010, 0.016, 0.014)),
        "brow_ridge": lambda p: _vector(dz=0.0016 * front_bump(p, 0.024, 0.031, 0.020, 0.008)),
        "brow_height": lambda p: _vector(dy=0.0019 * front_bump(p, 0.030, 0.034, 0.022, 0.010)),
        "cheekbones": lambda p: _vector(
            dx=0.0020 * side(p) * front_bump(p, 0.056, -0.012, 0.014, 0.014),
            dz=0.0020 * front_bump(p, 0.046, -0.014, 0.014, 0.013),
        ),
        "cheek_fullness": lambda p: _vector(
            dx=0.0032 * side(p) * front_bump(p, 0.054, -0.048, 0.016, 0.022),
            dz=0.0026 * front_bump(p, 0.040, -0.045, 0.014, 0.018),
        ),
        "lip_thickness": lambda p: _vector(
            dy=0.0011 * np.tanh((p[:, 1] - MOUTH_Y) / 0.004) * front_bump(p, 0, MOUTH_Y, 0.018, 0.012),
            dz=0.0009 * front_bump(p, 0, MOUTH_Y, 0.016, 0.009),
        ),
        "mouth_width": lambda p: _vector(dx=0.055 * p[:, 0] * front_bump(p, 0, MOUTH_Y, 0.026, 0.013)),
        "mouth_height": lambda p: _vector(dy=0.0014 * front_bump(p, 0, MOUTH_Y, 0.030, 0.014)),
        "mouth_projection": lambda p: _vector(dz=0.0018 * front_bump(p, 0, MOUTH_Y, 0.024, 0.016)),
        "forehead_slope": lambda p: _vector(dz=-0.0032 * front_bump(p, 0, 0.085, 0.050, 0.026)),
        "forehead_width": lambda p: _vector(dx=0.0022 * side(p) * front_bump(p, 0.060, 0.065, 0.018, 0.022)),
        "neck_width": lambda p: _vector(
            dx=0.070
            * p[:, 0]
            * np.exp(-0.5 * ((p[:, 1] + 0.145 - 0.35 * np.minimum(p[:, 2], 0)) / 0.026) ** 2)
        ),
        "shoulder_width": lambda p: _vector(dx=0.080 * p[:, 0] * smoothstep(-0.150, -0.200, p[:, 1])),
    }


def identity_axes(mesh: BuiltinMesh) -> tuple[tuple[str, ...], Float[np.ndarray, "n V 3"]]:
    """Names and unit displacements of the identity axes (standard normal coefficients)."""
    p = mesh.vertices
    names, axes = [], []

    def add(name, field):
        names.append(name)
        axes.append(field)

    for name, field in _identity_fields().items():
        add(name, _carry_eyes(mesh, field(p), field))

    # Eyes: ball and lids grow together about the ball's centre; slant turns the lids round it.
    relative = p - _eye_centres(mesh)
    lids = _lid_weight(mesh)[:, None]
    ring_size = np.array([1.0, 1.0, 1.0, 0.95, 0.6])
    grow = np.where(mesh.eye_ring >= 0, ring_size[np.maximum(mesh.eye_ring, 0)], 0.0)
    grow = np.where((mesh.part == EYEBALL) | (mesh.part == LID_RIM), 1.0, grow)[:, None]
    add("eye_size", 0.045 * relative * grow)
    slant = np.cross(np.where(mesh.left[:, None] > 0, 1.0, -1.0) * np.array([0.0, 0.0, 1.0]), relative)
    add("eye_slant", 0.045 * slant * np.where(mesh.part == EYEBALL, 0.0, 1.0)[:, None] * lids)

    ear = (mesh.part == EAR)[:, None]
    ear_root = np.stack([mesh.left * 0.0715, np.full(len(p), 0.002), np.full(len(p), -0.014)], -1)
    add("ear_size", 0.08 * (p - ear_root) * ear)
    flap = np.maximum(-(p[:, 2] + 0.010), 0.0)  # distance behind the ear's front edge
    add("ear_protrusion", _vector(dx=0.16 * mesh.left * flap) * ear)

    skin = mesh.part == SKIN
    line = hairline(mesh.phi)
    scalp = skin * smoothstep(line - 0.008, line + 0.024, mesh.v)
    above = smoothstep(0.050, 0.110, mesh.v)
    outward = _outward(p)
    add("hair_top", 0.0045 * outward * (scalp * above)[:, None])
    add("hair_sides", 0.0040 * outward * (scalp * (1 - 0.75 * above))[:, None])
    # Long hair: sides and back of the neck swell, up to over the ears.
    behind = smoothstep(1.30, 1.75, mesh.phi)
    low = skin * behind * smoothstep(0.075, 0.010, mesh.v) * smoothstep(-0.225, -0.165, mesh.v)
    away = p * [1.0, 0.0, 1.0] + [0.0, 0.0, 0.02]
    away = away / np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-6)
    add("hair_length", 0.0090 * away * low[:, None])
    return tuple(names), np.stack(axes)


def _eye_centres(mesh):
    """Centre of the eyeball on each vertex's own side, (V, 3)."""
    return EYE * np.stack([np.where(mesh.left >= 0, 1.0, -1.0), *np.ones((2, len(mesh.left)))], -1)


def _lid_weight(mesh):
    """How much each vertex moves with the eyeball: 1 on the ball, its rim and the lid's edge."""
    on_ring = np.where(
        mesh.eye_ring >= 0, np.array([1.0, 1.0, 1.0, 0.9, 0.5])[np.maximum(mesh.eye_ring, 0)], 0.0
    )
    return np.where((mesh.part == EYEBALL) | (mesh.part == LID_RIM), 1.0, on_ring)


def _carry_eyes(mesh, displacement, field):
    """Replace the displacement on eyeballs and lids by that of the eye's centre (made rigid)."""
    centres = _eye_centres(mesh)
    # Sample at the skin's height, where the fields are defined.
    rigid = field(centres + [0.0, 0.0, EYE_RADIUS])
    weight = _lid_weight(mesh)[:, None]
    return displacement + weight * (rigid - displacement)


def jaw_weight(mesh: BuiltinMesh) -> Float[np.ndarray, " V"]:
    """Share of the jaw joint in each vertex's motion."""
    x, y, z = mesh.vertices.T
    ax = np.abs(x)
    # Below the line from the mouth to the jaw's hinge; sharp at the lips, wide at the cheeks.
    line = MOUTH_Y + 0.45 * np.maximum(ax - 0.030, 0.0)
    width = 0.004 + 0.024 * smoothstep(0.018, 0.050, ax)
    smooth = smoothstep(-1.0, 1.0, (line - y) / width)
    lower = (mesh.lip < 0) | ((mesh.lip == 0) & (y < MOUTH_Y))
    step = (1 - smoothstep(0.45, 1.0, ax / MOUTH_HALF_WIDTH)) * np.exp(
        -0.5 * (np.maximum(ax - 0.025, 0) / 0.005) ** 2
    )
    weight = step * lower + (1 - step) * smooth
    # Gone behind the ramus and down the throat.
    weight = weight * smoothstep(-0.020, 0.030, z)
    throat = np.where(mesh.part == SKIN, smoothstep(-0.150, -0.112, mesh.v), 1.0)
    weight = weight * throat
    cavity = mesh.part == CAVITY
    depth_fade = np.where(mesh.depth >= 3, 0.8, 1.0)
    inside = np.where(mesh.lip < 0, depth_fade, np.where(mesh.lip == 0, 0.5, 0.0))
    weight = np.where(cavity, np.where(mesh.depth == 5, 0.4, inside), weight)
    corner = (mesh.lip == 1) & (ax > MOUTH_HALF_WIDTH - 1e-6)
    weight = np.where(corner, 0.5, weight)
    weight = np.where(mesh.part == UPPER_TEETH, 0.0, np.where(mesh.part == LOWER_TEETH, 1.0, weight))
    return np.where((mesh.part == EYEBALL) | (mesh.part == LID_RIM) | (mesh.part == EAR), 0.0, weight)


def _lips(mesh):
    """(upper, lower) masks that fall off from the lips into the skin; sharp between the lips."""
    x, y, z = mesh.vertices.T
    near = _front(mesh.vertices) * np.exp(-0.5 * (x / 0.019) ** 2)
    upper_side = np.where(mesh.lip != 0, mesh.lip > 0, y > MOUTH_Y)
    fall_up = np.exp(-0.5 * (np.maximum(y - MOUTH_Y - 0.007, 0) / 0.008) ** 2)
    fall_down = np.exp(-0.5 * (np.maximum(MOUTH_Y - 0.009 - y, 0) / 0.009) ** 2)
    return near * upper_side * fall_up, near * ~upper_side * fall_down


def _blink(mesh, amount_upper, amount_lower):
    """Lid motion of both eyes: each lid's edge travels the given share of the opening.

    Upper and lower lid meet exactly on the eyeball when the shares add up to 1.
    """
    p = mesh.vertices
    x, y = np.abs(p[:, 0]), p[:, 1]
    # Heights of both lid edges as functions of x.
    upper_edge, lower_edge = lid_edges()
    at = np.clip(x, upper_edge[0, 0], upper_edge[-1, 0])
    top, bottom = np.interp(at, *upper_edge.T), np.interp(at, *lower_edge.T)
    opening = top - bottom
    middle = 0.5 * (top + bottom)
    follow = np.array([1.0, 0.97, 0.76, 0.34, 0.0])
    share = np.where(mesh.eye_ring >= 0, follow[np.maximum(mesh.eye_ring, 0)], 0.0)
    is_upper = y > middle
    dy = share * opening * np.where(is_upper, -amount_upper, amount_lower)
    # Outside the corners lids only slide a little.
    dy = dy * np.exp(-0.5 * (np.maximum(np.abs(x - at), 0) / 0.002) ** 2)
    # Towards the ball's surface, the lid's thickness above it; the crease flattens as the lid goes
    # down. The bulge at the end keeps the straight path of a linear axis out of the ball half-way.
    travelled = np.clip(np.abs(dy) / np.maximum(opening, 1e-3) / 0.6, 0, 1)
    firm = np.where(
        mesh.eye_ring >= 0, np.array([1.0, 1.0, 1.0, 0.85, 0.15])[np.maximum(mesh.eye_ring, 0)], 0.0
    )
    hold = np.where(mesh.eye_ring >= 0, LID_WEIGHT[np.maximum(mesh.eye_ring, 0)], 0.0)
    rim = np.where(mesh.part == LID_RIM, -0.0012 - LID_THICKNESS, 0.0)
    radius = EYE_RADIUS + LID_THICKNESS + rim
    slide = hold * (lid_z(x, y + dy, radius) - lid_z(x, y, radius))
    on_ball = firm * (lid_z(x, y + dy, radius) - p[:, 2])
    dz = slide + travelled * (on_ball - slide) + 0.0007 * share * travelled
    return _vector(dy=dy, dz=dz)


def expression_axes(
    mesh: BuiltinMesh,
) -> tuple[tuple[str, ...], Float[np.ndarray, "n V 3"], Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Names, unit displacements, bounds and prior standard deviations of the expression axes."""
    p = mesh.vertices
    x, y = p[:, 0], p[:, 1]
    ax, sign = np.abs(x), np.tanh(x / 0.003)
    front = _front(p)
    # Nothing but the lids moves near the eyeballs; eyeballs and ears never move.
    movable = np.where((mesh.part == SKIN) | (mesh.part == CAVITY), 1.0, 0.0)
    firm = 1.0 - np.where(
        mesh.eye_ring >= 0, np.array([1.0, 1.0, 0.75, 0.25, 0.0])[np.maximum(mesh.eye_ring, 0)], 0.0
    )
    fade = np.where(
        mesh.part == CAVITY, np.array([1.0, 1.0, 0.6, 0.25, 0.0, 0.0])[np.minimum(mesh.depth, 5)], 1.0
    )
    soft = (front * movable * firm * fade)[:, None]
    left = smoothstep(-0.006, 0.006, x)[:, None]
    upper, lower = _lips(mesh)
    jaw = jaw_weight(mesh)[:, None]

    def g(x0, y0, sx, sy):
        return bump(x, y, x0, y0, sx, sy)

    names, axes = [], []

    def add(name, field):
        names.append(name)
        axes.append(field)

    def sides(name, field):
        add(f"{name}Left", field * left)
        add(f"{name}Right", field * (1 - left))

    mid_brow, outer_brow = g(0.014, 0.034, 0.011, 0.011), g(0.045, 0.034, 0.013, 0.012)
    whole_brow = g(0.026, 0.033, 0.020, 0.010)
    forehead = g(0.026, 0.060, 0.022, 0.016)
    add("browInnerUp", soft * _vector(dy=0.0075 * mid_brow + 0.0020 * forehead))
    sides(
        "browDown",
        soft * _vector(dx=-0.0016 * sign * mid_brow, dy=-0.0062 * whole_brow, dz=0.0012 * mid_brow),
    )
    sides("browOuterUp", soft * _vector(dy=0.0075 * outer_brow + 0.0015 * forehead))

    sides("eyeBlink", _blink(mesh, 0.87, 0.13))
    sides("eyeWide", _blink(mesh, -0.24, -0.05))
    cheek = g(0.036, -0.014, 0.015, 0.010)
    sides("eyeSquint", _blink(mesh, 0.20, 0.28) + soft * _vector(dy=0.0020 * cheek, dz=0.0010 * cheek))
    sides("cheekSquint", _blink(mesh, 0.0, 0.20) + soft * _vector(dy=0.0042 * cheek, dz=0.0024 * cheek))
    puff = g(0.042, -0.052, 0.014, 0.016)
    add("cheekPuff", soft * _vector(dx=0.0070 * sign * puff, dz=0.0085 * puff))
    wing = g(0.0150, -0.030, 0.006, 0.007)
    sides(
        "noseSneer",
        soft * _vector(dx=0.0010 * sign * wing, dy=0.0042 * wing + 0.0022 * g(0.018, -0.044, 0.009, 0.007)),
    )

    corner = g(MOUTH_HALF_WIDTH, MOUTH_Y, 0.010, 0.009)
    around = g(0.032, -0.054, 0.012, 0.013)
    add("jawOpen", jaw_open_corrective(mesh))
    add("jawForward", jaw * [0.0, 0.0, 0.0065])
    add("jawLeft", jaw * [0.0085, 0.0, 0.0])
    add("jawRight", jaw * [-0.0085, 0.0, 0.0])
    mouth = g(0, MOUTH_Y, 0.028, 0.016)
    add("mouthLeft", soft * _vector(dx=0.0085 * mouth))
    add("mouthRight", soft * _vector(dx=-0.0085 * mouth))
    sides(
        "mouthSmile",
        soft
        * _vector(
            dx=sign * (0.0075 * corner + 0.0020 * around),
            dy=0.0062 * corner + 0.0026 * around + 0.0026 * g(0.040, -0.026, 0.014, 0.011),
            dz=-0.0045 * corner + 0.0030 * g(0.042, -0.026, 0.013, 0.011),
        ),
    )
    sides(
        "mouthFrown",
        soft * _vector(dx=0.0012 * sign * corner, dy=-0.0075 * corner - 0.0020 * around, dz=-0.0010 * corner),
    )
    sides(
        "mouthStretch",
        soft
        * _vector(dx=sign * (0.0090 * corner + 0.0025 * around), dy=-0.0025 * corner, dz=-0.0050 * corner),
    )
    sides("mouthDimple", soft * _vector(dx=0.0040 * sign * corner, dz=-0.0050 * corner))
    pull = np.exp(-0.5 * ((y - MOUTH_Y) / 0.014) ** 2) * np.exp(
        -0.5 * (np.maximum(ax - 0.022, 0) / 0.012) ** 2
    )
    lips = upper + lower
    add("mouthPucker", soft * _vector(dx=-0.32 * x * pull, dz=0.0075 * g(0, MOUTH_Y, 0.014, 0.012)))
    add(
        "mouthFunnel",
        soft
        * _vector(
            dx=-0.26 * x * pull, dy=0.0042 * upper - 0.0050 * lower, dz=0.0065 * g(0, MOUTH_Y, 0.015, 0.013)
        ),
    )
    thin = np.abs(mesh.lip) == 3
    sides(
        "mouthPress",
        soft * _vector(dy=np.where(thin, -0.0022 * np.sign(mesh.lip), 0.0) * lips, dz=-0.0022 * lips),
    )
    add("mouthRollUpper", soft * _vector(dy=np.where(mesh.lip > 1, -0.0032, 0.0) * upper, dz=-0.0045 * upper))
    add("mouthRollLower", soft * _vector(dy=np.where(mesh.lip < -1, 0.0036, 0.0) * lower, dz=-0.0036 * lower))
    up_side, down_side = upper * g(0.012, -0.054, 0.012, 0.02), lower * g(0.012, -0.066, 0.012, 0.02)
    sides("mouthUpperUp", soft * _vector(dy=0.0068 * up_side, dz=0.0008 * up_side))
    sides("mouthLowerDown", soft * _vector(dy=-0.0072 * down_side, dz=0.0006 * down_side))
    add("mouthShrugUpper", soft * _vector(dy=0.0032 * upper, dz=0.0022 * upper))
    chin = g(0, -0.088, 0.018, 0.012)
    add(
        "mouthShrugLower",
        soft * _vector(dy=0.0030 * lower + 0.0030 * chin, dz=0.0030 * lower + 0.0012 * chin),
    )
    # Lips shut while the jaw is open: undoes what the jaw joint does to the lower lip at 0.12 rad.
    add("mouthClose", soft * _vector(dy=-0.0028 * upper + 0.0075 * lower))
    n = len(names)
    bounds = np.tile([0.0, 1.0], (n, 1))
    return tuple(names), np.stack(axes), bounds, np.full(n, 0.3)


def jaw_open_corrective(mesh: BuiltinMesh) -> Float[np.ndarray, "V 3"]:
    """What skin does besides turning with the jaw: corners draw in, cheeks hollow, lips part.

    The rotation itself belongs to the jaw joint; this axis rides along with it.
    """
    x, y = mesh.vertices[:, 0], mesh.vertices[:, 1]
    soft = _front(mesh.vertices) * ((mesh.part == SKIN) | ((mesh.part == CAVITY) & (mesh.depth == 1)))
    upper, lower = _lips(mesh)
    corner = bump(x, y, MOUTH_HALF_WIDTH, MOUTH_Y, 0.012, 0.010)
    cheek = bump(x, y, 0.046, -0.052, 0.012, 0.018)
    return soft[:, None] * _vector(
        dx=-np.tanh(x / 0.003) * (0.0030 * corner + 0.0028 * cheek),
        dy=0.0016 * upper - 0.0020 * lower,
        dz=-0.0015 * corner,
    )


def skinning_weights(mesh: BuiltinMesh) -> Float[np.ndarray, "V 5"]:
    """Weights of root, neck, jaw, left eye and right eye; rows sum to 1.

    The neck joint carries the whole head; the neck's skin blends down to the shoulders (root).
    """
    y, z = mesh.vertices[:, 1], mesh.vertices[:, 2]
    # The chin is all head although it lies as low as the nape's lower end.
    head = smoothstep(-0.165, -0.100, y + 0.35 * np.maximum(z, 0.0))
    head = np.where(mesh.part == SKIN, head, 1.0)
    jaw = jaw_weight(mesh) * head
    weights = np.zeros((len(y), 5))
    ball = mesh.part == EYEBALL
    weights[:, 0] = 1 - head
    weights[:, 1] = head - jaw
    weights[:, 2] = jaw
    weights[ball] = 0.0
    weights[ball & (mesh.left > 0), 3] = 1.0
    weights[ball & (mesh.left < 0), 4] = 1.0
    return weights
