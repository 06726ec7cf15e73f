"""What group normalisation does to each channel, 32 groups: the pass over x that ops.conv2d spares the other two."""

import math

import torch

from benchmarks.ops import bench_group_norm
from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

SHAPES, CUDA_SHAPES = bench_group_norm.SHAPES, bench_group_norm.CUDA_SHAPES
QUICK_SHAPES = bench_group_norm.QUICK_SHAPES
TINY_SHAPE = bench_group_norm.TINY_SHAPE
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward",)  # a training step keeps the normalised x, and takes group_norm
GRADIENTS = ("x", "weight", "bias")
TOLERANCE = 1e-5
NOTE = "The roofline is the copy bandwidth, with bytes = x read once: reading alone can pass 100 % of it."

label = bench_group_norm.label
make_inputs = bench_group_norm.make_inputs


def fused(x, weight, bias):
    return torch.stack(ops.group_norm_factors(x, bench_group_norm.GROUPS, weight, bias))


def plain(x, weight, bias):
    return torch.stack(eager.group_norm_factors(x, bench_group_norm.GROUPS, weight, bias, 1e-5, None, None))


PROVIDERS = {"imagegen": Provider(fused), "eager": Provider(plain)}
reference = plain


def flops(shape):
    """3 per element, for the sums."""
    return 3 * math.prod(bench_group_norm.sizes(shape))


def flops_made(shape, provider):
    return flops(shape)


def bytes_moved(shape, itemsize, direction):
    """x read, gain and offset written in float32; backward: their gradients and x read, dx written."""
    B, C, *_ = shape
    x, factors = itemsize * math.prod(bench_group_norm.sizes(shape)), 4 * 2 * B * C
    return x + factors if direction == "forward" else 3 * x + 2 * factors
