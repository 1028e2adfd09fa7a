"""The command line: the same corridor without ROS, the models, and the probe.

spark3r map SOURCE --out DIR      poses, map, report and picture of a recording
spark3r models [get NAME]         what backbones there are, and their weights
spark3r probe SOURCE ... --out F  measure how much reduction each layer stands
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark3r_ros import __version__
from spark3r_ros.config import Config, parameters, with_values
from spark3r_ros.frame import Update
from spark3r_ros.sources import Source, SourceError, open_source

if TYPE_CHECKING:
    from spark3r_ros.reconstructor import Reconstructor

logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """A command line that cannot be carried out; one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. Expected errors are one line on stderr."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("spark3r_ros").setLevel(logging.INFO)
    try:
        return int(options.command(options))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"spark3r: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spark3r: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spark3r", description="Camera poses and dense clouds from a camera stream.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("map", help="reconstruct a recording", description=_map.__doc__)
    build.add_argument("source", help="folder with rgb/ and timestamps.txt, folder of images, video or rosbag2")
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    _add_model_options(build)
    build.add_argument("--topic", help="image topic of a bag; not needed when it has only one")
    build.add_argument("--camera-info-topic", help="CameraInfo topic of a bag; default: the one beside the images")
    build.add_argument("--fps", type=float, help="frame rate of a plain folder of images (default 30)")
    build.set_defaults(command=_map)

    models = commands.add_parser("models", help="list backbones, fetch their weights", description=_models.__doc__)
    models.set_defaults(command=_models)
    actions = models.add_subparsers(metavar="ACTION")
    get = actions.add_parser("get", help="fetch the weights of one model", description=_get_model.__doc__)
    get.add_argument("name", help="as `spark3r models` lists it")
    get.add_argument("--accept-licence", action="store_true", help="you have read the licence and may use the weights")
    get.set_defaults(command=_get_model)

    probe = commands.add_parser("probe", help="find a model's sensitive layers", description=_probe.__doc__)
    probe.add_argument("sources", nargs="+", help="calibration recordings, as `map` takes them")
    probe.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="factor file; a plot lies beside")
    _add_model_options(probe)
    probe.add_argument("--frames", type=int, default=100, help="most frames of each recording (default 100)")
    probe.add_argument("--stride", type=int, default=1, help="take every n-th frame (default 1)")
    probe.set_defaults(command=_probe)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME|PATH", help="backbone (`spark3r models` lists them) or a weights file")
    parser.add_argument("--device", metavar="DEVICE", help="auto, cpu or cuda; short for --set model.device=DEVICE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="a parameter, as often as needed; docs/parameters.md lists them",
    )


def build_config(settings: Sequence[str], model: str | None = None, device: str | None = None) -> Config:
    """The defaults with ``group.field=value`` texts applied; UsageError or ValueError names what is wrong."""
    defaults = {p.name: p.default for p in parameters(Config())}
    given = {"model.name": model, "model.device": device}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set takes GROUP.FIELD=VALUE, got {setting!r}")
        values[name] = _parse_value(name, text, defaults.get(name, text))
    config: Config = with_values(Config(), values)
    return config


def _parse_value(name: str, text: str, default: Any) -> Any:
    """``text`` as the type of the parameter's default."""
    if isinstance(default, bool):
        words = {"true": True, "false": False}
        if text.lower() not in words:
            raise UsageError(f"{name} takes true or false, got {text!r}")
        return words[text.lower()]
    try:
        return type(default)(text)
    except ValueError:
        raise UsageError(f"{name} takes a number ({type(default).__name__}), got {text!r}") from None


def _map(options: argparse.Namespace) -> int:
    """Reconstruct a recording: writes trajectory.tum, map.ply, report.json and report.png."""
    from spark3r_ros.reconstructor import Reconstructor

    config = build_config(options.set, options.model, options.device)
    source = open_source(
        options.source, topic=options.topic, camera_info_topic=options.camera_info_topic, fps=options.fps
    )
    options.out.mkdir(parents=True, exist_ok=True)
    reconstructor = Reconstructor(config)
    run = Run(source, reconstructor)
    run.all_frames()
    report = run.write(options.out, {"settings": options.set, "model": config.model.name})
    _say(options.out, report)
    if run.error is not None:
        print(f"spark3r: stopped early: {run.error}", file=sys.stderr)
    return 1 if run.error is not None or run.refused else 0


class Run:
    """One recording through one Reconstructor, counting what happens."""

    def __init__(self, source: Source, reconstructor: Reconstructor) -> None:
        self.source = source
        self.reconstructor = reconstructor
        self.frames = 0
        self.refused: list[str] = []  # why, for every frame that the reconstruction could not use
        self.states: Counter[str] = Counter()
        self.windows: list[dict[str, Any]] = []
        self.error: SourceError | None = None  # that ended the recording early
        self.seconds = 0.0
        self.unit = "model units"

    def all_frames(self) -> None:
        """Every frame in order, none dropped, with a progress bar; a source that breaks off ends the run early."""
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        from spark3r_ros.reconstructor import FrameError

        start = time.monotonic()
        with logging_redirect_tqdm(), tqdm(total=len(self.source), unit="frame", desc="map") as bar:
            try:
                for frame in self.source:
                    self.frames += 1
                    try:
                        self._count(self.reconstructor.push(frame))
                    except FrameError as error:
                        self.refused.append(f"frame {self.frames - 1}: {error}")
                        logger.warning("%s", self.refused[-1])
                    bar.update()
            except SourceError as error:
                self.error = error
            self._count(self.reconstructor.finish())
        self.seconds = time.monotonic() - start

    def _count(self, update: Update) -> None:
        self.states.update(pose.state.value for pose in update.poses)
        self.unit = "m" if update.scale.is_metric else "model units"
        if update.window is not None:
            window = update.window
            self.windows.append({"frames": window.num_frames, "residual": window.residual, "seconds": window.seconds})

    def write(self, out: Path, about: dict[str, Any]) -> dict[str, Any]:
        """All result files; returns the report."""
        from spark3r_ros import export

        trajectory, points = self.reconstructor.trajectory(), self.reconstructor.map_points()
        report = {
            "source": str(self.source.path),
            "version": __version__,
            **about,
            "frames": self.frames,
            "poses": len(trajectory),
            "refused": self.refused,
            "stopped_early": None if self.error is None else str(self.error),
            "states": dict(self.states),
            "keyframes": len(self.reconstructor.keyframe_poses()),
            "points": len(points.xyz),
            "unit": self.unit,
            "path_length": export.path_length(trajectory),
            "seconds": self.seconds,
            "frames_per_second": self.frames / self.seconds if self.seconds else 0.0,
            "windows": self.windows,
            "status": self.reconstructor.status(),
        }
        export.write_tum(out / "trajectory.tum", trajectory)
        export.write_ply(out / "map.ply", points)
        export.write_json(out / "report.json", report)
        title = f"{self.source.path.name}: {len(trajectory)} poses, {len(points.xyz)} points"
        export.plot_map(out / "report.png", trajectory, points, title=title, unit=self.unit)
        return report


def _say(out: Path, report: dict[str, Any]) -> None:
    print(
        f"{report['frames']} frames in, {report['poses']} poses out, {len(report['refused'])} refused; "
        f"{report['keyframes']} keyframes, {len(report['windows'])} windows, {report['points']} points; "
        f"path {report['path_length']:.3f} {report['unit']}; "
        f"{report['seconds']:.1f} s, {report['frames_per_second']:.1f} frames/s"
    )
    for name in ("trajectory.tum", "map.ply", "report.json", "report.png"):
        print(f"  {out / name}")


def _models(options: argparse.Namespace) -> int:
    """All backbones: parameters, size of the weights, memory of a context frame, licences, and where weights belong."""
    from spark3r_ros.backbone.registry import list_models

    columns = ("model", "parameters", "download", "K/V per frame", "on disk", "licence of the weights / of the code")
    rows = [columns]
    for info in list_models():
        size = f"{info.download_bytes / 1e9:.2f} GB" if info.download_bytes else "included"
        licences = f"{info.weights_licence} / {info.code_licence}"
        kv_frame = f"{info.kv_bytes_per_frame / 2**20:.1f} MiB"
        here = str(info.path) if info.present else "-"
        rows.append((info.name, f"{info.parameters / 1e6:.0f} M", size, kv_frame, here, licences))
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]))
    return 0


def _get_model(options: argparse.Namespace) -> int:
    """Fetch the weights of one model into the cache folder; non-commercial ones need --accept-licence."""
    from spark3r_ros.backbone.registry import get_model

    print(get_model(options.name, accept_licence=options.accept_licence))
    return 0


def _probe(options: argparse.Namespace) -> int:
    """Measure which global layers stand hard key pruning; the result is what reduction.factor_file takes."""
    from tqdm import tqdm

    from spark3r_ros.backbone import load_backbone
    from spark3r_ros.device import choose_device
    from spark3r_ros.reduction.probe import plot, run_probe, sequence_from_frames

    config = build_config(options.set, options.model, options.device)
    sources = [open_source(path) for path in options.sources]
    device = choose_device(config.model.device)
    backbone = load_backbone(config.model.name, config.model.checkpoint or None, device)
    sequences = [
        sequence_from_frames(backbone, source, source.path.name, num_frames=options.frames, stride=options.stride)
        for source in sources
    ]
    with tqdm(unit="pass", desc="probe") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = run_probe(backbone, sequences, progress=progress)
    result.save(options.out)
    picture = options.out.with_suffix(".png")
    plot(result, picture)
    print(f"{result.model}: sensitive layers {list(result.sensitive_layers)} of {len(result.layers)}")
    print(f"  {options.out}\n  {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
