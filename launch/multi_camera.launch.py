"""Several cameras on one robot: one node per camera, each in its camera's namespace.

    ros2 launch spark3r_ros multi_camera.launch.py cameras:=front,rear

The first camera owns odom -> base_link; the others publish no transforms, or base_link would have several parents. Each
node makes a map of its own, in its own frame (front/map, rear/map).
"""

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def in_share(*parts):
    return PathJoinSubstitution([FindPackageShare("spark3r_ros"), *parts])


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument("cameras", default_value="front,rear", description="namespaces, comma separated"),
            DeclareLaunchArgument("image_topic", default_value="image_raw", description="inside each namespace"),
            DeclareLaunchArgument("camera_info_topic", default_value="camera_info", description="inside each"),
            DeclareLaunchArgument(
                "config",
                default_value=in_share("config", "live.yaml"),
                description="YAML file with parameters, for all",
            ),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="take time from /clock"),
            OpaqueFunction(function=nodes),
        ]
    )


def nodes(context):
    cameras = [name.strip() for name in LaunchConfiguration("cameras").perform(context).split(",") if name.strip()]
    use_sim_time = LaunchConfiguration("use_sim_time").perform(context).lower() in ("true", "1")
    return [
        Node(
            package="spark3r_ros",
            executable="spark3r_node",
            name="spark3r",
            namespace=camera,
            parameters=[
                LaunchConfiguration("config"),
                {
                    "tf_mode": "odom_to_base" if camera == cameras[0] else "off",
                    "map_frame": f"{camera}/map",
                    "odom_frame": "odom" if camera == cameras[0] else f"{camera}/odom",
                    "use_sim_time": use_sim_time,
                },
            ],
            remappings=[
                ("image", LaunchConfiguration("image_topic")),
                ("camera_info", LaunchConfiguration("camera_info_topic")),
            ],
            output="screen",
        )
        for camera in cameras
    ]
