"""GroupNorm followed by SiLU, 32 groups, as diffusion UNets and decoders use it."""

import math

import torch

from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

GROUPS = 32
SHAPES = ((1, 512, 64), (2, 320, 64), (1, 256, 128), (8, 128, 32), (1, 128, 256))  # (B, C, H), then W where it is not H
# The first three are larger than any L2; the first is twenty frames of video.
CUDA_SHAPES = ((1, 128, 5120, 256), (1, 256, 1024), (1, 512, 512), (1, 512, 128), (2, 320, 64), (8, 128, 32))
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


def sizes(shape):
    B, C, H, *W = shape
    return B, C, H, *(W or [H])


def label(shape):
    B, C, H, W = sizes(shape)
    return f"({B}, {C}, {H}x{W})"


def make_inputs(shape):
    _, C, *_ = shape
    x = 0.5 + 2 * torch.randn(sizes(shape))
    return {"x": x, "weight": 1 + 0.1 * torch.randn(C), "bias": 0.1 * torch.randn(C)}


def fused(x, weight, bias):
    return ops.group_norm(x, GROUPS, weight, bias, activation="silu")


def plain(x, weight, bias):
    return eager.group_norm(x, GROUPS, weight, bias, 1e-5, None, None, "silu")


PROVIDERS = {"imagegen": Provider(fused), "eager": Provider(plain)}
reference = plain


def flops(shape):
    """About 10 per element: 3 for the sums, 3 for the affine map, 4 for SiLU."""
    return 10 * math.prod(sizes(shape))


def flops_made(shape, provider):
    return flops(shape)


def bytes_moved(shape, itemsize, direction):
    return itemsize * math.prod(sizes(shape)) * (2 if direction == "forward" else 5)
