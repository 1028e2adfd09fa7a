"""A camera that is running: spark3r with its DDS profile, and RViz when asked for.

    ros2 launch spark3r_ros live.launch.py image_topic:=/camera/image_raw camera_info_topic:=/camera/camera_info

``ros2 launch spark3r_ros live.launch.py --show-args`` lists every argument. One that is left empty keeps what the YAML
file says, so one's own file is enough: ``config:=/path/to/robot.yaml``.
"""

import os

from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

TOPICS = {"image": "image_topic", "camera_info": "camera_info_topic", "depth": "depth_topic", "odom": "odom_topic"}
# launch argument -> parameter; empty arguments are not passed on
PARAMETERS = {
    "model": "model.name",
    "image_transport": "image_transport",
    "base_frame": "base_frame",
    "tf_mode": "tf_mode",
    "map_file": "map_file",
}
# Fast DDS 2 (Humble, Jazzy) reads the first; Fast DDS 3 (Kilted and later) the second, and warns of the first
PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
WITH_FAST_DDS_2 = ("humble", "iron", "jazzy")


def in_share(*parts):
    return PathJoinSubstitution([FindPackageShare("spark3r_ros"), *parts])


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument("image_topic", default_value="/camera/image_raw", description="images of one camera"),
            DeclareLaunchArgument(
                "camera_info_topic", default_value="/camera/camera_info", description="its calibration; may be missing"
            ),
            DeclareLaunchArgument(
                "depth_topic", default_value="depth", description="depth registered to the image, for metric scale"
            ),
            DeclareLaunchArgument(
                "odom_topic", default_value="odom", description="the robot's own odometry, for metric scale"
            ),
            DeclareLaunchArgument(
                "image_transport", default_value="", description="raw or compressed; empty: as in config"
            ),
            DeclareLaunchArgument("model", default_value="", description="backbone; empty: as in config"),
            DeclareLaunchArgument(
                "base_frame", default_value="", description="the robot's body; empty: as in config; camera: none"
            ),
            DeclareLaunchArgument(
                "tf_mode",
                default_value="",
                description="odom_to_base, map_to_odom, map_to_camera or off; empty: as in config",
            ),
            DeclareLaunchArgument("map_file", default_value="", description="file of ~/save_map and ~/load_map"),
            DeclareLaunchArgument(
                "config", default_value=in_share("config", "live.yaml"), description="YAML file with parameters"
            ),
            DeclareLaunchArgument("namespace", default_value="", description="of the node and its topics"),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="take time from /clock"),
            DeclareLaunchArgument("rviz", default_value="false", description="start RViz as well"),
            DeclareLaunchArgument(
                "dds_profile",
                default_value=in_share("config", "fastdds_shm.xml"),
                description="Fast DDS profile with enough shared memory for images; empty: none. The camera driver "
                "needs it too: start it from this launch file or export the variable there",
            ),
            OpaqueFunction(function=dds_profile),
            # The driver, for instance (each publishes what the topic arguments must then name):
            #
            # IncludeLaunchDescription(  # image_topic:=/image_raw camera_info_topic:=/camera_info
            #     PathJoinSubstitution([FindPackageShare("usb_cam"), "launch", "camera.launch.py"])
            # ),
            # IncludeLaunchDescription(  # image_topic:=/camera/camera/color/image_raw
            #     # depth_topic:=/camera/camera/aligned_depth_to_color/image_raw base_frame:=camera_link
            #     PathJoinSubstitution([FindPackageShare("realsense2_camera"), "launch", "rs_launch.py"]),
            #     launch_arguments={"align_depth.enable": "true"}.items(),
            # ),
            # IncludeLaunchDescription(  # image_topic:=/oak/rgb/image_raw depth_topic:=/oak/stereo/image_raw
            #     # base_frame:=oak
            #     PathJoinSubstitution([FindPackageShare("depthai_ros_driver"), "launch", "rgbd_pcl.launch.py"])
            # ),
            OpaqueFunction(function=spark3r),
            Node(
                package="rviz2",
                executable="rviz2",
                arguments=["-d", in_share("config", "spark3r.rviz")],
                parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
                condition=IfCondition(LaunchConfiguration("rviz")),
            ),
        ]
    )


def dds_profile(context):
    """Set the profile for everything started after this, unless the user has one already."""
    path = LaunchConfiguration("dds_profile").perform(context)
    if not path or any(name in os.environ for name in PROFILE_VARIABLES):
        return []
    name = PROFILE_VARIABLES[os.environ.get("ROS_DISTRO") not in WITH_FAST_DDS_2]
    return [SetEnvironmentVariable(name, path)]


def spark3r(context):
    given = {name: LaunchConfiguration(name).perform(context) for name in PARAMETERS}
    parameters = {PARAMETERS[name]: value for name, value in given.items() if value}
    if parameters.get("base_frame") == "camera":
        parameters["base_frame"] = ""
    parameters["use_sim_time"] = LaunchConfiguration("use_sim_time").perform(context).lower() in ("true", "1")
    return [
        Node(
            package="spark3r_ros",
            executable="spark3r_node",
            name="spark3r",
            namespace=LaunchConfiguration("namespace"),
            parameters=[LaunchConfiguration("config"), parameters],
            remappings=[(topic, LaunchConfiguration(argument)) for topic, argument in TOPICS.items()],
            output="screen",
        )
    ]
