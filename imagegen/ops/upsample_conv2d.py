"""Nearest-2x upsampling followed by a 3x3 convolution, without the upsampled tensor."""

import torch

from .. import _library
from . import _backend, _bilinear, eager
from ._activation import ACTIVATIONS, check_activation
from ._check import check_conv3x3, check_dtype, check_same_device, check_same_dtype
from ._layout import memory_format


def upsample_conv2d(x, weight, bias=None, *, activation="linear", backend=None):
    """Upsample x twofold by nearest neighbour, convolve it 3x3 with padding 1, add a bias and activate.

        y = act(conv2d(nearest2x(x), weight, padding=1) + bias)

    On CPU it takes 25 multiplications per 2x2 input pixels and pair of channels where the plain way takes 144, on CUDA
    36, on tensor cores. The result is exact up to rounding: in float32 with an error like that of the plain way's own
    sums, in half precision on CUDA up to three times it, and float16 overflows there where x is above 16,000. In Triton
    it is the transposed convolution that both steps are together, 64 multiplications for the same pixels, and the
    weight's gradient is torch's convolution.

    Args:
        x: (B, C, H, W), contiguous, channels_last or any strides; float32, bfloat16, float16 or float64.
        weight: (Cout, C, 3, 3) in x's dtype. On CPU its transform is cached until its content changes.
        bias: (Cout,) in x's dtype, or None.
        activation: "linear", "relu", "lrelu" (slope 0.2), "silu", "gelu", "tanh" or "sigmoid".
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on x's device.

    Returns: (B, Cout, 2H, 2W) in x's dtype and memory format.
    Gradients: of any order, in x, weight and bias.
    Autocast: runs in autocast's dtype.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: act(F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1))
    Source: Winograd, "Arithmetic Complexity of Computations", 1980, on data where every pixel appears twice.
    """
    _check(x, weight, bias, activation)
    flop = 72 * x.numel() * weight.size(0)
    run = _backend.choose("upsample_conv2d", _IMPLEMENTATIONS, backend, x, _declines, flop)
    return run(x, weight, bias, activation)


def _declines(backend, x):
    """Why the CUDA kernels, on tensor cores, do not take x; None where they do."""
    if backend == "cuda" and x.dtype == torch.float64:
        return "the cuda kernel takes float32, bfloat16 or float16, x is torch.float64"
    return None


def _check(x, weight, bias, activation):
    op = "upsample_conv2d"
    check_conv3x3(op, x, weight, bias)
    check_activation(op, "activation", activation)


def _kernel(operator):
    def run(x, weight, bias, activation):
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        if needs_grad and activation != "linear":
            # The fused activation leaves nothing to differentiate it by: apart, it costs a pass over y in training, and
            # saves the whole convolution that its gradient would otherwise have to repeat.
            return ACTIVATIONS[activation](operator(x, weight, bias, "linear"))
        return operator(x, weight, bias, activation)

    return run


def _upsample_conv2d_triton(x, weight, bias, activation):
    _check(x, weight, bias, activation)
    from .triton.upsample_conv2d_kernel import upsample_conv2d  # here, not above: importing Triton takes a second

    return upsample_conv2d(x, weight, bias, activation)


def _backward_input_triton(grad, weight):
    op = "upsample_conv2d_backward_input"
    check_dtype(op, "grad", grad)
    check_same_device(op, "weight", weight, grad)
    check_same_dtype(op, "weight", weight, grad)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"{op}: weight must have shape (Cout, C, 3, 3), got {tuple(weight.shape)}")
    if grad.dim() != 4 or grad.size(1) != weight.size(0) or grad.size(2) % 2 or grad.size(3) % 2:
        raise ValueError(f"{op}: grad must have shape (B, {weight.size(0)}, 2H, 2W), got {tuple(grad.shape)}")
    from .triton.upsample_conv2d_kernel import upsample_conv2d_backward_input

    return upsample_conv2d_backward_input(grad, weight)


def _backward_weight_triton(grad, x):
    op = "upsample_conv2d_backward_weight"
    check_dtype(op, "x", x)
    check_same_device(op, "grad", grad, x)
    check_same_dtype(op, "grad", grad, x)
    B, _, H, W = x.shape
    if grad.dim() != 4 or grad.size(0) != B or grad.shape[2:] != (2 * H, 2 * W):
        raise ValueError(
            f"{op}: grad must have shape ({B}, Cout, {2 * H}, {2 * W}) to match x {tuple(x.shape)}, "
            f"got {tuple(grad.shape)}"
        )
    from .triton.upsample_conv2d_kernel import upsample_conv2d_backward_weight

    return upsample_conv2d_backward_weight(grad, x)


# C, X and W are the op and its gradients in x and in weight, as _bilinear has them.


def _fake(x, weight, bias, activation):
    b, _, h, w = x.shape
    return x.new_empty(b, weight.size(0), 2 * h, 2 * w, dtype=x.dtype).to(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(C, X, W):
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if ctx.activation != "linear":
            grad = _activation_grad(grad, C(x, weight, bias, "linear"), ctx.activation)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            X(grad, weight) if need_x else None,
            W(grad, x) if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
            None,
        )

    return backward


def _activation_grad(grad, y, activation):
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        create_graph = grad.requires_grad or y.grad_fn is not None
        return torch.autograd.grad(ACTIVATIONS[activation](y), y, grad, create_graph=create_graph)[0]


def _fake_backward_input(grad, weight):
    b, _, h, w = grad.shape
    return grad.new_empty(b, weight.size(1), h // 2, w // 2).to(memory_format=memory_format(grad))


def _setup_context_two(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_backward_input(C, X, W):
    def backward(ctx, grad_x):
        grad, weight = ctx.saved_tensors
        need_grad, need_weight = ctx.needs_input_grad
        return (
            C(grad_x, weight, None, "linear") if need_grad else None,
            W(grad, grad_x) if need_weight else None,
        )

    return backward


def _fake_backward_weight(grad, x):
    return x.new_empty(grad.size(1), x.size(1), 3, 3)


def _backward_of_backward_weight(C, X, W):
    def backward(ctx, grad_weight):
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad
        return (
            C(x, grad_weight, None, "linear") if need_grad else None,
            X(grad, grad_weight) if need_x else None,
        )

    return backward


_library.define(
    "upsample_conv2d_triton(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor", _upsample_conv2d_triton
)
_library.define("upsample_conv2d_backward_input_triton(Tensor grad, Tensor weight) -> Tensor", _backward_input_triton)
_library.define("upsample_conv2d_backward_weight_triton(Tensor grad, Tensor x) -> Tensor", _backward_weight_triton)

_bilinear.register(
    "upsample_conv2d",
    fakes=(_fake, _fake_backward_input, _fake_backward_weight),
    setup_contexts=(_setup_context, _setup_context_two, _setup_context_two),
    backwards=(_backward, _backward_of_backward_input, _backward_of_backward_weight),
)

_IMPLEMENTATIONS = {
    "eager": eager.upsample_conv2d,
    "cpu": _kernel(_library.op("upsample_conv2d")),
    "cuda": _kernel(_library.op("upsample_conv2d")),
    "triton": _kernel(_library.op("upsample_conv2d_triton")),
}
