"""Camera poses, TF and dense point clouds from a plain camera stream."""

__version__ = "0.1.0"
