"""Bias, activation, gain and clamp in one pass over memory."""

import math

from .. import _library
from . import _backend, eager
from ._activation import LRELU_SLOPE, check_activation
from ._check import check_dtype, check_same_dtype

# Rectifiers keep the variance of their input when scaled by sqrt(2) (He et al. 2015).
_DEFAULT_GAIN = {"relu": math.sqrt(2), "lrelu": math.sqrt(2), "silu": math.sqrt(2)}


def bias_act(x, b=None, *, dim=1, act="linear", alpha=None, gain=None, clamp=None, backend=None):
    """Add a bias along one axis, apply an activation, scale and clamp.

        y = clamp(gain * act(x + b), -clamp, clamp)

    Args:
        x: tensor of any shape; float32, bfloat16, float16 or float64.
        b: bias of shape (x.size(dim),) in x's dtype, or None.
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
    _check(x, b, dim, act, clamp)
    alpha = LRELU_SLOPE if alpha is None else float(alpha)
    gain = _DEFAULT_GAIN.get(act, 1.0) if gain is None else float(gain)
    run = _backend.choose("bias_act", _IMPLEMENTATIONS, backend, x)
    return run(x, b, dim % x.dim(), act, alpha, gain, None if clamp is None else float(clamp))


def _check(x, b, dim, act, clamp):
    check_dtype("bias_act", "x", x)
    if x.dim() == 0 or not -x.dim() <= dim < x.dim():
        raise ValueError(f"bias_act: dim must be an axis of x {tuple(x.shape)}, got {dim}")
    if b is not None:
        check_same_dtype("bias_act", "b", b, x)
        if tuple(b.shape) != (x.size(dim),):
            raise ValueError(
                f"bias_act: b must have shape ({x.size(dim)},) to match x {tuple(x.shape)}, got {tuple(b.shape)}"
            )
    check_activation("bias_act", "act", act)
    if clamp is not None and clamp < 0:
        raise ValueError(f"bias_act: clamp must be at least 0, got {clamp}")


_IMPLEMENTATIONS = {"eager": eager.bias_act, "cpu": _library.op("bias_act")}
