"""Nothing inside a pass waits for the device: checked without one, on torch's meta device, for every model.

A value that is read back is an error there by itself; a table that is copied from the CPU is one here, unless the copy
is asked for as one that does not wait.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_spec
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spark3r_ros.backbone import Backbone, nano
from spark3r_ros.backbone.motion import CELL
from spark3r_ros.backbone.registry import MODELS
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import ContextConfig, ReductionConfig

STRIDED = ReductionConfig(kv_factor=2, query_factor=2)
COVERING = replace(STRIDED, kv_selection="coverage", matching="k", keep_special_kv=True)
FULL = {"vggt": "vggt", "pi3": "pi3", "da3": "da3-small", "omega": "omega", "nano": "nano"}


class WaitsError(AssertionError):
    pass


def is_meta(x):
    return isinstance(x, torch.Tensor) and x.is_meta


class NoTables(TorchFunctionMode):
    """Numbers of Python made a tensor on the device or written into an element, and lists as index: these wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if func in (torch.tensor, torch.as_tensor) and on_device:
            raise WaitsError(f"{func.__name__} of {args[0]}")
        if func is torch.Tensor.new_tensor and is_meta(args[0]):
            raise WaitsError(f"new_tensor of {args[1]}")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_meta(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                raise WaitsError(f"a list as index: {index}")
            if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor) and args[0][index].ndim == 0:
                raise WaitsError(f"a number written into an element: {args[2]}")
        return func(*args, **kwargs)


class NoCopies(TorchDispatchMode):
    """Copies of tensors from the CPU, and tensors of the CPU as an index."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        copied = [x for x in tensors if x.device.type == "cpu" and x.ndim]
        to_device = any(map(is_meta, tensors)) or torch.device(kwargs.get("device") or "cpu").type == "meta"
        if copied and to_device and not kwargs.get("non_blocking"):
            raise WaitsError(f"{func} copies {[tuple(x.shape) for x in copied]}")
        return func(*args, **kwargs)


def no_waiting():
    stack = ExitStack()
    stack.enter_context(NoTables())
    stack.enter_context(NoCopies())
    return stack


@pytest.mark.parametrize("family", [*FAMILIES, "nano"])
def test_nothing_waits_for_the_device(family, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    spec = nano.SPEC if family == "nano" else tiny_spec(family)
    patch = spec.trunk.patch
    with torch.device("meta"):
        model = MODELS[FULL[family]].build(spec).eval()
        model._mean, model._std = model._mean.to("meta"), model._std.to("meta")
        frames = torch.zeros(1, 4, 3, 3 * patch, 4 * patch)
        inputs = {}
        if family == "nano":
            cells = (3 * patch // CELL, 4 * patch // CELL)
            inputs["motion"] = torch.zeros(1, 4, nano.MOTION_WIDTH, *cells)
    context = Backbone(model, "meta").new_context(ContextConfig(), *frames.shape[-2:])
    warm_up = PassOptions()
    with torch.inference_mode():
        model(frames, warm_up, **inputs)  # fills tables that are kept
        for reduction, with_context in itertools.product((None, STRIDED, COVERING), (False, True)):
            context.begin(4)
            options = PassOptions(reduction=reduction, context=context if with_context else None)
            with no_waiting():
                assert model(frames, options, **inputs).depth.shape == (1, 4, *frames.shape[-2:])
            if with_context and reduction is None:
                context.commit(range(4), range(4))  # from here on windows are later ones


def test_the_check_works():
    device = torch.zeros(4, 4, device="meta")
    for wait in (
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: torch.zeros(3).to("meta"),
        lambda: device.new_tensor([1.0]),
        lambda: device[[0, 1]],
        lambda: device.__setitem__((0, 0), 1.0),
        lambda: device[torch.tensor([0, 1])],
    ):
        with pytest.raises(WaitsError), no_waiting():
            wait()
    with pytest.raises((RuntimeError, NotImplementedError)), no_waiting():
        device.amax().item()
    with no_waiting():
        torch.zeros(3).to("meta", non_blocking=True)
        torch.full((), 3, device="meta") + device
