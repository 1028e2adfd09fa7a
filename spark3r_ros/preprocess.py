"""From the camera's pixels to the network's and back: each model's own resize rule, lens distortion, and K for both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.camera import has_distortion
from spark3r_ros.frame import CameraModel, Frame


class FrameError(ValueError):
    """A frame that cannot be used; the stream goes on without it."""


@dataclass(frozen=True)
class Resize:
    """How a camera's image becomes the network's: a centred box is cut out, then scaled. Pixel centres at integers."""

    box: tuple[int, int, int, int]  # top, left, height, width in camera pixels
    size: tuple[int, int]  # height, width in network pixels

    def apply(self, image: np.ndarray) -> np.ndarray:
        """An image [H, W, ...] of the camera at the network's size: averaged when it shrinks, linear when it grows."""
        filtering = cv2.INTER_AREA if self.size[0] < self.box[2] else cv2.INTER_LINEAR
        return self._scale(image, filtering)

    def apply_nearest(self, image: np.ndarray) -> np.ndarray:
        """The same for values that must not be mixed, like depth across edges."""
        return self._scale(image, cv2.INTER_NEAREST)

    def _scale(self, image: np.ndarray, filtering: int) -> np.ndarray:
        top, left, height, width = self.box
        return cv2.resize(image[top : top + height, left : left + width], self.size[::-1], interpolation=filtering)

    @property
    def ratio(self) -> np.ndarray:
        """Network pixels per camera pixel, [2] x and y."""
        return np.array([self.size[1] / self.box[3], self.size[0] / self.box[2]])

    def to_network(self, uv: np.ndarray) -> np.ndarray:
        """Camera pixels [..., 2] to network pixels."""
        return (np.asarray(uv, dtype=float) - [self.box[1], self.box[0]] + 0.5) * self.ratio - 0.5

    def to_camera(self, uv: np.ndarray) -> np.ndarray:
        """Network pixels [..., 2] to camera pixels."""
        return (np.asarray(uv, dtype=float) + 0.5) / self.ratio - 0.5 + [self.box[1], self.box[0]]

    def intrinsics_to_network(self, K: np.ndarray) -> np.ndarray:
        """K [3, 3] of the camera's image to K of the network's."""
        K = np.array(K, dtype=float)
        K[:2, :2] *= self.ratio[:, None]
        K[:2, 2] = self.to_network(K[:2, 2])
        return K

    def intrinsics_to_camera(self, K: np.ndarray) -> np.ndarray:
        """K [3, 3] of the network's image to K of the camera's."""
        K = np.array(K, dtype=float)
        K[:2, :2] /= self.ratio[:, None]
        K[:2, 2] = self.to_camera(K[:2, 2])
        return K


@dataclass(frozen=True)
class ResizeRule:
    """A model's choice of network size for a camera image. Sides are multiples of ``patch``.

    ``mode``: ``longest`` scales the longer side to ``target`` pixels; ``width`` scales the width to it and cuts off
    what is taller than wide; ``area`` takes the largest size with at most target^2 pixels; ``patches`` the size
    nearest to that many, after cutting the image to an aspect between 1 : 2 and 2 : 1.
    """

    patch: int
    target: int
    mode: str = "longest"

    def plan(self, height: int, width: int) -> Resize:
        """The way from a camera image of this size to the network."""
        if height < 1 or width < 1:
            raise ValueError(f"image sides must be >= 1, got {width}x{height}")
        box_height, box_width = height, width
        if self.mode == "width":
            box_height = min(height, width)
        elif self.mode == "patches":
            box_height, box_width = min(height, 2 * width), min(width, 2 * height)
        box = ((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)
        return Resize(box, self._size(box_height, box_width))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.mode == "longest":  # to whole pixels first, then to the nearest patch, halves up
            scale = self.target / max(height, width)
            rows, columns = (max(1, math.floor(round(side * scale) / self.patch + 0.5)) for side in (height, width))
            return rows * self.patch, columns * self.patch
        scale = self.target / (width if self.mode == "width" else math.sqrt(height * width))
        rows, columns = (max(1, round(side * scale / self.patch)) for side in (height, width))
        while self.mode == "area" and max(rows, columns) > 1 and rows * columns * self.patch**2 > self.target**2:
            if columns * height > width * rows and columns > 1:
                columns -= 1
            else:
                rows = max(1, rows - 1)
        return rows * self.patch, columns * self.patch


def undistort_maps(camera: CameraModel) -> tuple[np.ndarray, np.ndarray] | None:
    """Lookup tables of cv2.remap for an undistorted image with the same K; None when there is nothing to undo."""
    try:
        if not has_distortion(camera):
            return None
    except ValueError as error:
        raise FrameError(str(error)) from error
    K, size = np.asarray(camera.K, dtype=float), (camera.width, camera.height)
    coefficients = np.asarray(camera.distortion, dtype=float)
    if camera.distortion_model == "equidistant":
        return cv2.fisheye.initUndistortRectifyMap(K, coefficients[:4], np.eye(3), K, size, cv2.CV_16SC2)
    return cv2.initUndistortRectifyMap(K, coefficients, np.eye(3), K, size, cv2.CV_16SC2)


@dataclass(frozen=True, eq=False)
class NetworkImage:
    """A frame as the network sees it."""

    rgb: np.ndarray  # [h, w, 3] uint8
    depth: np.ndarray | None  # [h, w] float32 metres, NaN where unknown: the robot's own, when it has one


class Preprocessor:
    """Brings every frame of one camera to the network: undistorted with the same K, then resized as the model wants."""

    def __init__(self, frame: Frame, resize: Resize) -> None:
        self.resize = resize
        self.image_shape = frame.image.shape
        self.camera = frame.camera
        self._maps = undistort_maps(frame.camera) if frame.camera is not None else None
        self.K = None if frame.camera is None else resize.intrinsics_to_network(frame.camera.K)  # [3, 3] | None
        self.valid = np.ones(resize.size, dtype=bool)  # [h, w] pixels that the lens really saw
        if self._maps is not None:
            seen = cv2.remap(np.full(self.image_shape[:2], 255, np.uint8), *self._maps, cv2.INTER_LINEAR)
            self.valid = resize.apply(seen) > 250

    def check(self, frame: Frame) -> None:
        """Raise FrameError when the frame is not one of this camera."""
        if frame.image.ndim != 3 or frame.image.shape[2] != 3 or frame.image.dtype != np.uint8:
            raise FrameError(f"image must be [H, W, 3] uint8, got {list(frame.image.shape)} {frame.image.dtype}")
        if frame.image.shape != self.image_shape:
            raise FrameError(
                f"image size changed from {self.image_shape[1]}x{self.image_shape[0]} to "
                f"{frame.image.shape[1]}x{frame.image.shape[0]}; reset to start with the new one"
            )

    def __call__(self, frame: Frame) -> NetworkImage:
        return NetworkImage(self._resize(frame.image), None if frame.depth is None else self._resize_depth(frame.depth))

    def _resize(self, image: np.ndarray) -> np.ndarray:
        if self._maps is not None:
            image = cv2.remap(image, *self._maps, cv2.INTER_LINEAR)
        return self.resize.apply(image)

    def _resize_depth(self, depth: np.ndarray) -> np.ndarray:
        """Nearest neighbours only: depths must not be mixed across edges."""
        height, width = self.image_shape[:2]
        if depth.shape != (height, width):
            depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST)
        if self._maps is not None:
            depth = cv2.remap(depth, *self._maps, cv2.INTER_NEAREST, borderValue=float("nan"))
        return self.resize.apply_nearest(depth).astype(np.float32)
