"""Which implementation of an op runs: the one place that decides, with reasons."""

import importlib
import importlib.util
import os
import warnings

import torch
from torch.autograd import forward_ad

from .. import _library
from ._check import autocasts
from ._layout import memory_format
from ._measured import FASTEST

NAMES = ("eager", "cpu", "cuda", "triton")

# The order of preference per device where nothing was measured; any other device runs eager. Of the two kernels on
# CUDA the compiled one is the safe one: its machine code was made with the package, held against float64 in the
# simulator and looked through for spills; Triton compiles in a call's first seconds, by a version nobody here has seen.
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}

# Where eager is no fallback: torch calls a library there that a kernel of ours would not beat.
_LIBRARIES = {("conv2d", "cuda"): "cuDNN convolves, by eager"}

# For debugging: IMAGEGEN_BACKEND=eager makes every call that names no backend use this one.
forced = os.environ.get("IMAGEGEN_BACKEND") or None

_triton_is_installed = importlib.util.find_spec("triton") is not None  # found, not imported: that takes a second

_warned = set()
_architectures = {}  # index of a CUDA device -> its architecture


def choose(op, implementations, backend, x, declines=None, flop=lambda: 0):
    """The implementation of `op` for x: the one asked for, or the first that is ready on x's device.

    implementations maps backend names to functions of one signature. A backend asked for by name never falls
    back: it raises with the reason. A fallback to eager where a kernel exists for other installations warns once.
    declines(name, x) is None where that backend takes an x like this, else one sentence; without it each takes any.
    flop() is what a forward of this call takes as the op's benchmark counts it: by it the measurements are asked.
    """
    if x.is_cpu and backend is None and forced is None and forward_ad._current_level < 0:
        run = implementations.get("cpu")  # what follows would find it too, 0.6 µs later
        if run is not None and op in _library.compiled["cpu"] and not (declines and declines("cpu", x)):
            return run
    device = "cpu" if x.is_cpu else x.device.type  # the second takes 0.4 µs

    def reason_against(name):
        if name != "eager" and forward_ad._current_level >= 0:  # torch.func.jvp, too
            return "it has no derivative in forward mode"
        return why_not(op, implementations, name, device) or (declines and declines(name, x))

    asked = backend or forced
    if asked is not None:
        if asked not in NAMES:
            raise ValueError(f"{op}: backend must be one of {', '.join(NAMES)} or None, got {asked!r}")
        reason = reason_against(asked)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {asked!r} can't run here: {reason}")
        return implementations[asked]
    measured = _fastest(op, x, flop()) if device == "cuda" else None
    for name in measured or PREFERENCE.get(device, ("eager",)):
        if reason_against(name) is None:
            break
    if name == "eager" and measured is None:
        _warn_once(op, device, reason_against)
    return implementations[name]


def _fastest(op, x, flop):
    """The backends from the fastest on, as measured for calls like this on GPUs like x's; None where nobody did.

    The nearest measured call is that of the nearest FLOP. float16 computes as bfloat16 does.
    """
    classes = FASTEST and FASTEST.get(architecture(x.device), {}).get(op.rstrip("_"))
    if not classes:
        return None
    dtype = torch.get_autocast_dtype("cuda") if autocasts(x) else x.dtype
    dtype = "float32" if dtype == torch.float32 else "float64" if dtype == torch.float64 else "bfloat16"
    layout = "channels_last" if memory_format(x) is torch.channels_last else "nchw"
    direction = "forward+backward" if x.requires_grad and torch.is_grad_enabled() else "forward"
    for most, names in classes.get((dtype, layout, direction), ()):
        if flop <= most:
            return names
    return None


def architecture(device):
    """The architecture of a CUDA device, as in "sm_90"; None where torch has no such device to ask."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _architectures.get(index)
    if found is None:
        properties = torch.cuda.get_device_properties(index)
        found = f"sm_{properties.major}{properties.minor}"
        if not torch.compiler.is_compiling():
            _architectures[index] = found
    return found


def why_eager(op, implementations, device):
    """None where `op` on this device type runs in a kernel or a library; else what stands against each backend."""
    if any(why_not(op, implementations, name, device) is None for name in _kernels(device)):
        return None
    return _why_no_kernel(op, device, lambda name: why_not(op, implementations, name, device))


def _why_no_kernel(op, device, reason_against):
    if (op, device) in _LIBRARIES:
        return None
    reasons = "; ".join(f"{name}: {reason_against(name)}" for name in _kernels(device))
    return reasons or f"imagegen has no kernels for {device}"


def _kernels(device):
    return [name for name in PREFERENCE.get(device, ()) if name != "eager"]


def why_not(op, implementations, name, device):
    """None where backend `name` can run `op` on tensors of this device type, else one sentence."""
    if name == "eager":
        return None
    if name not in implementations:
        return _LIBRARIES.get((op, name)) or f"{op} has no {name} implementation"
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
    if device not in PREFERENCE or (op, device) in _warned or torch.compiler.is_compiling():
        return
    reasons = _why_no_kernel(op, device, reason_against)
    if reasons is not None:
        _warned.add((op, device))
        warnings.warn(f"{op} runs in eager PyTorch on {device}, slower than it could: {reasons}", stacklevel=4)


def implementations(op):
    """The table backend name -> function of one op, as its module declares it; an in-place twin shares its op's."""
    return importlib.import_module(f"{__package__}.{op.rstrip('_')}")._IMPLEMENTATIONS
