"""From a camera image to what the network sees: lens distortion removed, resized, K in pixels of the result."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.camera import has_distortion
from spark3r_ros.frame import CameraModel, Frame


class FrameError(ValueError):
    """A frame that cannot be used; the stream goes on without it."""


def scale_intrinsics(K: np.ndarray, ratio_x: float, ratio_y: float) -> np.ndarray:
    """K [3, 3] of an image resized by these ratios; pixel centres at integers."""
    scaled = np.array(K, dtype=float)
    scaled[0] *= ratio_x
    scaled[1] *= ratio_y
    scaled[0, 2] += 0.5 * (ratio_x - 1)
    scaled[1, 2] += 0.5 * (ratio_y - 1)
    return scaled


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
    """Brings every frame of one camera to the network's size ``size`` (height, width)."""

    def __init__(self, frame: Frame, size: tuple[int, int]) -> None:
        self.size = size
        self.image_shape = frame.image.shape
        self.camera = frame.camera
        self._maps = undistort_maps(frame.camera) if frame.camera is not None else None
        height, width = frame.image.shape[:2]
        self.ratio = (size[1] / width, size[0] / height)  # x, y
        self.K = None if frame.camera is None else scale_intrinsics(frame.camera.K, *self.ratio)  # [3, 3] | None
        self.valid = np.ones(size, dtype=bool)  # [h, w] pixels that the lens really saw
        if self._maps is not None:
            seen = cv2.remap(np.full((height, width), 255, np.uint8), *self._maps, cv2.INTER_LINEAR)
            self.valid = cv2.resize(seen, size[::-1], interpolation=cv2.INTER_AREA) > 250

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
        shrinking = self.ratio[0] < 1
        return cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)

    def _resize_depth(self, depth: np.ndarray) -> np.ndarray:
        """Nearest neighbours only: depths must not be mixed across edges."""
        height, width = self.image_shape[:2]
        if depth.shape != (height, width):
            depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST)
        if self._maps is not None:
            depth = cv2.remap(depth, *self._maps, cv2.INTER_NEAREST, borderValue=float("nan"))
        return cv2.resize(depth, self.size[::-1], interpolation=cv2.INTER_NEAREST).astype(np.float32)
