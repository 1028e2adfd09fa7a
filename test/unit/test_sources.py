"""Folders, videos and bags as iterators of Frame: exact stamps, every frame, clear errors."""

import json
from decimal import Decimal
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3r_ros.bags import write_bag
from spark3r_ros.calibration import CalibrationError, camera_from_info, make_camera
from spark3r_ros.frame import CameraModel, Frame
from spark3r_ros.sources import SourceError, natural_key, open_source, parse_stamp

STAMPS = ["1341847980.822978", "1341847980.854676001", "1341847981", "1341847981.000000001"]
STAMPS_NS = [1341847980822978000, 1341847980854676001, 1341847981000000000, 1341847981000000001]
K = np.array([[50.0, 0, 31], [0, 51, 23], [0, 0, 1]])
CAMERA = CameraModel(64, 48, K, "plumb_bob", (0.1, -0.2, 0.001, 0.002, 0.05))


def picture(index):
    """[48, 64, 3] RGB whose colour tells its index."""
    return np.full((48, 64, 3), (20 + 40 * index, 100, 200 - 40 * index), np.uint8)


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


@pytest.fixture
def dataset(tmp_path):
    """Four images in the layout with rgb/, timestamps.txt and intrinsics.json."""
    for i in range(4):
        write_image(tmp_path / "rgb" / f"{i:06d}.png", picture(i))
    (tmp_path / "timestamps.txt").write_text("# seconds\n" + "\n".join(STAMPS) + "\n")
    distortion = {"model": "plumb_bob", "coeffs": list(CAMERA.distortion)}
    content = {"width": 64, "height": 48, "fx": 50.0, "fy": 51.0, "cx": 31.0, "cy": 23.0, "distortion": distortion}
    (tmp_path / "intrinsics.json").write_text(json.dumps(content))
    return tmp_path


def frames(indices=range(4), camera=CAMERA):
    return [Frame(STAMPS_NS[i], picture(i), camera=camera) for i in indices]


def check_stream(source, tolerance=0):
    """Four frames with exact stamps, right pixels and the camera; twice, because sources can be iterated again."""
    for _ in range(2):
        found = list(source)
        assert len(found) == len(source) == 4
        assert [frame.stamp_ns for frame in found] == STAMPS_NS
        for i, frame in enumerate(found):
            assert np.abs(frame.image.astype(int) - picture(i)).max() <= tolerance
            np.testing.assert_array_equal(frame.camera.K, K)
            assert (frame.camera.width, frame.camera.height) == (64, 48)
            assert frame.camera.distortion_model == "plumb_bob"
            assert frame.camera.distortion == CAMERA.distortion


def test_dataset_folder(dataset):
    check_stream(open_source(dataset))


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_bag(tmp_path, storage, jpeg):
    assert write_bag(frames(), tmp_path / "bag", storage=storage, jpeg=jpeg, frame_id="eye") == 4
    source = open_source(tmp_path / "bag")
    check_stream(source, tolerance=3 if jpeg else 0)
    assert {frame.frame_id for frame in source} == {"eye"}
    [file] = [path for path in (tmp_path / "bag").iterdir() if path.suffix in (".mcap", ".db3")]
    check_stream(open_source(file), tolerance=3 if jpeg else 0)  # one file of a recording


def test_bag_without_calibration_has_frames_without_camera(tmp_path):
    write_bag(frames(camera=None), tmp_path / "bag")
    assert [frame.camera for frame in open_source(tmp_path / "bag")] == [None] * 4


def test_bag_is_never_overwritten(tmp_path):
    write_bag(frames(), tmp_path / "bag")
    with pytest.raises(FileExistsError, match="exists already"):
        write_bag(frames(), tmp_path / "bag")


def two_topics(path):
    from rosbags.rosbag2 import Writer
    from rosbags.typesys import Stores, get_typestore

    from spark3r_ros.bags import _Messages

    messages = _Messages(get_typestore(Stores.ROS2_KILTED), "eye")
    with Writer(path, version=9) as writer:
        for topic in ("/left/image_rect", "/right/image_raw"):
            connection = writer.add_connection(topic, "sensor_msgs/msg/Image", typestore=messages.typestore)
            for frame in frames():
                writer.write(connection, frame.stamp_ns, messages.image(frame))
        connection = writer.add_connection(
            "/left/camera_info", "sensor_msgs/msg/CameraInfo", typestore=messages.typestore
        )
        writer.write(connection, STAMPS_NS[0], messages.info(STAMPS_NS[0], CAMERA))
    return path


def test_several_image_topics_need_a_choice(tmp_path):
    bag = two_topics(tmp_path / "bag")
    with pytest.raises(SourceError, match=r"several image topics.*/left/image_rect \(Image, 4 messages\)"):
        open_source(bag)
    with pytest.raises(SourceError, match=r"no images on /nose; image topics: /left"):
        open_source(bag, topic="/nose")
    with pytest.raises(SourceError, match=r"no sensor_msgs/msg/CameraInfo on /nose"):
        open_source(bag, topic="/left/image_rect", camera_info_topic="/nose")


def test_camera_info_is_the_one_beside_the_images(tmp_path):
    bag = two_topics(tmp_path / "bag")
    assert next(iter(open_source(bag, topic="/right/image_raw"))).camera is None
    rectified = next(iter(open_source(bag, topic="/left/image_rect"))).camera
    assert rectified.distortion_model == "none"  # image_rect is undistorted
    chosen = open_source(bag, topic="/right/image_raw", camera_info_topic="/left/camera_info")
    assert next(iter(chosen)).camera.distortion_model == "plumb_bob"


def test_bag_without_images_says_what_it_has(tmp_path):
    from rosbags.rosbag2 import Writer
    from rosbags.typesys import Stores, get_typestore

    typestore = get_typestore(Stores.ROS2_KILTED)
    with Writer(tmp_path / "bag", version=9) as writer:
        text = writer.add_connection("/chatter", "std_msgs/msg/String", typestore=typestore)
        message = typestore.types["std_msgs/msg/String"]("hello")
        writer.write(text, 1, typestore.serialize_cdr(message, "std_msgs/msg/String"))
    with pytest.raises(SourceError, match=r"no images: .*CompressedImage were looked for, found /chatter"):
        open_source(tmp_path / "bag")


def test_broken_image_in_a_bag_is_named(tmp_path):
    from spark3r_ros import bags

    class Short(bags._Messages):
        def image(self, frame):
            height, width = 48, 64
            data = np.zeros(10, np.uint8)
            return self._serialise(bags.IMAGE, self._header(frame.stamp_ns), height, width, "rgb8", 0, 192, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bags, "_Messages", Short)
        write_bag(frames([0]), tmp_path / "bag")
    with pytest.raises(SourceError, match=r"/camera/image_raw, message 0: .*needs 9216, got 10"):
        list(open_source(tmp_path / "bag"))


def test_damaged_bags(tmp_path):
    bag = tmp_path / "bag"
    write_bag(frames(), bag)
    [file] = bag.glob("*.mcap")
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(SourceError, match="not a rosbag2 recording that can be read"):
        open_source(bag)
    (bag / "metadata.yaml").write_text("- no: metadata")
    with pytest.raises(SourceError, match="not a rosbag2 recording that can be read"):
        open_source(bag)


def test_truncated_bag_is_an_error_not_a_shorter_recording(tmp_path):
    write_bag(frames(), tmp_path / "bag")
    [file] = (tmp_path / "bag").glob("*.mcap")
    file.write_bytes(file.read_bytes()[:-9000])
    with pytest.raises(SourceError, match="bag"):
        list(open_source(tmp_path / "bag"))


def test_plain_folder_is_sorted_naturally(tmp_path):
    for i, name in enumerate(["img1.png", "img2.png", "img10.png", "IMG11.PNG"]):
        write_image(tmp_path / name, picture(i))
    (tmp_path / "notes.txt").write_text("not an image")
    found = list(open_source(tmp_path, fps=29.97))
    assert [int(frame.image[0, 0, 0]) for frame in found] == [20, 60, 100, 140]
    assert [frame.stamp_ns for frame in found] == [round(i * 1e9 / 29.97) for i in range(4)]
    assert all(frame.camera is None for frame in found)
    assert next(iter(open_source(tmp_path))).stamp_ns == 0


def test_video(tmp_path):
    path = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for i in range(4):
        writer.write(cv2.cvtColor(picture(i), cv2.COLOR_RGB2BGR))
    writer.release()
    source = open_source(path)
    found = list(source)
    assert len(found) == len(source) == 4
    assert [frame.stamp_ns for frame in found] == [0, 40_000_000, 80_000_000, 120_000_000]
    for i, frame in enumerate(found):
        assert np.abs(frame.image.astype(int) - picture(i)).max() <= 6


@pytest.mark.parametrize(
    ("text", "expected"), [*zip(STAMPS, STAMPS_NS), ("7", 7_000_000_000), (" 1.5000000000 ", 1_500_000_000)]
)
def test_stamps_are_exact(text, expected):
    assert parse_stamp(text) == expected


@given(st.integers(0, 2**62), st.integers(0, 9))
def test_any_stamp_survives(stamp_ns, decimals):
    stamp_ns -= stamp_ns % 10 ** (9 - decimals)
    assert parse_stamp(f"{Decimal(stamp_ns).scaleb(-9):.{decimals}f}") == stamp_ns


@pytest.mark.parametrize("text", ["", "1e9", "-1.0", "1.2.3", "nan", "0.0000000001"])
def test_what_is_not_a_stamp(text):
    with pytest.raises(ValueError, match="not a time in seconds"):
        parse_stamp(text)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_natural_order_is_numeric(numbers):
    names = sorted((f"frame{n}.png" for n in numbers), key=natural_key)
    assert names == [f"frame{n}.png" for n in sorted(numbers)]


def test_missing_empty_and_unknown(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere does not exist: an image folder, a video file or a rosbag2"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"has no images: \*\.jpg"):
        open_source(tmp_path)
    (tmp_path / "file.mp4").write_bytes(b"no video")
    with pytest.raises(SourceError, match="not a video that OpenCV can read"):
        open_source(tmp_path / "file.mp4")


def test_corrupt_image_is_named(dataset):
    image = dataset / "rgb" / "000002.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(SourceError, match=r"000002\.png is cut off after 60 bytes"):
        list(open_source(dataset))
    image.write_bytes(b"")
    with pytest.raises(SourceError, match=r"000002\.png is empty"):
        list(open_source(dataset))


@pytest.mark.parametrize(
    ("stamps", "says"),
    [
        (STAMPS[:3], r"has 3 stamps for 4 images"),
        ([*STAMPS[:3], "soon"], r"timestamps\.txt:4: 'soon' is not a time"),
        ([STAMPS[1], STAMPS[0], *STAMPS[2:]], r"timestamps\.txt:2: .* is not after the line before"),
    ],
)
def test_bad_timestamps(dataset, stamps, says):
    (dataset / "timestamps.txt").write_text("\n".join(stamps))
    with pytest.raises(SourceError, match=says):
        open_source(dataset)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fx": 0}, "focal lengths must be positive"),
        ({"fx": "wide"}, "could not convert"),
        ({"distortion": {"model": "fisheye", "coeffs": [1]}}, "'fisheye' is not known; known: plumb_bob"),
        ({"distortion": {"model": "plumb_bob", "coeffs": [1]}}, "plumb_bob does not have 1 coefficients"),
        ({"distortion": {"coeffs": [1]}}, "has no 'model'"),
    ],
)
def test_bad_intrinsics(dataset, change, says):
    path = dataset / "intrinsics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError, match=says):
        open_source(dataset)


def test_intrinsics_of_another_size(dataset):
    write_image(dataset / "rgb" / "000001.png", picture(1)[:40])
    with pytest.raises(SourceError, match=r"000001\.png has 64 x 40 pixels, .*intrinsics\.json is for 64 x 48"):
        list(open_source(dataset))


def test_options_that_do_not_apply(dataset, tmp_path):
    with pytest.raises(SourceError, match="fps applies to a folder without timestamps"):
        open_source(dataset, fps=10)
    with pytest.raises(SourceError, match="topic applies to a bag only"):
        open_source(dataset, topic="/image")
    write_bag(frames(), tmp_path / "bag")
    with pytest.raises(SourceError, match="fps applies to a plain folder"):
        open_source(tmp_path / "bag", fps=10)
    (dataset / "timestamps.txt").unlink()
    with pytest.raises(SourceError, match="fps must be > 0, got 0"):
        open_source(dataset, fps=0)


def info(**changes):
    region = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
    values = {"width": 64, "height": 48, "k": K.ravel(), "p": np.hstack([K * 2, np.zeros((3, 1))]).ravel()}
    values |= {"binning_x": 0, "binning_y": 0, "roi": region, "distortion_model": "plumb_bob", "d": CAMERA.distortion}
    return SimpleNamespace(**{**values, **changes})


def test_camera_info_region_and_binning():
    region = SimpleNamespace(x_offset=8, y_offset=4, width=32, height=24)
    camera = camera_from_info(info(roi=region, binning_x=2, binning_y=2), 16, 12)
    # a point at the full image's pixel (10.5, 6.5) is seen at the middle of four pixels, the binned pixel (1, 1)
    ray = np.linalg.inv(K) @ [10.5, 6.5, 1]
    np.testing.assert_allclose(camera.K @ ray, [1, 1, 1])


def test_camera_info_of_no_calibration_and_of_rectified_images():
    assert camera_from_info(info(k=np.zeros(9)), 64, 48) is None
    camera = camera_from_info(info(), 64, 48, rectified=True)
    np.testing.assert_array_equal(camera.K[:2], K[:2] * 2)
    assert camera.distortion == ()


def test_camera_info_that_does_not_fit():
    with pytest.raises(CalibrationError, match="is for 64 x 48 pixels, the images have 32 x 24"):
        camera_from_info(info(), 32, 24)
    with pytest.raises(CalibrationError, match="'unheard_of' is not known"):
        camera_from_info(info(distortion_model="unheard_of"), 64, 48)


def test_zero_coefficients_are_no_distortion():
    assert make_camera(64, 48, K, "whatever", [0.0] * 5).distortion_model == "none"


def test_shared_recordings_open(shared):
    source = open_source(shared("data", "tum_fr3_office"))
    first = next(iter(source))
    assert len(source) == 183
    assert first.stamp_ns == 1341847980822978000
    assert first.camera.K[0, 0] == 535.4
