"""Bias, activation, gain and clamp in one pass over memory."""

import math

import torch

from .. import _library
from . import _backend, eager
from ._activation import LRELU_SLOPE, check_activation
from ._check import autocasts, check_dtype, check_same_device, check_same_dtype, check_shape

# Rectifiers keep the variance of their input when scaled by sqrt(2) (He et al. 2015).
_DEFAULT_GAIN = {"relu": math.sqrt(2), "lrelu": math.sqrt(2), "silu": math.sqrt(2)}


def bias_act(x, b=None, *, dim=1, act="linear", alpha=None, gain=None, clamp=None, backend=None):
    """Add a bias along one axis, apply an activation, scale and clamp.

        y = clamp(gain * act(x + b), -clamp, clamp)

    Args:
        x: tensor of any shape; float32, bfloat16, float16 or float64.
        b: bias of shape (x.size(dim),) in x's dtype (any under autocast), or None.
        dim: the axis of x that b runs along.
        act: "linear", "relu", "lrelu", "silu", "gelu", "tanh" or "sigmoid".
        alpha: slope of lrelu below zero; None is 0.2.
        gain: factor after the activation; None is sqrt(2) for relu, lrelu and silu, 1 otherwise.
        clamp: bound on |y|; None is no bound.
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on x's device.

    Returns: a tensor of x's shape, dtype and strides.
    Gradients: of any order, in x and b.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: (act(x + b.reshape(...)) * gain).clamp(-clamp, clamp)
    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, appendix B.
    """
    if isinstance(b, torch.Tensor) and autocasts(b):
        b = b.to(x.dtype)
    _check(x, b, dim, act, clamp)
    alpha = LRELU_SLOPE if alpha is None else float(alpha)
    gain = _DEFAULT_GAIN.get(act, 1.0) if gain is None else float(gain)
    run = _backend.choose("bias_act", _IMPLEMENTATIONS, backend, x, flop=lambda: 5 * x.numel())
    return run(x, b, dim % x.dim(), act, alpha, gain, None if clamp is None else float(clamp))


def _check(x, b, dim, act, clamp):
    check_dtype("bias_act", "x", x)
    if x.dim() > 8:
        raise ValueError(f"bias_act: x must have at most 8 dimensions, got {x.dim()}")
    if x.dim() == 0 or not -x.dim() <= dim < x.dim():
        raise ValueError(f"bias_act: dim must be an axis of x {tuple(x.shape)}, got {dim}")
    if b is not None:
        check_same_device("bias_act", "b", b, x)
        check_same_dtype("bias_act", "b", b, x)
        if tuple(b.shape) != (x.size(dim),):
            raise ValueError(
                f"bias_act: b must have shape ({x.size(dim)},) to match x {tuple(x.shape)}, got {tuple(b.shape)}"
            )
    check_activation("bias_act", "act", act)
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"bias_act: clamp must be at least 0, got {clamp}")


def _bias_act_triton(x, b, dim, act, alpha, gain, clamp):
    _check(x, b, dim, act, clamp)
    from .triton.bias_act_kernel import bias_act  # here, not above: importing Triton takes a second

    return bias_act(None, x, b, dim, act, alpha, gain, clamp)


def _bias_act_backward_triton(grad, x, b, dim, act, alpha, gain, clamp):
    _check(x, b, dim, act, clamp)
    check_same_device("bias_act", "grad", grad, x)
    check_same_dtype("bias_act", "grad", grad, x)
    check_shape("bias_act", "grad", grad, x.shape, x)
    from .triton.bias_act_kernel import bias_act

    return bias_act(grad, x, b, dim, act, alpha, gain, clamp)


def _setup_context(ctx, inputs, output):
    x, b, *ctx.options = inputs
    ctx.save_for_backward(x, b)


def _backward(kernel):
    """The gradient both twins share; `kernel` names the operator each has for its first order."""

    def backward(ctx, grad):
        x, b = ctx.saved_tensors
        x_wants, b_wants = ctx.needs_input_grad[:2]
        dx = db = None
        if torch.is_grad_enabled():  # create_graph=True: what comes out will be differentiated in its turn
            # Views, so that one tensor passed as both gets the gradient of each.
            x, b = (t if t is None else t.view_as(t) for t in (x, b))
            y = eager.bias_act(x, b, *ctx.options)
            wanted = [t for t, wants in ((x, x_wants), (b, b_wants)) if wants]
            grads = list(torch.autograd.grad(y, wanted, grad, create_graph=True))
            db = grads.pop() if b_wants else None
            dx = grads.pop() if x_wants else None
        else:
            dx = _library.op(kernel)(grad, x, b, *ctx.options)
            db = _sum_to_bias(dx, ctx.options[0]) if b_wants else None
        return dx, db, None, None, None, None, None

    return backward


def _sum_to_bias(dx, dim):
    others = [d for d in range(dx.dim()) if d != dim]
    return dx.sum(others) if others else dx.clone()


_SIGNATURE = "Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp) -> Tensor"
_library.define(f"bias_act_triton({_SIGNATURE}", _bias_act_triton)
_library.define(f"bias_act_backward_triton(Tensor grad, {_SIGNATURE}", _bias_act_backward_triton)

for twin in ("", "_triton"):
    _library.register(
        f"bias_act{twin}",
        fake=lambda x, b, *options: torch.empty_like(x),
        setup_context=_setup_context,
        backward=_backward(f"bias_act_backward{twin}"),
    )
    _library.register(f"bias_act_backward{twin}", fake=lambda grad, x, b, *options: torch.empty_like(x))

_IMPLEMENTATIONS = {
    "eager": eager.bias_act,
    "cpu": _library.op("bias_act"),
    "cuda": _library.op("bias_act"),
    "triton": _library.op("bias_act_triton"),
}
