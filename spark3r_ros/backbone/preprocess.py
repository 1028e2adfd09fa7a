"""From the camera's image to the network's and back: each model's own resize rule, and what it does to intrinsics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResizeRule:
    """How a model wants its images: sides are multiples of ``patch``."""

    patch: int
    longest: int  # longest side in pixels

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Network size (height, width) for a camera image."""
        ratio = self.longest / max(height, width)
        h, w = (max(self.patch, round(side * ratio / self.patch) * self.patch) for side in (height, width))
        return h, w
