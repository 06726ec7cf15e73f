"""Nearest-2x upsampling followed by a 3x3 convolution, without the upsampled tensor."""

import torch

from .. import _library
from . import _backend, _bilinear, eager
from ._activation import ACTIVATIONS, check_activation
from ._check import autocasts, check_conv3x3, check_dtype, check_same_device, check_same_dtype, explain
from ._layout import memory_format
from .eager.upsample_conv2d import moments as moments_of


def upsample_conv2d(x, weight, bias=None, *, activation="linear", moments=None, packed_weight=None, backend=None):
    """Upsample x twofold by nearest neighbour, convolve it 3x3 with padding 1, add a bias and activate.

        y = act(conv2d(nearest2x(x), weight, padding=1) + bias)

    On CPU it takes 81 multiplications per 4x4 input pixels and pair of channels where the plain way takes 576, a
    seventh; for images below about 24x24, and for bfloat16 on machines with bfloat16 dot products, 25 per 2x2 where it
    takes 144. `imagegen.info(verbose=True)` names the choice for some shapes. On CUDA, on tensor cores, it takes 36 per
    2x2. The result is exact up to rounding: in float32 it errs by about 2e-6, by 25 multiplications like the plain
    way's own sums; in half precision on CUDA up to three times as much as those, and float16 overflows there where x is
    above 16,000. In Triton it is the transposed convolution that both steps are together, 64 multiplications per 2x2,
    and the weight's gradient is torch's convolution.

    Args:
        x: (B, C, H, W), contiguous, channels_last or any strides; float32, bfloat16, float16 or float64.
        weight: (Cout, C, 3, 3) in x's dtype. On CPU its transform is cached until its content changes.
        bias: (Cout,) in x's dtype, or None.
        activation: "linear", "relu", "lrelu" (slope 0.2), "silu", "gelu", "tanh" or "sigmoid".
        moments: the num_groups of the normalisation that follows, to have what it asks of y while y is made: on CUDA
            and Triton by the same kernel, elsewhere by a pass over y. None: not asked for.
        packed_weight: torch.ops.imagegen.upsample_conv2d_pack_weight(weight), which CUDA otherwise makes at every call:
            a launch and 0.5 to 12 % of the op as predicted. Nobody looks whether weight has changed since. Not read
            elsewhere, nor where autocast or gradients ask for weight itself. nn.UpsampleConv2d.pack_weight keeps one.
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on x's device.

    Returns: (B, Cout, 2H, 2W) in x's dtype and memory format; with moments also mean and biased variance of each
        image's groups of channels of it, (B, moments, 2) in float32, or float64 if x is: ops.group_norm_factors takes
        them.
    Gradients: of any order, in x, weight and bias, through both results.
    Autocast: runs in autocast's dtype.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: act(F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1))
    Source: Winograd, "Arithmetic Complexity of Computations", 1980, on data where every pixel appears twice.
    """
    if packed_weight is not None:
        _check(x, weight, bias, activation, moments)
        _check_packed(packed_weight, weight)
    try:
        run = _backend.choose(
            "upsample_conv2d", _IMPLEMENTATIONS, backend, x, _declines, lambda: 72 * x.numel() * weight.size(0)
        )
        return run(x, weight, bias, activation, moments, packed_weight)
    except Exception:
        explain(_check, x, weight, bias, activation, moments)
        raise


def _declines(backend, x):
    """Why the CUDA kernels, on tensor cores, do not take x; None where they do."""
    if backend == "cuda" and x.dtype == torch.float64:
        return "the cuda kernel takes float32, bfloat16 or float16, x is torch.float64"
    return None


def _check(x, weight, bias, activation, moments=None):
    op = "upsample_conv2d"
    check_conv3x3(op, x, weight, bias)
    check_activation(op, "activation", activation)
    if moments is not None and (moments < 1 or weight.size(0) % moments):
        raise ValueError(
            f"{op}: moments must be a number of groups that divides weight's {weight.size(0)} output channels, "
            f"got {moments}"
        )


def _check_packed(packed, weight):
    op = "upsample_conv2d"
    check_same_device(op, "packed_weight", packed, weight, "weight")
    check_same_dtype(op, "packed_weight", packed, weight, "weight")
    if tuple(packed.shape) != (_packed_size(weight),) or not packed.is_contiguous():
        raise ValueError(
            f"{op}: packed_weight must be what upsample_conv2d_pack_weight makes of a weight of shape "
            f"{tuple(weight.shape)}, got a tensor of shape {tuple(packed.shape)}"
        )


def _packed_size(weight):
    """As csrc/ops/cuda/upsample_conv2d_params.h lays it out: blocks of channels, twos of 32 bytes of depth."""
    n, depth, size = weight.size(0), weight.size(1), weight.element_size()
    block = 32 if n <= 32 else 64 if n <= 64 else 128
    return 9 * (-(-n // block) * block) * (-(-depth * size // 64) * 64) // size


def _eager(x, weight, bias, activation, moments, packed_weight):
    _check(x, weight, bias, activation, moments)
    y = eager.upsample_conv2d(x, weight, bias, activation)
    return y if moments is None else (y, moments_of(y, moments))


def _kernel(operator, with_moments, with_packed=None):
    def run(x, weight, bias, activation, moments, packed_weight):
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        if needs_grad and activation != "linear":
            # The fused activation leaves nothing to differentiate it by: apart, it costs a pass over y in training, and
            # saves the whole convolution that its gradient would otherwise have to repeat.
            y = ACTIVATIONS[activation](operator(x, weight, bias, "linear"))
            return y if moments is None else (y, moments_of(y, moments))
        if packed_weight is not None and with_packed is not None and not needs_grad and not autocasts(x):
            found = with_packed(x, packed_weight, bias, activation, weight.size(0), moments or 0)
            return found[0] if moments is None else found
        if moments is not None:
            return with_moments(x, weight, bias, activation, moments)
        return operator(x, weight, bias, activation)

    return run


def _moments_cpu(x, weight, bias, activation, groups):
    """By a pass over y: the CPU kernel's tiles are cut so that sums over them would differ with the threads."""
    _check(x, weight, bias, activation, groups)
    y = _library.op("upsample_conv2d")(x, weight, bias, activation)
    return y, moments_of(y, groups)


def _upsample_conv2d_triton(x, weight, bias, activation):
    _check(x, weight, bias, activation)
    from .triton.upsample_conv2d_kernel import upsample_conv2d  # here, not above: importing Triton takes a second

    return upsample_conv2d(x, weight, bias, activation)


def _moments_triton(x, weight, bias, activation, groups):
    _check(x, weight, bias, activation, groups)
    from .triton.upsample_conv2d_kernel import upsample_conv2d_moments

    return upsample_conv2d_moments(x, weight, bias, activation, groups)


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
    _check(x, weight, bias, activation)
    b, _, h, w = x.shape
    return x.new_empty(b, weight.size(0), 2 * h, 2 * w, dtype=x.dtype).to(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(C, X, W):
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors[:3]
        if ctx.activation != "linear":
            grad = _activation_grad(grad, C(x, weight, bias, "linear"), ctx.activation)
        need_x, need_weight, need_bias, *options = ctx.needs_input_grad
        return (
            X(grad, weight) if need_x else None,
            W(grad, x) if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
            *(None for _ in options),
        )

    return backward


def _activation_grad(grad, y, activation):
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        create_graph = grad.requires_grad or y.grad_fn is not None
        return torch.autograd.grad(ACTIVATIONS[activation](y), y, grad, create_graph=create_graph)[0]


def _fake_moments(x, weight, bias, activation, groups):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _fake(x, weight, bias, activation), x.new_empty(x.size(0), groups, 2, dtype=dtype)


def _setup_context_moments(ctx, inputs, output):
    x, weight, bias, ctx.activation, ctx.groups = inputs
    ctx.save_for_backward(x, weight, bias, output[0])
    ctx.set_materialize_grads(False)


def _backward_moments(C, X, W):
    """As that of y alone, once the gradient of its moments is a part of the gradient of y."""
    backward_of_y = _backward(C, X, W)

    def backward(ctx, grad, grad_moments):
        if grad_moments is not None:
            create_graph, y = torch.is_grad_enabled(), ctx.saved_tensors[3]
            with torch.enable_grad():
                y = y if create_graph and y.requires_grad else y.detach().requires_grad_()
                through_moments = torch.autograd.grad(
                    moments_of(y, ctx.groups), y, grad_moments, create_graph=create_graph
                )[0]
            grad = through_moments if grad is None else grad + through_moments
        return (None,) * 5 if grad is None else backward_of_y(ctx, grad)

    return backward


def _fake_pack_weight(weight):
    return weight.new_empty(_packed_size(weight))


def _fake_packed(x, packed_weight, bias, activation, cout, groups):
    b, _, h, w = x.shape
    y = x.new_empty(b, cout, 2 * h, 2 * w).to(memory_format=memory_format(x))
    return y, x.new_empty(b, groups, 2, dtype=torch.float32)


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
_library.define(
    "upsample_conv2d_moments_triton(Tensor x, Tensor weight, Tensor? bias, str activation, int groups) "
    "-> (Tensor y, Tensor moments)",
    _moments_triton,
)
_library.implement("upsample_conv2d_moments", "cpu", _moments_cpu)
_library.define("upsample_conv2d_backward_input_triton(Tensor grad, Tensor weight) -> Tensor", _backward_input_triton)
_library.define("upsample_conv2d_backward_weight_triton(Tensor grad, Tensor x) -> Tensor", _backward_weight_triton)

_bilinear.register(
    "upsample_conv2d",
    fakes=(_fake, _fake_backward_input, _fake_backward_weight),
    setup_contexts=(_setup_context, _setup_context_two, _setup_context_two),
    backwards=(_backward, _backward_of_backward_input, _backward_of_backward_weight),
)

for twin in ("", "_triton"):
    parts = ("", "_backward_input", "_backward_weight")
    _library.register(
        f"upsample_conv2d_moments{twin}",
        fake=_fake_moments,
        setup_context=_setup_context_moments,
        backward=_backward_moments(*(_library.op(f"upsample_conv2d{part}{twin}") for part in parts)),
        autocast=(0, 1, 2),
    )

_library.register("upsample_conv2d_pack_weight", fake=_fake_pack_weight)
_library.register("upsample_conv2d_packed", fake=_fake_packed)

_native = _library.past_autograd("upsample_conv2d"), _library.op("upsample_conv2d_moments")

_IMPLEMENTATIONS = {
    "eager": _eager,
    "cpu": _kernel(*_native),
    "cuda": _kernel(*_native, _library.op("upsample_conv2d_packed")),
    "triton": _kernel(_library.op("upsample_conv2d_triton"), _library.op("upsample_conv2d_moments_triton")),
}
