"""Which implementation of an op runs: the one place that decides, with reasons."""

import importlib
import importlib.util
import os
import warnings

import torch

from .. import _library

NAMES = ("eager", "cpu", "cuda", "triton")

# The order of preference per device; any other device runs eager.
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}

# Where eager is no fallback: torch calls a library there that a kernel of ours would not beat.
LIBRARIES = {("conv2d", "cuda"): "cuDNN convolves, by eager"}

# For debugging: IMAGEGEN_BACKEND=eager makes every call that names no backend use this one.
forced = os.environ.get("IMAGEGEN_BACKEND") or None

_triton_is_installed = importlib.util.find_spec("triton") is not None  # found, not imported: that takes a second

_warned = set()


def choose(op, implementations, backend, x, declines=None):
    """The implementation of `op` for x: the one asked for, or the first that is ready on x's device.

    implementations maps backend names to functions of one signature. A backend asked for by name never falls
    back: it raises with the reason. A fallback to eager where a kernel exists for other installations warns once.
    declines(name, x) is None where that backend takes an x like this, else one sentence; without it each takes any.
    """
    device = "cpu" if x.is_cpu else x.device.type  # the second takes 0.4 µs

    def reason_against(name):
        return why_not(op, implementations, name, device) or (declines and declines(name, x))

    asked = backend or forced
    if asked is not None:
        if asked not in NAMES:
            raise ValueError(f"{op}: backend must be one of {', '.join(NAMES)} or None, got {asked!r}")
        reason = reason_against(asked)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {asked!r} can't run here: {reason}")
        return implementations[asked]
    for name in PREFERENCE.get(device, ("eager",)):
        if reason_against(name) is None:
            break
    if name == "eager" and device in PREFERENCE and (op, device) not in LIBRARIES:
        _warn_once(op, device, reason_against)
    return implementations[name]


def why_not(op, implementations, name, device):
    """None where backend `name` can run `op` on tensors of this device type, else one sentence."""
    if name == "eager":
        return None
    if name not in implementations:
        return LIBRARIES.get((op, name)) or f"{op} has no {name} implementation"
    if name == "triton":
        return _why_no_triton(device)
    if device != name:
        return f"it takes {name} tensors, x is on {device}"
    return _library.why_missing(op, name)


def _why_no_triton(device):
    if not _triton_is_installed:
        return "triton is not installed: pip install triton"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it takes cuda tensors (or cpu tensors under TRITON_INTERPRET=1), x is on {device}"


def _warn_once(op, device, reason_against):
    if torch.compiler.is_compiling() or (op, device) in _warned:
        return
    _warned.add((op, device))
    reasons = "; ".join(f"{name}: {reason_against(name)}" for name in PREFERENCE[device] if name != "eager")
    warnings.warn(f"{op} runs in eager PyTorch on {device}, slower than it could: {reasons}", stacklevel=4)


def implementations(op):
    """The table backend name -> function of one op, as its module declares it; an in-place twin shares its op's."""
    return importlib.import_module(f"{__package__}.{op.rstrip('_')}")._IMPLEMENTATIONS
