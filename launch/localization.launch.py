"""Localise in a saved map: the node loads it while it configures and relocalises the camera in it.

ros2 launch spark3r_ros localization.launch.py map_file:=/maps/office.map image_topic:=/camera/image_raw
"""

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

PASSED_ON = ("map_file", "image_topic", "camera_info_topic", "odom_topic", "base_frame", "tf_mode", "config",
             "namespace", "use_sim_time", "rviz")  # fmt: skip


def in_share(*parts):
    return PathJoinSubstitution([FindPackageShare("spark3r_ros"), *parts])


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument("map_file", description="what ~/save_map wrote"),
            DeclareLaunchArgument("image_topic", default_value="/camera/image_raw", description="images of one camera"),
            DeclareLaunchArgument(
                "camera_info_topic", default_value="/camera/camera_info", description="its calibration; may be missing"
            ),
            DeclareLaunchArgument("odom_topic", default_value="odom", description="the robot's own odometry"),
            DeclareLaunchArgument("base_frame", default_value="", description="the robot's body; empty: as in config"),
            DeclareLaunchArgument("tf_mode", default_value="", description="empty: as in config"),
            DeclareLaunchArgument(
                "config", default_value=in_share("config", "localization.yaml"), description="YAML with parameters"
            ),
            DeclareLaunchArgument("namespace", default_value="", description="of the node and its topics"),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="take time from /clock"),
            DeclareLaunchArgument("rviz", default_value="false", description="start RViz as well"),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(in_share("launch", "live.launch.py")),
                launch_arguments=[(name, LaunchConfiguration(name)) for name in PASSED_ON],
            ),
        ]
    )
