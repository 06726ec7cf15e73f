"""Group normalisation in Triton: the backward.

Two launches: sums of every tile's channels and groups, then the gradient, which merges those of its groups in front of
every tile; three where they are too many for that. x and its gradient are read twice, dx written once.

Predicted for an H200, not measured, as in the forward: (1, 512, 128, 128) bf16 25 us, two launches in both layouts: 34
MB read twice, the second time from the L2, and 17 MB written; (1, 128, 5120, 256) bf16 395 us, 1.7 GB of DRAM.
"""

import torch
import triton
import triton.language as tl

from .._layout import memory_format
from .activation import derivative, to_compute
from .group_norm_tiles import (
    MERGED,
    affine,
    by_channel,
    by_group,
    cut,
    dense,
    factors_of,
    merge_sums,
    place,
    shape_of,
    statistic,
    store_part,
    tile_of,
    walk,
)


def group_norm_backward(grad, x, mean, rstd, num_groups, weight, bias, scale, shift, activation):
    """The gradient of x, and per image and channel the sums of dz and of dz times the normalised x."""
    dx = torch.empty_like(x, memory_format=memory_format(x))
    sum_dz, sum_dz_xhat = (statistic(x, x.size(1)) for _ in range(2))
    if x.size(0) * x.size(1) == 0:
        return dx, sum_dz, sum_dz_xhat
    tiles, units = cut(x, num_groups, grad), x.size(0) * num_groups
    parts, of_channels = statistic(x, num_groups, tiles.parts, 2), statistic(x, x.size(1), tiles.slices, 2)
    shape = shape_of(x, num_groups)
    walks, factors = (*walk(x, grad), *walk(grad, x)), factors_of(weight, bias, scale, shift)
    with torch.cuda.device_of(x):
        group_norm_gradient_sums_kernel[(tiles.programs,)](
            grad, x, parts, of_channels, mean, rstd, *shape, *walks, *factors, ACT=activation,
            **tiles.of(group_norm_gradient_sums_kernel),
        )  # fmt: skip
        if not tiles.in_front:
            merged = statistic(x, num_groups, 1, 2)
            group_norm_merge_sums_kernel[(units,)](parts, merged, tiles.parts, PB=MERGED)
            parts = merged
        group_norm_gradient_kernel[(tiles.programs,)](
            grad, x, dx, sum_dz, sum_dz_xhat, parts, of_channels, parts.size(2), mean, rstd, *shape, *walks,
            *dense(dx), *factors, ACT=activation, **tiles.of(group_norm_gradient_kernel),
        )  # fmt: skip
    return dx, sum_dz, sum_dz_xhat


@triton.jit
def _coefficients(
    b, c, has, unit, real, members, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b
):  # fmt: skip
    """Of every channel rstd and the affine gain, then center, gain and offset: z = (x - center) * gain + offset"""
    center = by_channel(tl.load(mean + unit, mask=real, other=0), members)
    r = by_channel(tl.load(rstd + unit, mask=real, other=0), members)
    gain, offset = affine(b, c, has, center, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b)
    return r, gain, (center, gain * r, offset)


@triton.jit
def _dz(
    grad, x, b, c, i, inside, x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, k, ACT: tl.constexpr
):
    """dz and x - mean of a tile; k: center, gain and offset of its channels."""
    at = b * x_b + (c * x_c)[:, None] + place(i, x_p, sizes, strides)[None, :]
    d = to_compute(tl.load(x + at, mask=inside, other=0)) - k[0][:, None]
    at = b * g_b + (c * g_c)[:, None] + place(i, g_p, g_sizes, g_strides)[None, :]
    z = d * k[1][:, None] + k[2][:, None]
    slope = derivative(z, tl.full((1, 1), 0.2, z.dtype), ACT)
    return to_compute(tl.load(grad + at, mask=inside, other=0)) * slope, d


@triton.jit
def group_norm_gradient_sums_kernel(
    grad, x, parts, of_channels, mean, rstd, C, D, pixels,
    x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, groups, blocks, piece, slices,
    ACT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of dz * (x - mean) over a slice of the pixels, of every channel and, times gain, group."""
    b, block, s, c, has, unit, real, members = tile_of(C, D, groups, blocks, slices, ALIGN, BC, BG, False)
    _, affine_gain, k = _coefficients(
        b, c, has, unit, real, members, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b
    )  # fmt: skip
    dz_sum = tl.zeros((BC, BP), k[0].dtype)
    dz_d_sum = tl.zeros((BC, BP), k[0].dtype)
    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :] & has[:, None]
        dz, d = _dz(
            grad, x, b, c, i, inside, x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, k, ACT
        )  # fmt: skip
        dz_sum += dz
        dz_d_sum += dz * d
    of_channel, of_channel_d = tl.sum(dz_sum, 1), tl.sum(dz_d_sum, 1)
    store_part(of_channels, b * C + c, has, s, slices, of_channel, of_channel_d)
    of_group, of_group_d = by_group(affine_gain * of_channel, members), by_group(affine_gain * of_channel_d, members)
    store_part(parts, unit, real, block * slices + s, blocks * slices, of_group, of_group_d)


@triton.jit
def group_norm_merge_sums_kernel(parts, merged, count, PB: tl.constexpr):
    """All parts of one group as one."""
    unit = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    dz, dz_d = merge_sums(parts, unit, unit >= 0, count, PB)
    store_part(merged, unit, unit >= 0, 0, 1, dz, dz_d)


@triton.jit
def group_norm_gradient_kernel(
    grad, x, dx, sum_dz, sum_dz_xhat, parts, of_channels, count, mean, rstd, C, D, pixels,
    x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, y_b, y_c, y_p,
    weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b, groups, blocks, piece, slices,
    ACT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, PB: tl.constexpr,
    JB: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """dx = dz * gain - ((x - mean) * slope + level), of what the parts of the groups come to."""
    b, _, s, c, has, unit, real, members = tile_of(C, D, groups, blocks, slices, ALIGN, BC, BG, True)
    r, _, k = _coefficients(
        b, c, has, unit, real, members, mean, rstd, weight, bias, scale, shift, w_c, b_c, s_c, t_c, s_b, t_b
    )  # fmt: skip
    of_groups, of_groups_d = merge_sums(parts, unit, real, count, PB)
    n = tl.maximum(D * pixels.to(tl.int64), 1).to(r.dtype)
    level, slope = by_channel(of_groups, members) * r / n, by_channel(of_groups_d, members) * r * r * r / n

    # The sums of the tile's channels, JB of them in each of its programs.
    j = s * JB + tl.arange(0, JB)
    c_sum = tl.min(c) + j
    there = (j < BC) & (c_sum <= tl.max(tl.where(has, c, -1)))
    of_channel, of_channel_d = merge_sums(of_channels, b * C + c_sum, there, slices, SB)
    tl.store(sum_dz + b * C + c_sum, of_channel, mask=there)
    r_sum = tl.load(rstd + b * (C // D) + c_sum // D, mask=there, other=0)
    tl.store(sum_dz_xhat + b * C + c_sum, of_channel_d * r_sum, mask=there)

    for start in range(0, piece, BP):
        i = s * piece + start + tl.arange(0, BP)
        inside = (i < pixels)[None, :] & has[:, None]
        dz, d = _dz(
            grad, x, b, c, i, inside, x_b, x_c, x_p, sizes, strides, g_b, g_c, g_p, g_sizes, g_strides, k, ACT
        )  # fmt: skip
        v = dz * k[1][:, None] - (d * slope[:, None] + level[:, None])
        at = b * y_b + (c * y_c)[:, None] + (i * y_p)[None, :]
        tl.store(dx + at, v.to(dx.dtype.element_ty), mask=inside)
