"""Configure, activate, deactivate, clean up, again and again; parameters and their refusals."""

import gc
import os
import threading
from pathlib import Path

import pytest
import rclpy
from fake import FakeReconstructor
from lifecycle_msgs.srv import ChangeState, GetState
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import ParameterDescriptor
from rcl_interfaces.srv import DescribeParameters, SetParameters
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rig import Rig

from spark3r_ros.config import Config, NodeConfig
from spark3r_ros.ros import parameters
from spark3r_ros.ros.node import Spark3rNode, start

OK = TransitionCallbackReturn.SUCCESS


def memory_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cycle(node):
    assert node.trigger_configure() == OK
    assert node.trigger_activate() == OK
    assert node.trigger_deactivate() == OK
    assert node.trigger_cleanup() == OK


def test_a_hundred_cycles_leave_nothing_behind(rig):
    r = rig(started=False)
    node = r.node
    r.executor.remove_node(node)  # transitions are called from here, as the executor would

    def count():
        gc.collect()
        return (
            len(list(node.publishers)), len(list(node.subscriptions)), len(list(node.services)),
            len(list(node.timers)), threading.active_count(), len(os.listdir("/proc/self/fd")),
        )  # fmt: skip

    for _ in range(10):
        cycle(node)
    before, memory = count(), memory_mb()
    for _ in range(90):
        cycle(node)
    assert count() == before
    assert memory_mb() - memory < 8
    r.executor.add_node(node)
    assert start(node)
    r.send(3)
    assert r.stats.poses == 3


def test_a_lifecycle_manager_can_drive_it(rig):
    r = rig(autostart=False, started=False)
    change = r.peer.create_client(ChangeState, "/spark3r/change_state")
    get = r.peer.create_client(GetState, "/spark3r/get_state")
    r.until(lambda: change.service_is_ready() and get.service_is_ready())

    def call(client, request):
        future = client.call_async(request)
        r.until(future.done)
        return future.result()

    for transition, state in ((1, "inactive"), (3, "active"), (4, "inactive"), (2, "unconfigured"), (1, "inactive")):
        request = ChangeState.Request()
        request.transition.id = transition
        assert call(change, request).success
        assert call(get, GetState.Request()).current_state.label == state


def test_deactivated_it_listens_to_nothing_and_activated_again_goes_on(rig):
    r = rig()
    got = r.listen(Odometry, "/spark3r/odometry")
    r.send(3)
    assert r.node.trigger_deactivate() == OK
    r.until(lambda: not r._image_publisher.get_subscription_count())
    assert r.node.trigger_activate() == OK
    r.until(r._image_publisher.get_subscription_count)
    r.send(3)
    r.until(lambda: len(got) == 6)


def test_a_model_that_cannot_load_leaves_it_unconfigured(ros):
    def fail(config):
        raise FileNotFoundError("no such checkpoint: model.safetensors")

    node = Spark3rNode(fail)
    assert not start(node)
    assert node._state_machine.current_state[1] == "unconfigured"
    assert not list(node.publishers) or all("spark3r" not in p.topic_name for p in node.publishers)
    node.close()


def test_an_unforeseen_error_in_configure_is_told_and_leaves_it_unconfigured_and_usable(ros, capfd):
    class Broken:
        is_broken = True

        def __call__(self, config):
            if self.is_broken:
                raise KeyError("not foreseen")
            return FakeReconstructor(config)

    factory = Broken()
    node = Spark3rNode(factory, parameter_overrides=overrides(base_frame=""))
    node.trigger_configure()
    assert "KeyError: 'not foreseen'" in capfd.readouterr().err
    assert node._entities == []
    factory.is_broken = False
    assert start(node)
    node.close()


def test_shutdown_from_active(rig):
    r = rig()
    assert r.node.trigger_shutdown() == OK


def test_a_frame_in_work_when_ros_ends_is_no_error(rig, capfd):
    r = rig()
    r.fake.gate.clear()
    r.send(1, wait=False)
    r.until(lambda: r.stats.images == 1 and not r.node._worker.waiting)
    rclpy.shutdown()
    r.fake.gate.set()
    r.close()
    assert not r.stats.dropped.total()
    assert "Traceback" not in capfd.readouterr().err


# ---- parameters -----------------------------------------------------------------------------------------------------


def overrides(**values):
    return [Parameter(name.replace("__", "."), value=value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windw__size": 4}, "unknown parameter 'windw.size'; did you mean window.size"),
        ({"map_fram": "m"}, "unknown parameter 'map_fram'; did you mean map_frame"),
        ({"window__size": 1}, "window.size must be >= 2, got 1"),
        ({"window__size": "8"}, "window.size must be of type int"),
        ({"tf_mode": "both"}, "tf_mode must be one of"),
        ({"transform_tolerance": -1.0}, "transform_tolerance must be >= 0, got -1"),
        ({"queue_size": 0}, "queue_size must be >= 1, got 0"),
        ({"load_map_on_start": True}, "map_file must name a map"),
        ({"odom_source": "tf"}, "follow its own transforms"),
        ({"odom_frame": "map"}, "must be different names"),
    ],
)
def test_bad_values_are_refused_by_name(ros, values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Spark3rNode(parameter_overrides=overrides(**values))


def test_numbers_without_a_point_are_numbers(ros):
    node = Spark3rNode(parameter_overrides=overrides(transform_tolerance=1, window__max_keyframe_interval=3))
    assert node.node_config.transform_tolerance == 1.0
    assert node.config.window.max_keyframe_interval == 3.0
    node.close()


def test_every_parameter_is_declared_with_its_default_description_and_range(ros):
    node = Spark3rNode()
    for p in parameters.all_parameters(Config(), NodeConfig()):
        assert node.get_parameter(p.name).value == p.default
        found: ParameterDescriptor = node.describe_parameter(p.name)
        assert found.description == p.doc
        assert found.read_only is not p.dynamic
        if p.choices:
            assert all(choice in found.additional_constraints for choice in p.choices)
        ranges = [*found.integer_range, *found.floating_point_range]
        assert bool(ranges) == (p.ge is not None or p.le is not None)
        if ranges and p.ge is not None:
            assert ranges[0].from_value == p.ge
        if ranges and p.le is not None:
            assert ranges[0].to_value == p.le
    node.close()


def set_parameter(r: Rig, name, value):
    client = r.peer.create_client(SetParameters, "/spark3r/set_parameters")
    r.until(client.service_is_ready)
    request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
    future = client.call_async(request)
    r.until(future.done)
    r.peer.destroy_client(client)
    return future.result().results[0]


def test_dynamic_parameters_reach_the_reconstruction_and_the_node(rig):
    r = rig()
    assert set_parameter(r, "window.keyframe_flow", 0.11).successful
    r.until(lambda: r.fake.config.window.keyframe_flow == 0.11)
    assert set_parameter(r, "transform_tolerance", 0.5).successful
    assert r.node._outputs.config.transform_tolerance == 0.5
    assert set_parameter(r, "map_file", "/tmp/other").successful
    assert r.node.node_config.map_file == "/tmp/other"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("window.size", 4, "window.size"),
        ("tf_mode", "off", "tf_mode"),
        ("window.keyframe_flow", 2.0, "range"),
        ("windw.size", 4, "unknown parameter 'windw.size'; did you mean window.size?"),
        ("transform_tolerance", "long", "transform_tolerance must be of type float"),
    ],
)
def test_running_it_refuses_with_a_reason(rig, name, value, message):
    r = rig()
    result = set_parameter(r, name, value)
    assert not result.successful
    assert message in result.reason
    assert r.node.config == Config()


def test_parameters_can_be_described_from_outside(rig):
    r = rig()
    client = r.peer.create_client(DescribeParameters, "/spark3r/describe_parameters")
    r.until(client.service_is_ready)
    future = client.call_async(DescribeParameters.Request(names=["tf_mode", "window.size"]))
    r.until(future.done)
    mode, size = future.result().descriptors
    assert "map_to_odom" in mode.additional_constraints
    assert size.integer_range[0].from_value == 2
