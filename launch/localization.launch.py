"""Localise in a saved map: the node loads it while it configures and relocalises the camera in it.

    ros2 launch spark3r_ros localization.launch.py map_file:=/maps/office.map image_topic:=/camera/image_raw

Takes every argument of live.launch.py as well.
"""

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def in_share(*parts):
    return PathJoinSubstitution([FindPackageShare("spark3r_ros"), *parts])


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument("map_file", description="what ~/save_map wrote"),
            DeclareLaunchArgument(
                "config", default_value=in_share("config", "localization.yaml"), description="YAML file with parameters"
            ),
            # an included file finds the arguments that are set already
            IncludeLaunchDescription(PythonLaunchDescriptionSource(in_share("launch", "live.launch.py"))),
        ]
    )
