"""The activations and their derivatives, for every Triton kernel, and the precision it computes in."""

import triton
import triton.language as tl


@triton.jit
def to_compute(v):
    """v in double where it is, else in float32: half precision is for memory."""
    return v if v.dtype == tl.float64 else v.to(tl.float32)


@triton.jit
def activate(z, alpha, ACT: tl.constexpr):
    """act(z); alpha is the slope of lrelu."""
    if ACT == "relu":
        return tl.where(z < 0, 0, z)
    elif ACT == "lrelu":
        return tl.where(z < 0, z * alpha, z)
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.70710678118654752))
    elif ACT == "tanh":
        return _tanh(z)
    elif ACT == "sigmoid":
        return tl.sigmoid(z)
    else:
        return z


@triton.jit
def derivative(z, alpha, ACT: tl.constexpr):
    """d act(z) / dz"""
    if ACT == "relu":
        return tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif ACT == "lrelu":
        return tl.where(z > 0, 1.0, alpha)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    elif ACT == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.70710678118654752)) + z * 0.39894228040143268 * tl.exp(-0.5 * z * z)
    elif ACT == "tanh":
        t = _tanh(z)
        return 1 - t * t
    elif ACT == "sigmoid":
        s = tl.sigmoid(z)
        return s * (1 - s)
    else:
        return tl.full(z.shape, 1, z.dtype)


@triton.jit
def _tanh(z):
    t = 2 * tl.sigmoid(2 * z) - 1
    if z.dtype == tl.float64:
        return t
    s = z * z  # an odd polynomial where the difference would cancel
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    return tl.where(tl.abs(z) < 0.625, z + z * s * (p - 3.33332819422e-1), t)
