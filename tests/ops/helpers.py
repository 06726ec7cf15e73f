"""What the tests of every op share: errors against float64, the tolerance rule, memory layouts, error messages."""

import re

import pytest
import torch

from imagegen import _library
from imagegen.ops import _backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relative_error(actual, reference):
    """Relative L2 error; infinite unless NaN and infinities stand in the same places."""
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, the reference has {tuple(reference.shape)}"
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    finite = reference.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(nan=0.5), reference[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    difference = (actual - reference)[finite].norm().item()
    return 0.0 if difference == 0 else difference / (reference[finite].norm().item() or 1e-300)


def tolerance(dtype, eager_error=0.0, fp32=1e-5, size=1000):
    """The bound on the relative error of `size` elements.

    fp32 for float32: 1e-5, or 2e-5 for Winograd. Three times eager's own error in that dtype for half precision; but a
    few elements may always err as much as two roundings do: eager may round all of them luckily, and what is summed
    over pixels (one per image and channel) shares the rounding of weights transformed to bf16, which does not average
    out as eager's roundings do.
    """
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return fp32
    return max(3 * eager_error, torch.finfo(dtype).eps if size < 256 else fp32)


def tells(dtype, shape):
    """Whether a convolution of this shape (B, C, Cout, H, W) tells half precision's error from luck.

    Over a few elements ours is compared with what eager happens to err by: by bf16 dots the gradient of x errs by 2.1
    to 2.4 of eager's error, and over 600 elements one time in thirty by more than the 3 allowed.
    """
    b, cin, cout, h, w = shape
    return dtype == torch.float32 or (min(cin, cout) >= 8 and b * h * w * min(cin, cout) >= 2000)


def check(op, eager, *tensors, fp32=1e-5, gradients=True):
    """Hold op's output, and the gradient of every floating tensor, to eager's in float64 on the same tensors.

    op and eager map the tensors (some may be None) to a tensor or a tuple of tensors. All outputs are mixed into one
    loss with random weights. Returns op's output.
    """
    ours, weights = _run(op, tensors, gradients)
    doubles = [t.double() if _floating(t) else t for t in tensors]
    reference, _ = _run(eager, doubles, gradients, [w.double() for w in weights])
    dtype = ours[0].dtype
    half = dtype in (torch.bfloat16, torch.float16)
    theirs = _run(eager, tensors, gradients, weights)[0] if half else reference
    names = [f"output {i}" for i in range(len(weights))]
    names += [f"gradient of tensor {i}" for i, t in enumerate(tensors) if gradients and _floating(t)]
    for name, a, e, r in zip(names, ours, theirs, reference, strict=True):
        error, bound = relative_error(a, r), tolerance(dtype, relative_error(e, r), fp32, a.numel())
        assert error <= bound, f"{name}: relative error {error:.2e} is above {bound:.2e}"
    return ours[0] if len(weights) == 1 else tuple(ours[: len(weights)])


def _floating(t):
    return t is not None and t.is_floating_point()


def _run(function, tensors, gradients, weights=None):
    """The outputs of function and the gradients of its tensors; weights of the loss, drawn where None is given."""
    leaves = [t.detach().requires_grad_(gradients) if _floating(t) else t for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Of one sign: gradients that are sums, a bias's above all, would otherwise cancel down to their rounding errors.
    weights = weights or [torch.rand_like(y) + 0.5 for y in outputs]
    grads = ()
    if gradients:
        loss = sum((y * w).sum(dtype=torch.float64) for y, w in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, [t for t in leaves if _floating(t)])
    return [*outputs, *grads], weights


def _slice(t):
    larger = t.new_full([n + 2 for n in t.shape], float("nan"))
    return larger[(slice(1, -1),) * t.dim()].copy_(t)


def _channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


def _steps_of_three(t):
    return t.new_full((*t.shape, 3), float("nan"))[..., 1].copy_(t)


# Layout name -> the same values, laid out so. What lies between the elements is NaN.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "slice": _slice,
    "channels_last_slice": lambda t: _channels_last(t.new_full([n + 2 for n in t.shape], float("nan")))[
        (slice(1, -1),) * t.dim()
    ].copy_(t),
    "steps_of_three": _steps_of_three,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
}


def backends(op):
    """pytest parameters (backend, device) of every implementation but eager; one that can't run here says why."""
    parameters = []
    implementations = _backend.implementations(op)
    for backend in [name for name in _backend.NAMES[1:] if name in implementations]:
        device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
        reason = _backend.why_not(op, implementations, backend, device)
        if reason is None and device == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device is available to torch"
        marks = [pytest.mark.gpu] * (device == "cuda") + [pytest.mark.skip(reason=reason)] * bool(reason)
        parameters.append(pytest.param(backend, device, id=backend, marks=marks))
    return parameters


def devices(op):
    """pytest parameters (backend, device): the CPU as it chooses, and every implementation that runs on a GPU.

    Not Triton's interpreter, which takes minutes for the shapes of tests that run everywhere.
    """
    on_gpu = [p for p in backends(op) if p.values[1] == "cuda"]
    return pytest.mark.parametrize("backend, device", [pytest.param(None, "cpu", id="cpu"), *on_gpu])


def every_device(op):
    """As devices(op), the CPU under each instruction set: parameters (backend, device, capability)."""
    capabilities = _library._C.cpu_capabilities() if _library._C else ["none"]
    parameters = [pytest.param(None, "cpu", name, id=name) for name in capabilities]
    parameters += [pytest.param(*p.values, None, id=p.id, marks=p.marks) for p in devices(op).args[1][1:]]
    return pytest.mark.parametrize("backend, device, capability", parameters, indirect=["capability"])


def check_error(error, message, function, operator=None):
    """function() raises `error` with this message; operator(), the bare operator, says the same as RuntimeError."""
    with pytest.raises(error, match=re.escape(message)):
        function()
    if operator is not None and _library.load_error is None:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            operator()
