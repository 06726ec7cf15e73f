"""Group normalisation with scale, shift and activation in the same pass."""

import torch

from .. import _library
from . import _backend, eager
from ._activation import check_activation
from ._check import check_dtype, check_same_device, check_same_dtype, check_shape, explain
from ._layout import memory_format


def group_norm(
    x,
    num_groups,
    weight=None,
    bias=None,
    *,
    eps=1e-5,
    scale=None,
    shift=None,
    activation="linear",
    moments=None,
    backend=None,
):
    """Normalise each group of channels of each image, then apply an affine map, scale, shift and activation.

        xhat = (x - mean) / sqrt(var + eps)              mean, var over each group of C / num_groups channels
        y = act((xhat * weight + bias) * (1 + scale) + shift)

    Args:
        x: (B, C, ...) of 2 to 10 axes; float32, bfloat16, float16 or float64.
        num_groups: divisor of C; 1 is layer normalisation of each image, C is instance normalisation.
        weight, bias: (C,) or None, in x's dtype or float32.
        eps: added to the variance.
        scale, shift: (B, C) or None, in x's dtype or float32; what a time or class embedding modulates.
        activation: "linear", "relu", "lrelu", "silu", "gelu", "tanh" or "sigmoid".
        moments: mean and variance of x's groups, (B, num_groups, 2) in float32, or float64 if x is, where they are
            known, as ops.upsample_conv2d returns them: x is then read once. Eager takes its own.
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on x's device.

    Returns: a tensor of x's shape and dtype, channels_last where x is, else contiguous.
    Gradients: of any order, in x, weight, bias, scale and shift; beyond the first in plain PyTorch. Moments are x's, so
        theirs is a part of x's.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: act(F.group_norm(x, num_groups, weight, bias, eps) * (1 + scale) + shift)
    Source: Wu and He, "Group Normalization", 2018; scale and shift: Perez et al., "FiLM", 2018.
    """
    arguments = x, num_groups, weight, bias, float(eps), scale, shift, activation, moments
    try:
        run = _backend.choose("group_norm", _IMPLEMENTATIONS, backend, x, flop=lambda: 10 * x.numel())
        return run(*arguments)
    except Exception:
        explain(_check, *arguments)
        raise


def _check(x, num_groups, weight, bias, eps, scale, shift, activation, moments=None):
    check_dtype("group_norm", "x", x)
    if not 2 <= x.dim() <= 10:
        raise ValueError(f"group_norm: x must have shape (B, C, ...) of at most 10 axes, got {tuple(x.shape)}")
    if num_groups < 1 or x.size(1) % num_groups:
        raise ValueError(f"group_norm: num_groups must divide x's {x.size(1)} channels, got {num_groups}")
    for argument, t, shape in (
        ("weight", weight, x.shape[1:2]),
        ("bias", bias, x.shape[1:2]),
        ("scale", scale, x.shape[:2]),
        ("shift", shift, x.shape[:2]),
    ):
        if t is not None:
            if t.dtype not in (x.dtype, torch.float32):
                raise TypeError(f"group_norm: {argument} must have x's dtype {x.dtype} or torch.float32, got {t.dtype}")
            check_same_device("group_norm", argument, t, x)
            check_shape("group_norm", argument, t, shape, x)
    if not eps >= 0:
        raise ValueError(f"group_norm: eps must be at least 0, got {eps}")
    check_activation("group_norm", "activation", activation)
    if moments is not None:
        _check_moments(moments, x, num_groups)


def _check_moments(moments, x, num_groups):
    op, shape, dtype = "group_norm", (x.size(0), num_groups, 2), torch.promote_types(x.dtype, torch.float32)
    check_same_device(op, "moments", moments, x)
    check_shape(op, "moments", moments, shape, x)
    if moments.dtype != dtype:
        raise TypeError(f"{op}: moments must be {dtype}, got {moments.dtype}")


def _eager(*arguments):
    _check(*arguments)
    return eager.group_norm(*arguments[:-1])


def _kernel(operator, with_moments):
    def run(*arguments):
        *others, moments = arguments
        if moments is None:
            return operator(*others)[0]
        return with_moments(*others, moments.detach().contiguous())[0]

    return run


def _group_norm_triton(x, num_groups, weight, bias, eps, scale, shift, activation, moments=None):
    _check(x, num_groups, weight, bias, eps, scale, shift, activation, moments)
    from .triton.group_norm_kernel import group_norm  # here, not above: importing Triton takes a second

    return group_norm(x, num_groups, weight, bias, eps, scale, shift, activation, moments)


def _group_norm_backward_triton(grad, x, mean, rstd, num_groups, weight, bias, scale, shift, activation):
    _check(x, num_groups, weight, bias, 0, scale, shift, activation)
    _check_backward(grad, x, mean, rstd, num_groups)
    from .triton.group_norm_backward_kernel import group_norm_backward

    return group_norm_backward(grad, x, mean, rstd, num_groups, weight, bias, scale, shift, activation)


def _check_backward(grad, x, mean, rstd, num_groups):
    op, shape, dtype = "group_norm", (x.size(0), num_groups), torch.promote_types(x.dtype, torch.float32)
    check_same_device(op, "grad", grad, x)
    check_same_dtype(op, "grad", grad, x)
    if grad.shape != x.shape:
        raise ValueError(f"{op}: grad must have x's shape {tuple(x.shape)}, got {tuple(grad.shape)}")
    for argument, t in (("mean", mean), ("rstd", rstd)):
        if tuple(t.shape) != shape or t.dtype != dtype or not t.is_contiguous():
            raise ValueError(
                f"{op}: {argument} must be contiguous of shape {shape} and dtype {dtype}, "
                f"got {tuple(t.shape)} of {t.dtype}"
            )


def _statistics(x, shape):
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _fake(x, num_groups, weight, bias, eps, scale, shift, activation, moments=None):
    _check(x, num_groups, weight, bias, eps, scale, shift, activation, moments)
    y = torch.empty_like(x, memory_format=memory_format(x))
    return y, *(_statistics(x, (x.size(0), num_groups)) for _ in range(2))


def _fake_backward(grad, x, mean, rstd, num_groups, weight, bias, scale, shift, activation):
    dx = torch.empty_like(x, memory_format=memory_format(x))
    return dx, *(_statistics(x, x.shape[:2]) for _ in range(2))


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, ctx.eps, scale, shift, ctx.activation = inputs[:8]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # zeros for mean and rstd
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)


def _backward(kernel):
    """The gradient that all kernels share; `kernel` names the operator of its first order."""
    first_order = _library.op(kernel)

    def backward(ctx, grad, _grad_mean, _grad_rstd):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 5, 6)]
        if torch.is_grad_enabled():  # create_graph=True: what comes out will be differentiated in its turn
            # Views, so that one tensor passed in two places gets the gradient of each.
            tensors = [t if t is None else t.view_as(t) for t in (x, weight, bias, scale, shift)]
            x, weight, bias, scale, shift = tensors
            y = eager.group_norm(x, ctx.num_groups, weight, bias, ctx.eps, scale, shift, ctx.activation)
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
            gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            dx, dweight, dbias, dscale, dshift = (next(gradients) if need else None for need in needs)
        else:
            dx, dz, dz_xhat = first_order(
                grad, x, mean, rstd, ctx.num_groups, weight, bias, scale, shift, ctx.activation
            )
            dweight, dbias, dscale, dshift = _factor_gradients(needs[1:], dz, dz_xhat, weight, bias, scale, shift)
        of_others = (None,) * (len(ctx.needs_input_grad) - 7)  # the activation, and moments, which are x's
        return dx, None, dweight, dbias, None, dscale, dshift, *of_others

    return backward


def _factor_gradients(needs, dz, dz_xhat, weight, bias, scale, shift):
    """From the sums over pixels of dz and of dz * xhat, each (B, C); z is the argument of the activation."""
    dweight = dbias = dscale = dshift = None
    if needs[0]:
        dweight = _in_dtype_of(weight, (dz_xhat if scale is None else dz_xhat * (1 + scale)).sum(0))
    if needs[1]:
        dbias = _in_dtype_of(bias, (dz if scale is None else dz * (1 + scale)).sum(0))
    if needs[2]:
        dscale = dz_xhat if weight is None else dz_xhat * weight
        dscale = _in_dtype_of(scale, dscale if bias is None else dscale + dz * bias)
    if needs[3]:
        dshift = _in_dtype_of(shift, dz)
    return dweight, dbias, dscale, dshift


def _in_dtype_of(other, t):
    """t.to(other.dtype), which takes 15 µs even for nothing where the caches have forgotten its code."""
    return t if t.dtype == other.dtype else t.to(other.dtype)


_library.define(
    "group_norm_triton(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, str activation) -> (Tensor y, Tensor mean, Tensor rstd)",
    _group_norm_triton,
)
_library.define(
    "group_norm_with_moments_triton(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, str activation, Tensor moments) -> (Tensor y, Tensor mean, Tensor rstd)",
    _group_norm_triton,
)
_library.define(
    "group_norm_backward_triton(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, str activation) -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xhat)",
    _group_norm_backward_triton,
)

for twin in ("", "_triton"):
    for forward in "group_norm", "group_norm_with_moments":
        _library.register(
            f"{forward}{twin}",
            fake=_fake,
            setup_context=_setup_context,
            backward=_backward(f"group_norm_backward{twin}"),
        )
    _library.register(f"group_norm_backward{twin}", fake=_fake_backward)

_native = _kernel(_library.past_autograd("group_norm"), _library.op("group_norm_with_moments"))
_triton = _kernel(_library.op("group_norm_triton"), _library.op("group_norm_with_moments_triton"))
_IMPLEMENTATIONS = {"eager": _eager, "cpu": _native, "cuda": _native, "triton": _triton}
