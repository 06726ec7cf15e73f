"""Bias, leaky ReLU, gain and clamp in one pass, as StyleGAN2 ends its layers."""

import math

import torch

from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

SHAPES = ((1, 512, 64), (4, 256, 64), (1, 64, 256), (8, 128, 32))  # (B, C, H); W = H
CUDA_SHAPES = ((16, 128, 512), (16, 512, 64), (1, 512, 32))
QUICK_SHAPES = ((1, 256, 64),)
TINY_SHAPE = (1, 32, 4)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "forward+backward")
GRADIENTS = ("x", "b")
TOLERANCE = 1e-5
NOTE = (
    "The roofline is the copy bandwidth, with bytes = x read once and y written once (backward: dy and x read, dx "
    "written). A tensor that fits in the last-level cache can pass 100 %."
)
GAIN, CLAMP = math.sqrt(2), 256.0


def label(shape):
    B, C, H = shape
    return f"({B}, {C}, {H}x{H})"


def make_inputs(shape):
    B, C, H = shape
    return {"x": torch.randn(B, C, H, H), "b": torch.randn(C)}


def fused(x, b):
    return ops.bias_act(x, b, act="lrelu", alpha=0.2, gain=GAIN, clamp=CLAMP)


def plain(x, b):
    return eager.bias_act(x, b, 1, "lrelu", 0.2, GAIN, CLAMP)


PROVIDERS = {"imagegen": Provider(fused), "eager": Provider(plain)}
reference = plain


def flops(shape):
    """5 per element: add, compare, slope, gain, clamp."""
    B, C, H = shape
    return 5 * B * C * H * H


def flops_made(shape, provider):
    return flops(shape)


def bytes_moved(shape, itemsize, direction):
    B, C, H = shape
    return itemsize * B * C * H * H * (2 if direction == "forward" else 5)
