"""Attention in Triton: online softmax over tiles of keys."""

import math

import torch
import triton
import triton.language as tl

from .._layout import empty_like_heads
from .attention_arguments import constants, masks_scores, operands, per_row, with_unit_rows
from .attention_scores import (
    add_product,
    finite,
    held,
    keys_of,
    place,
    rows_of,
    rows_of_mask,
    scores,
    steps,
    store_rows,
)
from .attention_tiles import (
    WHOLE_KEYS,
    WIDEST,
    column_blocks,
    forward_tiles,
    head_pieces,
    launch_with_fastest_tile,
    pieces,
)

_LN_2 = tl.constexpr(math.log(2))


def attention(q, k, v, mask, causal, scale):
    """The output and the log-sum-exp (B, H, Lq) of every row's scores."""
    q, k, v = map(with_unit_rows, (q, k, v))
    out, lse = empty_like_heads(q), per_row(q)
    B, H, Lq, D = q.shape
    Lk = k.size(2)
    if out.numel() == 0 or Lk == 0:
        return out.zero_(), lse.fill_(-math.inf)
    whole = Lk <= WHOLE_KEYS and D <= WIDEST
    arguments = *operands(q, k, v, mask, scale), out, out.stride()[:3], lse
    known = head_pieces(D, q.element_size(), WIDEST) | constants(q, k, mask, causal, [q, k, v, out])

    def launch(tile):
        BN, N1 = pieces(Lk) if whole else (tile.columns, 0)
        attention_kernel[triton.cdiv(Lq, tile.rows) * B * H, column_blocks(D, WIDEST)](
            *arguments,
            **known,
            BM=tile.rows,
            BN=BN,
            N1=N1,
            WHOLE=whole,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    with torch.cuda.device_of(q):
        launch_with_fastest_tile(q, forward_tiles, (D, q.element_size(), masks_scores(mask), whole), launch)
    return out, lse


@triton.jit
def attention_kernel(
    q,
    q_strides,  # b, h, l
    k,
    k_strides,
    v,
    v_strides,
    mask,  # additive, or bytes that are 0 where a key is hidden, or None
    mask_strides,  # b, h, q, k; 0 where it is broadcast
    scale,
    Lq,
    Lk,
    H,
    group,  # heads of q per head of k and v
    out,
    out_strides,
    lse,  # [B, H, Lq]
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    FAR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    N1: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """s = scale q k^T + mask; out = softmax(s) v; lse = log sum exp(s). One program per BM queries of one head."""
    b, h, m0 = place(Lq, H, BM)
    column = tl.program_id(1) * (D0 + D1)
    m = steps(BM, FAR)
    q, q_l = rows_of(q, q_strides, b, h, m0, VECTOR)
    k, k_l = rows_of(k, k_strides, b, h // group, 0, VECTOR)
    v, v_l = rows_of(v, v_strides, b, h // group, 0, VECTOR)
    v += column
    mask = rows_of_mask(mask, mask_strides, b, h, m0)
    m_end = Lq - m0
    diagonal = m0 + Lk - Lq
    q0, q1 = held(q, m, q_l, m_end, D, D0, D1, CHUNK)
    T: tl.constexpr = lse.dtype.element_ty
    out0 = tl.zeros([BM, D0], T)
    out1 = tl.zeros([BM, D1 if D1 else 16], T)

    if WHOLE:
        n = steps(BN, FAR)
        s = scores(
            q, m, q_l, m_end, q0, q1, k, n, k_l, Lk, 0, mask, mask_strides, diagonal, scale,
            D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, True, k.dtype.element_ty,
        )  # fmt: skip
        top = tl.max(s, 1)
        if N1:
            n1 = BN + steps(N1, FAR)
            s1 = scores(
                q, m, q_l, m_end, q0, q1, k, n1, k_l, Lk, 0, mask, mask_strides, diagonal, scale,
                D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, True, k.dtype.element_ty,
            )  # fmt: skip
            top = tl.maximum(top, tl.max(s1, 1))
        shift = finite(top)[:, None]
        p = tl.exp2(s - shift)
        total = tl.sum(p, 1)
        out0, out1 = add_product(out0, out1, p, v, n, v_l, Lk, column, D, D0, D1, PRECISION, True)
        if N1:
            p = tl.exp2(s1 - shift)
            total += tl.sum(p, 1)
            out0, out1 = add_product(out0, out1, p, v, n1, v_l, Lk, column, D, D0, D1, PRECISION, True)
    else:
        top = tl.full([BM], -float("inf"), T)
        total = tl.zeros([BM], T)
        stop, edge = keys_of(m0, Lq, Lk, BM, BN, CAUSAL)
        for n0 in range(0, edge, BN):
            top, total, out0, out1 = _attend(
                q, m, q_l, m_end, q0, q1, k, k_l, v, v_l, mask, mask_strides, n0, Lk, diagonal, scale,
                top, total, out0, out1, column, D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, FAR, BN, False,
            )  # fmt: skip
        for n0 in range(edge, stop, BN):
            top, total, out0, out1 = _attend(
                q, m, q_l, m_end, q0, q1, k, k_l, v, v_l, mask, mask_strides, n0, Lk, diagonal, scale,
                top, total, out0, out1, column, D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, FAR, BN, True,
            )  # fmt: skip

    total = tl.where(total == 0, 1, total)  # every key is hidden: the output is 0
    inverse = (1 / total)[:, None]
    out, out_l = rows_of(out, out_strides, b, h, m0, VECTOR)
    store_rows(out + column, out0 * inverse, out1 * inverse, m, out_l, m_end, column, D, D0, D1)
    if column == 0:
        tl.store(lse + (b * H + h) * Lq + m0 + m, (top + tl.log2(total)) * _LN_2, mask=m < m_end)


@triton.jit
def _attend(
    q, m, q_l, m_end, q0, q1, k, k_l, v, v_l, mask, mask_strides, n0, Lk, diagonal, scale,
    top, total, out0, out1, column, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr,
    BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum, sum and output, rescaled to the new maximum."""
    n = steps(BN, FAR)
    far = tl.cast(n0, tl.int64)
    s = scores(
        q, m, q_l, m_end, q0, q1, k + far * k_l, n, k_l, Lk - n0, n0, mask, mask_strides, diagonal - n0, scale,
        D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, EDGE, k.dtype.element_ty,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = finite(new_top)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    out0 *= shrink[:, None]
    if D1:
        out1 *= shrink[:, None]
    out0, out1 = add_product(out0, out1, p, v + far * v_l, n, v_l, Lk - n0, column, D, D0, D1, PRECISION, EDGE)
    return new_top, total, out0, out1
