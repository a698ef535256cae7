"""Cross-identity retargeting of coefficients (method, section 9): a pure function, nothing learned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients

_HIGHEST = jax.lax.Precision.HIGHEST


def _product(*matrices: Float[ArrayLike, "... 3 3"]) -> Float[Array, "... 3 3"]:
    result = jnp.asarray(matrices[0])
    for matrix in matrices[1:]:
        result = jnp.einsum("...ij,...jk->...ik", result, matrix, precision=_HIGHEST)
    return result


def head_rotation(coefficients: Coefficients) -> Float[Array, "*b 3 3"]:
    """World rotation of the head, R(rot) R(neck): what HPF compares."""
    return _product(matrix_from_rotvec(coefficients.rot), matrix_from_rotvec(coefficients.neck))


def neck_joint(head: HeadAsset, betas: Float[ArrayLike, "*b n_shape"]) -> Float[Array, "*b 3"]:
    """The neck joint of identities in the head frame, metres; the origin for heads without one."""
    joint = head.joint("neck")
    joints = jnp.asarray(make_identity(head, betas).joints)
    return jnp.zeros_like(joints[..., 0, :]) if joint is None else joints[..., joint, :]


def fold_neck(coefficients: Coefficients, joint: Float[ArrayLike, "*#b 3"]) -> Coefficients:
    """The same motion of the head without a bend of the neck, for driver maps that leave the neck out.

    `rot` and `tra` move all that follows the neck alone as R(rot) R(neck) about the neck joint did.

    Args:
      joint: the neck joint of the identity in the head frame, metres.
    """
    turned = head_rotation(coefficients)
    bend = matrix_from_rotvec(coefficients.rot) - turned
    tra = coefficients.tra + jnp.einsum("...ij,...j->...i", bend, jnp.asarray(joint), precision=_HIGHEST)
    return coefficients._replace(
        rot=rotvec_from_matrix(turned), tra=tra, neck=jnp.zeros_like(coefficients.neck)
    )


def size_ratio(
    head: HeadAsset,
    reference_betas: Float[ArrayLike, "*b n_shape"],
    driver_betas: Float[ArrayLike, "*b n_shape"],
) -> Float[Array, " *b"]:
    """Size of the reference's neutral head over the driver's.

    The size is the root mean square distance of the render-mask vertices from their mean.
    """

    def size(betas):
        vertices = make_identity(head, betas).vertices[..., : head.template.shape[0], :]
        weight = jnp.asarray(head.render_mask, vertices.dtype)[:, None]
        weight = weight / jnp.sum(weight)
        centre = jnp.sum(weight * vertices, axis=-2, keepdims=True)
        return jnp.sqrt(jnp.sum(weight * (vertices - centre) ** 2, axis=(-2, -1)))

    return size(reference_betas) / size(driver_betas)


def retarget(
    driver: Coefficients,
    reference: Coefficients,
    mode: str = "relative",
    *,
    scale: Float[ArrayLike, " *b"] | float = 1.0,
    origin: Coefficients | None = None,
    driver_camera: Camera | None = None,
    reference_camera: Camera | None = None,
) -> Coefficients:
    """Coefficients with which the reference follows the driver's clip.

    `betas` come from the reference; expression, jaw, eyes and neck from the driver. In mode "absolute"
    rotation and translation come from the driver too. In mode "relative", with H = R(rot) R(neck), the
    head turns by the driver's increments, composed on the left, from the reference's own pose:
    H_t = (H_drv,t H_drv,0^-1) H_ref, rot_t = H_t R(neck_t)^-1, and
    tra_t = tra_ref + scale (tra_drv,t - tra_drv,0).

    Args:
      driver: coefficients (*b, T, ...).
      reference: coefficients (*b, ...) of one frame.
      mode: "relative" or "absolute".
      scale: `size_ratio`, reference over driver; scales the translation's increments.
      origin: the driver's frame 0 (*b, ...) where `driver` does not begin with it, as in a later
        window of a clip.
      driver_camera, reference_camera: cameras (*b, ...) whose extrinsics turn the world; given both,
        increments are carried from one camera's axes into the other's. Without them both worlds are
        taken to have the same axes.

    Raises:
      ValueError: unknown mode, or only one camera given.
    """
    if mode not in ("relative", "absolute"):
        raise ValueError(f"unknown mode {mode!r} of retargeting: use 'relative' or 'absolute'")
    if (driver_camera is None) != (reference_camera is None):
        raise ValueError("give both cameras or none: increments pass from one camera's axes to the other's")
    betas = jnp.broadcast_to(
        reference.betas[..., None, :], (*driver.rot.shape[:-1], reference.betas.shape[-1])
    )
    if mode == "absolute":
        return driver._replace(betas=betas)

    if origin is None:
        origin = Coefficients(*(field[..., 0, :] for field in driver))
    start = head_rotation(origin)[..., None, :, :]
    turned = _product(head_rotation(driver), jnp.swapaxes(start, -1, -2))
    moved = driver.tra - origin.tra[..., None, :]
    if driver_camera is not None and reference_camera is not None:
        # Rotation from the driver's world into the reference's that agrees in both cameras' axes.
        # Extrinsics act after diag(1, -1, -1), which has to be undone on either side.
        flip = jnp.diag(jnp.array([1.0, -1.0, -1.0], jnp.float32))
        carry = _product(
            flip,
            jnp.swapaxes(reference_camera.extrinsics[..., :3, :3], -1, -2),
            driver_camera.extrinsics[..., :3, :3],
            flip,
        )[..., None, :, :]
        turned = _product(carry, turned, jnp.swapaxes(carry, -1, -2))
        moved = jnp.einsum(
            "...ij,...j->...i", jnp.broadcast_to(carry, turned.shape), moved, precision=_HIGHEST
        )
    head = _product(turned, head_rotation(reference)[..., None, :, :])
    rot = rotvec_from_matrix(_product(head, jnp.swapaxes(matrix_from_rotvec(driver.neck), -1, -2)))
    tra = reference.tra[..., None, :] + jnp.asarray(scale, jnp.float32)[..., None, None] * moved
    return driver._replace(betas=betas, rot=rot, tra=tra)
