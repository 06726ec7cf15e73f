"""3x3 convolution: decoder, UNet and small-image shapes, and the two ends in RGB or latents."""

import torch

from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

SHAPES = (  # (B, Ci, Co, H); W = H
    (1, 128, 128, 256),
    (1, 256, 256, 128),
    (1, 512, 512, 64),
    (1, 512, 512, 32),
    (2, 320, 320, 64),
    (2, 640, 640, 32),
    (2, 1280, 1280, 16),
    (8, 64, 64, 32),
    (2, 1280, 1280, 8),
    (1, 256, 512, 64),
    (1, 4, 512, 64),
    (1, 3, 128, 256),
    (1, 128, 3, 256),
)
CUDA_SHAPES = ((1, 512, 512, 128), (2, 320, 320, 64))  # where ours is cuDNN's, to see that nothing is lost on the way
QUICK_SHAPES = ((1, 128, 128, 32), (8, 64, 64, 32))
TINY_SHAPE = (1, 32, 32, 4)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "forward+backward")
GRADIENTS = ("x", "weight", "bias")
TOLERANCE = 2e-5
NOTE = (
    "FLOP: the plain count, 9 multiply-adds per output pixel, Ci and Co. The roofline counts what a provider really "
    "makes: `eager` 9, `imagegen` 36 per 4x4 pixels (F(4,3); F(2,3) makes 16 per 2x2), 6 from at most six channels "
    "(F(2,3) along the rows), 9 to at most four. A backward counts twice a forward. In forward+backward the weights "
    "are touched before every call, as an optimiser would."
)


def label(shape):
    B, Ci, Co, H = shape
    return f"({B}, {Ci}->{Co}, {H}x{H})"


def make_inputs(shape):
    B, Ci, Co, H = shape
    weight = torch.randn(Co, Ci, 3, 3) / (3 * Ci**0.5)
    return {"x": torch.randn(B, Ci, H, H), "weight": weight, "bias": torch.randn(Co)}


def plain(x, weight, bias):
    return eager.conv2d(x, weight, bias, None, None, None, "linear", "linear")


PROVIDERS = {"imagegen": Provider(ops.conv2d), "eager": Provider(plain)}
reference = plain


def flops(shape):
    B, Ci, Co, H = shape
    return 2 * 9 * B * Ci * Co * H * H


def flops_made(shape, provider):
    if provider != "imagegen" or shape[2] <= 4:
        return flops(shape)
    return flops(shape) * (6 if shape[1] <= 6 else 36 / 16) / 9


def bytes_moved(shape, itemsize, direction):
    """x, weight and bias read, y written; backward: dy, x and weight read, their gradients written."""
    B, Ci, Co, H = shape
    x, weights, y = B * Ci * H * H, (9 * Ci + 1) * Co, B * Co * H * H
    return itemsize * (x + weights + y if direction == "forward" else 3 * x + 3 * weights + 2 * y)
