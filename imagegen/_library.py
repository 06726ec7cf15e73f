"""Loads the compiled library, once, and remembers why it is missing where it is."""

import importlib
from operator import itemgetter

import torch

try:
    _C = importlib.import_module("._C", __package__)
except ModuleNotFoundError:
    _C = None
    load_error = (
        "the compiled kernels are not there: no C++ compiler was found when imagegen was installed. "
        "Install one, then imagegen again with pip install --force-reinstall --no-deps --no-cache-dir"
    )
except ImportError as error:
    _C = None
    load_error = f"the compiled kernels are not there: they do not load beside torch {torch.__version__} ({error})"
else:
    load_error = None

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

# The operators with a compiled kernel. Asked for once: torch.compile can trace a lookup, not the question.
compiled = {
    backend: {
        name.removeprefix("imagegen::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
        if name.startswith("imagegen::")
    }
    for backend, key in _DISPATCH_KEYS.items()
}


def op(name):
    """The operator torch.ops.imagegen.<name>, or None where it is not defined."""
    packet = getattr(torch.ops.imagegen, name, None)
    return packet and packet.default


def past_autograd(name, with_grad=None):
    """The operator `name` as a function that goes past the wrapper torch makes for gradients written in Python.

    The wrapper takes 20 µs a call where a gradient is asked for and 4 where none is, as long as small kernels, and
    several times that where the caches have forgotten its code. A Function of the same gradient takes its place, or
    with_grad. Tracing, autocast and torch.func go through the wrapper as always.
    """
    operator = op(name)
    if operator is None:
        return None
    run = operator._op  # what calling the operator ends in
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled  # lookups take 0.1 µs
    below_autograd = torch._C._AutoDispatchBelowAutograd
    positions = [i for i, a in enumerate(operator._schema.arguments) if "Tensor" in str(a.type)]
    tensors = itemgetter(*positions)

    def call(*args):
        compiling = is_compiling()  # torch.compile traces no itemgetter
        if is_grad_enabled() and _wants_grad([args[i] for i in positions] if compiling else tensors(args)):
            if with_grad is not None:
                return with_grad(*args)
            past = not compiling and name in _functions and not _is_transformed()
            return _functions[name].apply(*args) if past else operator(*args)
        if compiling:
            return operator(*args)
        with below_autograd():
            return run(*args)

    return call


_functions = {}  # name of an operator -> the autograd.Function of its gradient


def _function(operator, setup_context, backward):
    run = operator._op

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = run(*args)
            setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(operator._opname, (torch.autograd.Function,), methods)


def _is_transformed():
    """Whether more than autograd has to see the operator: autocast, torch.func or torch.jit.trace."""
    return (
        torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _wants_grad(tensors):
    for t in tensors:  # any(… for t in …) takes twice as long
        if t is None:
            continue
        if _wants_grad(t) if isinstance(t, (list, tuple)) else t.requires_grad:
            return True
    return False


def why_missing(name, backend):
    """None where the operator `name` has a compiled kernel for `backend`, else the reason it has not."""
    if load_error is not None:
        return load_error
    if name in compiled[backend]:
        return None
    if backend == "cuda" and not _C.cuda_architectures():
        return "this build has no CUDA kernels: nvcc was not found when it was compiled, or IMAGEGEN_CUDA was OFF"
    return f"{name} has no {backend} kernel yet"


def define(schema, function):
    """Define an operator that a Python function runs, the same on CPU and CUDA.

    That is the Triton twin of a compiled one, since Triton's interpreter takes CPU tensors, or a call of torch's own.
    """
    name = schema.partition("(")[0]
    _python_side.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in _DISPATCH_KEYS.values():
        _python_side.impl(name, function, key)


def implement(name, backend, function):
    """Give a compiled operator the kernel it lacks for one backend; nothing to do where it is not defined."""
    if op(name) is not None:
        _python_side.impl(name, function, _DISPATCH_KEYS[backend])


def register(name, *, fake, setup_context=None, backward=None, autocast=()):
    """Attach fake kernel, gradient and autocast to the operator `name`; nothing to do where it is not defined.

    fake, setup_context and backward are what torch.library takes. autocast lists the positions of the tensors
    to be cast to autocast's dtype on the way in.
    """
    if op(name) is None:
        return
    torch.library.register_fake(f"imagegen::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"imagegen::{name}", backward, setup_context=setup_context)
        schema = op(name)._schema
        if not any("List[" in str(a.type) for a in (*schema.arguments, *schema.returns)):  # a Function takes tensors
            _functions[name] = _function(op(name), setup_context, backward)
    if autocast:
        for device, key in _DISPATCH_KEYS.items():
            _python_side.impl(name, _autocast_kernel(name, device, autocast), f"Autocast{key}")


def _autocast_kernel(name, device, positions):
    def cast_and_run(*args):
        dtype = torch.get_autocast_dtype(device)
        args = [a.to(dtype) if i in positions and castable(a) else a for i, a in enumerate(args)]
        with torch.autocast(device, enabled=False):
            return op(name)(*args)

    return cast_and_run


def castable(t):
    return t is not None and t.is_floating_point() and t.dtype != torch.float64  # torch's own rule


_python_side = torch.library.Library("imagegen", "FRAGMENT")


def set_cache_limit(cache, size):
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"{cache}.set_limit: size must be a number of bytes, at least 0, got {size!r}")
    if _C:
        getattr(_C, f"set_{cache}_limit")(size)
