"""How group_norm in Triton cuts a tensor among programs, and what its kernels have in common.

A program takes a tile of channels by pixels, whichever of the two lie side by side in memory, and walks a slice of the
pixels with it. A tile covers whole groups, or a part of one, so that a group's parts are few enough to be merged by
every program of the launch that needs them.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._layout import memory_format
from .activation import to_compute

TILE_BYTES = 8192  # 16 bytes four times for each of 128 threads
PROGRAMS = 4096  # more than twice what the largest GPU runs at a time, so that the last ones even out
FILLED = 1024  # programs that still fill it: 132 multiprocessors with eight of 64 registers a thread
# Parts that are merged in front of every tile, of all its groups: 4 KB from the L2, two loads of 16 bytes a thread,
# under a microsecond where a launch of its own takes two or more. 1024 programs read 4 MB so: 1 us at 4.3 TB/s.
IN_FRONT = 512
MERGED = 1024  # parts that are merged at a time


class Cut(NamedTuple):
    """By the shape alone, so that sums are the same on every GPU."""

    groups: int  # of a tile
    blocks: int  # of channels that a group is cut into; more than one where a tile is a part of a group
    piece: int  # pixels of a slice
    slices: int
    programs: int
    in_front: bool  # whether every program merges the parts of its groups; else a launch of its own does
    ALIGN: int  # of which every tile's first channel and end are multiples: then loads along them take 16 bytes
    BC: int  # a tile's channels
    BP: int  # and pixels
    BG: int  # and groups, at least
    PB: int  # parts of each group that are merged at a time
    JB: int  # channels whose sums a program merges, that all programs of a tile together have them
    SB: int  # slices of each that are merged at a time

    @property
    def parts(self):
        return self.blocks * self.slices

    def of(self, kernel):
        """Those of them that the kernel takes."""
        return {name: value for name, value in self._asdict().items() if name in kernel.arg_names}


def cut(x, num_groups, grad=None):
    """How x is cut, and its gradient where both are read."""
    B, C, pixels = x.size(0), x.size(1), math.prod(x.shape[2:])
    size = TILE_BYTES // x.element_size() // (1 if grad is None else 2)
    if memory_format(x) is torch.channels_last or pixels == 1:
        least = max(16, 128 // x.element_size())  # channels that are whole lines of memory
        widths = [width for width in (least, 2 * least, 4 * least) if width <= size]
    else:
        widths = [max(1, size // triton.next_power_of_2(max(pixels, 1)))]
    aligned = 16 // x.element_size() // math.gcd(16 // x.element_size(), C // num_groups)
    spans = [_span(num_groups, C // num_groups, width, aligned) for width in widths]
    BC, groups, blocks = min(spans, key=lambda span: _lanes(num_groups, *span))
    BP = min(triton.next_power_of_2(max(pixels, 1)), size // BC)
    columns = B * -(-num_groups // groups) * blocks
    tiles = max(1, -(-pixels // BP))
    slices = _slices(tiles, PROGRAMS // columns)
    few = min(slices, IN_FRONT // (groups * blocks))
    in_front = few == slices or columns * few >= FILLED
    slices = _slices(tiles, few) if in_front else slices
    piece = BP * -(-tiles // slices)
    BG = triton.next_power_of_2(groups)
    PB = min(triton.next_power_of_2(blocks * slices), MERGED // BG)
    JB = triton.next_power_of_2(-(-BC // slices))
    SB = min(triton.next_power_of_2(slices), MERGED // JB)
    ALIGN = math.gcd(groups * (C // num_groups), C, BC if blocks > 1 else C, 16)
    return Cut(groups, blocks, piece, slices, columns * slices, in_front, ALIGN, BC, BP, BG, PB, JB, SB)


def _span(num_groups, channels, width, aligned):
    """A tile's channels, a power of two, its groups and the tiles of a group."""
    groups = max(1, min(num_groups, width // channels))
    groups -= groups % aligned if groups > aligned else 0
    BC = min(width, triton.next_power_of_2(groups * channels))
    return BC, groups, -(-groups * channels // BC)


def _lanes(num_groups, BC, groups, blocks):
    """The channels that all tiles of an image have room for: those beyond its own do nothing."""
    return BC * blocks * -(-num_groups // groups)


def _slices(tiles, most):
    """The least number of slices of as many tiles each as there must be for `most` of them."""
    return -(-tiles // -(-tiles // max(1, most)))


def statistic(x, *shape):
    return x.new_empty(x.size(0), *shape, dtype=torch.promote_types(x.dtype, torch.float32))


def shape_of(x, num_groups):
    return x.size(1), x.size(1) // num_groups, math.prod(x.shape[2:])


def factors_of(weight, bias, scale, shift):
    """The factors, and how far apart their values are: of weight and bias by channel, of the others by image, too."""
    by_channel = [0 if t is None else t.stride(-1) for t in (weight, bias, scale, shift)]
    return weight, bias, scale, shift, *by_channel, *(0 if t is None else t.stride(0) for t in (scale, shift))


def walk(x, other=None):
    """Strides by image, channel and pixel, with sizes and strides of the pixels where one stride does not do."""
    stride = _pixel_stride(x)
    if stride is not None and (other is None or _pixel_stride(other) is not None):
        return x.stride(0), x.stride(1), stride, None, None
    return x.stride(0), x.stride(1), 0, tuple(x.shape[:1:-1]), tuple(x.stride()[:1:-1])


def _pixel_stride(x):
    axes = [d for d in range(2, x.dim()) if x.size(d) > 1]
    if all(x.stride(d) == x.stride(e) * x.size(e) for d, e in pairwise(axes)):
        return x.stride(axes[-1]) if axes else 1
    return None


def dense(y):
    return y.stride(0), y.stride(1), y.size(1) if memory_format(y) is torch.channels_last else 1


@triton.jit
def place(i, stride, sizes, strides):
    at = i * stride
    if sizes is not None:
        at = tl.zeros_like(i)
        for d in tl.static_range(len(sizes)):
            at += i % sizes[d] * strides[d]
            i //= sizes[d]
    return at


@triton.jit
def pivot(x, b, g, D, pixels, x_b, x_c, x_p, sizes, strides):
    """The mean of eight values from all over the groups g (any shape): statistics are of x less this."""
    there = g * 0 + pixels > 0
    total = to_compute(tl.load(x + b * x_b + g * D * x_c, mask=there, other=0))
    for i in tl.static_range(1, 8):
        at = (g * D + D * i // 8) * x_c + place(g * 0 + pixels.to(tl.int64) * i // 8, x_p, sizes, strides)
        total += to_compute(tl.load(x + b * x_b + at, mask=there, other=0))
    return total * 0.125


@triton.jit
def affine(b, c, inside, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b):
    """(xhat * weight + bias) * (1 + scale) + shift = xhat * gain + offset"""
    gain = tl.zeros_like(like) + 1
    offset = tl.zeros_like(like)
    if weight is not None:
        gain = to_compute(tl.load(weight + c * w_c, mask=inside, other=0)).to(like.dtype)
    if bias is not None:
        offset += to_compute(tl.load(bias + c * b_c, mask=inside, other=0)).to(like.dtype)
    if scale is not None:
        s = 1 + to_compute(tl.load(scale + b * s_b + c * s_c, mask=inside, other=0)).to(like.dtype)
        gain *= s
        offset *= s
    if shift is not None:
        offset += to_compute(tl.load(shift + b * t_b + c * t_c, mask=inside, other=0)).to(like.dtype)
    return gain, offset


@triton.jit
def tile_of(
    C, D, groups, blocks, slices,
    ALIGN: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """What this program has: its image; the first group; which block of channels and slice of pixels; then by channel
    the channel and whether there is one; by group the group of all images, whether there is one, and its channels.

    Backwards, so that what was read last is read first.
    """
    i = tl.program_id(0)
    if BACKWARDS:
        i = tl.num_programs(0) - 1 - i
    spans = tl.cdiv(C // D, groups)
    b = (i // slices // blocks // spans).to(tl.int64)
    first = (i // slices // blocks % spans * groups).to(tl.int64)
    block, s = i // slices % blocks, (i % slices).to(tl.int64)
    k = block * BC + tl.arange(0, BC)
    c = tl.max_contiguous(tl.multiple_of(first * D + k, ALIGN), BC)
    j = tl.arange(0, BG)
    has = k // ALIGN < (tl.minimum(groups * D, C - first * D) // ALIGN)
    real = (j < groups) & (first + j < C // D)
    unit = b * (C // D) + tl.where(real, first + j, 0)
    members = (k // D)[None, :] == j[:, None]
    return b, block, s, c, has, unit, real, members & has[None, :]


@triton.jit
def by_channel(of_group, members):
    """Of every channel the value of its group."""
    return tl.sum(tl.where(members, of_group[:, None], 0), 0)


@triton.jit
def by_group(of_channel, members):
    """Of every group the sum over its channels."""
    return tl.sum(tl.where(members, of_channel[None, :], 0), 1)


@triton.jit
def store_part(parts, unit, real, i, count, one, two):
    at = (unit * count + i) * 2
    tl.store(parts + at, one, mask=real)
    tl.store(parts + at + 1, two, mask=real)


@triton.jit
def merge_moments(parts, unit, real, count, D, pixels, piece, slices, BC: tl.constexpr, PB: tl.constexpr):
    """Mean and variance of the groups from those of their parts (Chan et al. 1979), in an order the shape decides."""
    like = tl.load(parts + unit * count * 2, mask=real, other=0)
    n = tl.zeros((1, PB), like.dtype)
    total = like[:, None] * 0 + n
    for start in range(0, count, PB):
        i = start + tl.arange(0, PB)
        weight = _weight(i, count, D, pixels, piece, slices, BC).to(like.dtype)[None, :]
        n += weight
        at = (unit[:, None] * count + i[None, :]) * 2
        total += weight * tl.load(parts + at, mask=real[:, None] & (i < count)[None, :], other=0)
    n_all = tl.maximum(tl.sum(n, 1), 1)
    mean = tl.sum(total, 1) / n_all
    m2 = like[:, None] * 0 + tl.zeros((1, PB), like.dtype)
    for start in range(0, count, PB):
        i = start + tl.arange(0, PB)
        weight = _weight(i, count, D, pixels, piece, slices, BC).to(like.dtype)[None, :]
        at, inside = (unit[:, None] * count + i[None, :]) * 2, real[:, None] & (i < count)[None, :]
        apart = tl.load(parts + at, mask=inside, other=0) - mean[:, None]
        m2 += weight * (tl.load(parts + at + 1, mask=inside, other=0) + apart * apart)
    return mean, tl.sum(m2, 1) / n_all


@triton.jit
def _weight(i, count, D, pixels, piece, slices, BC: tl.constexpr):
    """The elements of part i: its slice's pixels of its block's channels. A part alone is all there is."""
    of_pixels = tl.maximum(tl.minimum(pixels - i % slices * piece, piece), 0)
    of_channels = tl.maximum(tl.minimum(D - i // slices * BC, BC), 0)
    n = of_pixels.to(tl.int64) * of_channels
    return tl.where(i < count, tl.where(count == 1, 1, n), 0)


@triton.jit
def merge_sums(parts, unit, real, count, PB: tl.constexpr):
    """Both sums of the groups from those of their parts."""
    like = tl.load(parts + unit * count * 2, mask=real, other=0)
    one = like[:, None] * 0 + tl.zeros((1, PB), like.dtype)
    two = one
    for start in range(0, count, PB):
        i = start + tl.arange(0, PB)
        at, inside = (unit[:, None] * count + i[None, :]) * 2, real[:, None] & (i < count)[None, :]
        one += tl.load(parts + at, mask=inside, other=0)
        two += tl.load(parts + at + 1, mask=inside, other=0)
    return tl.sum(one, 1), tl.sum(two, 1)
