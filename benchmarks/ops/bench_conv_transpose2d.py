"""Transposed convolution, batch normalisation in evaluation, activation: DCGAN's generator and CycleGAN's decoder."""

import torch
import torch.nn.functional as F

from benchmarks.suite import Provider
from imagegen import ops

SHAPES = (  # (B, Ci, Co, H, kernel); W = H
    (16, 1024, 512, 4, 4),
    (16, 512, 256, 8, 4),
    (16, 256, 128, 16, 4),
    (16, 128, 3, 32, 4),
    (16, 512, 256, 4, 4),
    (16, 256, 128, 8, 4),
    (16, 128, 64, 16, 4),
    (16, 64, 3, 32, 4),
    (1, 256, 128, 64, 3),
    (1, 128, 64, 128, 3),
)
CUDA_SHAPES = (
    (64, 512, 256, 8, 4),
    (64, 128, 64, 32, 4),
    (64, 64, 3, 64, 4),
    (4, 256, 128, 128, 3),
    (4, 128, 64, 256, 3),
)
QUICK_SHAPES = ((16, 128, 64, 16, 4), (1, 128, 64, 32, 3))
TINY_SHAPE = (1, 32, 32, 4, 4)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "forward+backward")
GRADIENTS = ("x", "weight", "scale", "shift")
TOLERANCE = 1e-5
NOTE = (
    "Stride 2, padding 1, output padding 1 for the 3x3 kernel; ReLU, or tanh to three channels. `eager` normalises "
    "with running mean 0 and variance 1: scale and shift are its weight and bias. FLOP: the plain count, kernel^2 "
    "multiply-adds per input pixel, Ci and Co. The roofline counts what a provider makes: `imagegen` 36 per 2x2 input "
    "pixels, 25 with the 3x3 kernel, the plain count to at most four channels; where F(4,2) makes fewer it shows as a "
    "higher fraction. A backward counts twice a forward. In forward+backward the weights are touched before every call."
)


def label(shape):
    B, Ci, Co, H, k = shape
    return f"({B}, {Ci}->{Co}, {H}x{H}) {k}x{k}"


def make_inputs(shape):
    B, Ci, Co, H, k = shape
    return {
        "x": torch.randn(B, Ci, H, H),
        "weight": torch.randn(Ci, Co, k, k) / (k / 2 * Ci**0.5),
        "scale": torch.rand(Co) + 0.5,
        "shift": torch.randn(Co),
    }


def _activation(weight):
    return "tanh" if weight.size(1) <= 3 else "relu"


def fused(x, weight, scale, shift):
    return ops.conv_transpose2d(
        x, weight, output_padding=4 - weight.size(2), scale=scale, shift=shift, activation=_activation(weight)
    )


def plain(x, weight, scale, shift):
    y = _normalised(x, weight, scale, shift)
    return torch.tanh(y) if _activation(weight) == "tanh" else torch.relu(y)


def _normalised(x, weight, scale, shift):
    y = F.conv_transpose2d(x, weight, None, 2, 1, 4 - weight.size(2))
    mean, var = scale.new_zeros(len(scale)), scale.new_ones(len(scale))
    return F.batch_norm(y, mean, var, scale, shift, eps=0.0)


def at_kink(x, weight, scale, shift):
    """Where float32's rounding may put a sum on the other side of ReLU's kink: some twenty of two million outputs."""
    y = _normalised(x, weight, scale, shift)
    return (y.abs() < 1e-5) & (_activation(weight) == "relu")


PROVIDERS = {"imagegen": Provider(fused), "eager": Provider(plain)}
reference = plain


def flops(shape):
    B, Ci, Co, H, k = shape
    return 2 * k * k * B * Ci * Co * H * H


def flops_made(shape, provider):
    _, _, Co, _, k = shape
    ours = k * k if Co <= 4 else {4: 36, 3: 25}[k] / 4
    return flops(shape) * (ours / (k * k) if provider == "imagegen" else 1)


def bytes_moved(shape, itemsize, direction):
    """x, weight and scale and shift read, y written; backward: dy, x and weight read, their gradients written."""
    B, Ci, Co, H, k = shape
    x, weights, y = B * Ci * H * H, (k * k * Ci + 2) * Co, 4 * B * Co * H * H
    return itemsize * (x + weights + y if direction == "forward" else 3 * x + 3 * weights + 2 * y)
