"""Geometric refinement: tracks in, poses of every frame, corrected windows and sparse landmarks out.

How the corridor uses it (``tracks.py`` makes the tracks; one Refiner per map, dropped on reset)::

    tracker = FeatureTracker(config.refine)
    refiner = Refiner(config.refine, width, height, camera)       # camera: CameraModel with lens distortion, or None

    tracks = tracker.track(gray)                                  # every frame; flow_px and survival are for the gate
    pose = refiner.track(tracks, T_guess=None)                    # TrackedPose, or None while there is no map
    if gate says keyframe:
        tracks = tracker.set_keyframe(keyframe_id)                # the same tracks and the new points
        refiner.add_keyframe(keyframe_id, tracks, pose=None)   # poses it, triangulates, small local adjustment
    when a window is full:
        refined = refiner.solve(keyframe_ids, T_world_camera, depths)
        # T_world_camera [S, 4, 4]: the network's poses, aligned to the world (first window: as they are), or None
        # depths {keyframe_id: DepthPrior}: the network's depth in world scale, or None
        # the same beside the stream: begin(...), then the result's adjust() in any thread, then end(...) with both
        # -> RefinedWindow: poses, K, depth_scale per keyframe (multiply the network's depth by it), confidence, start

* Before the first ``solve`` nothing has a pose: ``track`` gives None. ``refiner.locate(tracks_of_a_frame, T_guess)``
  poses any frame whose Tracks were kept, also to improve poses after a window was solved: neither moves the map, and
  ``locate`` does not count as the frame before the next ``track``.
* World and scale are those of the first window's T_world_camera and depths (first keyframe exactly at its given pose);
  without them the first keyframe is the origin and the median depth is 1. Later windows keep them: poses that older
  landmarks hold do not move freely, and the network's own poses are only another start.
* Later windows need no network at all (``solve(ids, None, None)``): that is "refine alone".
* ``refiner.K`` [3, 3]: in pixels of the undistorted camera image, known or estimated; locked after the first windows.
* Same input, same output, bit for bit: no threads of our own, random numbers from fixed seeds.
"""

from spark3r_ros.refine.dense import DenseView, dense_depth, expected_error
from spark3r_ros.refine.refiner import DepthPrior, PendingWindow, RefinedWindow, Refiner, TrackedPose

__all__ = [
    "DenseView",
    "DepthPrior",
    "PendingWindow",
    "RefinedWindow",
    "Refiner",
    "TrackedPose",
    "dense_depth",
    "expected_error",
]
