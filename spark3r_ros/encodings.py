"""Pixels of camera messages and image files to RGB uint8 arrays: numpy and OpenCV only, no ROS.

The names are those of sensor_msgs/image_encodings. ``8UC3`` and ``8UC4`` are read as BGR and BGRA, as OpenCV orders
them. 16-bit channels keep their upper eight bits. Everything returned is contiguous and owned by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np


class ImageError(ValueError):
    """An image that cannot be decoded; the message names the encoding and what was wrong."""


class _Layout(NamedTuple):
    """How one encoding lies in memory and the OpenCV conversion that makes it RGB."""

    bits: int
    channels: int
    to_rgb: int | None = None
    planes: int = 2  # rows of data per two rows of image: 2, or 3 for the half-resolution chroma of NV12 and NV21
    pairs: int = 1  # width (and height, with chroma planes) must be a multiple of this


# OpenCV names a Bayer pattern after its second row and column, ROS after its first pixel
_BAYER = {"rggb": cv2.COLOR_BayerBG2RGB, "bggr": cv2.COLOR_BayerRG2RGB,
          "gbrg": cv2.COLOR_BayerGR2RGB, "grbg": cv2.COLOR_BayerGB2RGB}  # fmt: skip
_CHANNELS = {
    "rgb": (3, None),
    "bgr": (3, cv2.COLOR_BGR2RGB),
    "rgba": (4, cv2.COLOR_RGBA2RGB),
    "bgra": (4, cv2.COLOR_BGRA2RGB),
    "mono": (1, cv2.COLOR_GRAY2RGB),
}
_UYVY = _Layout(8, 2, cv2.COLOR_YUV2RGB_UYVY, pairs=2)
_YUYV = _Layout(8, 2, cv2.COLOR_YUV2RGB_YUYV, pairs=2)

_LAYOUTS: dict[str, _Layout] = {
    **{f"{name}{bits}": _Layout(bits, *channels) for name, channels in _CHANNELS.items() for bits in (8, 16)},
    **{f"bayer_{name}{bits}": _Layout(bits, 1, code, pairs=2) for name, code in _BAYER.items() for bits in (8, 16)},
    **{f"{bits}UC1": _Layout(bits, *_CHANNELS["mono"]) for bits in (8, 16)},
    **{f"{bits}UC3": _Layout(bits, *_CHANNELS["bgr"]) for bits in (8, 16)},
    **{f"{bits}UC4": _Layout(bits, *_CHANNELS["bgra"]) for bits in (8, 16)},
    "uyvy": _UYVY,
    "yuv422": _UYVY,
    "yuyv": _YUYV,
    "yuv422_yuy2": _YUYV,
    "nv12": _Layout(8, 1, cv2.COLOR_YUV2RGB_NV12, planes=3, pairs=2),
    "nv21": _Layout(8, 1, cv2.COLOR_YUV2RGB_NV21, planes=3, pairs=2),
}

ENCODINGS: tuple[str, ...] = tuple(sorted(_LAYOUTS))


def decode(
    encoding: str, data: bytes | memoryview, height: int, width: int, step: int, is_bigendian: bool = False
) -> np.ndarray:
    """The pixels of a raw sensor_msgs/Image as RGB uint8 [H, W, 3].

    ``data`` is any buffer of bytes whose rows are ``step`` bytes apart. Raises ImageError for unknown encodings,
    impossible sizes and data that is too short.
    """
    layout = _LAYOUTS.get(encoding)
    if layout is None:
        raise ImageError(f"image encoding {encoding!r} is not known; known: {', '.join(ENCODINGS)}")
    has_chroma_planes = layout.planes == 3
    if width % layout.pairs or (has_chroma_planes and height % layout.pairs):
        raise ImageError(f"a {encoding} image must have an even size, got {width} x {height}")
    rows = height * layout.planes // 2
    dtype = np.dtype(np.uint8) if layout.bits == 8 else np.dtype(">u2" if is_bigendian else "<u2")
    pixels = _rows(encoding, data, rows, width, layout.channels, step, dtype)
    pixels = np.ascontiguousarray(pixels, dtype=dtype.newbyteorder("="))
    if layout.bits == 16 and not encoding.startswith("bayer"):
        pixels = (pixels >> 8).astype(np.uint8)
    if layout.to_rgb is None:
        return pixels if pixels.base is None else pixels.copy()
    rgb: np.ndarray = cv2.cvtColor(pixels, layout.to_rgb)
    return rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)


def decode_compressed(data: bytes, name: str = "compressed image") -> np.ndarray:
    """A JPEG, PNG or other image file in memory as RGB uint8 [H, W, 3]; ``name`` is what errors call it.

    Raises ImageError when the data is not an image, or when it ends early: OpenCV would paint the missing part grey.
    """
    buffer = np.frombuffer(data, dtype=np.uint8)
    head, tail = buffer[:8].tobytes(), buffer[-1024:].tobytes()
    if not len(buffer):
        raise ImageError(f"{name} is empty")
    if (head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail) or (head[1:4] == b"PNG" and b"IEND" not in tail):
        raise ImageError(f"{name} is cut off after {len(buffer)} bytes")
    try:
        bgr = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ImageError(f"{name} cannot be decoded: {error.err}") from error
    if bgr is None:
        raise ImageError(f"{name} is not an image that OpenCV can read ({len(buffer)} bytes, starting {head!r})")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def decode_depth(
    encoding: str, data: bytes, height: int, width: int, step: int, is_bigendian: bool = False
) -> np.ndarray:
    """Depth in metres, float32 [H, W], NaN where unknown (REP-118); 16UC1 and mono16 hold millimetres, 32FC1 metres."""
    order = ">" if is_bigendian else "<"
    if encoding in ("16UC1", "mono16"):
        depth = _rows(encoding, data, height, width, 1, step, np.dtype(order + "u2")).astype(np.float32) / 1000
    elif encoding == "32FC1":
        depth = _rows(encoding, data, height, width, 1, step, np.dtype(order + "f4")).astype(np.float32)
    else:
        raise ImageError(
            f"depth encoding {encoding!r} is not known; known: 16UC1, mono16 (millimetres), 32FC1 (metres)"
        )
    depth[~(np.isfinite(depth) & (depth > 0))] = np.nan
    return depth


def _rows(
    encoding: str, data: bytes | memoryview, rows: int, width: int, channels: int, step: int, dtype: np.dtype
) -> np.ndarray:
    """A view [rows, width] or [rows, width, channels] of the buffer; rows are ``step`` bytes apart."""
    row_bytes = width * channels * dtype.itemsize
    if rows < 1 or width < 1:
        raise ImageError(f"a {encoding} image of {width} columns and {rows} rows of data has no pixels")
    if step < row_bytes:
        raise ImageError(f"step {step} is shorter than a row of {width} {encoding} pixels ({row_bytes} bytes)")
    buffer = memoryview(data).cast("B")
    needed = (rows - 1) * step + row_bytes  # the padding behind the last row may be missing
    if len(buffer) < needed:
        raise ImageError(f"a {encoding} image with {rows} rows of {step} bytes needs {needed}, got {len(buffer)}")
    shape, strides = (rows, width, channels), (step, channels * dtype.itemsize, dtype.itemsize)
    view = np.ndarray(shape, dtype, buffer, strides=strides)
    return view[..., 0] if channels == 1 else view
