"""What the model does with fixed held-out windows, during training: pictures, videos, HPF and HEF."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt8
from ml_collections import ConfigDict

from loki_jax.data.reader import Dataset
from loki_jax.data.schema import Batch
from loki_jax.diffusion.sampler import check_guidance, sample_latents
from loki_jax.diffusion.schedule import Schedule
from loki_jax.driver.encoding import ReferenceFrame
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import NAME as BUILTIN
from loki_jax.face.retarget import fold_neck, neck_joint, retarget, size_ratio
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.photometric import fit_photometric_clips
from loki_jax.metrics.hef import head_expression_follow
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.networks import (
    Networks,
    decode_latents,
    default_guidance,
    driver_input,
    initial_noise,
    portrait_keys_values,
    sample_windows,
)  # fmt: skip
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.training.logging import MetricWriter, log
from loki_jax.training.sharding import BATCH_AXES, put_global
from loki_jax.video.writer import write_video


class Pairs(NamedTuple):
    """Fixed references and drivers: N of one person each, then N of two (numpy, the same on all processes).

    Attributes:
      names: "reference clip < driver clip" of each pair.
      reference: (2N,S,S,3) uint8; reference_coefficients (2N,...); reference_clip (2N,) clip indices.
      reference_camera, reference_crop: of the reference frames, (2N,...).
      driver: (2N,T,S,S,3) uint8, the driver's frames; for the first N they are what should come out.
      driver_coefficients, driver_camera: as recorded, (2N,T,...).
      coefficients, camera, crop: the reference's motion, (2N,T,...): its own camera and crop.
    """

    names: tuple[str, ...]
    reference: UInt8[np.ndarray, "n s s 3"]
    reference_coefficients: Coefficients
    reference_clip: np.ndarray
    reference_camera: Camera
    reference_crop: np.ndarray
    driver: UInt8[np.ndarray, "n t s s 3"]
    driver_coefficients: Coefficients
    driver_camera: Camera
    coefficients: Coefficients
    camera: Camera
    crop: np.ndarray


def take_rows(tree: PyTree, rows: np.ndarray, mesh: Mesh) -> PyTree:
    """Rows of global arrays, as numpy on every process; nothing else leaves its device."""
    pick = jax.jit(
        lambda tree: jax.tree.map(lambda x: x[rows], tree), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    return jax.tree.map(np.asarray, pick(tree))


def make_pairs(
    batch: Batch, count: int, head: HeadAsset, dataset: Dataset, mode: str, mesh: Mesh, neck: bool = True,
    history: int = 0,
) -> Pairs | None:  # fmt: skip
    """Pairs from a validation batch; all processes must call. None where it holds no images.

    Window i drives its own person, and then that of the next window of somebody else (method, section 9).

    Args:
      batch: the global batch.
      count: N; at most as many as the global batch has windows.
      mode: pose of the second kind, "relative" or "absolute".
      neck: whether the driver map shows the neck's bend; else, in relative mode, it becomes part of `rot`.
      history: frames at the front of the windows that belong to their history and are left out.
    """
    if batch.frames is None or count < 1:
        return None
    rows = np.arange(min(count, len(batch.clip_index)))
    few = take_rows(batch, rows, mesh)
    window = ("frames", "coefficients", "camera", "crop")
    few = few._replace(
        **{name: jax.tree.map(lambda x: x[:, history:], getattr(few, name)) for name in window}
    )
    take = lambda name, index: jax.tree.map(lambda x: x[index], getattr(few, name))
    clips = [dataset.clips[int(clip)] for clip in few.clip_index]
    others = np.array([_next_other([clip.identity for clip in clips], int(row)) for row in rows])
    own = np.concatenate([rows, others])  # whose portrait
    drivers = np.concatenate([rows, rows])  # whose motion

    def retargeted(driver, reference, driver_camera, reference_camera):
        scale = size_ratio(head, reference.betas, driver.betas[0])
        cameras = dict(driver_camera=driver_camera, reference_camera=reference_camera)
        moved = retarget(driver, reference, mode, scale=scale, **cameras)
        if neck or mode == "absolute":
            return moved
        return fold_neck(moved, neck_joint(head, reference.betas))

    camera = jax.tree.map(lambda x: x[:, 0], few.camera)
    camera_of = lambda index: jax.tree.map(lambda x: x[index], camera)
    crossed = jax.jit(jax.vmap(retargeted))(
        take("coefficients", rows), take("reference_coefficients", others), camera_of(rows), camera_of(others)
    )
    join = lambda same, other: np.concatenate([same, np.asarray(other)])
    hold = lambda tree: jax.tree.map(lambda x: np.repeat(x[:, :1], few.frames.shape[1], 1), tree)
    return Pairs(
        names=tuple(f"{clips[a].clip_id} < {clips[b].clip_id}" for a, b in zip(own, drivers, strict=True)),
        reference=take("reference", own),
        reference_coefficients=take("reference_coefficients", own),
        reference_clip=few.clip_index[own],
        reference_camera=take("reference_camera", own),
        reference_crop=take("reference_crop", own),
        driver=take("frames", drivers),
        driver_coefficients=take("coefficients", drivers),
        driver_camera=take("camera", drivers),
        coefficients=jax.tree.map(join, take("coefficients", rows), crossed),
        camera=hold(take("camera", own)),
        crop=hold(take("crop", own)),
    )


def _next_other(identity: list[str], row: int) -> int:
    """The next row, around the end, of another identity; the row itself where there is only one."""
    count = len(identity)
    return next((i % count for i in range(row + 1, row + count) if identity[i % count] != identity[row]), row)


def check_sampling(config: ConfigDict, schedule: Schedule) -> None:
    """Raise ValueError where the sampler would refuse the options of `config.sample`."""
    c = config.sample
    sample = lambda noise: sample_latents(
        lambda x, *_: x, noise, schedule, conditional=(), unconditional=(), solver=c.solver,
        steps=c.steps, guidance=c.guidance, spacing=c.spacing, prediction=config.diffusion.prediction,
    )  # fmt: skip
    try:
        check_guidance(default_guidance(config), c.guided_steps)
        jax.eval_shape(sample, jax.ShapeDtypeStruct((1, 1, 1, 1, 1), jnp.float32))
    except ValueError as error:
        raise ValueError(f"config.sample: {error}") from error


def animate_pairs(
    config: ConfigDict, networks: Networks, params: PyTree, head: HeadAsset, inputs: dict[str, Any]
) -> UInt8[Array, "n t s s 3"]:
    """Frames of pairs: `inputs` holds fields of `Pairs` and the noise, each with the leading axis N."""
    own = (inputs["reference_coefficients"], inputs["reference_camera"], inputs["reference_crop"])
    reference = ReferenceFrame(*own, inputs["reference"])
    seen = portrait_keys_values(config, networks, params, head, inputs["reference"], *own)
    driver = driver_input(config, head, inputs["coefficients"], inputs["camera"], inputs["crop"], reference)
    latents, _ = sample_windows(
        config, networks, params, seen, driver, inputs["noise"], solver=config.sample.solver,
        steps=config.sample.steps, guidance=default_guidance(config), spacing=config.sample.spacing,
        guided_steps=config.sample.guided_steps,
    )  # fmt: skip
    return decode_latents(networks, params, latents)


def make_sampler(
    config: ConfigDict, networks: Networks, mesh: Mesh
) -> Callable[[PyTree, HeadAsset, Pairs], np.ndarray]:
    """sample(params, head, pairs) -> (2N,T,S,S,3) uint8 on every process, always from the same noise.

    All processes must call. The pairs go through in blocks of one for each device (the last is filled up),
    with whole parameters: nothing is exchanged between the first gathering and the result of a block.
    """
    whole, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
    animate = functools.partial(animate_pairs, config, networks)
    sample = jax.shard_map(
        animate, mesh=mesh, in_specs=(whole, whole, split), out_specs=split, check_vma=False
    )
    compiled = jax.jit(sample, out_shardings=NamedSharding(mesh, whole))
    moved = ("coefficients", "camera", "crop")
    names = (*moved, "reference", *(f"reference_{name}" for name in moved))

    def run(params: PyTree, head: HeadAsset, pairs: Pairs) -> np.ndarray:
        inputs = {name: getattr(pairs, name) for name in names}
        inputs["noise"] = initial_noise(networks, jax.random.key(0), *pairs.driver.shape[:2])
        count, frames = len(pairs.reference), []
        for first in range(0, count, mesh.size):
            rows = np.minimum(np.arange(first, first + mesh.size), count - 1)
            block = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
            # Every process holds all pairs and gives its devices what they ask for.
            block = put_global(block, jax.tree.map(lambda _: NamedSharding(mesh, split), block))
            frames.append(np.asarray(compiled(params, head, block)))
        return np.concatenate(frames)[:count]

    return run


def sample_frames(pairs: Pairs, sampled: UInt8[np.ndarray, "n t s s 3"]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Frames of a video: a column for each pair, with its reference, its driver and what was sampled."""
    still = np.concatenate(list(pairs.reference), 1)
    row = lambda videos, t: np.concatenate(list(videos[:, t]), 1)
    return [
        np.concatenate([still, row(pairs.driver, t), row(sampled, t)], 0) for t in range(sampled.shape[1])
    ]


def sample_sheet(pairs: Pairs, sampled: UInt8[np.ndarray, "n t s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """For each pair a row of driver frames over a row of sampled ones, the reference in front of both."""
    rows = []
    for portrait, driver, new in zip(pairs.reference, pairs.driver, sampled, strict=True):
        rows += [np.concatenate([portrait, *driver], 1), np.concatenate([portrait, *new], 1)]
    return np.concatenate(rows, 0)


def can_follow(head: HeadAsset, dataset: Dataset, pairs: Pairs) -> bool:
    """Whether `follow` can read these pairs back: synthetic clips of the built-in head."""
    known = all("identity_seed" in dataset.clips[int(clip)].extra for clip in pairs.reference_clip)
    return head.name == BUILTIN and known


def follow(
    head: HeadAsset, dataset: Dataset, pairs: Pairs, sampled: UInt8[np.ndarray, "n t s s 3"], size: int = 256
) -> dict[str, float]:
    """Mean HPF (degrees) and HEF of sampled windows, of one person and of two, read back photometrically.

    Works on one process alone. Windows of few frames measure less than `python -m loki_jax.evaluate`.
    """
    seeds = [dataset.clips[int(clip)].extra["identity_seed"] for clip in pairs.reference_clip]
    appearance = jax.tree.map(
        lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *(sample_appearance(seed, head) for seed in seeds)
    )
    fitted, _ = fit_photometric_clips(
        jnp.asarray(sampled),
        head,
        jnp.asarray(pairs.reference_coefficients.betas),
        appearance,
        pairs.camera,
        jnp.asarray(pairs.crop),
    )
    one = lambda tree, i: jax.tree.map(lambda x: np.asarray(x)[i], tree)
    hpf, hef = [], []
    for i in range(len(sampled)):
        mine, target, camera = one(fitted, i), one(pairs.driver_coefficients, i), one(pairs.driver_camera, i)
        follow = head_pose_follow(
            mine.rot, target.rot, mine.neck, target.neck,
            pred_extrinsics=one(pairs.camera, i).extrinsics, target_extrinsics=camera.extrinsics,
        )  # fmt: skip
        hpf.append(follow.degrees)
        hef.append(head_expression_follow(head, mine, target, camera, size=size).distance)
    half = len(sampled) // 2
    mean = lambda values: float(np.mean([v for v in values if v is not None]))
    return {
        "sample_hpf": mean(hpf[:half]), "sample_hef": mean(hef[:half]),
        "sample_hpf_cross": mean(hpf[half:]), "sample_hef_cross": mean(hef[half:]),
    }  # fmt: skip


def write_samples(
    writer: MetricWriter, workdir: Path, step: int, pairs: Pairs, frames: UInt8[np.ndarray, "n t s s 3"],
    head: HeadAsset, dataset: Dataset, config: ConfigDict,
) -> None:  # fmt: skip
    """Write picture and video of sampled windows, and their metrics where the config asks for them."""
    writer.image(step, "samples", sample_sheet(pairs, frames))
    if config.sample.video:
        (workdir / "samples").mkdir(exist_ok=True)
        write_video(workdir / "samples" / f"{step:08d}.mp4", sample_frames(pairs, frames), Fraction(25))
    if config.sample.follow and can_follow(head, dataset, pairs):
        figures = follow(head, dataset, pairs, frames)
        writer.scalars(step, figures)
        log(f"step {step} " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
