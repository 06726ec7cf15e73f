"""What is there and what is not, and why."""

import torch

from . import _library, ops
from .ops import _backend


def info(*, verbose=False):
    """Print each op x backend as ready, or why it is not."""
    print("\n".join(_lines(verbose)))


def _lines(verbose):
    yield f"imagegen on torch {torch.__version__}"
    if _library.load_error:
        yield _library.load_error
    else:
        c = _library._C
        yield f"CPU kernels: {c.cpu_capability()} (this machine has {', '.join(c.cpu_capabilities())})"
        none = "none: nvcc was not found when this was built, or IMAGEGEN_CUDA was OFF"
        yield f"CUDA kernels: {c.cuda_architectures() or none}"
        if verbose:
            yield f"compiler: {c.compiler()}, for torch {c.torch_target()} and later"
    yield from _measurements()
    if _backend.forced:
        yield f"IMAGEGEN_BACKEND={_backend.forced} is in force"
    for op in ops.__all__:
        yield f"{op}:"
        for backend in _backend.NAMES:
            yield f"  {backend:7}{_state(op, backend)}"
            if verbose and backend == "cpu" and not _library.load_error:
                yield from _algorithms(op)


def _measurements():
    """By what the backends on this machine's GPUs are chosen."""
    here = {_backend.architecture(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    for architecture in sorted(filter(None, here)):
        measured = sorted(_backend.FASTEST.get(architecture, ()))
        if measured:
            yield f"on {architecture} the fastest backend as measured is taken for {', '.join(measured)}"
        rest = [op for op in ops.__all__ if op.rstrip("_") not in measured]
        if rest:
            order = ", then ".join(_backend.PREFERENCE["cuda"])
            yield f"not measured on {architecture}: {', '.join(rest)}; there it is {order}, the first that is ready"


def _algorithms(op):
    """How a convolution is computed on this machine's CPU, by shape and dtype: the answer of what chooses for it."""
    for kernel, cin, cout, size in _CONVOLUTIONS.get(op, ()):
        names = {dtype: _algorithm(op, kernel, dtype, cin, cout, size) for dtype in ("float32", "bfloat16")}
        which = f"{kernel}x{kernel}, {cin} -> {cout} channels, output {size}x{size}"
        chosen = dict.fromkeys(names.values())
        how = (
            next(iter(chosen)) if len(chosen) == 1 else ", ".join(f"{name} in {dtype}" for dtype, name in names.items())
        )
        yield f"         {which}: {how}"


def _algorithm(op, kernel, dtype, cin, cout, size):
    return _library._C.conv_algorithm(op, kernel, dtype, cin, cout, size, size).removeprefix(f"{op} ")


# (kernel, input channels, output channels, output height and width), so that every algorithm appears.
_CONVOLUTIONS = {
    "conv2d": [(3, 512, 512, 64), (3, 512, 512, 8), (3, 4, 512, 64), (3, 128, 3, 512)],
    "conv_transpose2d": [(4, 128, 64, 64), (4, 512, 256, 8), (4, 64, 3, 64), (3, 128, 64, 64), (3, 512, 256, 8)],
    "upsample_conv2d": [(3, 512, 512, 128), (3, 512, 512, 32), (3, 64, 3, 64)],
}


def _state(op, backend):
    if backend == "cuda" and not torch.cuda.is_available():
        device, note = "cuda", "no CUDA device is available to torch"
    else:
        device, note = ("cuda" if backend == "cuda" else "cpu"), None
    if backend == "triton" and torch.cuda.is_available():
        device = "cuda"
    reason = _backend.why_not(op, _backend.implementations(op), backend, device)
    if reason is not None and reason == _library.load_error:
        reason = "the compiled kernels are not there: see above"
    return "; ".join(filter(None, (reason, note))) or "ready"
