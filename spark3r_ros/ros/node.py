"""The lifecycle node: wires inputs, the worker that owns the reconstruction, and outputs together.

Threads: the executor's callbacks check, count and hand over; one worker does everything that touches the
reconstruction, and publishes what comes of it. Services wait for the worker without keeping the executor.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future as WorkerFuture
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.task import Future
from rclpy.timer import Timer
from std_srvs.srv import Trigger

from spark3r_ros.config import Config
from spark3r_ros.encodings import ImageError
from spark3r_ros.export import write_ply
from spark3r_ros.frame import Frame
from spark3r_ros.preprocess import FrameError
from spark3r_ros.ros import diagnostics, interface, parameters, qos, stamps
from spark3r_ros.ros.executor import LeanExecutor
from spark3r_ros.ros.inputs import Companions, ImageInput, Taken
from spark3r_ros.ros.outputs import Outputs, load_place
from spark3r_ros.ros.tf import Transforms
from spark3r_ros.ros.tf_output import RESEND_S
from spark3r_ros.ros.worker import Worker

if TYPE_CHECKING:
    from spark3r_ros.reconstructor import Reconstructor

_QUIET_S = 5.0  # between two log lines of the same kind
_SKEW_S = 10.0  # images this far from the node's clock are of another time
_NEW_SIZE_FRAMES = 10  # refused in a row before a changed image size is taken for a new camera mode
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OK, _FAILED = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE

Factory = Callable[[Config], "Reconstructor"]
Transition = Callable[["Spark3rNode", LifecycleState], TransitionCallbackReturn]


def load_reconstructor(config: Config) -> Reconstructor:
    """The real one; imported here because it brings torch, which takes seconds."""
    from spark3r_ros.reconstructor import Reconstructor

    return Reconstructor(config)


def _told(transition: Transition) -> Transition:
    """Log what a transition raises: rclpy takes it for an error of the transition and says nothing."""

    @wraps(transition)
    def told(node: Spark3rNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception:
            node.get_logger().error(traceback.format_exc())
            raise

    return told


class Spark3rNode(LifecycleNode):
    """A camera stream to poses, transforms and clouds.

    Args:
        make_reconstructor: builds the reconstruction from the configuration, in configure, on the worker's thread.
        defaults: what parameters are when nobody sets them.

    Raises ValueError for unknown parameters and bad values, naming them.
    """

    def __init__(
        self, make_reconstructor: Factory = load_reconstructor, defaults: Config | None = None, **options: Any
    ) -> None:
        super().__init__("spark3r", automatically_declare_parameters_from_overrides=True, **options)
        self.config, self.node_config = parameters.declare(self, defaults or Config())
        self._make_reconstructor = make_reconstructor
        self._is_active = False
        self._entities: list[Callable[[], Any]] = []  # how to undo configure, in order of creation
        self.add_on_set_parameters_callback(self._on_parameters)

    # ---- lifecycle -------------------------------------------------------------------------------------------------

    @_told
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and, when asked for, the map; create publishers and services."""
        self.stats = diagnostics.Statistics()
        self._executor_group = MutuallyExclusiveCallbackGroup()
        self._service_group = ReentrantCallbackGroup()
        self._worker: Worker[Taken] = Worker(self._process, self.node_config.queue_size, self._on_room)
        self._entities = [self._stop_worker]
        try:
            self._build()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            self.get_logger().error(f"cannot configure: {error}")
            self._tear_down()
            return _FAILED
        self.get_logger().info(f"configured: model {self.config.model.name}, tf_mode {self.node_config.tf_mode}")
        return _OK

    def _build(self) -> None:
        config = self.node_config
        self._transforms = Transforms(self, self._executor_group, self._refuse_transform)
        self._entities.append(self._transforms.destroy)
        self._companions = Companions(self, config, self.stats, self._transforms, self._executor_group)
        self._images = ImageInput(
            self, config, self.stats, lambda: self._worker.has_room, self._take, self._on_time_went_back
        )
        self._outputs = Outputs(self, config, self.stats, self._transforms, self._companions)
        self._entities.append(self._outputs.destroy)
        kind = next(o for o in interface.OUTPUTS if o.topic == "/diagnostics")
        self._diagnostics: Publisher = self.create_publisher(
            kind.kind, kind.topic, kind.profile, event_callbacks=qos.NO_PUBLISHER_EVENTS
        )
        self._entities.append(lambda: self.destroy_publisher(self._diagnostics))
        self._tf_timer: Timer | None = None
        self._details: dict[str, Any] = {}
        self._detail_job: WorkerFuture[Any] | None = None
        self._image_size: tuple[int, ...] | None = None
        self._new_size_frames = 0
        self._wait(self._load)
        for service in interface.SERVICES:
            handler = getattr(self, "_on_" + service.name.removeprefix("~/"))
            created = self.create_service(Trigger, service.name, handler, callback_group=self._service_group)
            self._entities.append(partial(self.destroy_service, created))
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # a silent /clock must not silence the warnings
        self._timer(1.0, self._tick, steady)
        if config.tf_mode in ("odom_to_base", "map_to_odom"):
            self._tf_timer = self._timer(RESEND_S, self._outputs.tf.resend, self.get_clock())
        threshold = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=False)
        jumps = self.get_clock().create_jump_callback(threshold, post_callback=self._on_clock_jump)
        self._entities.append(jumps.unregister)

    def _load(self) -> None:
        self._reconstructor = self._make_reconstructor(self.config)
        if self.node_config.load_map_on_start:
            self._load_map(Path(self.node_config.map_file))

    @_told
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to listen."""
        self._transforms.listen_to_moving(True)
        self._companions.open()
        self._images.open()
        self._is_active = True
        self._active_since = time.monotonic()
        self.stats.last_image = None
        self.get_logger().info(f"active: waiting for images on {self._images.topic}")
        return _OK

    @_told
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the frame in work is finished and what is pending is solved and published."""
        self._is_active = False
        self._images.close()
        self._companions.close()
        self.stats.frame_dropped("restart", self._worker.discard_frames())
        try:
            self._wait(self._finish)
        except (ValueError, RuntimeError) as error:
            self.get_logger().error(f"the last window could not be solved: {error}")
        return _OK

    @_told
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._tear_down()
        return _OK

    @_told
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._is_active:
            self.on_deactivate(state)
        self._tear_down()
        return _OK

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition raised: undo everything, so that configure can be tried again."""
        self.get_logger().error(f"transition from {state.label} failed; the node is unconfigured")
        self._tear_down()
        return _OK

    def _tear_down(self) -> None:
        """The worker first: it uses what the others own."""
        self._is_active = False
        entities, self._entities = self._entities, []
        for undo in entities[:1] + entities[:0:-1]:
            undo()
        self._reconstructor = None  # type: ignore[assignment]

    def close(self) -> None:
        """End the worker and destroy the node, in whatever state it is; the ROS context may be gone already."""
        self._tear_down()
        self.destroy_node()

    def _stop_worker(self) -> None:
        self.stats.frame_dropped("restart", self._worker.stop())

    def _timer(self, period_s: float, callback: Callable[[], None], clock: Clock) -> Timer:
        timer = self.create_timer(period_s, callback, callback_group=self._executor_group, clock=clock)
        self._entities.append(lambda: self.destroy_timer(timer))
        return timer

    # ---- frames ----------------------------------------------------------------------------------------------------

    def _take(self, taken: Taken) -> None:
        if self._tf_timer is not None:  # it fires between slow images only: a wake-up costs more than a transform
            self._outputs.tf.image_arrived(taken.stamp_ns)
            self._tf_timer.reset()
        dropped = self._worker.offer(taken)
        if dropped is not None:
            self.stats.frame_dropped("queue_full", stamp_ns=dropped.stamp_ns)

    def _process(self, taken: Taken) -> None:
        """On the worker: one image through the reconstruction."""
        try:
            frame = self._companions.frame(taken)
            self._check_size(frame)
            self._outputs.publish(self._reconstructor.track(frame), self._reconstructor)  # its pose goes out first
        except ImageError as error:
            self._drop("bad_image", taken, str(error))
        except FrameError as error:
            self._drop("bad_frame", taken, str(error))
        except Exception as error:  # noqa: BLE001  the worker must outlive whatever a frame brings, and say so
            if not self.context.ok():
                return  # ROS has ended while the frame was in work: there is nobody to tell
            self.stats.worker_error = f"{type(error).__name__}: {error}"
            self._drop("failed", taken, f"frame {taken.stamp_ns} failed: {traceback.format_exc()}")
        else:
            self._update_map()

    def _update_map(self) -> None:
        """On the worker: what the image that has its pose now means for the map."""
        try:
            self._outputs.publish(self._reconstructor.update_map(), self._reconstructor)
            self.stats.worker_error = ""
        except Exception as error:  # noqa: BLE001  as above
            if self.context.ok():
                self.stats.worker_error = f"{type(error).__name__}: {error}"
                text = f"the map could not be updated: {traceback.format_exc()}"
                self.get_logger().error(text, throttle_duration_sec=_QUIET_S)

    def _check_size(self, frame: Frame) -> None:
        """One image of another size is refused by the reconstruction; many in a row are a new camera mode."""
        size = frame.image.shape[:2]
        self._image_size = self._image_size or size
        self._new_size_frames = 0 if size == self._image_size else self._new_size_frames + 1
        if self._new_size_frames >= _NEW_SIZE_FRAMES:
            text = f"the camera changed from {self._image_size} to {size} (height, width): starting anew"
            self.get_logger().warning(text)
            self._reset()

    def _drop(self, reason: str, taken: Taken, text: str) -> None:
        self.stats.frame_dropped(reason, stamp_ns=taken.stamp_ns)
        self.get_logger().error(text, throttle_duration_sec=_QUIET_S)

    def _reset(self) -> None:
        """On the worker: forget stream and map; a node that localises takes its map again."""
        self._reconstructor.reset()
        self._image_size = None
        self._new_size_frames = 0
        self._outputs.restart(None)
        if self.node_config.load_map_on_start:
            self._load_map(Path(self.node_config.map_file))

    def _finish(self) -> None:
        """On the worker: solve and publish what is pending."""
        self._outputs.publish(self._reconstructor.finish(), self._reconstructor)

    # ---- time ------------------------------------------------------------------------------------------------------

    def _restart(self, reason: str) -> WorkerFuture[Any]:
        """Forget everything that belongs to the time before; the one line that is logged about it."""
        discarded = self._worker.discard_frames()
        self.stats.frame_dropped("restart", discarded)
        self.stats.restarts += 1
        self.stats.forget_arrivals()
        self._transforms.clear()
        self._companions.clear()
        self._images.forget()
        self._outputs.tf.restart()  # now, not when the worker comes to it
        self.get_logger().warning(
            f"{reason}: reconstruction, context and transforms are reset, {discarded} images dropped"
        )
        return self._worker.call(self._reset)

    def _on_time_went_back(self, reason: str) -> None:
        self._restart(reason).add_done_callback(partial(self._tell_failure, "cannot start anew"))

    def _on_clock_jump(self, jump: TimeJump) -> None:
        newest = self._images.newest_ns if self._is_active else None
        now_ns = self.get_clock().now().nanoseconds
        if newest is not None and newest - now_ns > stamps.JUMP_BACK_NS:  # else the images showed the jump already
            self._on_time_went_back(f"the clock jumped back by {-1e-9 * jump.delta.nanoseconds:.3f} s")

    # ---- services --------------------------------------------------------------------------------------------------

    async def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return await self._answer(response, lambda: self._restart("asked to reset"), "reset")

    async def _on_save_map(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        path = self.node_config.map_file
        return await self._answer(response, lambda: self._worker.call(lambda: self._save_map(path)), f"wrote {path}")

    async def _on_load_map(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        path = Path(self.node_config.map_file)
        return await self._answer(response, lambda: self._worker.call(lambda: self._load_map(path)), f"read {path}")

    def _on_pause(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._set_paused(response, True)

    def _on_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._set_paused(response, False)

    def _set_paused(self, response: Trigger.Response, paused: bool) -> Trigger.Response:
        """A pause takes effect at once: images that wait are given up."""
        word = "paused" if paused else "running"
        response.success = self._images.is_paused is not paused
        response.message = word if response.success else f"already {word}"
        self._images.is_paused = paused
        if paused:
            self.stats.frame_dropped("restart", self._worker.discard_frames())
        return response

    async def _answer(
        self, response: Trigger.Response, submit: Callable[[], WorkerFuture[Any]], done: str
    ) -> Trigger.Response:
        """Have the worker do it and answer when it is done, while the executor goes on taking images."""
        executor = self.executor
        assert executor is not None
        finished: Future = Future(executor=executor)

        def tell(job: WorkerFuture[Any]) -> None:
            finished.set_result(job.exception())
            executor.wake()

        submit().add_done_callback(tell)
        error = await finished
        response.success = error is None
        response.message = done if error is None else f"{type(error).__name__}: {error}"
        if response.success:
            self.get_logger().info(response.message)
        else:
            self.get_logger().error(response.message)
        return response

    def _save_map(self, name: str) -> None:
        if not name:
            raise ValueError("parameter map_file is empty: set it to where the map shall go")
        path = Path(name)
        self._finish()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ply":
            write_ply(path, self._outputs.in_map_frame(self._reconstructor.map_points()))
        else:
            self._outputs.save_place(path)
            self._reconstructor.save_map(path)

    def _load_map(self, path: Path) -> None:
        if path.suffix == ".ply":
            raise ValueError(f"{path} is a point cloud for other programs; only maps can be loaded")
        if not path.is_file():
            raise FileNotFoundError(f"parameter map_file: there is no map {str(path)!r}")
        T_map_world = load_place(path)
        self._reconstructor.load_map(path)
        self._outputs.restart(T_map_world)

    # ---- once a second -----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        problem = ""
        if self._is_active:
            self._images.follow_publishers()
            problem = self._input_problem()
            if self._outputs.has_static_mount and not self._companions.uses_moving_transforms:
                self._transforms.listen_to_moving(False)
            if self._detail_job is None or self._detail_job.done():
                self._detail_job = self._worker.call(self._refresh)
                self._detail_job.add_done_callback(partial(self._tell_failure, "cannot publish map or diagnostics"))
        name = self.get_fully_qualified_name().lstrip("/")
        waiting, described = self._worker.waiting, self._images.describe()
        tracking_problem = self._outputs.problem or self._scale_problem()
        statuses = [
            diagnostics.input_status(name, self.stats, described, problem, waiting),
            diagnostics.tracking_status(name, self.stats, tracking_problem, self._details),
        ]
        self._diagnostics.publish(diagnostics.array_message(self.get_clock().now().to_msg(), statuses))

    def _refresh(self) -> None:
        """On the worker: what is due for those who listen, and the reconstruction's own figures."""
        self._outputs.refresh(self._reconstructor)
        self._details = self._reconstructor.status()

    def _input_problem(self) -> str:
        """A sentence when images are missing or from another time; the missing ones are logged as well."""
        since = time.monotonic() - (self.stats.last_image or self._active_since)
        if self._images.is_paused:
            return "paused"
        if since >= self.node_config.no_data_timeout and not self._worker.waiting:
            text = self._images.why_silent()
            self.get_logger().warning(text, throttle_duration_sec=_QUIET_S)
            return text
        newest = self._images.newest_ns
        skew_s = 0.0 if newest is None else 1e-9 * (self.get_clock().now().nanoseconds - newest)
        if abs(skew_s) > _SKEW_S:
            return (
                f"image stamps are {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the node's clock: "
                "play bags with --clock and set use_sim_time"
            )
        return ""

    def _scale_problem(self) -> str:
        if self.stats.scale.is_metric or not self.stats.poses:
            return ""
        held = ", map -> odom is held" if self.node_config.tf_mode == "map_to_odom" else ""
        return f"{self.stats.state.value}; lengths are model units: no source of metric scale has spoken{held}"

    # ---- the rest --------------------------------------------------------------------------------------------------

    def set_parameters_atomically(self, parameter_list: list[Parameter]) -> SetParametersResult:
        """As rclpy's, but an unknown parameter is refused by its name and with the nearest known one."""
        for parameter in parameter_list:
            if not self.has_parameter(parameter.name):
                return SetParametersResult(successful=False, reason=parameters.unknown(parameter.name))
        return super().set_parameters_atomically(parameter_list)

    def _on_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        """Dynamic parameters only come this far; rclpy refuses the read-only and the unknown ones by name."""
        known = {p.name for p in parameters.all_parameters()}
        values = {p.name: p.value for p in changed if p.name in known}
        try:
            config, node_config = parameters.build_configs(values, self.config, self.node_config)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.config, self.node_config = config, node_config
        if self._entities:
            for part in (self._companions, self._images, self._outputs, self._outputs.tf):
                part.config = node_config
            job = self._worker.call(lambda: self._reconfigure(config))
            job.add_done_callback(partial(self._tell_failure, "cannot use the new parameters"))
        return SetParametersResult(successful=True)

    def _tell_failure(self, what: str, job: WorkerFuture[Any]) -> None:
        """Of a job that nobody waits for."""
        error = job.exception()
        if error is not None:
            self.stats.worker_error = f"{what}: {type(error).__name__}: {error}"
            self.get_logger().error(self.stats.worker_error, throttle_duration_sec=_QUIET_S)

    def _reconfigure(self, config: Config) -> None:
        self._reconstructor.config = config

    def _refuse_transform(self, text: str) -> None:
        self.stats.refused["transform"] += 1
        self.get_logger().error(text, throttle_duration_sec=_QUIET_S)

    def _wait(self, command: Callable[[], Any]) -> Any:
        """Have the worker do it and wait: in transitions only."""
        return self._worker.call(command).result()

    def _on_room(self) -> None:
        """There is room again: an image subscription that was left alone must be looked at."""
        if self.node_config.drop_policy == "never" and self.executor is not None:
            self.executor.wake()


def main(args: list[str] | None = None, make_reconstructor: Factory = load_reconstructor) -> int:
    """Entry point ``spark3r_node``: a node that configures and activates itself unless autostart is off."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")  # of the parts without ROS
    logging.getLogger("spark3r_ros").setLevel(logging.INFO)
    _keep_freed_memory()
    rclpy.init(args=args)
    node = None
    try:
        node = Spark3rNode(make_reconstructor)
        executor = LeanExecutor()
        executor.add_node(node)
        if node.node_config.autostart and not start(node):
            return 1
        executor.spin()
    except ValueError as error:
        rclpy.logging.get_logger("spark3r").fatal(str(error))
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # launch passes a second Ctrl-C on
        if node is not None:
            node.close()
        rclpy.try_shutdown()
    return 0


def _keep_freed_memory() -> None:
    """Let the C library keep what images leave behind instead of giving it back and faulting it in for the next one.

    That took 0.7 ms of CPU per 640x480 image. glibc adapts these two thresholds by itself when large blocks are freed,
    up to the values given here (mallopt(3)); other C libraries have no mallopt, or ignore it.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def start(node: Spark3rNode) -> bool:
    """Configure and activate; False when either failed, with the reason in the log."""
    return node.trigger_configure() == _OK and node.trigger_activate() == _OK


if __name__ == "__main__":
    sys.exit(main())
