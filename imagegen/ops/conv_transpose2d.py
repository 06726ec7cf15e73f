"""Transposed convolution with a scale and a shift per channel and an activation in the same pass."""

import torch

from . import _backend, eager
from ._activation import check_activation
from ._check import check_dtype, check_same_device, check_same_dtype, check_shape
from .eager.conv_transpose2d import output_shape


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

    Args:
        x: (B, C, H, W), contiguous, channels_last or any strides; float32, bfloat16, float16 or float64.
        weight: (C, Cout, kH, kW) in x's dtype.
        bias: (Cout,) in x's dtype, or None.
        stride, padding, output_padding: integers, or pairs of them for height and width, as torch has them.
        scale, shift: (Cout,) in x's dtype or float32, or None.
        activation: "linear", "relu", "lrelu" (slope 0.2), "silu", "gelu", "tanh" or "sigmoid".
        backend: "eager" or None, which takes the first one ready on x's device.

    Returns: (B, Cout, (H - 1) * stride - 2 * padding + kH + output_padding, ...) in x's dtype and memory format.
    Gradients: of any order, in x, weight, bias, scale and shift.
    Autocast: runs in autocast's dtype.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: act(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding) * scale[:, None, None]
        + shift[:, None, None])
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
    run = _backend.choose("conv_transpose2d", _IMPLEMENTATIONS, backend, x)
    return run(x, weight, bias, *geometry, scale, shift, activation)


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
    autocast = torch.is_autocast_enabled(x.device.type)  # which makes the dtypes one
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


_IMPLEMENTATIONS = {"eager": eager.conv_transpose2d}
