"""Motion between neighbouring frames: what nano sees besides RGB.

Every frame has two partners, the one and two frames before it; where there are none (start of a stream) later frames of
the same window take their place. Flow to a partner (DIS, Kroeger et al. 2016) comes with its forward-backward error.
A frame that asks alone (tracking) gets its flow to the second one by way of the first, whose own is known.

Shapes: S frames, H x W pixels, h x w motion cells of CELL x CELL pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np

CELL = 4  # pixels per side of a motion cell
NUM_PARTNERS = 2
CHANNELS = 3  # per partner: flow dx, dy and forward-backward error, all in pixels; error -1: no partner
MAX_ERROR = 16.0  # pixels; also where the flow leaves the partner's image
MIN_MATCHES = 8  # of corners, to start flow from

Corners = tuple[np.ndarray, np.ndarray]  # [M, 2] pixels, and their descriptors


def partners(num_frames: int, num_previous: int) -> np.ndarray:
    """Partner of each frame [num_frames, 2] as an index into [previous..., frames...]; -1: none.

    The first partner is the frame before, or at the start of a stream the one after; the second is two before, or the
    nearest later frame that is not the first.
    """
    count = num_previous + num_frames
    table = np.full((num_frames, NUM_PARTNERS), -1)
    for frame in range(num_frames):
        own = num_previous + frame
        before = [own - 1, own - 2]
        after = [own + 1, own + 2]
        found = [i for i in before if i >= 0] + [i for i in after if i < count]
        table[frame, : len(found[:NUM_PARTNERS])] = found[:NUM_PARTNERS]
    return table


@functools.lru_cache(maxsize=64)
def _flow(own: bytes, partner: bytes, shape: tuple[int, int], is_way_back: bool) -> np.ndarray:
    """Cells [3, h, w] of dx, dy and error from one grey image [H, W] to another. Windows overlap, so pairs come again.

    ``is_way_back``: start from the way there, turned round.

    DIS starts from a homography of matched ORB corners: at 192 x 144 pixels this finds 67% instead of 21% of the
    displacements of 25 to 50 pixels. One scale finer than the fast presets halves the error for 2 ms.
    """
    images = [np.frombuffer(pixels, np.uint8).reshape(shape) for pixels in (own, partner)]
    corners = _corners(own, shape), _corners(partner, shape)
    there = _homography(*(reversed(corners) if is_way_back else corners))
    back = None if there is None else np.linalg.inv(there)
    forward = _dis(images[0], images[1], back if is_way_back else there)
    backward = _dis(images[1], images[0], there if is_way_back else back)
    error = _round_trip_error(forward, backward)
    height, width = shape
    cells = cv2.resize(np.dstack([forward, error]), (width // CELL, height // CELL), interpolation=cv2.INTER_AREA)
    return cells.transpose(2, 0, 1)


def _dis(own: np.ndarray, partner: np.ndarray, H: np.ndarray | None) -> np.ndarray:
    """Flow [H, W, 2] from one grey image to another, that begins with a homography [3, 3]."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    dis.setFinestScale(1)
    dis.setVariationalRefinementIterations(3)
    if H is None:
        return dis.calc(own, partner, None)  # type: ignore[call-overload]
    height, width = own.shape
    grid = _pixel_grid(height, width)
    moved = cv2.perspectiveTransform(grid.reshape(1, -1, 2), H).reshape(grid.shape)
    return dis.calc(own, partner, np.clip(moved - grid, -width, width))


def _homography(own: Corners, partner: Corners) -> np.ndarray | None:
    """Homography [3, 3] that most matched corners agree with; None: too few do."""
    (points, descriptors), (others, other_descriptors) = own, partner
    if min(len(points), len(others)) < MIN_MATCHES:
        return None
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(descriptors, other_descriptors)
    if len(matches) < MIN_MATCHES:
        return None
    a, b = points[[m.queryIdx for m in matches]], others[[m.trainIdx for m in matches]]
    H, agree = cv2.findHomography(a, b, cv2.RANSAC, 6.0, maxIters=300)
    if H is None or int(agree.sum()) < MIN_MATCHES or abs(np.linalg.det(H)) < 1e-6:
        return None
    return H


@functools.lru_cache(maxsize=64)
def _corners(pixels: bytes, shape: tuple[int, int]) -> Corners:
    """Of a grey image [H, W]. Images come again, as partners of others."""
    orb = cv2.ORB.create(250, 1.4, 3, edgeThreshold=12, patchSize=15, fastThreshold=8)
    corners, descriptors = orb.detectAndCompute(np.frombuffer(pixels, np.uint8).reshape(shape), None)
    return np.array([c.pt for c in corners], np.float32).reshape(-1, 2), descriptors


@functools.lru_cache(maxsize=4)
def _pixel_grid(height: int, width: int) -> np.ndarray:
    """x and y of every pixel [H, W, 2] float32."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def motion_channels(greys: Sequence[np.ndarray], num_previous: int = 0) -> np.ndarray:
    """Motion of every frame after the first ``num_previous`` ones to its partners.

    Args:
        greys: uint8 images [H, W], sides multiples of CELL, previous frames first.
        num_previous: how many of them are only partners.

    Returns:
        [S, 6, h, w] float32: per partner dx, dy, error.
    """
    height, width = shape = greys[0].shape
    table = partners(len(greys) - num_previous, num_previous)
    pixels = [grey.tobytes() for grey in greys]
    if len(table) == 1 and num_previous >= NUM_PARTNERS:
        before_last, last, own = pixels[-3:]
        there = _flow(own, last, shape, False)
        return np.concatenate([there, _chained(there, _flow(last, before_last, shape, False))])[None]
    out = np.zeros((len(table), NUM_PARTNERS, CHANNELS, height // CELL, width // CELL), np.float32)
    out[:, :, 2] = -1.0
    done = set()
    for frame, slot in np.argwhere(table >= 0).tolist():
        pair = num_previous + frame, int(table[frame, slot])
        out[frame, slot] = _flow(*(pixels[i] for i in pair), shape, pair[::-1] in done)
        done.add(pair)
    return out.reshape(len(table), NUM_PARTNERS * CHANNELS, height // CELL, width // CELL)


def _chained(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cells [3, h, w] of dx, dy and error by way of another frame: ``first`` leads there, ``second`` on from there."""
    height, width = first.shape[1:]
    x = first[0] / CELL + np.arange(width, dtype=np.float32)  # cells
    y = first[1] / CELL + np.arange(height, dtype=np.float32)[:, None]
    there = np.ascontiguousarray(second.transpose(1, 2, 0))
    total = first + cv2.remap(there, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).transpose(2, 0, 1)
    inside = (np.abs(x - (width - 1) / 2) <= width / 2) & (np.abs(y - (height - 1) / 2) <= height / 2)
    total[2] = np.where(inside, np.minimum(total[2], MAX_ERROR), MAX_ERROR)
    return total


def _round_trip_error(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """|forward(x) + backward(x + forward(x))| [H, W] in pixels, at most MAX_ERROR."""
    height, width = forward.shape[:2]
    x = forward[..., 0] + np.arange(width, dtype=np.float32)
    y = forward[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    error = np.hypot(forward[..., 0] + back[..., 0], forward[..., 1] + back[..., 1])
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return np.where(inside, np.minimum(error, MAX_ERROR), MAX_ERROR).astype(np.float32)
