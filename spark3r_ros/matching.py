"""Binary descriptors: how far apart they are, and which are each other's best match."""

from __future__ import annotations

import numpy as np


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits [N, M] float32 in which the descriptors ``a`` [N, D] and ``b`` [M, D] uint8 differ.

    A product of matrices is exact here, and many times as fast as comparing them pair by pair.
    """
    signs_a, signs_b = (2.0 * np.unpackbits(x, axis=1).astype(np.float32) - 1.0 for x in (a, b))
    return np.asarray(0.5 * (signs_a.shape[1] - signs_a @ signs_b.T))


def mutual_best(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [K] of ``distance`` [N, M] that are nearest to each other; the first of several as near."""
    best = distance.argmin(axis=1)
    rows = np.flatnonzero(distance.argmin(axis=0)[best] == np.arange(len(best)))
    return rows, best[rows]
