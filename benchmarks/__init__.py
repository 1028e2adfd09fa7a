"""Speed and accuracy, each printing a table and one JSON line last. Run as ``python -m benchmarks.NAME``."""
