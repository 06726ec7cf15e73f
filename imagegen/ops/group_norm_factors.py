"""What group normalisation does to each channel, for an op that reads x anyway to do it on the way."""

import torch

from .. import _library
from . import _backend, eager
from .eager.group_norm_factors import factors
from .group_norm import _check, _check_moments


def group_norm_factors(
    x, num_groups, weight=None, bias=None, *, eps=1e-5, scale=None, shift=None, moments=None, backend=None
):
    """The gain and offset of every image and channel by which group_norm, but for its activation, maps x.

        group_norm(x, num_groups, weight, bias, ...) = act(x * gain + offset)
        gain = rstd * weight * (1 + scale)              offset = (bias - mean * rstd * weight) * (1 + scale) + shift

    One pass over x instead of three: ops.conv2d takes them as its scale and shift. Where |mean| is far above the
    deviation of a group x * gain + offset cancels, and errs by their quotient times the rounding of float32;
    group_norm itself does not.

    Args: as ops.group_norm; moments: mean and variance of x's groups, (B, num_groups, 2), where they are known, as
        ops.upsample_conv2d returns them: x is then not read, unless a gradient is asked for.
    Returns: two tensors (B, C) in float32, or float64 if x is.
    Gradients: of any order, in plain PyTorch; moments are x's, so theirs is a part of x's.
    Raises: ValueError or TypeError that names the argument.
    """
    _check(x, num_groups, weight, bias, eps, scale, shift, "linear")
    if moments is not None:
        _check_moments(moments, x, num_groups)
        if not (torch.is_grad_enabled() and x.requires_grad):
            mean, var = moments.detach().unbind(-1)
            return factors(mean, var, x.size(1) // num_groups, weight, bias, eps, scale, shift)
    run = _backend.choose("group_norm_factors", _IMPLEMENTATIONS, backend, x, flop=lambda: 3 * x.numel())
    return run(x, num_groups, weight, bias, float(eps), scale, shift)


_native = _library.past_autograd("group_norm_factors")


def _group_norm_factors_triton(x, num_groups, weight, bias, eps, scale, shift):
    _check(x, num_groups, weight, bias, eps, scale, shift, "linear")
    from .triton.group_norm_kernel import group_norm_factors  # here, not above: importing Triton takes a second

    return group_norm_factors(x, num_groups, weight, bias, eps, scale, shift)


def _fake(x, num_groups, weight, bias, eps, scale, shift):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, ctx.eps, scale, shift = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)


def _backward(ctx, *grads):
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 5, 6)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that one tensor passed in two places gets the gradient of each.
        tensors = [t if t is None else t.view_as(t) for t in ctx.saved_tensors]
        tensors = [
            t.requires_grad_() if need and not t.requires_grad else t for t, need in zip(tensors, needs, strict=True)
        ]
        x, weight, bias, scale, shift = tensors
        factors = eager.group_norm_factors(x, ctx.num_groups, weight, bias, ctx.eps, scale, shift)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        found = torch.autograd.grad(factors, wanted, grads, create_graph=create_graph, allow_unused=True)
    found = iter(found)
    dx, dweight, dbias, dscale, dshift = (next(found) if need else None for need in needs)
    return dx, None, dweight, dbias, None, dscale, dshift


_library.define(
    "group_norm_factors_triton(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift) -> (Tensor gain, Tensor offset)",
    _group_norm_factors_triton,
)

for twin in ("", "_triton"):
    _library.register(f"group_norm_factors{twin}", fake=_fake, setup_context=_setup_context, backward=_backward)

_IMPLEMENTATIONS = {
    "eager": eager.group_norm_factors,
    "cpu": _native,
    "cuda": _native,
    "triton": _library.op("group_norm_factors_triton"),
}
