"""A recorded bag into the node, in simulated time and without a lost image; or, offline, without ROS at all.

    ros2 launch spark3r_ros replay.launch.py bag:=/path/to/bag image_topic:=/camera/image_raw rviz:=true
    ros2 launch spark3r_ros replay.launch.py bag:=/path/to/bag offline:=true out:=/tmp/map

Takes the other arguments of live.launch.py as well. The player waits until the node has loaded its model and listens.
``ros2 bag play --clock 100 BAG`` does the same for a node that runs already.
"""

import sys

from launch.actions import DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

LOOPS_FOREVER = "1000000"


def in_share(*parts):
    return PathJoinSubstitution([FindPackageShare("spark3r_ros"), *parts])


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="rosbag2 folder, sqlite3 or MCAP"),
            DeclareLaunchArgument("rate", default_value="1.0", description="2.0 is twice as fast as recorded"),
            DeclareLaunchArgument("loop", default_value="false", description="again and again; every start is a reset"),
            DeclareLaunchArgument("offline", default_value="false", description="read the bag directly, no topics"),
            DeclareLaunchArgument("out", default_value="spark3r_out", description="folder for the results of offline"),
            DeclareLaunchArgument("image_topic", default_value="/camera/image_raw", description="images in the bag"),
            DeclareLaunchArgument("model", default_value="", description="backbone; empty: as in config"),
            DeclareLaunchArgument(
                "config", default_value=in_share("config", "replay.yaml"), description="YAML file with parameters"
            ),
            OpaqueFunction(function=replay),
        ]
    )


def replay(context):
    def value(name):
        return LaunchConfiguration(name).perform(context)

    def is_on(name):
        return value(name).lower() in ("true", "1")

    if is_on("offline"):
        model = ["--model", value("model")] if value("model") else []
        topic = ["--topic", value("image_topic")]
        command = ["-m", "spark3r_ros.cli", "map", value("bag"), "--out", value("out"), *topic, *model]
        return [ExecuteProcess(cmd=[sys.executable, *command], output="screen")]
    loops = LOOPS_FOREVER if is_on("loop") else "1"
    command = ["-m", "spark3r_ros.ros.player", value("bag"), "--rate", value("rate"), "--loops", loops]
    return [
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(in_share("launch", "live.launch.py")),
            launch_arguments=[("use_sim_time", "true")],  # it finds the others, which are set already
        ),
        ExecuteProcess(cmd=[sys.executable, *command, "--wait-for", value("image_topic")], output="screen"),
    ]
