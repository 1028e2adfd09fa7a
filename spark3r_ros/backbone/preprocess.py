"""From the camera's pixels to the network's and back: each model's own resize rule, and what it does to intrinsics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Resize:
    """How a camera's image becomes the network's: a centred box is cut out, then scaled. Pixel centres at integers."""

    box: tuple[int, int, int, int]  # top, left, height, width in camera pixels
    size: tuple[int, int]  # height, width in network pixels

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
        if self.mode == "longest":
            scale = self.target / max(height, width)
        elif self.mode == "width":
            scale = self.target / width
        else:
            scale = self.target / math.sqrt(height * width)
        rows, columns = (max(1, round(side * scale / self.patch)) for side in (height, width))
        while self.mode == "area" and max(rows, columns) > 1 and rows * columns * self.patch**2 > self.target**2:
            if columns * height > width * rows and columns > 1:
                columns -= 1
            else:
                rows = max(1, rows - 1)
        return rows * self.patch, columns * self.patch
