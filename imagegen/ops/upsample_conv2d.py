"""Nearest-2x upsampling followed by a 3x3 convolution, without the upsampled tensor."""

import torch

from .. import _library
from . import _backend, eager
from ._activation import ACTIVATIONS, check_activation
from ._check import check_conv3x3
from ._layout import memory_format


def upsample_conv2d(x, weight, bias=None, *, activation="linear", backend=None):
    """Upsample x twofold by nearest neighbour, convolve it 3x3 with padding 1, add a bias and activate.

        y = act(conv2d(nearest2x(x), weight, padding=1) + bias)

    On CPU it takes 25 multiplications per 2x2 input pixels and pair of channels where the plain way takes 144. The
    result is exact up to rounding, with a smaller error than the plain way's own sums.

    Args:
        x: (B, C, H, W), contiguous, channels_last or any strides; float32, bfloat16, float16 or float64.
        weight: (Cout, C, 3, 3) in x's dtype. Its transform is cached until its content changes.
        bias: (Cout,) in x's dtype, or None.
        activation: "linear", "relu", "lrelu" (slope 0.2), "silu", "gelu", "tanh" or "sigmoid".
        backend: "eager", "cpu" or None, which takes the first one ready on x's device.

    Returns: (B, Cout, 2H, 2W) in x's dtype and memory format.
    Gradients: of any order, in x, weight and bias.
    Autocast: runs in autocast's dtype.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: act(F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1))
    Source: Winograd, "Arithmetic Complexity of Computations", 1980, on data where every pixel appears twice.
    """
    _check(x, weight, bias, activation)
    run = _backend.choose("upsample_conv2d", _IMPLEMENTATIONS, backend, x)
    return run(x, weight, bias, activation)


def _check(x, weight, bias, activation):
    op = "upsample_conv2d"
    check_conv3x3(op, x, weight, bias)
    check_activation(op, "activation", activation)


def _native(x, weight, bias, activation):
    op = torch.ops.imagegen.upsample_conv2d.default
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if needs_grad and activation != "linear":
        # The fused activation leaves nothing to differentiate it by: apart, it costs a pass over y in training, and
        # saves the whole convolution that its gradient would otherwise have to repeat.
        return ACTIVATIONS[activation](op(x, weight, bias, "linear"))
    return op(x, weight, bias, activation)


_IMPLEMENTATIONS = {"eager": eager.upsample_conv2d, "cpu": _native}


# The op is linear in x and in weight. With C(x, w) for it, X(g, w) and W(g, x) for its two gradients,
# <g, C(x, w)> = <x, X(g, w)> = <w, W(g, x)>: each one's gradients are the other two.


def _fake(x, weight, bias, activation):
    b, _, h, w = x.shape
    return x.new_empty(b, weight.size(0), 2 * h, 2 * w, dtype=x.dtype).to(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    ops = torch.ops.imagegen
    if ctx.activation != "linear":
        grad = _activation_grad(grad, ops.upsample_conv2d(x, weight, bias, "linear"), ctx.activation)
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    return (
        ops.upsample_conv2d_backward_input(grad, weight) if need_x else None,
        ops.upsample_conv2d_backward_weight(grad, x) if need_weight else None,
        grad.sum((0, 2, 3)) if need_bias else None,
        None,
    )


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


def _backward_of_backward_input(ctx, grad_x):
    grad, weight = ctx.saved_tensors
    ops = torch.ops.imagegen
    return (
        ops.upsample_conv2d(grad_x, weight, None, "linear") if ctx.needs_input_grad[0] else None,
        ops.upsample_conv2d_backward_weight(grad, grad_x) if ctx.needs_input_grad[1] else None,
    )


def _fake_backward_weight(grad, x):
    return x.new_empty(grad.size(1), x.size(1), 3, 3)


def _backward_of_backward_weight(ctx, grad_weight):
    grad, x = ctx.saved_tensors
    ops = torch.ops.imagegen
    return (
        ops.upsample_conv2d(x, grad_weight, None, "linear") if ctx.needs_input_grad[0] else None,
        ops.upsample_conv2d_backward_input(grad, grad_weight) if ctx.needs_input_grad[1] else None,
    )


_library.register("upsample_conv2d", fake=_fake, setup_context=_setup_context, backward=_backward, autocast=(0, 1, 2))
_library.register(
    "upsample_conv2d_backward_input",
    fake=_fake_backward_input,
    setup_context=_setup_context_two,
    backward=_backward_of_backward_input,
)
_library.register(
    "upsample_conv2d_backward_weight",
    fake=_fake_backward_weight,
    setup_context=_setup_context_two,
    backward=_backward_of_backward_weight,
)
