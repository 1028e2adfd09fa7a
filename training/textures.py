"""Textures, mip-mapped: noise, checks, bricks, stripes, dots, text, gradients, dead leaves; for training photos too.

The photos are those inside scikit-image's wheel that are in the public domain or CC0 (its ``data/README.txt``).
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

TEXTURE_SIZE = 256  # texels per side; a power of two

FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "grass.png",
    "gravel.png", "ihc.png", "rocket.jpg",
)  # fmt: skip
PHOTO_SHARE = 0.3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;-+*/()"


def _noise(rng: np.random.Generator, slope: float | None = None) -> np.ndarray:
    """Tileable noise [n, n] in 0..1 with a 1/f**slope amplitude spectrum."""
    n = TEXTURE_SIZE
    slope = rng.uniform(0.5, 1.8) if slope is None else slope
    radius = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None, :])
    radius[0, 0] = 1.0
    spectrum = np.exp(2j * np.pi * rng.random(radius.shape)) / radius**slope
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(n, n))
    return np.clip(0.5 + field / (4 * field.std()), 0, 1)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour [3] in 0..1, mostly muted."""
    grey = rng.uniform(0.1, 0.95)
    return np.clip(grey + rng.normal(0, rng.choice([0.03, 0.1, 0.25]), 3), 0, 1)


def _blend(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two random colours mixed by mask [n, n] in 0..1, at least a little apart."""
    first, second = _colour(rng), _colour(rng)
    if np.abs(first - second).max() < 0.15:
        second = np.clip(1 - first, 0, 1)
    return mask[..., None] * first + (1 - mask[..., None]) * second


def _checks(rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(2, 12)) * 2
    i = np.arange(TEXTURE_SIZE) * cells // TEXTURE_SIZE
    return _blend(((i[:, None] + i[None, :]) % 2).astype(float), rng)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    rows = int(rng.integers(3, 9)) * 2
    cols = int(rng.integers(2, 7))
    n = TEXTURE_SIZE
    y, x = np.mgrid[:n, :n] / n
    row = np.floor(y * rows).astype(int)
    shifted = x * cols + 0.5 * (row % 2) * rng.integers(0, 2)
    joint = rng.uniform(0.03, 0.15)
    wall = ((y * rows) % 1 > joint) & (shifted % 1 > joint * cols / rows)
    col = np.floor(shifted).astype(int) % cols
    tone = rng.normal(0, rng.uniform(0.02, 0.15), (rows, cols))[row, col]
    return np.clip(_blend(wall.astype(float), rng) + tone[..., None], 0, 1)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    n = TEXTURE_SIZE
    waves = rng.integers(1, 20, 2) * rng.integers(0, 2, 2)
    if not waves.any():
        waves[0] = 5
    y, x = np.mgrid[:n, :n] / n
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (waves[0] * x + waves[1] * y))
    return _blend((wave > rng.uniform(0.2, 0.8)).astype(float) if rng.random() < 0.6 else wave, rng)


def _dots(rng: np.random.Generator) -> np.ndarray:
    canvas = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE), np.float32)
    for _ in range(int(rng.integers(10, 150))):
        centre = tuple(int(v) for v in rng.integers(0, TEXTURE_SIZE, 2))
        cv2.circle(canvas, centre, int(rng.integers(2, 18)), float(rng.random()), -1, cv2.LINE_AA)
    return _blend(canvas, rng)


def _text(rng: np.random.Generator) -> np.ndarray:
    canvas = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE), np.uint8)
    y = 0
    while y < TEXTURE_SIZE:
        size = rng.uniform(0.3, 1.6)
        y += int(26 * size) + int(rng.integers(0, 12))
        line = "".join(rng.choice(list(LETTERS + "    "), 40))
        thickness = 1 + int(rng.random() < size / 2)
        cv2.putText(canvas, line, (int(rng.integers(-40, 60)), y), int(rng.choice(FONTS)), size, 255, thickness,
                    cv2.LINE_AA)  # fmt: skip
    return _blend(canvas / 255.0, rng)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    wave = rng.integers(1, 3, 2) * rng.integers(0, 2, 2)
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE] / TEXTURE_SIZE
    base = _colour(rng)
    shade = 0.5 + 0.5 * np.cos(2 * np.pi * (wave[0] * x + wave[1] * y) + rng.uniform(0, 6.28))
    return np.clip(base * (1 - rng.uniform(0.02, 0.3) * shade[..., None]), 0, 1)


def _marble(rng: np.random.Generator) -> np.ndarray:
    return _blend(0.5 + 0.5 * np.sin(rng.uniform(5, 40) * _noise(rng, 1.7)), rng)


def _grain(rng: np.random.Generator) -> np.ndarray:
    return _blend(_noise(rng), rng)


def _dead_leaves(rng: np.random.Generator) -> np.ndarray:
    """Overlapping shapes with power-law sizes: the edge and contrast statistics of photographs (Lee et al. 2001)."""
    canvas = np.full((TEXTURE_SIZE, TEXTURE_SIZE, 3), _colour(rng), np.float32)
    count = int(rng.integers(80, 400))
    sizes = np.clip(4 * rng.random(count) ** (-1 / 1.7), 3, 90)[rng.permutation(count)]
    palette = [_colour(rng) for _ in range(int(rng.integers(4, 20)))]
    for size in sizes:
        colour = tuple(float(v) for v in np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 0.04), 0, 1))
        centre = rng.uniform(0, TEXTURE_SIZE, 2)
        if rng.random() < 0.5:
            axes = (int(size), int(size * rng.uniform(0.2, 1)))
            cv2.ellipse(canvas, tuple(int(v) for v in centre), axes, float(rng.uniform(0, 180)), 0, 360, colour, -1,
                        cv2.LINE_AA)  # fmt: skip
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
            corners = centre + size * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            cv2.fillPoly(canvas, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    grain = _noise(rng, rng.uniform(0.6, 1.4)) - 0.5
    return np.clip(canvas * (1 + rng.uniform(0, 0.6) * grain[..., None]), 0, 1)


MAKERS = (
    (_grain, 0.16), (_dead_leaves, 0.34), (_checks, 0.06), (_bricks, 0.1), (_stripes, 0.05), (_dots, 0.06),
    (_text, 0.09), (_gradient, 0.07), (_marble, 0.07),
)  # fmt: skip


@lru_cache
def _photos() -> tuple[np.ndarray, ...]:
    """The photos [H, W, 3] uint8. Imported here: only who makes training data needs scikit-image."""
    from pathlib import Path

    from skimage import data

    folder = Path(data.__file__).parent
    return tuple(cv2.imread(str(folder / name), cv2.IMREAD_COLOR) for name in PHOTOS)


def _photo(rng: np.random.Generator) -> np.ndarray:
    """A window of a photo, mirrored, turned and tinted at random."""
    photo = _photos()[rng.integers(len(_photos()))]
    side = int(rng.uniform(0.35, 1.0) * min(photo.shape[:2]))
    y, x = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
    window = np.rot90(photo[y : y + side, x : x + side, rng.permutation(3)], rng.integers(4))[:, :: rng.choice([-1, 1])]
    shrinking = side > TEXTURE_SIZE
    size = (TEXTURE_SIZE, TEXTURE_SIZE)
    image = cv2.resize(
        np.ascontiguousarray(window), size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    )
    tone = np.clip(image / 255.0, 0, 1) ** np.exp(rng.normal(0, 0.3))
    return np.clip(tone * np.exp(rng.normal(0, 0.1, 3)), 0, 1)


def make_texture(rng: np.random.Generator, photos: bool = False) -> np.ndarray:
    """One random texture [n, n, 3] uint8; ``photos``: some show photographs."""
    makers, shares = zip(*MAKERS)
    if photos and rng.random() < PHOTO_SHARE:
        image = _photo(rng)
    else:
        image = makers[rng.choice(len(makers), p=shares)](rng)
    if rng.random() < 0.5:  # dirt, so that regular patterns are not perfectly ambiguous
        image = image * (1 + rng.uniform(0.05, 0.5) * (_noise(rng) - 0.5)[..., None])
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def mip_offsets() -> np.ndarray:
    """First texel of every mip level in a flattened texture, and the end: [levels + 1]."""
    sizes = [(TEXTURE_SIZE >> level) ** 2 for level in range(TEXTURE_SIZE.bit_length())]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def texture_bank(count: int, seed: int, photos: bool = False) -> np.ndarray:
    """``count`` textures with all mip levels: [count, texels, 3] uint8; the same for the same arguments."""
    rng = np.random.default_rng([seed, 77])
    offsets = mip_offsets()
    bank = np.empty((count, offsets[-1], 3), np.uint8)
    for texture in bank:
        level = make_texture(rng, photos)
        for first in offsets[:-1]:
            texture[first : first + level.size // 3] = level.reshape(-1, 3)
            half = (max(level.shape[1] // 2, 1), max(level.shape[0] // 2, 1))
            level = cv2.resize(level, half, interpolation=cv2.INTER_AREA)
    return bank
