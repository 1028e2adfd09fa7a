"""The tables of docs/ros.md are the code's, and the code is what a running node shows."""

from pathlib import Path

from rclpy.qos import ReliabilityPolicy

from scripts import interface_docs
from spark3r_ros.ros import interface

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ros.md").read_text(encoding="utf-8")


def test_tables_are_up_to_date():
    assert interface_docs.page(PAGE) == PAGE, "run scripts/interface_docs.py"


def test_every_table_is_on_the_page():
    assert {block[1] for block in interface_docs.BLOCK.findall(PAGE)} == set(interface_docs.tables())


def test_launch_arguments_are_read_from_the_files():
    found = {
        name: (default, text)
        for name, default, text in interface_docs.launch_arguments(ROOT / "launch" / "replay.launch.py")
    }
    assert found["bag"] == ("required", "rosbag2 folder, sqlite3 or MCAP")
    assert found["rate"][0] == "`1.0`"
    assert found["model"][0] == "empty"
    assert found["config"][0] == "`config/replay.yaml`"


def test_a_running_node_listens_to_exactly_the_inputs_of_the_table(rig):
    r = rig(tf_mode="map_to_odom", base_frame="base_link", reliability="reliable")
    wanted = {r.node.resolve_topic_name(i.topic) for i in interface.INPUTS}

    def heard():  # the graph follows a little later
        return {topic for topic, _ in r.node.get_subscriber_names_and_types_by_node("spark3r", "/")}

    r.until(lambda: heard() - {"/parameter_events"} == wanted)
    for one in interface.INPUTS:
        (info,) = (
            i
            for i in r.node.get_subscriptions_info_by_topic(r.node.resolve_topic_name(one.topic))
            if i.node_name == "spark3r"
        )
        assert info.topic_type in {f"{k.__module__.partition('.')[0]}/msg/{k.__name__}" for k in one.kinds}
        assert info.qos_profile.reliability == one.profile.reliability
        assert info.qos_profile.durability == one.profile.durability
    assert interface.INPUTS[0].profile.reliability is ReliabilityPolicy.RELIABLE


def test_a_running_node_offers_exactly_the_services_of_the_table(rig):
    r = rig()
    wanted = {r.node.resolve_service_name(s.name) for s in interface.SERVICES}

    def offered():
        found = r.node.get_service_names_and_types_by_node("spark3r", "/")
        return {name for name, kinds in found if kinds == ["std_srvs/srv/Trigger"]}

    r.until(lambda: offered() == wanted)


def test_a_running_node_publishes_exactly_the_outputs_of_the_table(rig):
    r = rig()
    wanted = {r.node.resolve_topic_name(o.topic) for o in interface.OUTPUTS}
    of_rclpy = {"/parameter_events", "/rosout", "/spark3r/transition_event"}

    def published():
        return {topic for topic, _ in r.node.get_publisher_names_and_types_by_node("spark3r", "/")}

    r.until(lambda: published() - of_rclpy == wanted)
