#!/usr/bin/env python3
"""Make a rosbag2 recording from an image folder, a video or another bag, without ROS.

usage: .venv/bin/python scripts/make_bag.py SOURCE BAG [--storage mcap] [--jpeg] [--namespace /camera]
"""

import argparse
import sys

from tqdm import tqdm

from spark3r_ros.bags import STORAGES, write_bag
from spark3r_ros.sources import SourceError, open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder with rgb/ and timestamps.txt, folder of images, video or bag")
    parser.add_argument("bag", help="folder to write; must not exist")
    parser.add_argument("--storage", choices=STORAGES, default="mcap")
    parser.add_argument("--jpeg", action="store_true", help="CompressedImage instead of Image")
    parser.add_argument("--namespace", default="/camera", help="before /image_raw and /camera_info")
    parser.add_argument("--frame-id", default="camera_optical_frame", help="of the headers")
    options = parser.parse_args()
    try:
        frames = tqdm(open_source(options.source), unit="frame")
        count = write_bag(
            frames,
            options.bag,
            storage=options.storage,
            jpeg=options.jpeg,
            namespace=options.namespace,
            frame_id=options.frame_id,
        )
    except (SourceError, FileExistsError) as error:
        sys.exit(f"make_bag: {error}")
    print(f"{options.bag}: {count} frames")


if __name__ == "__main__":
    main()
