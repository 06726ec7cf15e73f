"""Group normalisation in Triton: the forward, in as few launches as the shape allows.

One, which reads x once, where a group stays in a program's registers. One, which reads it twice, where groups are so
many that they alone fill the GPU. Else two: statistics of every tile's groups, then apply, which merges them in front
of every tile; three where a group has so many parts that merging them so often would show. Nothing is added by atomics,
and everything in an order that the shape alone decides.

Predicted for an H200, not measured: bytes at 4.3 TB/s, from the L2 of 50 MB at twice that, 2.5 us a launch.
  (B, C, H, W), 32 groups      programs                launches       us
  (1, 512, 32, 32) bf16        32                      whole          3     16 warps a program: one round of loads
  (8, 320, 32, 32) bf16        256                     whole          5     5 MB read and written
  (1, 512, 128, 128) bf16      2048                    two            15    17 MB read, read from the L2 and written
  the same, channels_last      1024                    two            15    of 128 parts, 4 groups a tile: 4 KB
  (1, 128, 512, 512) bf16      4096                    two            41    67 MB
  the same, channels_last      4096                    three          44    2048 parts, 16 groups a tile: 256 KB
  (1, 128, 5120, 256) bf16     4096                    two            240   336 MB, the second reading from DRAM, too
  (16, 512, 64, 64) bf16       512                     looped         34    67 MB; the second reading from the L2
"""

import math

import torch
import triton
import triton.language as tl

from .._layout import memory_format
from .activation import activate, to_compute
from .group_norm_tiles import (
    MERGED,
    affine,
    by_channel,
    by_group,
    cut,
    dense,
    factors_of,
    merge_moments,
    pivot,
    place,
    shape_of,
    statistic,
    store_part,
    tile_of,
    walk,
)

WHOLE = 16384  # elements of a group that one program keeps in registers, 32 for each of 512 threads
# From this many groups on they fill a GPU, two for each of 132 multiprocessors, and a program loops over its own, as
# long as all that are looped over at a time stay in the L2 for the second reading: 264 of them in 34 MB of 50.
LOOPED, LOOPED_BYTES = 256, 128 << 10
LOOPED_TILE = 8192  # elements, 32 for each of 256 threads


def group_norm(x, num_groups, weight, bias, eps, scale, shift, activation, moments=None):
    """y, and the mean and rstd of every group; moments: its mean and variance where they are known."""
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean, rstd = (statistic(x, num_groups) for _ in range(2))
    if x.size(0) * x.size(1) == 0:
        return y, mean, rstd
    common = *shape_of(x, num_groups), *walk(x), *dense(y), *factors_of(weight, bias, scale, shift), eps
    with torch.cuda.device_of(x):
        one = None if moments is not None else _in_one_launch(x, num_groups)
        if one is not None:
            kernel, options = one
            kernel[(x.size(0) * num_groups,)](x, y, mean, rstd, *common, ACT=activation, **options)
        else:
            tiles = cut(x, num_groups)
            parts, pivots = (moments, None) if moments is not None else _statistics(x, num_groups, tiles)
            group_norm_apply_kernel[(tiles.programs,)](
                x, y, mean, rstd, parts, pivots, parts.size(-2) if pivots is not None else 1, *common, ACT=activation,
                **tiles.of(group_norm_apply_kernel),
            )  # fmt: skip
    return y, mean, rstd


def group_norm_factors(x, num_groups, weight, bias, eps, scale, shift):
    """The gain and offset of every image and channel."""
    gain, offset = (statistic(x, x.size(1)) for _ in range(2))
    if x.size(0) * x.size(1) > 0:
        with torch.cuda.device_of(x):
            tiles = cut(x, num_groups)
            parts, pivots = _parts(x, num_groups, tiles)
            group_norm_factors_kernel[(x.size(0) * num_groups,)](
                parts, pivots, gain, offset, tiles.parts, *shape_of(x, num_groups),
                *factors_of(weight, bias, scale, shift), eps, **tiles.of(group_norm_factors_kernel) | {"PB": MERGED},
            )  # fmt: skip
    return gain, offset


def _in_one_launch(x, num_groups):
    """The kernel in which a program takes a whole group, with its constants; None where that does not do."""
    pixels, channels = math.prod(x.shape[2:]), x.size(1) // num_groups
    if pixels == 0:
        return None
    BC, BP = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    if BC * BP <= WHOLE:
        return group_norm_whole_kernel, {"BC": BC, "BP": BP, "num_warps": min(16, max(1, BC * BP // 1024))}
    lies_together = walk(x)[2] == 1 and (x.stride(1) == pixels or channels == 1)
    few = channels * pixels * x.element_size() <= LOOPED_BYTES
    if lies_together and few and x.size(0) * num_groups >= LOOPED:
        BP = min(BP, LOOPED_TILE)
        return group_norm_looped_kernel, {"BC": min(BC, LOOPED_TILE // BP), "BP": BP, "num_warps": 8}
    return None


def _parts(x, num_groups, tiles):
    """The moments of every part of every group, which are of x less the group's pivot."""
    parts, pivots = statistic(x, num_groups, tiles.parts, 2), statistic(x, num_groups)
    group_norm_statistics_kernel[(tiles.programs,)](
        x, parts, pivots, *shape_of(x, num_groups), *walk(x), **tiles.of(group_norm_statistics_kernel)
    )
    return parts, pivots


def _statistics(x, num_groups, tiles):
    """The same, as many of them as a program merges in front of its tile."""
    parts, pivots = _parts(x, num_groups, tiles)
    if tiles.in_front:
        return parts, pivots
    merged = statistic(x, num_groups, 1, 2)
    group_norm_merge_kernel[(x.size(0) * num_groups,)](
        parts, merged, tiles.parts, *shape_of(x, num_groups)[1:], **tiles.of(group_norm_merge_kernel) | {"PB": MERGED}
    )
    return merged, pivots


@triton.jit
def group_norm_whole_kernel(
    x, y, mean, rstd, C, D, pixels, x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, eps: tl.float64,
    ACT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Statistics and output of one group, which stays in registers."""
    unit = tl.program_id(0).to(tl.int64)
    b, g = unit // (C // D), unit % (C // D)
    c = tl.arange(0, BC).to(tl.int64)
    i = tl.arange(0, BP).to(tl.int64)
    inside = (c < D)[:, None] & (i < pixels)[None, :]
    at = b * x_b + ((g * D + c) * x_c)[:, None] + place(i, x_p, sizes, strides)[None, :]
    pivot = to_compute(tl.load(x + b * x_b + g * D * x_c))
    d = tl.where(inside, to_compute(tl.load(x + at, mask=inside, other=0)) - pivot, 0)
    share = tl.full((), 1, d.dtype) / (D * pixels)
    pivot_mean = tl.sum(d) * share
    d = tl.where(inside, d - pivot_mean, 0)
    r = 1 / tl.sqrt(tl.sum(d * d) * share + tl.full((), eps, d.dtype))
    tl.store(mean + unit, pivot + pivot_mean)
    tl.store(rstd + unit, r)
    like = tl.zeros((BC,), d.dtype)
    gain, offset = affine(b, g * D + c, c < D, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    z = d * (gain * r)[:, None] + offset[:, None]
    v = activate(z, tl.full((1, 1), 0.2, z.dtype), ACT)
    at = b * y_b + ((g * D + c) * y_c)[:, None] + (i * y_p)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normalise(
    x, y, b, c, has, first, last, pixels, center, gain, offset, x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p,
    ACT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = act((x - center) * gain + offset) for the channels c and the pixels from first to last."""
    for start in range(first, last, BP):
        i = start + tl.arange(0, BP).to(tl.int64)
        inside = (i < pixels)[None, :] & has[:, None]
        at = b * x_b + (c * x_c)[:, None] + place(i, x_p, sizes, strides)[None, :]
        d = to_compute(tl.load(x + at, mask=inside, other=0)) - center[:, None]
        z = d * gain[:, None] + offset[:, None]
        v = activate(z, tl.full((1, 1), 0.2, z.dtype), ACT)
        at = b * y_b + (c * y_c)[:, None] + (i * y_p)[None, :]
        tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_looped_kernel(
    x, y, mean, rstd, C, D, pixels, x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, eps: tl.float64,
    ACT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Statistics and output of one group, which is one run of memory that is read twice."""
    unit = tl.program_id(0).to(tl.int64)
    b, g = unit // (C // D), unit % (C // D)
    about = tl.sum(pivot(x, b, g + tl.zeros((1,), tl.int64), D, pixels, x_b, x_c, x_p, sizes, strides))
    run, elements = x + b * x_b + g * D * x_c, D * pixels
    of_lane = tl.zeros((BC * BP,), about.dtype)
    m2 = tl.zeros((BC * BP,), about.dtype)
    n = tl.full((), 0, about.dtype)
    for start in range(0, elements, BC * BP):
        i = start + tl.arange(0, BC * BP)
        v = to_compute(tl.load(run + i, mask=i < elements, other=0)) - about
        n += 1
        d = tl.where(i < elements, v - of_lane, 0)
        of_lane += d * (1 / n)
        m2 += d * (v - of_lane)
    rest = elements - (tl.cdiv(elements, BC * BP) - 1) * BC * BP  # lanes that had an element in every round
    n_lane = tl.where(tl.arange(0, BC * BP) < rest, n, n - 1)
    pivot_mean = tl.sum(of_lane * n_lane) / elements
    apart = of_lane - pivot_mean
    r = 1 / tl.sqrt(tl.sum(m2 + apart * apart * n_lane) / elements + tl.full((), eps, about.dtype))
    center = about + pivot_mean
    lost = (about - center) + pivot_mean
    tl.store(mean + unit, center)
    tl.store(rstd + unit, r)
    for block in range(0, D, BC):
        k = block + tl.arange(0, BC)
        c, has = g * D + k, k < D
        like = tl.zeros((BC,), about.dtype)
        gain, offset = affine(b, c, has, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
        gain *= r
        offset -= lost * gain
        _normalise(
            x, y, b, c, has, 0, pixels, pixels, like + center, gain, offset,
            x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p, ACT, BP,
        )  # fmt: skip


@triton.jit
def group_norm_statistics_kernel(
    x, parts, pivots, C, D, pixels, x_b, x_c, x_p, sizes, strides, groups, blocks, piece, slices,
    ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Mean and variance of x - pivot over this program's part of each of its groups (Welford 1962)."""
    b, block, s, c, has, unit, real, members = tile_of(C, D, groups, blocks, slices, ALIGN, BC, BG, False)
    of_group = pivot(x, b, unit % (C // D), D, pixels, x_b, x_c, x_p, sizes, strides)
    tl.store(pivots + unit, of_group, mask=real & (unit * 0 + block + s == 0))
    about = by_channel(of_group, members)
    mean = tl.zeros((BC, BP), about.dtype)
    m2 = tl.zeros((BC, BP), about.dtype)
    rounds = tl.full((), 0, about.dtype)
    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :]
        at = b * x_b + (c * x_c)[:, None] + place(i, x_p, sizes, strides)[None, :]
        v = to_compute(tl.load(x + at, mask=inside & has[:, None], other=0)) - about[:, None]
        rounds += 1
        d = tl.where(inside, v - mean, 0)
        mean += d * (1 / rounds)
        m2 += d * (v - mean)
    n = tl.cdiv(pixels - s * piece - tl.arange(0, BP), BP)  # of a lane, which runs out of pixels, if at all, last
    n = tl.maximum(tl.minimum(n, tl.cdiv(piece, BP)), 0).to(about.dtype)[None, :]
    total = tl.maximum(tl.sum(n, 1), 1)
    of_channel = tl.sum(mean * n, 1) / total
    apart = mean - of_channel[:, None]
    variance = tl.sum(m2 + apart * apart * n, 1) / total
    channels = tl.maximum(by_group(tl.where(has, 1.0, 0.0).to(about.dtype), members), 1)
    of_part = by_group(of_channel, members) / channels
    off = of_channel - by_channel(of_part, members)
    store_part(
        parts, unit, real, block * slices + s, blocks * slices,
        of_part, by_group(variance + off * off, members) / channels,
    )  # fmt: skip


@triton.jit
def group_norm_merge_kernel(
    parts, merged, count, D, pixels, piece, slices, BC: tl.constexpr, PB: tl.constexpr
):  # fmt: skip
    """All parts of one group as one."""
    unit = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    mean, variance = merge_moments(parts, unit, unit >= 0, count, D, pixels, piece, slices, BC, PB)
    store_part(merged, unit, unit >= 0, 0, 1, mean, variance)


@triton.jit
def _finish(parts, pivots, unit, real, count, D, pixels, eps, piece, slices, BC: tl.constexpr, PB: tl.constexpr):
    """Of every group the mean, in two numbers, the first of which is what is kept of it, and rstd."""
    mean, variance = merge_moments(parts, unit, real, count, D, pixels, piece, slices, BC, PB)
    about = mean * 0
    if pivots is not None:
        about = tl.load(pivots + unit, mask=real, other=0)
    center = about + mean
    return center, (about - center) + mean, 1 / tl.sqrt(variance + tl.full((1,), eps, mean.dtype))


@triton.jit
def group_norm_factors_kernel(
    parts, pivots, gain, offset, count, C, D, pixels, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b,
    eps: tl.float64, piece, slices, BC: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """Gain and offset of the channels of one group: y = x * gain + offset"""
    unit = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    center, lost, r = _finish(parts, pivots, unit, unit >= 0, count, D, pixels, eps, piece, slices, BC, PB)
    b, g = tl.program_id(0).to(tl.int64) // (C // D), tl.program_id(0).to(tl.int64) % (C // D)
    for start in range(0, D, PB):
        k = start + tl.arange(0, PB)
        c = g * D + k
        like = tl.zeros((PB,), center.dtype)
        by, plus = affine(b, c, k < D, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
        by *= r
        tl.store(gain + b * C + c, by, mask=k < D)
        tl.store(offset + b * C + c, (plus - lost * by) - center * by, mask=k < D)


@triton.jit
def group_norm_apply_kernel(
    x, y, mean, rstd, parts, pivots, count, C, D, pixels, x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, eps: tl.float64, groups, blocks, piece, slices,
    ACT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * rstd * gain + offset), of what the parts of the groups come to."""
    b, block, s, c, has, unit, real, members = tile_of(C, D, groups, blocks, slices, ALIGN, BC, BG, True)
    center, lost, r = _finish(parts, pivots, unit, real, count, D, pixels, eps, piece, slices, BC, PB)
    leads = real & (unit * 0 + block + s == 0)
    tl.store(mean + unit, center, mask=leads)
    tl.store(rstd + unit, r, mask=leads)
    center = by_channel(center, members)
    gain, offset = affine(b, c, has, center, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    gain *= by_channel(r, members)
    offset -= by_channel(lost, members) * gain
    _normalise(
        x, y, b, c, has, s * piece, s * piece + piece, pixels, center, gain, offset,
        x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p, ACT, BP,
    )  # fmt: skip
