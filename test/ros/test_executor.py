"""The executor of the entry point; every other test runs the node in it."""

import threading
import time

import pytest
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from spark3r_ros.ros.executor import LeanExecutor


class Watched(LeanExecutor):
    """Notes how large each wait set is."""

    def __init__(self, size_of):
        super().__init__()
        self.size_of = size_of
        self.sizes = []

    def get_nodes(self):
        nodes = super().get_nodes()
        self.sizes.append(sum(self.size_of(node) for node in nodes))
        return nodes


def spin_until(executor, condition):
    while not condition():
        executor.spin_once(timeout_sec=30)


def test_one_message_costs_one_complete_wait_set(ros):
    node, got = Node("listener"), []
    node.create_subscription(Header, "topic", got.append, 10)
    publisher = node.create_publisher(Header, "topic", 10)
    executor = Watched(lambda node: len(list(node.subscriptions)))
    executor.add_node(node)
    publisher.publish(Header())
    spin_until(executor, lambda: got)
    executor.sizes.clear()
    for count in range(2, 12):
        publisher.publish(Header())
        spin_until(executor, lambda count=count: len(got) == count)
    assert executor.sizes == 10 * [0, 1]
    executor.shutdown()
    node.destroy_node()


def test_what_is_asked_for_while_a_callback_runs_is_not_missed(ros):
    """Tasks of other threads, timers that were reset, messages: each wakes it, whichever wait set sees them first."""
    node, seen = Node("listener"), []
    executor = LeanExecutor()
    executor.add_node(node)
    timer = node.create_timer(0.02, lambda: seen.append("timer"))
    publisher = node.create_publisher(Header, "topic", 10)

    def on_message(msg):
        timer.reset()
        seen.append("message")
        threading.Thread(target=executor.create_task, args=(lambda: seen.append("task"),)).start()

    node.create_subscription(Header, "topic", on_message, 10)
    for count in range(1, 31):
        publisher.publish(Header())
        spin_until(executor, lambda count=count: seen.count("task") == seen.count("message") == count)
    spin_until(executor, lambda: seen[-3:] == 3 * ["timer"])
    executor.shutdown()
    node.destroy_node()


def test_services_are_answered_while_messages_stream_in(ros):
    """They are not in every wait set then, but soon in one, and once the stream has ended at the next timer."""
    node, client_node, got = Node("server"), Node("client"), []
    node.create_subscription(Header, "topic", got.append, 10)
    node.create_timer(0.5, lambda: None)
    node.create_service(Trigger, "ask", lambda request, response: response)
    client, publisher = client_node.create_client(Trigger, "ask"), node.create_publisher(Header, "topic", 10)
    executor, other = LeanExecutor(), SingleThreadedExecutor()
    executor.add_node(node)
    other.add_node(client_node)
    assert client.wait_for_service(10)
    for is_streaming in (True, False):
        got.clear()
        publisher.publish(Header())
        spin_until(executor, lambda: got)
        future, deadline = client.call_async(Trigger.Request()), time.monotonic() + 10
        while not future.done():
            assert time.monotonic() < deadline, "no answer"
            if is_streaming:
                publisher.publish(Header())
            executor.spin_once(timeout_sec=30)
            other.spin_once(timeout_sec=0)
    executor.shutdown()
    other.shutdown()
    node.destroy_node()
    client_node.destroy_node()


@pytest.mark.parametrize(("rest_s", "complete"), [(1e9, 0), (0.0, 20)])
def test_wait_sets_of_a_stream_have_services_only_when_they_are_due(ros, monkeypatch, rest_s, complete):
    monkeypatch.setattr("spark3r_ros.ros.executor.REST_S", rest_s)
    node, got = Node("listener"), []
    node.create_subscription(Header, "topic", got.append, 10)
    publisher = node.create_publisher(Header, "topic", 10)
    executor = Watched(lambda node: len(list(node.services)))
    executor.add_node(node)
    publisher.publish(Header())
    spin_until(executor, lambda: got)
    executor.sizes.clear()
    for count in range(2, 22):
        publisher.publish(Header())
        spin_until(executor, lambda count=count: len(got) == count)
    assert sum(size > 0 for size in executor.sizes) == complete
    executor.shutdown()
    node.destroy_node()
