"""GroupNorm followed by SiLU, 32 groups, as diffusion UNets and decoders use it."""

import torch

from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

GROUPS = 32
SHAPES = ((1, 512, 64), (2, 320, 64), (1, 256, 128), (8, 128, 32), (1, 128, 256))  # (B, C, H); W = H
QUICK_SHAPES = ((1, 256, 64), (8, 128, 32))
TINY_SHAPE = (1, 64, 4)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "forward+backward")
GRADIENTS = ("x", "weight", "bias")
TOLERANCE = 1e-5
NOTE = (
    "The roofline is the copy bandwidth, with bytes = x read once and y written once (backward: dy and x read, dx "
    "written), which a tensor larger than the caches cannot reach: the statistics need x before its first output. "
    "A tensor that fits in the last-level cache can pass 100 %."
)


def label(shape):
    B, C, H = shape
    return f"({B}, {C}, {H}x{H})"


def make_inputs(shape):
    B, C, H = shape
    x = 0.5 + 2 * torch.randn(B, C, H, H)
    return {"x": x, "weight": 1 + 0.1 * torch.randn(C), "bias": 0.1 * torch.randn(C)}


def fused(x, weight, bias):
    return ops.group_norm(x, GROUPS, weight, bias, activation="silu")


def plain(x, weight, bias):
    return eager.group_norm(x, GROUPS, weight, bias, 1e-5, None, None, "silu")


PROVIDERS = {"imagegen": Provider(fused), "eager": Provider(plain)}
reference = plain


def flops(shape):
    """About 10 per element: 3 for the sums, 3 for the affine map, 4 for SiLU."""
    B, C, H = shape
    return 10 * B * C * H * H


def flops_made(shape, provider):
    return flops(shape)


def bytes_moved(shape, itemsize, direction):
    B, C, H = shape
    return itemsize * B * C * H * H * (2 if direction == "forward" else 5)
