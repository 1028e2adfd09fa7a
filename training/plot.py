"""Plot a training log: python -m training.plot --out RUN_DIR (writes RUN_DIR/log.png)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.train import DEFAULT_OUT, LOG


def plot(folder: Path) -> Path:
    """Draw every logged term over the samples seen; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    names = [name for name in rows[-1] if name not in ("step", "samples", "hours")]
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(16, 6), squeeze=False)
    for axis, name in zip(axes.ravel(), names):
        points = [(row["samples"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points), linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("samples")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "log.png"
    figure.savefig(path, dpi=90)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="(default: %(default)s)")
    print(plot(parser.parse_args().out))


if __name__ == "__main__":
    main()
