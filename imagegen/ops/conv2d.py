"""3x3 convolution with stride 1 and padding 1, fused with what stands before and behind it."""

import torch

from .. import _library
from . import _backend, eager
from ._activation import ACTIVATIONS, check_activation
from ._check import autocasts, check_conv3x3, check_same_device, check_same_dtype, check_shape, explain
from ._layout import memory_format
from .eager.conv2d import map_input


def conv2d(
    x,
    weight,
    bias=None,
    *,
    activation="linear",
    residual=None,
    scale=None,
    shift=None,
    input_activation="linear",
    backend=None,
):
    """Convolve x 3x3 with padding 1, add a bias and a residual, and activate; x may be normalised on the way in.

        h = input_activation(x * scale + shift)             zero outside the image
        y = activation(conv2d(h, weight, padding=1) + bias + residual)

    scale and shift are how a normalisation with known statistics (rstd * gamma and beta - mean * rstd * gamma for
    GroupNorm) is applied while the input is read, so that norm, activation and convolution are one pass over memory.

    On CPU it is Winograd's F(4x4, 3x3), 2.25 multiplications per output pixel and pair of channels instead of 9, or
    F(2x2, 3x3), 4 instead of 9: where its smaller tiles take fewer, in images up to about 8x8, and for bfloat16 on
    machines with bfloat16 dot products. From at most six channels, from seven or eight to 9 to 32, and with AVX-512
    from up to twelve to at most eight, it is F(2, 3) along the rows alone, 6 multiplications; to at most four channels
    it is direct.
    `imagegen.info(verbose=True)` names the choice for some shapes. float32 errs by about 3e-6.

    Args:
        x: (B, C, H, W), contiguous, channels_last or any strides; float32, bfloat16, float16 or float64.
        weight: (Cout, C, 3, 3) in x's dtype. Its transform, if it has one, is cached until its content changes.
        bias: (Cout,) in x's dtype, or None.
        activation: "linear", "relu", "lrelu" (slope 0.2), "silu", "gelu", "tanh" or "sigmoid".
        residual: (B, Cout, H, W) in x's dtype, or None.
        scale, shift: (B, C) in x's dtype or float32, both or neither.
        input_activation: one of the activations.
        backend: "eager", "cpu" or None, which takes the first one ready on x's device.

    Returns: (B, Cout, H, W) in x's dtype and memory format.
    Gradients: of any order, in every tensor. Where one is needed only the convolution is fused with its bias.
    Autocast: runs in autocast's dtype; scale and shift keep theirs.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: F.conv2d between the plain operations, as written above.
    Source: Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for Convolutional
        Neural Networks", 2016.
    """
    arguments = x, weight, bias, residual, scale, shift, input_activation, activation
    try:
        run = _backend.choose("conv2d", _IMPLEMENTATIONS, backend, x, flop=lambda: 18 * x.numel() * weight.size(0))
        if run is eager.conv2d:
            _check(*arguments)
        return run(*arguments)
    except Exception:
        explain(_check, *arguments)
        raise


def _check(x, weight, bias, residual, scale, shift, input_activation, activation):
    op = "conv2d"
    check_conv3x3(op, x, weight, bias)
    autocast = autocasts(x)  # which makes the dtypes one
    if residual is not None:
        check_same_device(op, "residual", residual, x)
        if not autocast:
            check_same_dtype(op, "residual", residual, x)
        check_shape(op, "residual", residual, (x.size(0), weight.size(0), *x.shape[2:]), x)
    if (scale is None) != (shift is None):
        given = "scale" if shift is None else "shift"
        raise ValueError(f"{op}: scale and shift must be given together, got only {given}")
    for argument, t in ("scale", scale), ("shift", shift):
        if t is not None:
            check_same_device(op, argument, t, x)
            if t.dtype not in (x.dtype, torch.float32) and not autocast:
                raise TypeError(f"{op}: {argument} must have x's dtype {x.dtype} or torch.float32, got {t.dtype}")
            check_shape(op, argument, t, x.shape[:2], x)
    check_activation(op, "input_activation", input_activation)
    check_activation(op, "activation", activation)


def _on_cpu(x, weight, bias, residual, scale, shift, input_activation, activation):
    """Five arguments that say nothing take 1 µs of a call, as long as a small image."""
    if residual is None and scale is None and shift is None and input_activation == activation == "linear":
        return _plain(x, weight, bias)
    return _fused(x, weight, bias, residual, scale, shift, input_activation, activation)


def _apart(x, weight, bias, residual, scale, shift, input_activation, activation):
    """The same with every step on its own: fused, what gradients are computed from would have to be computed again."""
    h = map_input(x, scale, shift, input_activation)
    y = _plain(h, weight, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual.to(y.dtype))


_plain = _library.past_autograd("conv2d_plain")
_fused = _library.past_autograd("conv2d", with_grad=_apart)
_backward_input = _library.past_autograd("conv2d_backward_input")
_backward_weight = _library.past_autograd("conv2d_backward_weight")

_IMPLEMENTATIONS = {"eager": eager.conv2d, "cpu": _on_cpu}


def _fake(x, weight, *others):
    _check(x, weight, *others)
    return _empty(x, weight)


def _empty(x, weight):
    b, _, h, w = x.shape
    return x.new_empty(b, weight.size(0), h, w).to(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.input_activation, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors, create_graph = ctx.saved_tensors, torch.is_grad_enabled()
    needs = ctx.needs_input_grad[:6]
    with torch.enable_grad():
        # Views, so that one tensor passed in two places gets the gradient of each.
        if create_graph:
            tensors = [t if t is None else t.view_as(t) for t in tensors]
        else:
            tensors = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        y = _apart(*tensors, ctx.input_activation, ctx.activation)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return *[next(gradients) if need else None for need in needs], None, None


# The plain convolution is linear in x and in weight. With C(x, w) for it, X(g, w) and W(g, x) for its two gradients,
# <g, C(x, w)> = <x, X(g, w)> = <w, W(g, x)>: each one's gradients are the other two.


def _fake_plain(x, weight, bias):
    check_conv3x3("conv2d", x, weight, bias)
    return _empty(x, weight)


def _setup_context_plain(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward_plain(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    return (
        _backward_input(grad, weight) if need_x else None,
        _backward_weight(grad, x) if need_weight else None,
        grad.sum((0, 2, 3)) if need_bias else None,
    )


def _fake_backward_input(grad, weight):
    b, _, h, w = grad.shape
    return grad.new_empty(b, weight.size(1), h, w).to(memory_format=memory_format(grad))


def _setup_context_two(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_backward_input(ctx, grad_x):
    grad, weight = ctx.saved_tensors
    return (
        _plain(grad_x, weight, None) if ctx.needs_input_grad[0] else None,
        _backward_weight(grad, grad_x) if ctx.needs_input_grad[1] else None,
    )


def _fake_backward_weight(grad, x):
    return x.new_empty(grad.size(1), x.size(1), 3, 3)


def _backward_of_backward_weight(ctx, grad_weight):
    grad, x = ctx.saved_tensors
    return (
        _plain(x, grad_weight, None) if ctx.needs_input_grad[0] else None,
        _backward_input(grad, grad_weight) if ctx.needs_input_grad[1] else None,
    )


_library.register("conv2d", fake=_fake, setup_context=_setup_context, backward=_backward, autocast=(0, 1, 2, 3))
_library.register(
    "conv2d_plain",
    fake=_fake_plain,
    setup_context=_setup_context_plain,
    backward=_backward_plain,
    autocast=(0, 1, 2),
)
_library.register(
    "conv2d_backward_input",
    fake=_fake_backward_input,
    setup_context=_setup_context_two,
    backward=_backward_of_backward_input,
)
_library.register(
    "conv2d_backward_weight",
    fake=_fake_backward_weight,
    setup_context=_setup_context_two,
    backward=_backward_of_backward_weight,
)
