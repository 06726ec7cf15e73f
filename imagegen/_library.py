"""Loads the compiled library, once, and remembers why it is missing where it is."""

import torch

try:
    from . import _C
except ImportError as error:
    _C = None
    load_error = f"the compiled kernels are not there ({error}); reinstall with a C++ compiler at hand: pip install --no-cache-dir imagegen"
else:
    load_error = None

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def op(name):
    """torch.ops.imagegen.<name>, or None where this build has no such operator."""
    return getattr(torch.ops.imagegen, name, None) if load_error is None else None


def why_missing(name, backend):
    """None where the operator `name` has a compiled kernel for `backend`, else the reason it has not."""
    if load_error is not None:
        return load_error
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"imagegen::{name}", _DISPATCH_KEYS[backend]):
        return None
    if backend == "cuda" and not _C.cuda_architectures():
        return "this build has no CUDA kernels: nvcc was not found when it was compiled"
    return f"{name} has no {backend} kernel yet"


def register(name, *, fake, setup_context, backward, autocast=()):
    """Attach the Python side of a compiled operator; nothing to do where the library is missing.

    fake, setup_context and backward are what torch.library takes. autocast lists the positions of the tensors
    to be cast to autocast's dtype on the way in.
    """
    if op(name) is None:
        return
    attach(f"imagegen::{name}", fake=fake, setup_context=setup_context, backward=backward)
    if autocast:
        for device in ("cpu", "cuda"):
            _python_side.impl(name, _autocast_kernel(name, device, autocast), f"Autocast{_DISPATCH_KEYS[device]}")


def attach(qualified_name, *, fake, setup_context, backward):
    """Fake kernel and gradient of one operator, compiled or Triton."""
    torch.library.register_fake(qualified_name, fake)
    if backward is not None:
        torch.library.register_autograd(qualified_name, backward, setup_context=setup_context)


def _autocast_kernel(name, device, positions):
    overload = getattr(torch.ops.imagegen, name).default

    def cast_and_run(*args):
        dtype = torch.get_autocast_dtype(device)
        args = [
            a.to(dtype) if i in positions and a is not None and a.is_floating_point() else a for i, a in enumerate(args)
        ]
        with torch.autocast(device, enabled=False):
            return overload(*args)

    return cast_and_run


_python_side = torch.library.Library("imagegen", "FRAGMENT")
