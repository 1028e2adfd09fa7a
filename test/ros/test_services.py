"""Every service: honest answers, also while a window is being solved."""

import json
import threading

import numpy as np
import pytest
from fake import WINDOW
from nav_msgs.msg import Odometry, Path
from rig import CAMERA, LATCHED
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import Trigger

from spark3r_ros import geometry
from spark3r_ros.ros import conversions, interface


def test_all_services_of_the_contract_exist(rig):
    r = rig()
    names = {"/spark3r/" + s.name.removeprefix("~/") for s in interface.SERVICES}
    assert names == {f"/spark3r/{n}" for n in ("reset", "pause", "resume", "save_map", "load_map")}
    r.until(lambda: names <= {name for name, _ in r.peer.get_service_names_and_types()})


def test_reset_begins_anew_at_the_origin(rig):
    r = rig()
    odometry = r.listen(Odometry, "/spark3r/odometry")
    paths = r.listen(Path, "/spark3r/path", LATCHED)
    r.send(WINDOW)
    r.until(lambda: paths and len(paths[-1].poses) == 1)
    answer = r.call("/spark3r/reset")
    assert (answer.success, answer.message) == (True, "reset")
    assert r.fake.resets == 1
    r.send(1)
    r.until(lambda: len(odometry) == WINDOW + 1)
    assert odometry[-1].pose.pose.position.x == 0
    r.until(lambda: not paths[-1].poses)


def test_reset_while_a_frame_is_in_work_waits_for_it_and_drops_the_queue(rig):
    r = rig(queue_size=5)
    r.camera()
    r.fake.gate.clear()
    r.send(4, wait=False)
    r.until(lambda: r.node._worker.waiting == 3)
    client = r.peer.create_client(Trigger, "/spark3r/reset")
    r.until(client.service_is_ready)
    pending = client.call_async(Trigger.Request())
    r.until(lambda: r.node._worker.waiting == 0)
    assert not pending.done(), "it answers when it is done"
    r.fake.gate.set()
    r.until(pending.done)
    assert pending.result().success
    assert (r.stats.poses, r.stats.dropped["restart"], r.fake.resets) == (1, 3, 1)


def test_services_answer_and_images_are_taken_while_another_waits(rig):
    r = rig(queue_size=50)
    r.camera()
    r.fake.gate.clear()
    r.send(1, wait=False)
    r.until(lambda: r.stats.images == 1)
    client = r.peer.create_client(Trigger, "/spark3r/reset")
    r.until(client.service_is_ready)
    pending = client.call_async(Trigger.Request())
    r.until(lambda: r.stats.restarts == 1)
    assert r.call("/spark3r/pause").success
    assert r.call("/spark3r/resume").success
    r.send(3, wait=False)
    r.until(lambda: r.stats.images == 4)
    assert not pending.done(), "a window is still being solved"
    r.fake.gate.set()
    r.until(pending.done)
    assert pending.result().success
    r.until(lambda: r.stats.poses == 4)


def test_pause_counts_what_it_does_not_use(rig):
    r = rig()
    r.send(2)
    assert r.call("/spark3r/pause").success
    again = r.call("/spark3r/pause")
    assert (again.success, again.message) == (False, "already paused")
    r.send(3)
    assert (r.stats.poses, r.stats.dropped["paused"]) == (2, 3)
    assert r.call("/spark3r/resume").success
    assert not r.call("/spark3r/resume").success
    r.send(1)
    assert r.stats.poses == 3


def test_save_and_load_keep_the_map_where_it_was(rig, tmp_path):
    file = tmp_path / "maps" / "office.map"
    r = rig(base_frame="base_link", map_file=str(file))
    T_base_camera = geometry.make_T(geometry.so3_exp([0.1, 0.5, -1.0]), np.array([0.1, 0.2, 0.3]))
    r.send_tf(("base_link", CAMERA, 0, T_base_camera), static=True)
    r.send(WINDOW)
    answer = r.call("/spark3r/save_map")
    assert (answer.success, answer.message) == (True, f"wrote {file}")
    assert json.loads(file.read_text()) == {"frames": WINDOW}
    other = rig(map_file=str(file), load_map_on_start=True, tf_mode="off", remap=["__node:=other"])
    assert other.fake.loaded == file
    np.testing.assert_allclose(other.node._outputs._known_T_map_world, T_base_camera, atol=1e-12)
    answer = r.call("/spark3r/load_map")
    assert (answer.success, answer.message) == (True, f"read {file}")
    paths = r.listen(Path, "/spark3r/path", LATCHED)
    r.send(WINDOW)
    r.until(lambda: paths and paths[-1].poses)
    T = conversions.matrix_from_pose(paths[-1].poses[-1].pose)
    np.testing.assert_allclose(T[:3, :3], np.eye(3), atol=1e-9)


def test_points_are_saved_as_they_stand_in_the_map_frame(rig, tmp_path):
    file = tmp_path / "office.ply"
    r = rig(map_file=str(file))
    got = r.listen(PointCloud2, "/spark3r/map", LATCHED)
    r.send(WINDOW)
    r.until(lambda: got)
    assert r.call("/spark3r/save_map").success
    _, body = file.read_bytes().split(b"end_header\n")
    saved = np.frombuffer(body, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3), ("confidence", "<f4")]))
    points = np.frombuffer(got[-1].data, conversions.POINT)
    np.testing.assert_allclose(saved["xyz"], np.stack([points["x"], points["y"], points["z"]], axis=1), atol=1e-6)
    answer = r.call("/spark3r/load_map")
    assert not answer.success
    assert "only maps can be loaded" in answer.message


@pytest.mark.parametrize(
    ("service", "file", "message"),
    [
        ("save_map", "", "map_file is empty"),
        ("load_map", "/nowhere/at.all", "there is no map '/nowhere/at.all'"),
        ("save_map", "/proc/no/map", "/proc/no"),
    ],
)
def test_failures_are_told(rig, service, file, message):
    r = rig(map_file=file)
    r.send(WINDOW)
    answer = r.call(f"/spark3r/{service}")
    assert not answer.success
    assert message in answer.message


def test_a_map_cannot_be_saved_before_there_is_one(rig, tmp_path):
    r = rig(map_file=str(tmp_path / "map"))
    answer = r.call("/spark3r/save_map")
    assert not answer.success
    assert "no map yet" in answer.message


def test_every_service_under_load(rig, tmp_path):
    r = rig(queue_size=3, map_file=str(tmp_path / "map"))
    r.camera()
    r.fake.delay_s = 0.005
    stop = threading.Event()

    def stream():
        stamp = r._next_ns
        while not stop.wait(0.01):
            stamp += 10_000_000
            r._image_publisher.publish(_frame(stamp))

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        r.until(lambda: r.stats.poses > 3)
        for _ in range(4):
            for service in ("save_map", "pause", "resume", "load_map", "reset"):
                answer = r.call(f"/spark3r/{service}")
                assert answer.success, f"{service}: {answer.message}"
                done = r.stats.poses + 1  # one may have been in work while the service answered
                if service in ("resume", "reset", "load_map"):
                    r.until(lambda done=done: r.stats.poses > done)
    finally:
        stop.set()
        thread.join()
    r.until(r.is_idle)
    assert r.stats.images == r.stats.poses + sum(r.stats.dropped.values())
    assert not r.stats.dropped["failed"]


def test_images_that_wait_while_a_map_is_loaded_are_used_in_it(rig, tmp_path):
    r = rig(map_file=str(tmp_path / "map"))
    r.send(WINDOW)
    assert r.call("/spark3r/save_map").success
    r.fake.gate.clear()
    r.send(4, wait=False)
    r.until(lambda: r.node._worker.waiting == 3)
    client = r.peer.create_client(Trigger, "/spark3r/load_map")
    r.until(client.service_is_ready)
    pending = client.call_async(Trigger.Request())
    r.until(lambda: r.node._worker._commands)
    r.fake.gate.set()
    r.until(pending.done)
    r.until(r.is_idle)
    assert r.stats.poses == WINDOW + 4
    assert not r.stats.dropped.total()


def _frame(stamp_ns):
    from rig import image

    return image(stamp_ns)
