"""Recorded camera streams as iterables of Frame: image folders, videos and rosbag2 recordings.

Every source knows its length, yields every frame it has in stored order, and can be iterated again. What is missing
or broken raises SourceError, naming what was looked for.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spark3r_ros import calibration, encodings
from spark3r_ros.frame import CameraModel, Frame

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts")
BAG_SUFFIXES = (".mcap", ".db3")
IMAGE, COMPRESSED, CAMERA_INFO = (f"sensor_msgs/msg/{name}" for name in ("Image", "CompressedImage", "CameraInfo"))
NS_PER_S = 1_000_000_000

logger = logging.getLogger(__name__)


class SourceError(ValueError):
    """A recording that cannot be read; the message names what was looked for and where."""


class Source(ABC):
    """A recorded camera stream."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames, as far as the recording itself knows it."""

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """All frames from the first on. Raises SourceError at a frame that cannot be read."""


def open_source(
    path: str | Path, *, topic: str | None = None, camera_info_topic: str | None = None, fps: float | None = None
) -> Source:
    """The recording at ``path``.

    Args:
        path: a folder with rgb/ and timestamps.txt (intrinsics.json is used when there), any folder of images, a
            video file, or a rosbag2 recording (folder or file).
        topic: image topic of a bag; not needed when it has only one.
        camera_info_topic: CameraInfo topic of a bag; by default the one beside the image topic.
        fps: frame rate of a plain folder of images (default 30).
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist: an image folder, a video file or a rosbag2 folder was looked for")
    suffix = path.suffix.lower()
    if suffix in BAG_SUFFIXES or (path / "metadata.yaml").exists() or _files(path, BAG_SUFFIXES):
        _only_for("a plain folder of images", fps=fps)
        return BagSource(path, topic, camera_info_topic)
    _only_for("a bag", topic=topic, camera_info_topic=camera_info_topic)
    if path.is_file():
        _only_for("a plain folder of images", fps=fps)
        return VideoSource(path)
    return FolderSource(path, fps)


def _only_for(kind: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise SourceError(f"{name} applies to {kind} only")


def parse_stamp(text: str) -> int:
    """Decimal seconds as integer nanoseconds, exactly; no float is involved. ValueError when it is not a number."""
    match = re.fullmatch(r"(\d+)(?:\.(\d{0,9})0*)?", text.strip())
    if match is None:
        raise ValueError(f"{text.strip()!r} is not a time in seconds with at most nine decimals")
    return int(match[1]) * NS_PER_S + int((match[2] or "").ljust(9, "0"))


def natural_key(name: str) -> list[Any]:
    """Sort key by which img2 comes before img10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name.lower())]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(found, key=lambda path: natural_key(path.name))


class FolderSource(Source):
    """Images in rgb/ or in the folder itself, stamped by timestamps.txt or at a constant rate."""

    def __init__(self, path: Path, fps: float | None) -> None:
        super().__init__(path)
        folder = path / "rgb" if (path / "rgb").is_dir() else path
        self._images = _files(folder, IMAGE_SUFFIXES)
        if not self._images:
            kinds = " ".join(f"*{suffix}" for suffix in IMAGE_SUFFIXES)
            raise SourceError(
                f"{folder} has no images: {kinds} were looked for (and no rosbag2 metadata.yaml is there)"
            )
        timestamps, intrinsics = path / "timestamps.txt", path / "intrinsics.json"
        if timestamps.exists():
            _only_for("a folder without timestamps.txt", fps=fps)
            self._stamps_ns = self._read_stamps(timestamps)
        else:
            rate = 30.0 if fps is None else fps
            if not rate > 0:
                raise SourceError(f"fps must be > 0, got {rate}")
            self._stamps_ns = [round(i * NS_PER_S / rate) for i in range(len(self._images))]
        try:
            self._camera = calibration.read_intrinsics(intrinsics) if intrinsics.exists() else None
        except calibration.CalibrationError as error:
            raise SourceError(str(error)) from error

    def _read_stamps(self, timestamps: Path) -> list[int]:
        stamps_ns: list[int] = []
        for number, line in enumerate(timestamps.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                stamps_ns.append(parse_stamp(line))
            except ValueError as error:
                raise SourceError(f"{timestamps}:{number}: {error}") from error
            if len(stamps_ns) > 1 and stamps_ns[-1] <= stamps_ns[-2]:
                raise SourceError(f"{timestamps}:{number}: {line.strip()} is not after the line before")
        if len(stamps_ns) != len(self._images):
            raise SourceError(
                f"{timestamps} has {len(stamps_ns)} stamps for {len(self._images)} images in {self._images[0].parent}"
            )
        return stamps_ns

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Frame]:
        for stamp_ns, path in zip(self._stamps_ns, self._images):
            try:
                image = encodings.decode_compressed(path.read_bytes(), str(path))
            except (encodings.ImageError, OSError) as error:
                raise SourceError(str(error)) from error
            camera = self._camera
            if camera is not None and image.shape[:2] != (camera.height, camera.width):
                raise SourceError(
                    f"{path} has {image.shape[1]} x {image.shape[0]} pixels, "
                    f"{self.path / 'intrinsics.json'} is for {camera.width} x {camera.height}"
                )
            yield Frame(stamp_ns, image, frame_id="camera", camera=camera)


class VideoSource(Source):
    """A video file; frames carry the presentation times of the container, counted from 0."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        capture = self._open()
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if count <= 0:  # some containers do not say
            count = 0
            while capture.grab():
                count += 1
        capture.release()
        self._count = count

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise SourceError(
                f"{self.path} is not a video that OpenCV can read: "
                f"{' '.join(VIDEO_SUFFIXES)} or a rosbag2 file ({' '.join(BAG_SUFFIXES)}) was looked for"
            )
        return capture

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Frame]:
        capture = self._open()
        done = 0
        while True:
            ok, bgr = capture.read()
            if not ok:
                break
            done += 1
            stamp_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)  # of the frame just read
            yield Frame(stamp_ns, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), frame_id="camera")
        capture.release()
        if done == 0:
            raise SourceError(f"{self.path}: no frame could be decoded")
        if done < self._count:
            logger.warning("%s ended after %d of the %d frames it announces", self.path, done, self._count)


class BagSource(Source):
    """One image topic of a rosbag2 recording, sqlite3 or MCAP, with its CameraInfo."""

    def __init__(self, path: Path, topic: str | None, camera_info_topic: str | None) -> None:
        super().__init__(path)
        from rosbags.typesys import Stores, get_typestore

        self._typestore = get_typestore(Stores.LATEST)
        with self._reader() as reader:
            self._image = self._choose_image(reader.connections, topic)
            self._info = self._first_info(reader, camera_info_topic)

    def _reader(self) -> Any:
        from rosbags.rosbag2 import Reader, ReaderError

        try:
            reader = Reader(self.path)
            reader.open()
        except (ReaderError, OSError) as error:
            remedy = "" if (self.path / "metadata.yaml").exists() else " (`ros2 bag reindex` writes metadata.yaml)"
            raise SourceError(f"{self.path} is not a rosbag2 recording that can be read: {error}{remedy}") from error
        return _Closing(reader)

    def _choose_image(self, connections: list[Any], topic: str | None) -> Any:
        images = [c for c in connections if c.msgtype in (IMAGE, COMPRESSED)]
        found = ", ".join(f"{c.topic} ({c.msgtype.split('/')[-1]}, {c.msgcount} messages)" for c in images)
        if topic is not None:
            chosen = [c for c in images if c.topic == topic]
            if not chosen:
                raise SourceError(f"{self.path} has no images on {topic}; image topics: {found or 'none'}")
            images = chosen
        images = [c for c in images if c.msgcount]
        if not images:
            others = ", ".join(sorted({f"{c.topic} ({c.msgtype})" for c in connections})) or "nothing"
            raise SourceError(
                f"{self.path} has no images: messages of {IMAGE} or {COMPRESSED} were looked for, found {others}"
            )
        if len(images) > 1:
            raise SourceError(f"{self.path} has several image topics, choose one with --topic: {found}")
        return images[0]

    def _first_info(self, reader: Any, topic: str | None) -> Any:
        """The first CameraInfo of the chosen topic, or of the one beside the images; None when there is none."""
        wanted = topic
        if wanted is None:
            wanted = self._base_topic().rpartition("/")[0] + "/camera_info"
        connections = [c for c in reader.connections if c.topic == wanted and c.msgtype == CAMERA_INFO and c.msgcount]
        if not connections:
            if topic is not None:
                raise SourceError(f"{self.path} has no {CAMERA_INFO} on {topic}")
            return None
        for connection, _, data in reader.messages(connections=connections):
            return self._typestore.deserialize_cdr(data, connection.msgtype)
        return None

    def _base_topic(self) -> str:
        return str(self._image.topic).removesuffix("/compressed")

    def __len__(self) -> int:
        return int(self._image.msgcount)

    def __iter__(self) -> Iterator[Frame]:
        with self._reader() as reader:
            connections = [c for c in reader.connections if c.id == self._image.id]
            for index, (connection, _, data) in enumerate(reader.messages(connections=connections)):
                msg = self._typestore.deserialize_cdr(data, connection.msgtype)
                try:
                    yield self._frame(msg)
                except (encodings.ImageError, calibration.CalibrationError) as error:
                    raise SourceError(f"{self.path}, {self._image.topic}, message {index}: {error}") from error

    def _frame(self, msg: Any) -> Frame:
        stamp = msg.header.stamp
        if self._image.msgtype == COMPRESSED:
            image = encodings.decode_compressed(msg.data, f"image of format {msg.format!r}")
        else:
            image = encodings.decode(msg.encoding, msg.data, msg.height, msg.width, msg.step, bool(msg.is_bigendian))
        return Frame(
            stamp.sec * NS_PER_S + stamp.nanosec, image, frame_id=msg.header.frame_id, camera=self._camera(image)
        )

    def _camera(self, image: np.ndarray) -> CameraModel | None:
        if self._info is None:
            return None
        height, width = image.shape[:2]
        rectified = self._base_topic().rpartition("/")[2].startswith("image_rect")  # image_pipeline's names
        return calibration.camera_from_info(self._info, width, height, rectified=rectified)


class _Closing:
    """An opened rosbags reader as a context manager; its own would open it a second time."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __enter__(self) -> Any:
        return self._reader

    def __exit__(self, *exception: object) -> None:
        self._reader.close()
