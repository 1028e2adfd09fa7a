"""The executor of the entry point; every other test runs the node in it."""

import threading

from rclpy.node import Node
from std_msgs.msg import Header

from spark3r_ros.ros.executor import LeanExecutor


class Watched(LeanExecutor):
    """Notes how many subscriptions each wait set has."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def get_nodes(self):
        nodes = super().get_nodes()
        self.sizes.append(sum(len(list(node.subscriptions)) for node in nodes))
        return nodes


def spin_until(executor, condition):
    while not condition():
        executor.spin_once(timeout_sec=30)


def test_one_message_costs_one_complete_wait_set(ros):
    node, got = Node("listener"), []
    node.create_subscription(Header, "topic", got.append, 10)
    publisher = node.create_publisher(Header, "topic", 10)
    executor = Watched()
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
