"""Binary descriptors are matched as OpenCV matches them."""

import cv2
import numpy as np

from spark3r_ros.matching import hamming, mutual_best


def descriptors(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    some = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    some[::7] = some[0]  # as near as each other
    return some


def test_distances_are_the_bits_that_differ():
    a, b = descriptors(5, 0), descriptors(9, 1)
    bits = np.unpackbits(a[:, None] ^ b[None], axis=2).sum(axis=2)
    assert np.array_equal(hamming(a, b), bits)


def test_matches_are_those_of_a_cross_check():
    for seed in range(20):
        a, b = descriptors(60, seed), descriptors(50, 100 + seed)
        b[:30] = a[10:40] ^ (1 << np.random.default_rng(seed).integers(0, 8, (30, 32), dtype=np.uint8))
        matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(a, b)
        rows, columns = mutual_best(hamming(a, b))
        assert sorted((m.queryIdx, m.trainIdx) for m in matches) == sorted(zip(rows.tolist(), columns.tolist()))
