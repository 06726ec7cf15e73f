"""Transposed convolution with a scale and a shift per channel and an activation in the same pass."""

import torch

from .. import _library
from . import _backend, _bilinear, eager
from ._activation import check_activation
from ._check import autocasts, check_dtype, check_same_device, check_same_dtype, check_shape
from ._layout import memory_format
from .eager.conv_transpose2d import finish, output_shape


def conv_transpose2d(
    x,
    weight,
    bias=None,
    *,
    stride=2,
    padding=1,
    output_padding=0,
    scale=None,
    shift=None,
    activation="linear",
    backend=None,
):
    """Convolve x transposed, add a bias, then apply a scale and a shift per output channel and activate.

        y = act((conv_transpose2d(x, weight) + bias) * scale + shift)

    scale and shift are what a batch normalisation does in evaluation: scale = gamma / sqrt(var + eps) and
    shift = beta - mean * scale.

    On CPU a 4x4 or 3x3 kernel with stride 2 and padding 1 has kernels of its own: 36 multiplications per 2x2 input
    pixels and pair of channels where the plain way takes 64, or 25 where it takes 36, and fewer where there are many
    pixels. On CUDA and Triton the same kernels are four convolutions, of the outputs of each parity, in one launch; x
    is read faster in channels_last. The gradients on CUDA, and the weight's on Triton, are torch's convolutions.
    Without padding a single pixel is a matrix product. Any other geometry is torch's convolution followed by scale,
    shift and activation.

    Args:
        x: (B, C, H, W), contiguous, channels_last or any strides; float32, bfloat16, float16 or float64.
        weight: (C, Cout, kH, kW) in x's dtype. Its transform is cached until its content changes.
        bias: (Cout,) in x's dtype, or None.
        stride, padding, output_padding: integers, or pairs of them for height and width, as torch has them.
        scale, shift: (Cout,) in x's dtype or float32, or None.
        activation: "linear", "relu", "lrelu" (slope 0.2), "silu", "gelu", "tanh" or "sigmoid".
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on x's device.

    Returns: (B, Cout, (H - 1) * stride - 2 * padding + kH + output_padding, ...) in x's dtype and memory format.
    Gradients: of any order, in x, weight, bias, scale and shift.
    Autocast: runs in autocast's dtype.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: act(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding) * scale[:, None, None]
        + shift[:, None, None])
    Source: Winograd, "Arithmetic Complexity of Computations", 1980: F(2,2) for each parity of output row and column.
    """
    geometry = [
        _pair(name, value, least)
        for name, value, least in (
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("output_padding", output_padding, 0),
        )
    ]
    _check(x, weight, bias, geometry, scale, shift, activation)
    run = _backend.choose(
        "conv_transpose2d", _IMPLEMENTATIONS, backend, x, _declines, lambda: 2 * x.numel() * weight[0].numel()
    )
    return run(x, weight, bias, *geometry, scale, shift, activation)


def _declines(backend, x):
    """Why the CUDA kernel, which multiplies in tensor cores' precisions, does not take x; None where it does."""
    if backend == "cuda" and x.dtype == torch.float64:
        return "the cuda kernel takes float32, bfloat16 or float16, x is torch.float64"
    return None


def _pair(argument, value, least):
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(n, int) for n in pair):
        raise TypeError(f"conv_transpose2d: {argument} must be an integer or a pair of integers, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"conv_transpose2d: {argument} must be at least {least}, got {value}")
    return list(pair)


def _check(x, weight, bias, geometry, scale, shift, activation):
    op = "conv_transpose2d"
    check_dtype(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape (B, C, H, W), got {tuple(x.shape)}")
    autocast = autocasts(x)  # which makes the dtypes one
    check_same_device(op, "weight", weight, x)
    if not autocast:
        check_same_dtype(op, "weight", weight, x)
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(f"{op}: weight must have shape (C, Cout, kH, kW), got {tuple(weight.shape)}")
    check_shape(op, "weight", weight, (x.size(1), *weight.shape[1:]), x)
    for argument, t in (("bias", bias), ("scale", scale), ("shift", shift)):
        if t is None:
            continue
        check_same_device(op, argument, t, x)
        if argument == "bias" and not autocast:
            check_same_dtype(op, argument, t, x)
        if argument != "bias" and not autocast and t.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{op}: {argument} must have x's dtype {x.dtype} or torch.float32, got {t.dtype}")
        if t.shape != weight.shape[1:2]:
            raise ValueError(
                f"{op}: {argument} must have shape ({weight.size(1)},) to match weight {tuple(weight.shape)}, "
                f"got {tuple(t.shape)}"
            )
    stride, padding, output_padding = geometry
    if any(extra >= s for extra, s in zip(output_padding, stride, strict=True)):
        raise ValueError(
            f"{op}: output_padding must be smaller than stride {tuple(stride)}, got {tuple(output_padding)}"
        )
    if min(output_shape(x, weight, *geometry)[2:]) < 0:
        raise ValueError(
            f"{op}: padding must leave something of x {tuple(x.shape)} under weight {tuple(weight.shape)}, "
            f"got {tuple(padding)}"
        )
    check_activation(op, "activation", activation)


def _kernel(operator):
    """The function that runs this operator where the geometry is its own."""

    def run(x, weight, bias, stride, padding, output_padding, scale, shift, activation):
        if x.shape[2:] == (1, 1) and padding == output_padding == [0, 0]:
            return _convolve_pixel(x, weight, bias, scale, shift, activation)
        if stride != [2, 2] or padding != [1, 1] or weight.shape[2:] not in ((4, 4), (3, 3)):
            return eager.conv_transpose2d(x, weight, bias, stride, padding, output_padding, scale, shift, activation)
        tensors = (x, weight, bias, scale, shift)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            # What is fused leaves nothing to differentiate it by: apart, it costs passes over y in training, and saves
            # the whole convolution that its gradient would otherwise have to repeat.
            y = operator(x, weight, bias, output_padding, None, None, "linear")
            return finish(y, scale, shift, activation)
        return operator(x, weight, bias, output_padding, scale, shift, activation)

    return run


def _convolve_pixel(x, weight, bias, scale, shift, activation):
    """A generator's first layer: of a single pixel the convolution is a matrix product, which torch does not notice."""
    y = (x.flatten(1) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    y = y if bias is None else y + bias.to(y.dtype).reshape(-1, 1, 1)
    return finish(y, scale, shift, activation).contiguous(memory_format=memory_format(x))


def _conv_transpose2d_triton(x, weight, bias, output_padding, scale, shift, activation):
    _check(x, weight, bias, [[2, 2], [1, 1], output_padding], scale, shift, activation)
    _check_kernel("conv_transpose2d", weight, output_padding)
    from .triton.conv_transpose2d_kernel import conv_transpose2d  # here, not above: importing Triton takes a second

    return conv_transpose2d(x, weight, bias, output_padding, scale, shift, activation)


def _backward_input_triton(grad, weight, output_padding):
    op = "conv_transpose2d_backward_input"
    check_dtype(op, "grad", grad)
    check_same_device(op, "weight", weight, grad)
    check_same_dtype(op, "weight", weight, grad)
    _check_kernel(op, weight, output_padding)
    if grad.dim() != 4 or grad.size(1) != weight.size(1):
        raise ValueError(f"{op}: grad must have shape (B, {weight.size(1)}, OH, OW), got {tuple(grad.shape)}")
    shape = _input_shape(grad, weight, output_padding)
    outputs = ((n - 1) * 2 - 2 + weight.size(2) + extra for n, extra in zip(shape[2:], output_padding, strict=True))
    if tuple(outputs) != tuple(grad.shape[2:]):
        raise ValueError(
            f"{op}: grad of shape {tuple(grad.shape)} is no output of weight {tuple(weight.shape)} "
            f"with output_padding {tuple(output_padding)}"
        )
    from .triton.conv_transpose2d_kernel import conv_transpose2d_backward_input

    return conv_transpose2d_backward_input(grad, weight, shape)


def _backward_weight_triton(grad, x, kernel, output_padding):
    op = "conv_transpose2d_backward_weight"
    check_dtype(op, "x", x)
    check_same_device(op, "grad", grad, x)
    check_same_dtype(op, "grad", grad, x)
    size = [(n - 1) * 2 - 2 + kernel + extra for n, extra in zip(x.shape[2:], output_padding, strict=True)]
    if grad.dim() != 4 or grad.size(0) != x.size(0) or list(grad.shape[2:]) != size:
        raise ValueError(
            f"{op}: grad must have shape ({x.size(0)}, Cout, {size[0]}, {size[1]}) to match x {tuple(x.shape)}, "
            f"got {tuple(grad.shape)}"
        )
    from .triton.conv_transpose2d_kernel import conv_transpose2d_backward_weight

    return conv_transpose2d_backward_weight(grad, x, kernel)


# Strided convolutions, which cuDNN has had kernels for all along: the gradients on CUDA.


def backward_input_cudnn(grad, weight, output_padding):
    grad_x = torch.nn.functional.conv2d(grad, weight, stride=2, padding=1)
    return grad_x.contiguous(memory_format=memory_format(grad))


def backward_weight_cudnn(grad, x, kernel, output_padding):
    shape = (x.size(1), grad.size(1), kernel, kernel)
    return torch.nn.grad.conv2d_weight(grad, shape, x, stride=2, padding=1).contiguous()


def _check_kernel(op, weight, output_padding):
    if weight.dim() != 4 or weight.shape[2:] not in ((3, 3), (4, 4)):
        raise ValueError(f"{op}: the kernel must be 3x3 or 4x4, got weight {tuple(weight.shape)}")
    if min(output_padding) < 0:
        raise ValueError(f"{op}: output_padding must be at least 0, got {tuple(output_padding)}")


# C, X and W are the op and its gradients in x and in weight, as _bilinear has them.


def _fake(x, weight, bias, output_padding, scale, shift, activation):
    y = x.new_empty(output_shape(x, weight, (2, 2), (1, 1), output_padding))
    return y.to(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.output_padding, scale, shift, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)


def _backward(C, X, W):
    def backward(ctx, grad):
        x, weight, bias, scale, shift = ctx.saved_tensors
        need_x, need_weight, need_bias, _, need_scale, need_shift, _ = ctx.needs_input_grad
        extra, grad_scale, grad_shift = ctx.output_padding, None, None
        if scale is not None or shift is not None or ctx.activation != "linear":
            y = C(x, weight, bias, extra, None, None, "linear")
            grad, grad_scale, grad_shift = _finish_grad(grad, y, scale, shift, ctx.activation, need_scale, need_shift)
        return (
            X(grad, weight, extra) if need_x else None,
            W(grad, x, weight.size(2), extra) if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
            None,
            grad_scale,
            grad_shift,
            None,
        )

    return backward


def _finish_grad(grad, y, scale, shift, activation, need_scale, need_shift):
    """The gradients of y, scale and shift in finish(); None for a scale or shift that needs none."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        # Views, so that one tensor passed as both gets the gradient of each.
        scale, shift = (t if t is None else t.view_as(t) for t in (scale, shift))
        wanted = [y, *([scale] if need_scale else []), *([shift] if need_shift else [])]
        z = finish(y, scale, shift, activation)
        found = iter(torch.autograd.grad(z, wanted, grad, create_graph=create_graph))
    return next(found), next(found) if need_scale else None, next(found) if need_shift else None


def _fake_backward_input(grad, weight, output_padding):
    return grad.new_empty(_input_shape(grad, weight, output_padding)).to(memory_format=memory_format(grad))


def _input_shape(grad, weight, output_padding):
    h, w = ((n - k + 4 - e) // 2 for n, k, e in zip(grad.shape[2:], weight.shape[2:], output_padding, strict=True))
    return grad.size(0), weight.size(0), h, w


def _setup_context_backward_input(ctx, inputs, output):
    grad, weight, ctx.output_padding = inputs
    ctx.save_for_backward(grad, weight)


def _backward_of_backward_input(C, X, W):
    def backward(ctx, grad_x):
        grad, weight = ctx.saved_tensors
        need_grad, need_weight, _ = ctx.needs_input_grad
        return (
            C(grad_x, weight, None, ctx.output_padding, None, None, "linear") if need_grad else None,
            W(grad, grad_x, weight.size(2), ctx.output_padding) if need_weight else None,
            None,
        )

    return backward


def _fake_backward_weight(grad, x, kernel, output_padding):
    return x.new_empty(x.size(1), grad.size(1), kernel, kernel)


def _setup_context_backward_weight(ctx, inputs, output):
    grad, x, _, ctx.output_padding = inputs
    ctx.save_for_backward(grad, x)


def _backward_of_backward_weight(C, X, W):
    def backward(ctx, grad_weight):
        grad, x = ctx.saved_tensors
        need_grad, need_x, _, _ = ctx.needs_input_grad
        return (
            C(x, grad_weight, None, ctx.output_padding, None, None, "linear") if need_grad else None,
            X(grad, grad_weight, ctx.output_padding) if need_x else None,
            None,
            None,
        )

    return backward


_library.define(
    "conv_transpose2d_triton(Tensor x, Tensor weight, Tensor? bias, int[] output_padding, Tensor? scale, "
    "Tensor? shift, str activation) -> Tensor",
    _conv_transpose2d_triton,
)
_library.define(
    "conv_transpose2d_backward_input_triton(Tensor grad, Tensor weight, int[] output_padding) -> Tensor",
    _backward_input_triton,
)
_library.define(
    "conv_transpose2d_backward_weight_triton(Tensor grad, Tensor x, int kernel, int[] output_padding) -> Tensor",
    _backward_weight_triton,
)

_library.implement("conv_transpose2d_backward_input", "cuda", backward_input_cudnn)
_library.implement("conv_transpose2d_backward_weight", "cuda", backward_weight_cudnn)

_bilinear.register(
    "conv_transpose2d",
    fakes=(_fake, _fake_backward_input, _fake_backward_weight),
    setup_contexts=(_setup_context, _setup_context_backward_input, _setup_context_backward_weight),
    backwards=(_backward, _backward_of_backward_input, _backward_of_backward_weight),
)

_IMPLEMENTATIONS = {
    "eager": eager.conv_transpose2d,
    "cpu": _kernel(_library.past_autograd("conv_transpose2d")),
    "cuda": _kernel(_library.past_autograd("conv_transpose2d")),
    "triton": _kernel(_library.op("conv_transpose2d_triton")),
}
