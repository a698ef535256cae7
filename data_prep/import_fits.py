"""Fits of other programs to shards: public Loki / CAP4D `fit.npz`, VHAP / GaussianAvatars `flame_param.npz`.

    python -m data_prep.import_fits --fits FILES_OR_FOLDERS... --head flame.npz --out DIR

A fit is a `fit.npz` with its pictures beside it (`images/cam0/`, `images/` or a video; `--frames` names
them otherwise), or VHAP's export: a `transforms.json` with `flame_param/*.npz` or `flame_param.npz`. The
head must be made from the FLAME model that was fitted, with as many axes (`python -m data_prep.head_asset
flame MODEL.pkl`, with `--blink` for fits of the public Loki code, whose 65th expression axis is a blink).
Conventions are those of design sections 3 and 11. The result is a dataset as `data_prep.build` makes it,
and stopping, continuing and extending work the same way. `data_prep.export` goes back.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data_prep.assemble import DatasetOptions, FitClip, RejectedClip, build
from data_prep.build import (
    add_dataset_arguments,
    check_dataset_arguments,
    interrupted,
    load_any_head,
)
from data_prep.clip_file import ClipData
from data_prep.face_track import CROP_FACTOR, clip_crop_box, head_extent
from data_prep.latents import load_encoder
from data_prep.manifest import PlannedClip, pipeline_identity, plan_clips, read_labels
from data_prep.workers import WorkerError
from loki_jax.data.records import DatasetError, encode_image
from loki_jax.head.asset import HeadAsset, HeadAssetError
from loki_jax.head.camera import crop_and_resize, crop_box
from loki_jax.head.rotation import matrix_from_rotvec
from loki_jax.head.skinning import make_identity
from loki_jax.head.types import Camera, Coefficients
from loki_jax.video import MediaError, VideoReader, read_image, resample_indices

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# Files that go by the name of their folder.
_GENERIC_STEMS = ("fit", "flame_param", "transforms", "transforms_train")
_TRANSFORMS = ("transforms.json", "transforms_train.json")
_LOKI_KEYS = ("shape", "expr", "rot", "tra", "eye_rot", "neck_rot", "fx", "fy", "cx", "cy", "extr")
_VHAP_KEYS = ("shape", "expr", "rotation", "translation", "neck_pose", "jaw_pose", "eyes_pose")
_N_PUBLIC_EXPRESSION = 65
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


class ImportedFit(NamedTuple):
    """A fit in our conventions, and where its pictures are.

    Attributes:
      coefficients: fields (N, n).
      camera: intrinsics (4,) or (N, 4), extrinsics (4, 4) or (N, 4, 4).
      frames: N picture files, or one video of N frames.
      notes: what could not be taken over.
    """

    coefficients: Coefficients
    camera: Camera
    frames: list[Path] | Path
    notes: tuple[str, ...]


# --- finding files -------------------------------------------------------------------------------------


def find_fits(sources: Sequence[str]) -> list[Path]:
    """`fit*.npz` files, `transforms.json` files and `flame_param.npz` files, as given or inside folders.

    Raises:
      DatasetError: a source does not exist, or there is none.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise DatasetError(f"{source}: no such file or folder. Check `--fits`.")
        if not source.is_dir():
            found.setdefault(source.resolve(), None)
            continue
        for path in sorted(source.rglob("*")):
            if path.name in _TRANSFORMS[:1] or path.name == "fit.npz":
                found.setdefault(path.resolve(), None)
            # Beside a transforms.json it is part of that fit.
            elif path.name == "flame_param.npz" and not (path.parent / _TRANSFORMS[0]).exists():
                found.setdefault(path.resolve(), None)
    if not found:
        raise DatasetError(
            f"{', '.join(sources)}: neither fit.npz nor transforms.json nor flame_param.npz there. Check "
            "`--fits`."
        )
    return list(found)


def called(path: Path) -> Path:
    """The file or folder that a fit goes by: `person7/fit.npz` is person7."""
    return path.parent if path.stem in _GENERIC_STEMS else path


def find_frames(fit: Path, camera: int) -> list[Path] | Path:
    """The pictures that lie beside a fit: a folder of pictures, or a video.

    Raises:
      MediaError: there are none.
    """
    folder = fit.parent
    folders = [folder / "images" / f"cam{camera}", folder / "images", folder / "frames", folder]
    for candidate in folders:
        if candidate.is_dir() and (pictures := _pictures(candidate)):
            return pictures
    for stem in (fit.stem, "video", f"cam{camera}", "images/video", f"images/cam{camera}"):
        for suffix in _VIDEO_SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise MediaError(
        f"{fit}: no pictures beside it; looked for images/cam{camera}/, images/, frames/ and video.mp4. Name "
        "their folder or video with `--frames`."
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)


def given_frames(path: Path) -> list[Path] | Path:
    """The pictures in a folder, or the video, that `--frames` names.

    Raises:
      MediaError: there are none.
    """
    if path.is_dir():
        if pictures := _pictures(path):
            return pictures
        raise MediaError(f"{path}: holds no pictures ({', '.join(_IMAGE_SUFFIXES)}). Check `--frames`.")
    if not path.is_file():
        raise MediaError(f"{path}: no such folder or video. Check `--frames`.")
    return path


# --- reading -------------------------------------------------------------------------------------------


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file. Check `--fits`.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DatasetError(
            f"{path}: not a readable .npz file of a fit ({error}). Copy it again, or fit the clip again."
        ) from error


def _check_arrays(
    path: Path, arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int | None, ...]]
) -> None:
    """All of `shapes` (None: any size), numbers, and finite."""
    missing = [key for key in shapes if key not in arrays]
    if missing:
        raise DatasetError(
            f"{path}: lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}. Give "
            "the file "
            "that the fitting program wrote."
        )
    for key, shape in shapes.items():
        found = arrays[key].shape
        if len(found) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found, strict=True)
        ):
            want = "(" + ", ".join("n" if size is None else str(size) for size in shape) + ")"
            raise DatasetError(f"{path}: {key} has shape {found}, expected {want}. Fit the clip again.")
        if arrays[key].dtype.kind not in "fiu" or not np.isfinite(arrays[key].astype(np.float64)).all():
            raise DatasetError(f"{path}: {key} holds values that are not finite numbers. Fit the clip again.")


def _fitted_axes(
    values: Float[np.ndarray, "*n have"], want: int, what: str, path: Path, option: str
) -> np.ndarray:
    """`values` with as many axes as the head has; what is beyond them must be zero."""
    beyond = values[..., want:]
    if np.abs(beyond).max(initial=0) > 0:
        raise DatasetError(
            f"{path}: uses {values.shape[-1]} {what} axes, the head has {want}. Make the head with "
            f"`python -m data_prep.head_asset flame MODEL.pkl {option} {values.shape[-1]}`."
        )
    short = want - min(values.shape[-1], want)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, short)]
    return np.pad(values[..., :want], padding).astype(np.float32)


def _expression(
    values: Float[np.ndarray, "N have"], head: HeadAsset, path: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Expression of a public fit, whose 65th axis is a blink, on the head's axes."""
    names = head.expression_names
    if values.shape[1] != _N_PUBLIC_EXPRESSION or head.name != "flame":
        return _fitted_axes(values, head.n_expression, "expression", path, "--n-expression"), ()
    last = _N_PUBLIC_EXPRESSION - 1
    result, notes = np.zeros((len(values), head.n_expression), np.float32), ()
    plain = [index for index, name in enumerate(names) if name != "blink"][:last]
    if len(plain) < last and np.abs(values[:, len(plain) : last]).max() > 0:
        raise DatasetError(
            f"{path}: uses {last} expression axes of FLAME and a blink, the head has {len(plain)}. Make it "
            "with "
            "`python -m data_prep.head_asset flame MODEL.pkl --blink FILE`."
        )
    result[:, plain] = values[:, : len(plain)]
    if "blink" in names:
        result[:, names.index("blink")] = values[:, last]
    elif np.abs(values[:, last]).max() > 0:
        notes = (
            f"the blink (65th expression axis, up to {np.abs(values[:, last]).max():.2f}) is dropped: the "
            "head has "
            "no such axis. Make it with `data_prep.head_asset flame --blink FILE` to keep it.",
        )
    return result, notes


def read_loki_fit(
    path: Path, head: HeadAsset, *, camera: int = 0, neck: str = "keep", frames: Path | None = None
) -> ImportedFit:
    """A `fit.npz` of the public Loki or CAP4D code (design section 11).

    Its rotation is about the origin and comes after skinning, as ours. Its neck rotation is taken over
    (`neck="keep"`) although the public driver map ignores it; "drop" sets it to zero as that does.

    Raises:
      DatasetError: the file is damaged, lacks arrays, or does not fit the head.
      MediaError: its pictures are not there.
    """
    arrays = _read_arrays(path)
    n = len(np.atleast_1d(arrays.get("expr", np.zeros(0))))
    cameras = len(np.atleast_1d(arrays.get("fx", np.zeros(0))))
    shapes = dict.fromkeys(("rot", "tra", "eye_rot", "neck_rot"), (n, 3))
    shapes |= dict.fromkeys(("fx", "fy", "cx", "cy"), (cameras, 1))
    shapes |= {"shape": (None,), "expr": (n, None), "extr": (cameras, 4, 4)}
    if "jaw_rot" in arrays:
        shapes["jaw_rot"] = (n, 3)
    _check_arrays(path, arrays, shapes)
    if n == 0:
        raise DatasetError(f"{path}: holds no frames. Fit the clip again.")
    if not 0 <= camera < cameras:
        raise DatasetError(f"{path}: has {cameras} cameras, number {camera} is asked for. Check `--camera`.")
    expression, notes = _expression(arrays["expr"], head, path)
    shape = _fitted_axes(arrays["shape"], head.n_shape, "shape", path, "--n-shape")
    jaw = arrays.get("jaw_rot", np.zeros((n, 3)))
    kept = np.asarray(arrays["neck_rot"]) * (neck == "keep")
    motion = (arrays["rot"], arrays["tra"], kept, jaw, arrays["eye_rot"])
    coefficients = Coefficients(
        np.tile(shape, (n, 1)), expression, *(np.asarray(value, np.float32) for value in motion)
    )
    intrinsics = np.array([arrays[key][camera, 0] for key in ("fx", "fy", "cx", "cy")], np.float32)
    pictures = find_frames(path, camera) if frames is None else given_frames(frames)
    return ImportedFit(
        coefficients, Camera(intrinsics, arrays["extr"][camera].astype(np.float32)), pictures, notes
    )


def read_vhap_fit(
    path: Path, head: HeadAsset, *, camera: int = 0, neck: str = "keep", frames: Path | None = None
) -> ImportedFit:
    """A fit that VHAP exported, as GaussianAvatars reads it: `transforms.json` or `flame_param.npz`.

    Its FLAME turns about the root joint and then translates, ours turns about the origin: with J the
    root joint of the face with its expression, tra = translation + J - R J. Its cameras look along
    -z (OpenGL), camera to world. The two eyes' rotations become their mean. Static offsets of vertices
    have no place in our coefficients.

    Raises:
      DatasetError: files are missing or damaged, or do not fit the head.
      MediaError: its pictures are not there.
    """
    transforms = path if path.suffix == ".json" else next(
        (path.parent / name for name in _TRANSFORMS if (path.parent / name).is_file()), None
    )  # fmt: skip
    if transforms is None:
        raise DatasetError(
            f"{path}: needs the transforms.json of the same export beside it, which holds the camera."
        )
    entries = _read_transforms(transforms, camera)
    whole = path if path.suffix == ".npz" else transforms.parent / "flame_param.npz"
    if all("flame_param_path" in entry for entry in entries):
        parts = [_read_vhap_arrays(transforms.parent / entry["flame_param_path"]) for entry in entries]
        counts = {len(part["expr"]) for part in parts}
        if counts != {1}:
            raise DatasetError(
                f"{transforms}: its flame_param files hold {counts} frames, expected one each."
            )
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in _VHAP_KEYS if key != "shape"}
        arrays |= {"shape": parts[0]["shape"]}
        offsets = [part["static_offset"] for part in parts if "static_offset" in part]
    else:
        everything = _read_vhap_arrays(whole)
        rows = np.array([int(entry.get("timestep_index", i)) for i, entry in enumerate(entries)])
        n = len(everything["expr"])
        if rows.min() < 0 or rows.max() >= n:
            raise DatasetError(
                f"{transforms}: names frame {rows.max()}, but {whole} holds {n}. They belong to different "
                "exports."
            )
        arrays = {key: everything[key][rows] for key in _VHAP_KEYS if key != "shape"}
        arrays |= {"shape": everything["shape"]}
        offsets = [everything["static_offset"]] if "static_offset" in everything else []

    notes: tuple[str, ...] = ()
    largest = max((float(np.abs(offset).max(initial=0)) for offset in offsets), default=0.0)
    if largest > 0:
        notes += (f"static vertex offsets of up to {1000 * largest:.1f} mm are dropped.",)
    shape = _fitted_axes(arrays["shape"], head.n_shape, "shape", path, "--n-shape")
    # VHAP's axes are FLAME's own, so a blink axis stays at rest.
    plain = [index for index, name in enumerate(head.expression_names) if name != "blink"]
    expression = np.zeros((len(arrays["expr"]), head.n_expression), np.float32)
    expression[:, plain] = _fitted_axes(arrays["expr"], len(plain), "expression", path, "--n-expression")
    # FLAME regresses its joints from the mesh with its expression.
    moved = np.einsum("v,evc->ec", head.joint_regressor[0], head.expression_basis)
    root = np.asarray(make_identity(head, shape).joints[0], np.float64) + expression @ moved
    turn = np.asarray(matrix_from_rotvec(arrays["rotation"].astype(np.float32)), np.float64)
    tra = arrays["translation"] + root - np.einsum("nij,nj->ni", turn, root)
    eyes = (arrays["eyes_pose"][:, :3] + arrays["eyes_pose"][:, 3:]) / 2
    motion = (arrays["rotation"], tra, arrays["neck_pose"] * (neck == "keep"), arrays["jaw_pose"], eyes)
    coefficients = Coefficients(
        np.tile(shape, (len(expression), 1)), expression, *(np.asarray(v, np.float32) for v in motion)
    )
    intrinsics = np.stack([entry["intrinsics"] for entry in entries])
    extrinsics = np.stack([entry["extrinsics"] for entry in entries])
    fixed = (intrinsics == intrinsics[0]).all() and (extrinsics == extrinsics[0]).all()
    view = Camera(intrinsics[0], extrinsics[0]) if fixed else Camera(intrinsics, extrinsics)
    pictures = [entry["picture"] for entry in entries] if frames is None else given_frames(frames)
    return ImportedFit(coefficients, view, pictures, notes)


def _read_vhap_arrays(path: Path) -> dict[str, np.ndarray]:
    arrays = _read_arrays(path)
    n = len(np.atleast_1d(arrays.get("expr", np.zeros(0))))
    if "shape" in arrays:
        arrays["shape"] = arrays["shape"].reshape(-1)
    shapes = dict.fromkeys(("rotation", "translation", "neck_pose", "jaw_pose"), (n, 3))
    _check_arrays(path, arrays, shapes | {"shape": (None,), "expr": (n, None), "eyes_pose": (n, 6)})
    if n == 0:
        raise DatasetError(f"{path}: holds no frames. Fit the clip again.")
    return arrays


def _read_transforms(path: Path, camera: int) -> list[dict[str, Any]]:
    """The frames of one camera in order of time, each with intrinsics (4,), extrinsics (4, 4), picture."""
    try:
        content = json.loads(path.read_text())
        frames = content["frames"]
        chosen = [f for f in frames if int(f.get("camera_index", f.get("camera_indx", 0))) == camera]
        if not chosen:
            raise DatasetError(f"{path}: has no frames of camera {camera}. Check `--camera`.")
        chosen.sort(key=lambda f: int(f.get("timestep_index", 0)))
        entries = []
        for frame in chosen:
            values = content | frame
            if "fl_x" in values:
                focal = values["fl_x"], values.get("fl_y", values["fl_x"])
            else:
                focal = (values["w"] / 2 / np.tan(values["camera_angle_x"] / 2),) * 2
            centre = values.get("cx", values.get("w", 0) / 2), values.get("cy", values.get("h", 0) / 2)
            world_from_camera = np.asarray(values["transform_matrix"], np.float64)
            if world_from_camera.shape != (4, 4) or not np.isfinite(world_from_camera).all():
                raise ValueError("a transform_matrix is no 4 x 4 matrix")
            entries.append(frame | {
                "intrinsics": np.array([*focal, *centre], np.float32),
                "extrinsics": (_FLIP @ np.linalg.inv(world_from_camera) @ _FLIP).astype(np.float32),
                "picture": _picture_of(path.parent / values["file_path"]),
            })  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, np.linalg.LinAlgError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path}: not a readable transforms.json of VHAP ({type(error).__name__}: {error}). Export it "
            "again."
        ) from error
    return entries


def _picture_of(path: Path) -> Path:
    """NeRF data sets may leave the suffix out."""
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return path
    found = (path.with_name(path.name + suffix) for suffix in _IMAGE_SUFFIXES)
    return next((candidate for candidate in found if candidate.is_file()), path)


def read_fit(path: Path, head: HeadAsset, **options: Any) -> ImportedFit:
    """A fit of either kind, told apart by its content.

    Raises:
      DatasetError, MediaError: see `read_loki_fit` and `read_vhap_fit`.
    """
    if path.suffix == ".json":
        return read_vhap_fit(path, head, **options)
    keys = set(_read_arrays(path))
    reader = read_vhap_fit if {"rotation", "translation"} <= keys else read_loki_fit
    return reader(path, head, **options)


# --- one clip ------------------------------------------------------------------------------------------


def _frames_of(fit: ImportedFit, path: Path) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The fit's pictures, exactly as many as it has frames.

    Raises:
      MediaError: a picture cannot be read.
      DatasetError: there are more or fewer of them, or they differ in size.
    """
    n = len(fit.coefficients.expression)

    def wrong(count: str, where: Path) -> DatasetError:
        return DatasetError(
            f"{path}: the fit has {n} frames, {where} has {count}. Give the pictures that were fitted "
            "(`--frames`), at the fit's frame rate."
        )

    if isinstance(fit.frames, list):
        if len(fit.frames) != n:
            raise wrong(str(len(fit.frames)), fit.frames[0].parent)
        frames: Iterator[np.ndarray] = map(read_image, fit.frames)
        where = fit.frames[0].parent
    else:
        frames, where = iter(VideoReader(fit.frames)), fit.frames
    count, shape = 0, None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise DatasetError(
                f"{path}: picture {count} in {where} is {frame.shape[1]}x{frame.shape[0]}, the first is "
                f"{shape[1]}x{shape[0]}. All must have the size that was fitted."
            )
        count += 1
        if count > n:
            raise wrong("more", where)
        yield frame
    if count != n:
        raise wrong(str(count), where)


def make_import(
    head: HeadAsset,
    *,
    size: int,
    image_format: str,
    crop_factor: float,
    official_crops: bool,
    fps: Fraction,
    source_fps: Fraction,
    reader: dict[str, Any],
) -> FitClip:
    """The function that `data_prep.assemble` applies to every fit; arguments as of the program."""

    def take(clip: PlannedClip, folder: Path) -> ClipData:
        fit = read_fit(clip.path, head, **reader)
        n = len(fit.coefficients.expression)
        rate = source_fps
        if isinstance(fit.frames, Path):
            with VideoReader(fit.frames) as video:
                rate = video.source_fps
        if official_crops:
            low, high = head_extent(head, fit.coefficients, fit.camera)
            boxes = np.asarray(crop_box(np.stack([low, high], axis=1), crop_factor, integer=True))
        else:
            box = clip_crop_box(head, fit.coefficients, fit.camera, crop_factor)
            boxes = np.broadcast_to(box, (n, 4))
        if not np.isfinite(boxes).all() or (boxes[:, 2:] - boxes[:, :2] < 1).any():
            raise RejectedClip(
                f"{clip.path}: the head is behind the camera or a point. The fit is of another head or "
                "camera."
            )
        indices = resample_indices(n, rate, fps)
        wanted, images = dict.fromkeys(indices.tolist()), {}
        for index, frame in enumerate(_frames_of(fit, clip.path)):
            if index == 0:
                _check_in_sight(boxes[0], frame.shape, clip.path)
            if index in wanted:
                images[index] = encode_image(crop_and_resize(frame, boxes[index], size), image_format)
        coefficients = Coefficients(*(np.asarray(field)[indices] for field in fit.coefficients))
        camera = fit.camera
        if camera.intrinsics.ndim == 2:
            camera = Camera(camera.intrinsics[indices], camera.extrinsics[indices])
        row = {
            "frames": len(indices), "fps": str(fps), "source_fps": str(rate), "notes": list(fit.notes),
        }  # fmt: skip
        crop = boxes[indices] if official_crops else boxes[0]
        return ClipData(
            coefficients, camera, crop, np.ones(len(indices), np.float32),
            [images[i] for i in indices.tolist()], row,
        )  # fmt: skip

    return take


def _check_in_sight(box: Float[np.ndarray, "4"], shape: tuple[int, ...], path: Path) -> None:
    height, width = shape[:2]
    inside = np.minimum(box[2:], (width, height)) - np.maximum(box[:2], 0)
    share = np.prod(np.clip(inside, 0, None)) / np.prod(box[2:] - box[:2])
    if share < 0.25:
        raise RejectedClip(
            f"{path}: only {100 * share:.0f} % of the head's box {np.round(box).astype(int).tolist()} lie "
            "in the "
            f"{width}x{height} pictures. They have another size than those that were fitted, or belong to "
            "another "
            "camera (`--camera`)."
        )


def fit_digest(path: Path, frames: Path | None, camera: int) -> str:
    """SHA-256 of a fit's file, and of the names and sizes of all files beside it that it may use.

    The pictures themselves are not read: there may be millions.
    """
    digest = hashlib.sha256(path.read_bytes())
    roots = [path.parent] if frames is None else [path.parent, frames]
    for root in roots:
        inside = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in inside:
            if file.is_file():
                name = file.relative_to(root) if file != root else file.name
                digest.update(f"{name} {file.stat().st_size}\n".encode())
    digest.update(str(camera).encode())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.import_fits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fits", nargs="+", required=True, help="fit files, or folders with fits")
    parser.add_argument("--head", required=True, help="head asset of the fitted model")
    add_dataset_arguments(parser)
    parser.add_argument("--frames", type=Path, help="folder of pictures or video, for a single fit")
    parser.add_argument("--camera", type=int, default=0, help="which camera of a fit with several")
    parser.add_argument(
        "--neck", choices=("keep", "drop"), default="keep", help="drop: as the public driver map does"
    )
    parser.add_argument(
        "--official-crops",
        action="store_true",
        help="a box of whole pixels for each frame, as the public code",
    )
    parser.add_argument("--fps", type=Fraction, default=Fraction(25), help="rate to resample to")
    parser.add_argument(
        "--source-fps", type=Fraction, default=Fraction(25), help="rate of folders of pictures"
    )
    args = parser.parse_args(argv)
    check_dataset_arguments(parser, args)
    if args.fps <= 0 or args.source_fps <= 0 or args.camera < 0:
        parser.error("--fps and --source-fps must be positive, --camera not negative")
    crop_factor = args.crop_factor if args.crop_factor is not None else CROP_FACTOR
    image_format = args.image_format or ("png" if args.size <= 128 else "jpeg")
    options = DatasetOptions(
        args.size, "png" if args.no_images else image_format, not args.no_images, args.validation
    )
    settings = {
        "importer": True, "size": args.size, "image_format": options.image_format, "crop_factor": crop_factor,
        "official_crops": args.official_crops, "fps": str(args.fps), "source_fps": str(args.source_fps),
        "camera": args.camera, "neck": args.neck,
    }  # fmt: skip
    try:
        fits = find_fits(args.fits)
        if args.frames is not None and len(fits) > 1:
            raise DatasetError(
                f"--frames names the pictures of one fit, there are {len(fits)}. Import one by one."
            )
        head = load_any_head(args.head)
        labels = None if args.identities is None else read_labels(args.identities)
        encoder = None
        if args.latents is not None:
            encoder = load_encoder(
                args.latents, args.size, config=args.latents_config, batch=args.latents_batch
            )
        made_by = pipeline_identity(head, {}, settings)
        planned = plan_clips(
            fits, made_by, named=[called(path) for path in fits], identity_from=args.identity_from,
            labels=labels, licence=args.licence,
            digest_of=lambda path: fit_digest(path, args.frames, args.camera),
        )  # fmt: skip
        reader = {"camera": args.camera, "neck": args.neck, "frames": args.frames}
        make_fit = functools.partial(
            make_import, head, size=args.size, image_format=options.image_format, crop_factor=crop_factor,
            official_crops=args.official_crops, fps=args.fps, source_fps=args.source_fps, reader=reader,
        )  # fmt: skip
        summary = build(
            planned, head, args.out, make_fit, made_by, options, encoder=encoder, workers=args.workers,
            overwrite=args.overwrite, keep_work=args.keep_work, say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (MediaError, HeadAssetError, DatasetError, WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted(args.out)
    for row in summary["clips"]:
        for note in row["notes"]:
            print(f"note: {row['clip']}: {note}")
    for entry in summary["rejected"]:
        print(f"rejected  {entry['reason']}")
    print(f"{args.out}: {len(summary['clips'])} clips, {sum(summary['records'].values())} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
