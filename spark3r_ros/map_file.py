"""A map on disk: one file, versioned, checked, written as a whole or not at all.

Layout: the magic line, a version (uint32), the SHA-256 of what follows, and a compressed ``.npz``.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spark3r_ros.frame import ScaleEstimate
from spark3r_ros.loops import Edge
from spark3r_ros.places import Place
from spark3r_ros.point_map import KeyframePoints
from spark3r_ros.windows import Keyframe

MAGIC = b"spark3r map\n"
VERSION = 2
_HEADER = struct.Struct("<I32s")


class MapFileError(ValueError):
    """A map that cannot be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class SavedMap:
    """What a file holds. Keyframes come with their places."""

    model: str  # backbone that made the descriptors
    scale: ScaleEstimate
    keyframes: tuple[Keyframe, ...]
    points: dict[int, KeyframePoints]
    edges: tuple[Edge, ...]


def write(path: str | Path, saved: SavedMap) -> None:
    """Write beside the target and move into place, so that a crash leaves the old file or the new one."""
    payload = _pack(saved)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + _HEADER.pack(VERSION, hashlib.sha256(payload).digest()) + payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | Path) -> SavedMap:
    """Read and check a map; ``MapFileError`` when it is missing, not a map, of another version, or damaged."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MapFileError(f"cannot read map {path}: {error.strerror}") from error
    if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _HEADER.size:
        raise MapFileError(f"{path} is not a spark3r map")
    version, digest = _HEADER.unpack_from(data, len(MAGIC))
    if version != VERSION:
        raise MapFileError(
            f"{path} has map version {version}, this program reads version {VERSION}; make the map again"
        )
    payload = data[len(MAGIC) + _HEADER.size :]
    if hashlib.sha256(payload).digest() != digest:
        raise MapFileError(f"{path} is damaged: its checksum is wrong; restore it or make the map again")
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            return _unpack(arrays)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise MapFileError(f"{path} lacks what a version {VERSION} map must have: {error}") from error


def _pack(saved: SavedMap) -> bytes:
    keyframes = saved.keyframes
    assert all(k.is_solved for k in keyframes), "only solved keyframes can be saved"
    channels = next((len(k.place.descriptor) for k in keyframes if k.place is not None), 0)
    places = [k.place or _forgotten(k.id, channels) for k in keyframes]
    points = [saved.points.get(k.id, _no_points()) for k in keyframes]
    arrays = {
        "model": np.array(saved.model),
        "scale": np.array([saved.scale.log_scale, saved.scale.sigma]),
        "scale_source": np.array(saved.scale.source),
        "id": np.array([k.id for k in keyframes], np.int64),
        "stamp_ns": np.array([k.stamp_ns for k in keyframes], np.int64),
        "frame_id": np.array([k.frame_id for k in keyframes], np.str_),
        "T_map_camera": np.stack([k.T_map_camera for k in keyframes]) if keyframes else np.zeros((0, 4, 4)),
        "keyframe_scale": np.array([k.scale for k in keyframes]),
        "median_depth": np.array([k.median_depth for k in keyframes]),
        "travelled": np.array([k.travelled for k in keyframes]),
        "descriptor": np.stack([p.descriptor for p in places]) if places else np.zeros((0, 0), np.float32),
        "num_corners": np.array([len(p.xy) for p in places], np.int64),
        "corner_xy": _join([p.xy for p in places], (0, 2), np.float32),
        "corner_depth": _join([p.depth for p in places], (0,), np.float32),
        "corner_orb": _join([p.orb for p in places], (0, 32), np.uint8),
        "num_points": np.array([len(p) for p in points], np.int64),
        "point_xyz": _join([p.xyz for p in points], (0, 3), np.float32),
        "point_rgb": _join([p.rgb for p in points], (0, 3), np.uint8),
        "point_confidence": _join([p.confidence for p in points], (0,), np.float32),
        "edge": np.array([(e.first, e.second, e.is_loop) for e in saved.edges], np.int64).reshape(-1, 3),
        "edge_S": _join([e.S_first_second[None] for e in saved.edges], (0, 4, 4), np.float64),
        "edge_sigmas": np.array([e.sigmas for e in saved.edges]).reshape(-1, 3),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpack(arrays: np.lib.npyio.NpzFile) -> SavedMap:
    ids = arrays["id"].tolist()
    corners = _split(arrays["num_corners"], arrays["corner_xy"], arrays["corner_depth"], arrays["corner_orb"])
    clouds = _split(arrays["num_points"], arrays["point_xyz"], arrays["point_rgb"], arrays["point_confidence"])
    descriptors = arrays["descriptor"]
    T, scale, depth = arrays["T_map_camera"], arrays["keyframe_scale"], arrays["median_depth"]
    travelled = arrays["travelled"]
    stamps, frame_ids = arrays["stamp_ns"].tolist(), arrays["frame_id"].tolist()
    keyframes = tuple(
        Keyframe(
            id=number, frame_index=-1, stamp_ns=stamps[i], frame_id=frame_ids[i], rgb=None, T_world_camera=T[i],
            T_map_camera=T[i], scale=float(scale[i]), median_depth=float(depth[i]),
            travelled=float(travelled[i]), is_solved=True,
            place=Place(number, descriptors[i], *corners[i]) if len(corners[i][0]) else None,
        )
        for i, number in enumerate(ids)
    )  # fmt: skip
    points = {number: KeyframePoints(*clouds[i]) for i, number in enumerate(ids) if len(clouds[i][0])}
    edges = tuple(
        Edge(int(first), int(second), S, (float(r), float(t), float(s)), bool(is_loop))
        for (first, second, is_loop), S, (r, t, s) in zip(
            arrays["edge"], arrays["edge_S"], arrays["edge_sigmas"], strict=True
        )
    )
    log_scale, sigma = arrays["scale"]
    estimate = ScaleEstimate(float(log_scale), float(sigma), str(arrays["scale_source"]))
    return SavedMap(str(arrays["model"]), estimate, keyframes, points, edges)


def _forgotten(number: int, channels: int) -> Place:
    """Stands for a place that was forgotten: nothing can be recognised by it."""
    rows = np.zeros((0, 2), np.float32)
    return Place(number, np.zeros(channels, np.float32), rows, rows[:, 0], np.zeros((0, 32), np.uint8))


def _no_points() -> KeyframePoints:
    return KeyframePoints(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))


def _join(parts: Sequence[np.ndarray], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(shape, dtype), *parts])


def _split(counts: np.ndarray, *arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Rows of arrays by keyframe; ``ValueError`` when the counts do not add up."""
    if any(len(a) != counts.sum() for a in arrays):
        raise ValueError("counts and rows disagree")
    cuts = np.cumsum(counts)[:-1]
    if len(counts) == 0:
        return []
    return list(zip(*(np.split(a, cuts) for a in arrays), strict=True))
