"""Every encoding decodes to the colours that went in; broken data is refused with a reason."""

import array
import contextlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark3r_ros.encodings import ENCODINGS, ImageError, decode, decode_compressed, decode_depth

H, W = 8, 12
RNG = np.random.default_rng(3)
# smooth colours survive chroma subsampling and demosaicing; left half red, right half blue, brighter downwards
RGB = np.zeros((H, W, 3), np.uint8)
RGB[:, : W // 2, 0] = np.linspace(150, 200, H, dtype=np.uint8)[:, None]
RGB[:, W // 2 :, 2] = np.linspace(150, 200, H, dtype=np.uint8)[:, None]
RGB[..., 1] = 60


def padded(pixels, pad=5, order="="):
    """Bytes of ``pixels`` with ``pad`` junk bytes behind each row, and the step."""
    rows = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(order))).reshape(len(pixels), -1)
    rows = rows.view(np.uint8)
    junk = RNG.integers(0, 255, (len(rows), pad), dtype=np.uint8)
    return np.hstack([rows, junk]).tobytes(), rows.shape[1] + pad


def wide(pixels):
    return pixels.astype(np.uint16) * 256 + 77  # the lower byte must not matter


def channels(name):
    order = {"rgb": [0, 1, 2], "bgr": [2, 1, 0], "rgba": [0, 1, 2, 3], "bgra": [2, 1, 0, 3]}[name]
    alpha = np.full((H, W, 1), 9, np.uint8)
    return np.concatenate([RGB, alpha], axis=2)[..., order]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["rgb", "bgr", "rgba", "bgra"])
@pytest.mark.parametrize("bits", [8, 16])
def test_channel_orders_are_exact(name, bits, order):
    pixels = channels(name) if bits == 8 else wide(channels(name))
    data, step = padded(pixels, order=order)
    np.testing.assert_array_equal(decode(f"{name}{bits}", data, H, W, step, order == ">"), RGB)


@pytest.mark.parametrize(("encoding", "name"), [("8UC3", "bgr"), ("8UC4", "bgra"), ("16UC3", "bgr"), ("16UC4", "bgra")])
def test_opencv_types_are_bgr(encoding, name):
    pixels = channels(name) if encoding.startswith("8") else wide(channels(name))
    data, step = padded(pixels)
    np.testing.assert_array_equal(decode(encoding, data, H, W, step), RGB)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("encoding", ["mono8", "8UC1", "mono16", "16UC1"])
def test_grey_is_repeated(encoding, order):
    grey = RGB[..., 0]
    data, step = padded(grey if "8" in encoding else wide(grey), order=order)
    np.testing.assert_array_equal(
        decode(encoding, data, H, W, step, order == ">"), np.repeat(grey[..., None], 3, axis=2)
    )


def yuv_planes():
    """Full-resolution Y, U, V of RGB (BT.601, studio range), computed here."""
    r, g, b = np.moveaxis(RGB.astype(float), -1, 0)
    y = 16 + 0.257 * r + 0.504 * g + 0.098 * b
    u = 128 - 0.148 * r - 0.291 * g + 0.439 * b
    v = 128 + 0.439 * r - 0.368 * g - 0.071 * b
    return [np.clip(np.round(p), 0, 255).astype(np.uint8) for p in (y, u, v)]


@pytest.mark.parametrize("encoding", ["uyvy", "yuv422", "yuyv", "yuv422_yuy2"])
def test_packed_yuv(encoding):
    y, u, v = yuv_planes()
    chroma = np.where(np.arange(W) % 2 == 0, u, v)
    pixels = np.stack([chroma, y] if encoding in ("uyvy", "yuv422") else [y, chroma], axis=2)
    data, step = padded(pixels)
    assert np.abs(decode(encoding, data, H, W, step).astype(int) - RGB).max() <= 4


@pytest.mark.parametrize("encoding", ["nv12", "nv21"])
def test_planar_yuv(encoding):
    y, u, v = yuv_planes()
    first, second = (u, v) if encoding == "nv12" else (v, u)
    chroma = np.empty((H // 2, W), np.uint8)
    chroma[:, ::2], chroma[:, 1::2] = first[::2, ::2], second[::2, ::2]
    data, step = padded(np.vstack([y, chroma]))
    assert np.abs(decode(encoding, data, H, W, step).astype(int) - RGB).max() <= 8


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns(pattern, bits, order):
    mosaic = np.empty((H, W), np.uint8)
    for i, letter in enumerate(pattern):
        mosaic[i // 2 :: 2, i % 2 :: 2] = RGB[i // 2 :: 2, i % 2 :: 2, "rgb".index(letter)]
    data, step = padded(mosaic if bits == 8 else wide(mosaic), order=order)
    rgb = decode(f"bayer_{pattern}{bits}", data, H, W, step, order == ">").astype(int)
    inside = [1, 2, 3, -4, -3, -2]  # away from the borders and from the red-blue edge
    assert np.abs(rgb - RGB)[2:-2, inside].max() <= 8


def test_every_encoding_has_been_covered_and_returns_owned_rgb():
    for encoding in ENCODINGS:
        data = bytes(H * W * 8 * 2)
        rgb = decode(encoding, data, H, W, W * 8)
        assert rgb.shape == (H, W, 3)
        assert rgb.dtype == np.uint8
        assert rgb.flags.c_contiguous
        assert rgb.flags.writeable


def test_message_buffers_and_missing_padding_of_the_last_row():
    data, step = padded(RGB)
    short = data[: (H - 1) * step + W * 3]
    for buffer in (array.array("B", short), bytearray(short), np.frombuffer(short, np.uint8)):
        np.testing.assert_array_equal(decode("rgb8", buffer, H, W, step), RGB)


@pytest.mark.parametrize(
    ("encoding", "size", "step", "data", "says"),
    [
        ("rgb8", (H, W), W * 3, bytes(H * W * 3 - 1), "needs 288, got 287"),
        ("rgb8", (H, W), W * 2, bytes(H * W * 3), "step 24 is shorter than a row"),
        ("rgb8", (0, W), W * 3, b"", "no pixels"),
        ("nv12", (H, W), W, bytes(H * W), "needs 144, got 96"),
        ("nv12", (7, W), W, bytes(999), "even size"),
        ("yuyv", (H, 11), 22, bytes(999), "even size"),
        ("32FC1", (H, W), W * 4, bytes(999), "'32FC1' is not known; known: 16UC1, 16UC3"),
        ("", (H, W), W, bytes(999), "'' is not known"),
    ],
)
def test_broken_images_are_refused(encoding, size, step, data, says):
    with pytest.raises(ImageError, match=says):
        decode(encoding, data, *size, step)


@settings(max_examples=200, deadline=None)
@given(
    encoding=st.sampled_from([*ENCODINGS, "jpeg", "rgb"]),
    data=st.binary(max_size=300),
    height=st.integers(0, 9),
    width=st.integers(0, 9),
    step=st.integers(0, 40),
    big=st.booleans(),
)
def test_anything_decodes_or_raises_image_error(encoding, data, height, width, step, big):
    with contextlib.suppress(ImageError):
        assert decode(encoding, data, height, width, step, big).shape == (height, width, 3)


@pytest.mark.parametrize("kind", [".jpg", ".png", ".bmp"])
def test_compressed_files(kind):
    image = cv2.resize(RGB, (64, 48), interpolation=cv2.INTER_NEAREST)
    data = cv2.imencode(kind, image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    off_edge = np.r_[0:24, 40:64]
    assert np.abs(decode_compressed(data).astype(int) - image)[:, off_edge].max() <= 6
    with pytest.raises(ImageError, match=r"frame 7 (is cut off|cannot be|is not an image)"):
        decode_compressed(data[: len(data) // 2], name="frame 7")


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\nIEND"])
def test_rubbish_is_not_an_image(data):
    with pytest.raises(ImageError, match="compressed image"):
        decode_compressed(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_depth_in_metres_with_nan(order):
    millimetres = np.array([[0, 1500], [65535, 20]], np.uint16)
    data, step = padded(millimetres, order=order)
    expected = np.array([[np.nan, 1.5], [65.535, 0.02]], np.float32)
    np.testing.assert_array_equal(decode_depth("16UC1", data, 2, 2, step, order == ">"), expected)
    metres = np.array([[np.inf, 1.5], [-1, np.nan]], np.float32)
    data, step = padded(metres, order=order)
    expected = np.array([[np.nan, 1.5], [np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(decode_depth("32FC1", data, 2, 2, step, order == ">"), expected)


def test_depth_of_another_kind_is_refused():
    with pytest.raises(ImageError, match="'rgb8' is not known"):
        decode_depth("rgb8", bytes(12), 2, 2, 6)
