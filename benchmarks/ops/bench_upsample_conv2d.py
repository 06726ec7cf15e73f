"""Nearest-2x upsampling and a 3x3 convolution: decoder, UNet and GAN shapes, and the two ends in RGB."""

import torch
import torch.nn.functional as F

from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

SHAPES = (  # (B, Ci, Co, H); W = H
    (1, 512, 512, 64),
    (1, 256, 256, 128),
    (1, 512, 512, 32),
    (4, 128, 128, 32),
    (8, 64, 64, 16),
    (2, 320, 320, 32),
    (1, 640, 640, 16),
    (1, 1280, 1280, 8),
    (1, 128, 3, 128),
    (1, 64, 3, 256),
    (4, 64, 1, 32),
)
CUDA_SHAPES = (
    (1, 512, 512, 128),
    (1, 512, 512, 256),
    (1, 256, 256, 512),
    (8, 320, 320, 32),
    (2, 1280, 1280, 16),
    (16, 64, 64, 32),
    (1, 128, 3, 256),
)
QUICK_SHAPES = ((1, 128, 128, 32), (4, 64, 64, 16))
TINY_SHAPE = (1, 32, 32, 4)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "forward+backward")
GRADIENTS = ("x", "weight", "bias")
TOLERANCE = 1e-5
NOTE = (
    "FLOP: the plain count, 36 multiply-adds per low-resolution pixel, Ci and Co. The roofline counts what a provider "
    "really makes: 36, `fold` 16, `imagegen` 81 per 4x4 low-resolution pixels (5.06 each) from 24x24 on, below 25 per "
    "2x2 (6.25 each; in bfloat16 everywhere), 9 to at most four channels, `imagegen-cuda` 9, `imagegen-triton` 16. A "
    "backward counts twice a forward. `fold` is one ConvTranspose2d (kernel 4, stride 2, padding 1), its weights "
    "folded once before the clock starts, in training too. In forward+backward the weights are touched before every "
    "call, as an optimiser would."
)


def label(shape):
    B, Ci, Co, H = shape
    return f"({B}, {Ci}->{Co}, {H}x{H})"


def make_inputs(shape):
    B, Ci, Co, H = shape
    weight = torch.randn(Co, Ci, 3, 3) / (3 * Ci**0.5)
    return {"x": torch.randn(B, Ci, H, H), "weight": weight, "bias": torch.randn(Co)}


# y[2i] = w0 x[i-1] + (w1+w2) x[i] and y[2i+1] = (w0+w1) x[i] + w2 x[i+1]; a transposed convolution of stride 2 and
# padding 1 has y[o] = sum_i k[o-2i+1] x[i], so k = (w2, w1+w2, w0+w1, w0).
FOLD = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def fold_weight(weight):
    """(Co, Ci, 3, 3) -> (Ci, Co, 4, 4), summed in float32 at least and rounded once."""
    w = weight if weight.dtype == torch.float64 else weight.float()
    fold = torch.tensor(FOLD, dtype=w.dtype, device=w.device)
    return torch.einsum("ia,ocab,jb->coij", fold, w, fold).to(weight.dtype)


def plain(x, weight, bias):
    return eager.upsample_conv2d(x, weight, bias, "linear")


def folded(x, weight, bias):
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)


PROVIDERS = {
    "imagegen": Provider(ops.upsample_conv2d),
    "eager": Provider(plain),
    "fold": Provider(folded, prepare=lambda tensors: {**tensors, "weight": fold_weight(tensors["weight"])}),
}
reference = plain


def flops(shape):
    B, Ci, Co, H = shape
    return 2 * 36 * B * Ci * Co * H * H


def flops_made(shape, provider):
    ours = 9 if shape[2] <= 4 else 25 / 4 if shape[3] < 24 else 81 / 16
    made = {"imagegen": ours, "imagegen-cuda": 9, "imagegen-triton": 16, "fold": 16}
    return flops(shape) * made.get(provider, 36) / 36


def bytes_moved(shape, itemsize, direction):
    """x, weight and bias read, y written; backward: dy, x and weight read, their gradients written."""
    B, Ci, Co, H = shape
    x, weights, y = B * Ci * H * H, (9 * Ci + 1) * Co, 4 * B * Co * H * H
    return itemsize * (x + weights + y if direction == "forward" else 3 * x + 3 * weights + 2 * y)
