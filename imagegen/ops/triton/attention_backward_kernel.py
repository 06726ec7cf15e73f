"""Attention's gradients in Triton: the scores are recomputed from the log-sum-exp."""

import torch
import triton
import triton.language as tl

from .._layout import empty_like_heads
from .attention_arguments import constants, operands, per_row, strides_of_mask, with_unit_rows
from .attention_scores import (
    LOG2_E,
    add_product,
    finite,
    held,
    keys_of,
    masked,
    offset,
    place,
    product,
    rows_of,
    rows_of_mask,
    scores,
    steps,
    store_rows,
)
from .attention_tiles import (
    WIDEST,
    WIDEST_OF_KEYS,
    column_blocks,
    head_pieces,
    key_gradient_tiles,
    launch_with_fastest_tile,
    mask_gradient_tiles,
    query_gradient_tiles,
)


def attention_backward(grad, q, k, v, mask, out, lse, causal, scale, mask_needs_grad):
    """The gradients of q, k and v, and of an additive mask where it needs one (else a tensor without elements)."""
    dq, dk, dv = (empty_like_heads(t) for t in (q, k, v))
    dmask = mask.new_empty(mask.shape) if mask_needs_grad else q.new_empty(0)
    grad, q, k, v, out = map(with_unit_rows, (grad, q, k, v, out))
    if q.numel() == 0 or k.numel() == 0:
        return tuple(t.zero_() for t in (dq, dk, dv, dmask))
    B, H, Lq, D = q.shape
    Hk, Lk = k.shape[1:3]
    delta, delta_of_p = per_row(q), per_row(q)
    inputs = (*operands(q, k, v, mask, scale), grad, grad.stride()[:3], lse)
    known = constants(q, k, mask, causal, [q, k, v, grad, dq, dk, dv])

    def run(kernel, tiles, widest, programs, *outputs, **options):
        def launch(tile):
            kernel[programs(tile)](
                *inputs,
                *outputs,
                **head_pieces(D, q.element_size(), widest),
                **known,
                **options,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

        launch_with_fastest_tile(q, tiles, (D, q.element_size()), launch)

    with torch.cuda.device_of(q):
        width = triton.next_power_of_2(D)
        rows = max(16, 4096 // width)
        delta_kernel[triton.cdiv(B * H * Lq, rows),](
            *(grad, grad.stride()[:3], out, out.stride()[:3], delta, B * H * Lq, Lq, H), D=D, DP=width, BM=rows
        )
        run(
            attention_query_gradient_kernel,
            query_gradient_tiles,
            WIDEST,
            lambda tile: (triton.cdiv(Lq, tile.rows) * B * H, column_blocks(D, WIDEST)),
            *(delta, delta_of_p, dq, dq.stride()[:3]),
        )
        run(
            attention_key_gradient_kernel,
            key_gradient_tiles,
            WIDEST_OF_KEYS,
            lambda tile: (triton.cdiv(Lk, tile.rows) * B * Hk, column_blocks(D, WIDEST_OF_KEYS)),
            *(delta_of_p, dk, dk.stride()[:3], dv, dv.stride()[:3]),
        )
        if mask_needs_grad:
            sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
            run(
                attention_mask_gradient_kernel,
                mask_gradient_tiles,
                WIDEST,
                lambda tile: (
                    sizes[0] * sizes[1] * triton.cdiv(sizes[2], tile.rows) * triton.cdiv(sizes[3], tile.columns),
                ),
                *(delta_of_p, dmask, strides_of_mask(dmask), sizes, B),
                SUM_QUERIES=sizes[2] == 1,
                SUM_KEYS=sizes[3] == 1,
            )
    return dq, dk, dv, dmask


@triton.jit
def delta_kernel(
    grad, grad_strides, out, out_strides, delta, size, Lq, H, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr
):
    """delta = rowsum(grad * out), [B, H, Lq]: what the softmax's gradient subtracts."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    b, h, l = (i // Lq // H).to(tl.int64), i // Lq % H, (i % Lq).to(tl.int64)
    d = tl.arange(0, DP)
    inside = (i < size)[:, None] & (d < D)[None, :]
    g = tl.load(grad + (offset(grad_strides, b, h) + l * grad_strides[2])[:, None] + d[None, :], mask=inside, other=0)
    o = tl.load(out + (offset(out_strides, b, h) + l * out_strides[2])[:, None] + d[None, :], mask=inside, other=0)
    T: tl.constexpr = delta.dtype.element_ty
    tl.store(delta + i, tl.sum(g.to(T) * o.to(T), 1), mask=i < size)


@triton.jit
def attention_query_gradient_kernel(
    q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, scale, Lq, Lk, H, group,
    grad, grad_strides, lse, delta, delta_of_p, dq, dq_strides,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr, BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr, FAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """p = exp(s - lse); ds = p (grad v^T - delta); dq = scale ds k. One program per ROWS queries of one head.

    delta comes from the rounded output. What the ds of a row sum to, instead of 0, is its error: it is mended in
    delta_of_p for the other kernels, and where one tile holds all keys it is known in time for dq, too.
    """
    b, h, m0 = place(Lq, H, ROWS)
    column = tl.program_id(1) * (D0 + D1)
    m, n = steps(ROWS, FAR), steps(COLUMNS, FAR)
    q, q_l = rows_of(q, q_strides, b, h, m0, VECTOR)
    grad, grad_l = rows_of(grad, grad_strides, b, h, m0, VECTOR)
    k, k_l = rows_of(k, k_strides, b, h // group, 0, VECTOR)
    v, v_l = rows_of(v, v_strides, b, h // group, 0, VECTOR)
    mask = rows_of_mask(mask, mask_strides, b, h, m0)
    m_end = Lq - m0
    q0, q1 = held(q, m, q_l, m_end, D, D0, D1, CHUNK)
    grad0, grad1 = held(grad, m, grad_l, m_end, D, D0, D1, CHUNK)
    row = (b * H + h) * Lq + m0 + m
    T: tl.constexpr = lse.dtype.element_ty
    top, mean = statistics(lse, delta, row, m < m_end)
    excess = tl.zeros([ROWS], T)
    dq0 = tl.zeros([ROWS, D0], T)
    dq1 = tl.zeros([ROWS, D1 if D1 else 16], T)
    stop, _ = keys_of(m0, Lq, Lk, ROWS, COLUMNS, CAUSAL)
    for n0 in range(0, stop, COLUMNS):
        far = tl.cast(n0, tl.int64)
        s = scores(
            q, m, q_l, m_end, q0, q1, k + far * k_l, n, k_l, Lk - n0, n0, mask, mask_strides, m0 + Lk - Lq - n0, scale,
            D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, True, k.dtype.element_ty,
        )  # fmt: skip
        dp = product(
            grad, m, grad_l, m_end, grad0, grad1, v + far * v_l, n, v_l, Lk - n0, D, D0, D1, CHUNK, PRECISION, True
        )  # fmt: skip
        p = tl.exp2(s - top[:, None])
        ds = p * (dp - mean[:, None])
        ds_sum = tl.sum(ds, 1)
        excess += ds_sum
        ds -= p * tl.where(stop <= COLUMNS, ds_sum, 0)[:, None]
        dq0, dq1 = add_product(
            dq0, dq1, ds, k + far * k_l + column, n, k_l, Lk - n0, column, D, D0, D1, PRECISION, True
        )  # fmt: skip
    dq, dq_l = rows_of(dq, dq_strides, b, h, m0, VECTOR)
    store_rows(dq + column, dq0 * scale, dq1 * scale, m, dq_l, m_end, column, D, D0, D1)
    if column == 0:
        tl.store(delta_of_p + row, mean + excess, mask=m < m_end)


@triton.jit
def attention_key_gradient_kernel(
    q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, scale, Lq, Lk, H, group,
    grad, grad_strides, lse, delta, dk, dk_strides, dv, dv_strides,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr, BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr, FAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dv = p^T grad, dk = scale ds^T q, summed over the heads of q that share a key. One program per ROWS keys."""
    b, hk, n0 = place(Lk, H // group, ROWS)
    column = tl.program_id(1) * (D0 + D1)
    n, m = steps(ROWS, FAR), steps(COLUMNS, FAR)
    k, k_l = rows_of(k, k_strides, b, hk, n0, VECTOR)
    v, v_l = rows_of(v, v_strides, b, hk, n0, VECTOR)
    n_end = Lk - n0
    k0, k1 = held(k, n, k_l, n_end, D, D0, D1, CHUNK)
    v0, v1 = held(v, n, v_l, n_end, D, D0, D1, CHUNK)
    T: tl.constexpr = lse.dtype.element_ty
    dk0 = tl.zeros([ROWS, D0], T)
    dk1 = tl.zeros([ROWS, D1 if D1 else 16], T)
    dv0 = tl.zeros([ROWS, D0], T)
    dv1 = tl.zeros([ROWS, D1 if D1 else 16], T)
    start = 0
    if CAUSAL:
        start = tl.maximum(n0 + Lq - Lk, 0) // COLUMNS * COLUMNS
    for h in range(hk * group, hk * group + group):
        q_h, q_l = rows_of(q, q_strides, b, h, 0, VECTOR)
        grad_h, grad_l = rows_of(grad, grad_strides, b, h, 0, VECTOR)
        for m0 in range(start, Lq, COLUMNS):
            far = tl.cast(m0, tl.int64)
            m_end = Lq - m0
            top, mean = statistics(lse, delta, (b * H + h) * Lq + m0 + m, m < m_end)
            s = product(
                k, n, k_l, n_end, k0, k1, q_h + far * q_l, m, q_l, m_end, D, D0, D1, CHUNK, PRECISION, True
            )  # fmt: skip
            s = masked(
                s * (scale * LOG2_E), rows_of_mask(mask, mask_strides, b, h, m0), mask_strides,
                m[None, :], n[:, None], m_end, n_end, n0, m0 + Lk - Lq - n0, BY_KEY, CAUSAL, True,
            )  # fmt: skip
            p = tl.exp2(s - top[None, :])
            dv0, dv1 = add_product(
                dv0, dv1, p, grad_h + far * grad_l + column, m, grad_l, m_end, column, D, D0, D1, PRECISION, True
            )  # fmt: skip
            dp = product(
                v, n, v_l, n_end, v0, v1, grad_h + far * grad_l, m, grad_l, m_end, D, D0, D1, CHUNK, PRECISION, True
            )  # fmt: skip
            ds = p * (dp - mean[None, :])
            dk0, dk1 = add_product(
                dk0, dk1, ds, q_h + far * q_l + column, m, q_l, m_end, column, D, D0, D1, PRECISION, True
            )  # fmt: skip
    dk, dk_l = rows_of(dk + column, dk_strides, b, hk, n0, VECTOR)
    dv, dv_l = rows_of(dv + column, dv_strides, b, hk, n0, VECTOR)
    store_rows(dk, dk0 * scale, dk1 * scale, n, dk_l, n_end, column, D, D0, D1)
    store_rows(dv, dv0, dv1, n, dv_l, n_end, column, D, D0, D1)


@triton.jit
def attention_mask_gradient_kernel(
    q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, scale, Lq, Lk, H, group,
    grad, grad_strides, lse, delta, dmask, dmask_strides,
    sizes,  # of the mask: b, h, q, k, each 1 or the scores'
    B,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr, BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr, FAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """dmask = ds summed over what the mask is broadcast along, in one fixed order. One program per tile of the mask."""
    key_tiles = tl.cdiv(sizes[3], COLUMNS)
    tiles = tl.cdiv(sizes[2], ROWS) * key_tiles
    tile = tl.program_id(0) % tiles
    mask_b, mask_h = tl.program_id(0) // tiles // sizes[1], tl.program_id(0) // tiles % sizes[1]
    m, n = steps(ROWS, FAR), steps(COLUMNS, FAR)
    # The tiles of scores to be summed: batches x heads x tiles of queries x tiles of keys.
    heads = H // sizes[1]
    sum_m = tl.cdiv(Lq, ROWS) if SUM_QUERIES else 1
    sum_n = tl.cdiv(Lk, COLUMNS) if SUM_KEYS else 1
    T: tl.constexpr = lse.dtype.element_ty
    total = tl.zeros([ROWS, COLUMNS], T)
    for i in range(0, B // sizes[0] * heads * sum_m * sum_n):
        n0 = (i % sum_n + tile % key_tiles) * COLUMNS
        m0 = (i // sum_n % sum_m + tile // key_tiles) * ROWS
        h = mask_h + i // sum_n // sum_m % heads
        b = mask_b + i // sum_n // sum_m // heads
        m_end, n_end = Lq - m0, Lk - n0
        q_at, q_l = rows_of(q, q_strides, b, h, m0, VECTOR)
        grad_at, grad_l = rows_of(grad, grad_strides, b, h, m0, VECTOR)
        k_at, k_l = rows_of(k, k_strides, b, h // group, n0, VECTOR)
        v_at, v_l = rows_of(v, v_strides, b, h // group, n0, VECTOR)
        q0, q1 = held(q_at, m, q_l, m_end, D, D0, D1, CHUNK)
        s = scores(
            q_at, m, q_l, m_end, q0, q1, k_at, n, k_l, n_end, n0,
            rows_of_mask(mask, mask_strides, b, h, m0), mask_strides, m0 + Lk - Lq - n0, scale,
            D, D0, D1, CHUNK, BY_KEY, CAUSAL, PRECISION, True,
        )  # fmt: skip
        top, mean = statistics(lse, delta, (tl.cast(b, tl.int64) * H + h) * Lq + m0 + m, m < m_end)
        grad0, grad1 = held(grad_at, m, grad_l, m_end, D, D0, D1, CHUNK)
        dp = product(grad_at, m, grad_l, m_end, grad0, grad1, v_at, n, v_l, n_end, D, D0, D1, CHUNK, PRECISION, True)
        total += tl.exp2(s - top[:, None]) * (dp - mean[:, None])
    if SUM_QUERIES:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [ROWS, COLUMNS])
    if SUM_KEYS:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [ROWS, COLUMNS])
    m0 = tile // key_tiles * ROWS
    n0 = tile % key_tiles * COLUMNS
    at = dmask + tl.cast(mask_b, tl.int64) * dmask_strides[0] + tl.cast(mask_h, tl.int64) * dmask_strides[1]
    at += tl.cast(m0, tl.int64) * dmask_strides[2] + tl.cast(n0, tl.int64) * dmask_strides[3]
    at = at + m[:, None] * dmask_strides[2] + n[None, :] * dmask_strides[3]
    inside = (m < sizes[2] - m0)[:, None] & (n < sizes[3] - n0)[None, :]
    tl.store(at, total.to(dmask.dtype.element_ty), mask=inside)


@triton.jit
def statistics(lse, delta, row, inside):
    """Of rows of scores: the log-sum-exp in units of log 2, infinite past the end that p be 0, and delta."""
    top = finite(tl.load(lse + row, mask=inside, other=float("inf"))) * LOG2_E
    return top, tl.load(delta + row, mask=inside, other=0)
