"""Group normalisation in Triton.

A program takes a tile of channels by pixels, whichever of the two lie side by side in memory, of one image. Where a
group is one tile, one launch reads x once; else statistics, one number for each group of them, and apply.
"""

import math
from itertools import pairwise

import torch
import triton
import triton.language as tl

from .._layout import memory_format
from .activation import activate, derivative, to_compute

TILE_BYTES = 8192  # 16 bytes four times for each of 128 threads
WHOLE = 16384  # elements of a group that one program keeps in registers, 32 for each of 512 threads
PROGRAMS = 4096  # more than twice what the largest GPU runs at a time, so that the last ones even out
PARTS = 1024  # of a group, merged at a time


def group_norm(x, num_groups, weight, bias, eps, scale, shift, activation, moments=None):
    """y, and the mean and rstd of every group; moments: its mean and variance where they are known."""
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean, rstd, lost = (_statistic(x, num_groups) for _ in range(3))
    if moments is not None:
        mean.copy_(moments[..., 0])
        torch.rsqrt(moments[..., 1] + eps, out=rstd)
    if x.size(0) * x.size(1) == 0:
        return y, mean, rstd
    shape, factors = _shape(x, num_groups), _factors(weight, bias, scale, shift)
    with torch.cuda.device_of(x):
        pixels, channels = math.prod(x.shape[2:]), x.size(1) // num_groups
        few = triton.next_power_of_2(pixels) * triton.next_power_of_2(channels) <= WHOLE
        if moments is None and few and pixels:
            whole = {"BC": triton.next_power_of_2(channels), "BP": triton.next_power_of_2(pixels)}
            warps = min(16, max(1, whole["BC"] * whole["BP"] // 1024))
            group_norm_whole_kernel[(x.size(0) * num_groups,)](
                x, y, mean, rstd, *shape, *_walk(x), *_dense(y), *factors, eps, ACT=activation, **whole, num_warps=warps
            )
        else:
            tile, grid = _tiles(x)
            if moments is None:
                _statistics(x, mean, rstd, lost, None, None, shape, factors, eps, num_groups, tile, grid)
            else:
                lost = None
            group_norm_apply_kernel[grid](
                x, y, mean, rstd, lost, *shape, *_walk(x), *_dense(y), *factors, *tile[:2], ACT=activation, **tile[2]
            )
    return y, mean, rstd


def group_norm_factors(x, num_groups, weight, bias, eps, scale, shift):
    """The gain and offset of every image and channel."""
    gain, offset = (_statistic(x, x.size(1)) for _ in range(2))
    mean, rstd, lost = (_statistic(x, num_groups) for _ in range(3))
    if x.size(0) * x.size(1) > 0:
        shape, factors = _shape(x, num_groups), _factors(weight, bias, scale, shift)
        with torch.cuda.device_of(x):
            _statistics(x, mean, rstd, lost, gain, offset, shape, factors, eps, num_groups, *_tiles(x))
    return gain, offset


def group_norm_backward(grad, x, mean, rstd, num_groups, weight, bias, scale, shift, activation):
    """The gradient of x, and per image and channel the sums of dz and of dz times the normalised x."""
    dx = torch.empty_like(x, memory_format=memory_format(x))
    sum_dz, sum_dz_xhat = (_statistic(x, x.size(1)) for _ in range(2))
    if x.size(0) * x.size(1) == 0:
        return dx, sum_dz, sum_dz_xhat
    shape, factors = _shape(x, num_groups), _factors(weight, bias, scale, shift)
    level, slope = (_statistic(x, num_groups) for _ in range(2))
    with torch.cuda.device_of(x):
        tile, grid = _tiles(x, grad)
        parts = [mean.new_empty(x.size(0), x.size(1), tile[1]) for _ in range(2)]
        walks = *_walk(x, grad), *_walk(grad, x)
        group_norm_gradient_sums_kernel[grid](
            grad, x, *parts, mean, rstd, *shape, *walks, *factors, *tile[:2], ACT=activation, **tile[2]
        )
        channels = x.size(1) // num_groups
        blocks = {"BD": min(64, triton.next_power_of_2(channels)), "BS": min(64, triton.next_power_of_2(tile[1]))}
        group_norm_sums_kernel[(x.size(0) * num_groups,)](
            *parts, rstd, sum_dz, sum_dz_xhat, level, slope, *shape, *factors, tile[1], **blocks
        )
        group_norm_gradient_kernel[grid](
            grad, x, dx, mean, rstd, level, slope, *shape, *walks, *_dense(dx), *factors, *tile[:2], ACT=activation,
            **tile[2],
        )  # fmt: skip
    return dx, sum_dz, sum_dz_xhat


def _statistics(x, mean, rstd, lost, gain, offset, shape, factors, eps, num_groups, tile, grid):
    parts = [mean.new_empty(x.size(0), x.size(1), tile[1]) for _ in range(2)]
    group_norm_statistics_kernel[grid](x, *parts, *shape, *_walk(x), *tile[:2], **tile[2])
    group_norm_finish_kernel[(x.size(0) * num_groups,)](
        x, *parts, mean, rstd, lost, gain, offset, *shape, *_walk(x), *factors, eps, *tile[:2], BLOCK=PARTS
    )


def _statistic(x, n):
    return x.new_empty(x.size(0), n, dtype=torch.promote_types(x.dtype, torch.float32))


def _shape(x, num_groups):
    return x.size(1), x.size(1) // num_groups, math.prod(x.shape[2:])


def _factors(weight, bias, scale, shift):
    """The factors, and how far apart their values are: of weight and bias by channel, of the others by image, too."""
    by_channel = [0 if t is None else t.stride(-1) for t in (weight, bias, scale, shift)]
    return weight, bias, scale, shift, *by_channel, *(0 if t is None else t.stride(0) for t in (scale, shift))


def _walk(x, other=None):
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


def _dense(y):
    return y.stride(0), y.stride(1), y.size(1) if memory_format(y) is torch.channels_last else 1


def _tiles(x, grad=None):
    """((pixels of a slice, slices, block sizes), grid): tiles follow what lies side by side in x."""
    C, pixels = x.size(1), math.prod(x.shape[2:])
    size = TILE_BYTES // x.element_size() // (1 if grad is None else 2)
    if memory_format(x) is torch.channels_last or pixels == 1:
        BC = min(triton.next_power_of_2(C), max(16, 128 // x.element_size()))
        BP = min(triton.next_power_of_2(max(pixels, 1)), size // BC)
    else:
        BP = min(triton.next_power_of_2(max(pixels, 1)), size)
        BC = min(triton.next_power_of_2(C), size // BP)
    columns = x.size(0) * triton.cdiv(C, BC)
    piece = BP * max(1, triton.cdiv(columns * pixels, BP * PROGRAMS))
    slices = max(1, triton.cdiv(pixels, piece))
    return (piece, slices, {"BC": BC, "BP": BP}), (columns * slices,)


@triton.jit
def _place(i, stride, sizes, strides):
    at = i * stride
    if sizes is not None:
        at = tl.zeros_like(i)
        for d in tl.static_range(len(sizes)):
            at += i % sizes[d] * strides[d]
            i //= sizes[d]
    return at


@triton.jit
def _pivot(x, b, g, D, pixels, x_b, x_c, x_p, sizes, strides):
    """The mean of eight values from all over the groups g (any shape): statistics are of x less this."""
    there = g * 0 + pixels > 0
    total = to_compute(tl.load(x + b * x_b + g * D * x_c, mask=there, other=0))
    for i in tl.static_range(1, 8):
        at = (g * D + D * i // 8) * x_c + _place(g * 0 + pixels.to(tl.int64) * i // 8, x_p, sizes, strides)
        total += to_compute(tl.load(x + b * x_b + at, mask=there, other=0))
    return total * 0.125


@triton.jit
def _affine(b, c, inside, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b):
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
def _channels(b, c, C, D, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b):
    """The groups of the channels c of image b, and their center, gain and offset: z = (x - center) * gain + offset"""
    unit = b * (C // D) + tl.where(c < C, c, 0) // D
    center = tl.load(mean + unit)
    gain, offset = _affine(b, c, c < C, center, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    return unit, (center, gain * tl.load(rstd + unit), offset)


@triton.jit
def _tile(C, slices, BC: tl.constexpr, BACKWARDS: tl.constexpr):
    """The image, the channels and the slice of this program; backwards, so that what was read last is read first."""
    i = tl.program_id(0)
    if BACKWARDS:
        i = tl.num_programs(0) - 1 - i
    blocks = tl.cdiv(C, BC)
    c = i // slices % blocks * BC + tl.arange(0, BC)
    return (i // slices // blocks).to(tl.int64), c.to(tl.int64), (i % slices).to(tl.int64)


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
    at = b * x_b + ((g * D + c) * x_c)[:, None] + _place(i, x_p, sizes, strides)[None, :]
    pivot = to_compute(tl.load(x + b * x_b + g * D * x_c))
    d = tl.where(inside, to_compute(tl.load(x + at, mask=inside, other=0)) - pivot, 0)
    share = tl.full((), 1, d.dtype) / (D * pixels)
    pivot_mean = tl.sum(d) * share
    d = tl.where(inside, d - pivot_mean, 0)
    r = 1 / tl.sqrt(tl.sum(d * d) * share + tl.full((), eps, d.dtype))
    tl.store(mean + unit, pivot + pivot_mean)
    tl.store(rstd + unit, r)
    like = tl.zeros((BC,), d.dtype)
    gain, offset = _affine(b, g * D + c, c < D, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    z = d * (gain * r)[:, None] + offset[:, None]
    v = activate(z, tl.full((1, 1), 0.2, z.dtype), ACT)
    at = b * y_b + ((g * D + c) * y_c)[:, None] + (i * y_p)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_statistics_kernel(
    x, part_mean, part_m2, C, D, pixels, x_b, x_c, x_p, sizes, strides, piece, slices,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of x - pivot over a slice of the pixels, of every channel (Welford 1962)."""
    b, c, s = _tile(C, slices, BC, False)
    pivot = _pivot(x, b, tl.where(c < C, c, 0) // D, D, pixels, x_b, x_c, x_p, sizes, strides)
    mean = tl.zeros((BC, BP), pivot.dtype)
    m2 = tl.zeros((BC, BP), pivot.dtype)
    n = tl.zeros((1, BP), pivot.dtype)
    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :]
        at = b * x_b + (c * x_c)[:, None] + _place(i, x_p, sizes, strides)[None, :]
        v = to_compute(tl.load(x + at, mask=inside & (c < C)[:, None], other=0)) - pivot[:, None]
        n += tl.where(inside, 1.0, 0.0).to(n.dtype)
        d = tl.where(inside, v - mean, 0)
        mean += d / tl.where(n > 0, n, 1)
        m2 += d * (v - mean)
    total = tl.sum(n, 1)
    of_channel = tl.sum(mean * n, 1) / tl.where(total > 0, total, 1)
    apart = mean - of_channel[:, None]
    at = (b * C + c) * slices + s
    tl.store(part_mean + at, of_channel, mask=c < C)
    tl.store(part_m2 + at, tl.sum(m2 + apart * apart * n, 1), mask=c < C)


@triton.jit
def group_norm_finish_kernel(
    x, part_mean, part_m2, mean, rstd, lost, gain, offset, C, D, pixels, x_b, x_c, x_p, sizes, strides,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, eps: tl.float64, piece, slices, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of one group from its parts (Chan et al. 1979); where asked for, gain and offset of its channels.

    Its mean is what is kept of it, plus `lost`.
    """
    unit = tl.program_id(0).to(tl.int64)
    b, g = unit // (C // D), unit % (C // D)
    pivot = _pivot(x, b, g + tl.zeros((1,), tl.int64), D, pixels, x_b, x_c, x_p, sizes, strides)
    n = tl.zeros((BLOCK,), pivot.dtype)
    total = tl.zeros((BLOCK,), pivot.dtype)
    first = unit * D * slices
    for start in range(0, D * slices, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count = _count(i, D * slices, pixels, piece, slices).to(pivot.dtype)
        n += count
        total += count * tl.load(part_mean + first + i, mask=i < D * slices, other=0)
    n_all = tl.maximum(tl.sum(n), 1)
    about = tl.sum(total) / n_all
    m2 = tl.zeros((BLOCK,), pivot.dtype)
    for start in range(0, D * slices, BLOCK):
        i = start + tl.arange(0, BLOCK)
        apart = tl.load(part_mean + first + i, mask=i < D * slices, other=0) - about
        m2 += tl.load(part_m2 + first + i, mask=i < D * slices, other=0)
        m2 += _count(i, D * slices, pixels, piece, slices).to(pivot.dtype) * apart * apart
    r = 1 / tl.sqrt(tl.sum(m2) / n_all + tl.full((1,), eps, pivot.dtype))
    center = pivot + about
    rest = (pivot - center) + about
    one = unit + tl.zeros((1,), tl.int64)
    tl.store(mean + one, center)
    tl.store(rstd + one, r)
    tl.store(lost + one, rest)
    if gain is not None:
        for start in range(0, D, BLOCK):
            c = start + tl.arange(0, BLOCK)
            like = tl.zeros((BLOCK,), pivot.dtype)
            by, plus = _affine(b, g * D + c, c < D, like, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
            by *= r
            tl.store(gain + unit * D + c, by, mask=c < D)
            tl.store(offset + unit * D + c, (plus - rest * by) - center * by, mask=c < D)


@triton.jit
def _count(i, parts, pixels, piece, slices):
    """The pixels that part i of a group was made of."""
    left = pixels - i % slices * piece
    return tl.where(i < parts, tl.maximum(tl.minimum(left, piece), 0), 0)


@triton.jit
def group_norm_apply_kernel(
    x, y, mean, rstd, lost, C, D, pixels, x_b, x_c, x_p, sizes, strides, y_b, y_c, y_p,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, piece, slices,
    ACT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * rstd * gain + offset)"""
    b, c, s = _tile(C, slices, BC, True)
    unit, (center, gain, offset) = _channels(
        b, c, C, D, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b
    )
    if lost is not None:
        offset -= tl.load(lost + unit) * gain
    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :] & (c < C)[:, None]
        at = b * x_b + (c * x_c)[:, None] + _place(i, x_p, sizes, strides)[None, :]
        d = to_compute(tl.load(x + at, mask=inside, other=0)) - center[:, None]
        z = d * gain[:, None] + offset[:, None]
        v = activate(z, tl.full((1, 1), 0.2, z.dtype), ACT)
        at = b * y_b + (c * y_c)[:, None] + (i * y_p)[None, :]
        tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dz(
    grad, x, b, c, i, inside, x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, k, ACT: tl.constexpr
):
    """dz and x - mean of a tile; k: center, gain and offset of its channels."""
    at = b * x_b + (c * x_c)[:, None] + _place(i, x_p, sizes, strides)[None, :]
    d = to_compute(tl.load(x + at, mask=inside, other=0)) - k[0][:, None]
    at = b * g_b + (c * g_c)[:, None] + _place(i, g_p, g_sizes, g_strides)[None, :]
    z = d * k[1][:, None] + k[2][:, None]
    slope = derivative(z, tl.full((1, 1), 0.2, z.dtype), ACT)
    return to_compute(tl.load(grad + at, mask=inside, other=0)) * slope, d


@triton.jit
def group_norm_gradient_sums_kernel(
    grad, x, part_dz, part_dz_d, mean, rstd, C, D, pixels,
    x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, piece, slices,
    ACT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of dz * (x - mean) over a slice of the pixels, of every channel."""
    b, c, s = _tile(C, slices, BC, False)
    _, k = _channels(b, c, C, D, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    dz_sum = tl.zeros((BC, BP), k[0].dtype)
    dz_d_sum = tl.zeros((BC, BP), k[0].dtype)
    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :] & (c < C)[:, None]
        dz, d = _dz(
            grad, x, b, c, i, inside, x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, k, ACT
        )  # fmt: skip
        dz_sum += dz
        dz_d_sum += dz * d
    at = (b * C + c) * slices + s
    tl.store(part_dz + at, tl.sum(dz_sum, 1), mask=c < C)
    tl.store(part_dz_d + at, tl.sum(dz_d_sum, 1), mask=c < C)


@triton.jit
def group_norm_sums_kernel(
    part_dz, part_dz_d, rstd, sum_dz, sum_dz_xhat, level, slope, C, D, pixels,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, slices, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The sums of every channel of a group, and what its gradient subtracts: (x - mean) * slope + level."""
    unit = tl.program_id(0).to(tl.int64)
    b, g = unit // (C // D), unit % (C // D)
    r = tl.load(rstd + unit)
    of_group = tl.zeros((BD,), r.dtype)
    of_group_d = tl.zeros((BD,), r.dtype)
    for start in range(0, D, BD):
        c = start + tl.arange(0, BD)
        dz = tl.zeros((BD,), r.dtype)
        dz_d = tl.zeros((BD,), r.dtype)
        for s in range(0, slices, BS):
            j = s + tl.arange(0, BS)
            inside = (c < D)[:, None] & (j < slices)[None, :]
            at = ((unit * D + c) * slices)[:, None] + j[None, :]
            dz += tl.sum(tl.load(part_dz + at, mask=inside, other=0), 1)
            dz_d += tl.sum(tl.load(part_dz_d + at, mask=inside, other=0), 1)
        tl.store(sum_dz + unit * D + c, dz, mask=c < D)
        tl.store(sum_dz_xhat + unit * D + c, dz_d * r, mask=c < D)
        gain, _ = _affine(b, g * D + c, c < D, dz, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
        of_group += gain * dz
        of_group_d += gain * dz_d
    n = tl.maximum(D * pixels, 1).to(r.dtype)
    tl.store(level + unit, tl.sum(of_group) * r / n)
    tl.store(slope + unit, tl.sum(of_group_d) * r * r * r / n)


@triton.jit
def group_norm_gradient_kernel(
    grad, x, dx, mean, rstd, level, slope, C, D, pixels,
    x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, y_b, y_c, y_p,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, piece, slices,
    ACT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """dx = dz * gain - ((x - mean) * slope + level)"""
    b, c, s = _tile(C, slices, BC, True)
    unit, k = _channels(b, c, C, D, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    of_level, of_slope = tl.load(level + unit), tl.load(slope + unit)
    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :] & (c < C)[:, None]
        dz, d = _dz(
            grad, x, b, c, i, inside, x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, k, ACT
        )  # fmt: skip
        v = dz * k[1][:, None] - (d * of_slope[:, None] + of_level[:, None])
        at = b * y_b + (c * y_c)[:, None] + (i * y_p)[None, :]
        tl.store(dx + at, v.to(dx.dtype.element_ty), mask=inside)
