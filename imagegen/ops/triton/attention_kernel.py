"""Attention in Triton: online softmax over tiles of keys; the backward recomputes the scores from the log-sum-exp.

Tiles want powers of two and head dims are none, so D is held as two pieces (72 = 64 + 16, 160 = 128 + 32), the second
at least 16, the least that tl.dot multiplies. Above WIDEST the operands do not fit: scores are summed over chunks of D
that are read again for every tile, and each program owns WIDEST columns of the output.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._layout import empty_like_heads

WIDEST = 256  # the largest head dim whose operands are held, and the columns a program owns above it
WIDEST_OF_KEYS = 128  # the same where keys and values are held and both their gradients summed
WHOLE_KEYS = 128  # up to here all keys are held at once: one softmax, no rescaling

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))


class Tile(NamedTuple):
    rows: int  # of one program: queries, or keys where the gradients of keys and values are computed
    columns: int  # of the tiles it loops over
    warps: int
    stages: int


def attention(q, k, v, mask, causal, scale):
    """The output and the log-sum-exp (B, H, Lq) of every row's scores."""
    q, k, v = map(_with_unit_rows, (q, k, v))
    out, lse = empty_like_heads(q), _per_row(q)
    B, H, Lq, D = q.shape
    Lk = k.size(2)
    if out.numel() == 0 or Lk == 0:
        return out.zero_(), lse.fill_(-math.inf)
    whole = Lk <= WHOLE_KEYS and D <= WIDEST
    tile = _tile(q, forward_tile, D, q.element_size(), _masks_scores(mask), whole)
    BN, N1 = pieces(Lk) if whole else (tile.columns, 0)
    with torch.cuda.device_of(q):
        attention_kernel[triton.cdiv(Lq, tile.rows) * B * H, _column_blocks(D, WIDEST)](
            *_scored(q, k, v, mask, scale),
            *(out, out.stride()[:3], lse),
            **_shape(D, q.element_size(), WIDEST),
            **_constants(q, k, mask, causal, [q, k, v, out]),
            BM=tile.rows,
            BN=BN,
            N1=N1,
            WHOLE=whole,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def attention_backward(grad, q, k, v, mask, out, lse, causal, scale, mask_needs_grad):
    """The gradients of q, k and v, and of an additive mask where it needs one (else a tensor without elements)."""
    dq, dk, dv = (empty_like_heads(t) for t in (q, k, v))
    dmask = mask.new_empty(mask.shape) if mask_needs_grad else q.new_empty(0)
    grad, q, k, v, out = map(_with_unit_rows, (grad, q, k, v, out))
    if q.numel() == 0 or k.numel() == 0:
        return tuple(t.zero_() for t in (dq, dk, dv, dmask))
    B, H, Lq, D = q.shape
    Hk, Lk = k.shape[1:3]
    delta, delta_of_p = _per_row(q), _per_row(q)
    inputs = (*_scored(q, k, v, mask, scale), grad, grad.stride()[:3], lse)
    constants = _constants(q, k, mask, causal, [q, k, v, grad, dq, dk, dv])

    def run(kernel, tiles, widest, programs, *outputs, **options):
        tile = _tile(q, tiles, D, q.element_size())
        kernel[programs(tile)](
            *inputs,
            *outputs,
            **_shape(D, q.element_size(), widest),
            **constants,
            **options,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    with torch.cuda.device_of(q):
        width = triton.next_power_of_2(D)
        rows = max(16, 4096 // width)
        delta_kernel[triton.cdiv(B * H * Lq, rows),](
            *(grad, grad.stride()[:3], out, out.stride()[:3], delta, B * H * Lq, Lq, H), D=D, DP=width, BM=rows
        )
        run(
            attention_query_gradient_kernel,
            query_gradient_tile,
            WIDEST,
            lambda tile: (triton.cdiv(Lq, tile.rows) * B * H, _column_blocks(D, WIDEST)),
            *(delta, delta_of_p, dq, dq.stride()[:3]),
        )
        run(
            attention_key_gradient_kernel,
            key_gradient_tile,
            WIDEST_OF_KEYS,
            lambda tile: (triton.cdiv(Lk, tile.rows) * B * Hk, _column_blocks(D, WIDEST_OF_KEYS)),
            *(delta_of_p, dk, dk.stride()[:3], dv, dv.stride()[:3]),
        )
        if mask_needs_grad:
            sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
            run(
                attention_mask_gradient_kernel,
                mask_gradient_tile,
                WIDEST,
                lambda tile: (
                    sizes[0] * sizes[1] * triton.cdiv(sizes[2], tile.rows) * triton.cdiv(sizes[3], tile.columns),
                ),
                *(delta_of_p, dmask, _mask_strides(dmask), sizes, B),
                SUM_QUERIES=sizes[2] == 1,
                SUM_KEYS=sizes[3] == 1,
            )
    return dq, dk, dv, dmask


def pieces(n):
    """Two powers of two, the second at least 16 or none, that n fits in with the least waste."""
    n = max(16, triton.cdiv(n, 16) * 16)
    first = 1 << n.bit_length() - 1
    rest = triton.next_power_of_2(n - first) if n > first else 0
    return (2 * first, 0) if rest == first else (first, rest)


# Tiles of which no kernel of two-byte elements spills a register on sm_80, sm_90 or sm_100, as
# tests/ops/test_attention_gpu.py sees when it compiles them. float, each operand of which becomes two of tf32, still
# spills at D of 128 and more; where the library has CUDA kernels those come first. capability is the major one.


def forward_tile(D, element_size, masks_scores, whole, capability):
    if element_size > 2:
        return Tile(64, 32, 8, 1) if D <= 128 else Tile(32, 16, 4, 1)
    if D <= 64:
        if masks_scores:
            return Tile(64, 64, 8, 2)
        return Tile(128, 64, 4, 3) if capability < 10 else Tile(128, 64, 8, 2)
    if D <= 128:
        return Tile(128, 32 if masks_scores else 64, 8, 2)
    if D <= 160 and capability >= 9:
        return Tile(128, 32 if masks_scores else 64, 8, 2)
    if 160 < D <= WIDEST and whole and capability < 9:
        return Tile(32, 32, 8, 1)
    if 160 < D <= WIDEST and masks_scores and capability == 9:
        return Tile(64, 16, 8, 1)
    return Tile(64, 32, 8, 1)


def query_gradient_tile(D, element_size, capability):
    if element_size > 2:
        return Tile(32, 32, 8, 1) if D <= 128 else Tile(32, 16, 8, 1)
    return Tile(64, 64, 8, 2) if D <= 128 else Tile(64, 32, 8, 2 if capability >= 9 else 1)


def key_gradient_tile(D, element_size, capability):
    if element_size > 2:
        return Tile(32, 32, 8, 1) if D <= 64 else Tile(32, 16, 8, 1)
    return Tile(64, 16, 8, 1) if capability < 9 else Tile(64, 32, 8, 2 if capability < 10 else 1)


def mask_gradient_tile(D, element_size, capability):
    return Tile(64, 32, 8, 2) if element_size == 2 else Tile(32, 32, 8, 1)


# The interpreter takes as long for a large tile as for a small one.
_INTERPRETED = Tile(128, 128, warps=1, stages=1)


def _tile(q, tiles, *shape):
    if not q.is_cuda:
        return _INTERPRETED
    major = torch.cuda.get_device_capability(q.device)[0]
    return tiles(*shape, 8 if major == 12 else major)  # sm_120 has the matrix instructions and shared memory of sm_8x


def _column_blocks(D, widest):
    return 1 if widest >= D else triton.cdiv(D, widest)


def _shape(D, element_size, widest):
    """The pieces of D that are held, or the columns that a program owns and the chunks it reads."""
    D0, D1 = pieces(D) if widest >= D else (widest, 0)
    return {"D": D, "D0": D0, "D1": D1, "CHUNK": 0 if widest >= D else 128 // element_size}


def _masks_scores(mask):
    """Whether the mask has a number for each score, not one for each key: its tiles take registers."""
    return mask is not None and _mask_strides(mask)[2] != 0


def _with_unit_rows(t):
    return t if t.size(3) == 1 or t.stride(3) == 1 else t.contiguous()


def _per_row(q):
    return torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _scored(q, k, v, mask, scale):
    """The arguments every kernel begins with: what the scores are made of."""
    shown = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
    operands = [x for t in (q, k, v) for x in (t, t.stride()[:3])]
    return *operands, shown, _mask_strides(mask), scale, q.size(2), k.size(2), q.size(1), q.size(1) // k.size(1)


def _mask_strides(mask):
    """Of the four axes; 0 along those it is broadcast over."""
    if mask is None:
        return (0,) * 4
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return (0,) * (4 - mask.dim()) + tuple(strides)


def _constants(q, k, mask, causal, tensors):
    """tensors: all that are read and written row by row."""
    vector = 16 // q.element_size()
    aligned = all(stride % vector == 0 for t in tensors for stride in t.stride()[:3])
    rows = [t.stride(2) for t in tensors] + list(_mask_strides(mask)[2:])
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return {
        "BY_KEY": _mask_strides(mask)[2] == 0,
        "CAUSAL": causal,
        "PRECISION": precision if q.dtype == torch.float32 else "ieee",
        "VECTOR": vector if aligned else 1,
        # Offsets within a tile, or along the mask's keys, could pass 2^31.
        "FAR": max(rows) >= 2**23 or k.size(2) * _mask_strides(mask)[3] >= 2**31,
    }


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
    b, h, m0 = _place(Lq, H, BM)
    column = tl.program_id(1) * (D0 + D1)
    m = _steps(BM, FAR)
    q_l, k_l, v_l = _multiple(q_strides[2], VECTOR), _multiple(k_strides[2], VECTOR), _multiple(v_strides[2], VECTOR)
    q = _matrix(q, q_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * q_l
    k = _matrix(k, k_strides, b, h // group, VECTOR)
    v = _matrix(v, v_strides, b, h // group, VECTOR) + column
    mask = _rows_of_mask(mask, mask_strides, b, h, m0)
    m_end = Lq - m0
    diagonal = m0 + Lk - Lq
    q0, q1 = _held(q, m, q_l, m_end, D, D0, D1, CHUNK)
    T: tl.constexpr = lse.dtype.element_ty
    out0 = tl.zeros([BM, D0], T)
    out1 = tl.zeros([BM, D1 if D1 else 16], T)

    if WHOLE:
        n = _steps(BN, FAR)
        s = _product(q, m, q_l, m_end, q0, q1, k, n, k_l, Lk, D, D0, D1, CHUNK, PRECISION, True)
        s = _masked(
            s * (scale * _LOG2_E), mask, mask_strides, m[:, None], n[None, :], m_end, Lk, 0, diagonal,
            BY_KEY, CAUSAL, True, k.dtype.element_ty,
        )  # fmt: skip
        top = tl.max(s, 1)
        if N1:
            n1 = BN + _steps(N1, FAR)
            s1 = _product(q, m, q_l, m_end, q0, q1, k, n1, k_l, Lk, D, D0, D1, CHUNK, PRECISION, True)
            s1 = _masked(
                s1 * (scale * _LOG2_E), mask, mask_strides, m[:, None], n1[None, :], m_end, Lk, 0, diagonal,
                BY_KEY, CAUSAL, True, k.dtype.element_ty,
            )  # fmt: skip
            top = tl.maximum(top, tl.max(s1, 1))
        shift = _finite(top)[:, None]
        p = tl.exp2(s - shift)
        total = tl.sum(p, 1)
        out0, out1 = _add_product(out0, out1, p, v, n, v_l, Lk, column, D, D0, D1, PRECISION, True)
        if N1:
            p = tl.exp2(s1 - shift)
            total += tl.sum(p, 1)
            out0, out1 = _add_product(out0, out1, p, v, n1, v_l, Lk, column, D, D0, D1, PRECISION, True)
    else:
        top = tl.full([BM], -float("inf"), T)
        total = tl.zeros([BM], T)
        stop, edge = _keys_of(m0, Lq, Lk, BM, BN, CAUSAL)
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
    out_l = _multiple(out_strides[2], VECTOR)
    out = _matrix(out, out_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * out_l + column
    _store(out, out0 * inverse, out1 * inverse, m, out_l, m_end, column, D, D0, D1)
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
    n = _steps(BN, FAR)
    far = tl.cast(n0, tl.int64)
    s = _product(q, m, q_l, m_end, q0, q1, k + far * k_l, n, k_l, Lk - n0, D, D0, D1, CHUNK, PRECISION, EDGE)
    s *= scale * _LOG2_E
    s = _masked(
        s, mask, mask_strides, m[:, None], n[None, :], m_end, Lk - n0, n0, diagonal - n0,
        BY_KEY, CAUSAL, EDGE, k.dtype.element_ty,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = _finite(new_top)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    out0 *= shrink[:, None]
    if D1:
        out1 *= shrink[:, None]
    out0, out1 = _add_product(out0, out1, p, v + far * v_l, n, v_l, Lk - n0, column, D, D0, D1, PRECISION, EDGE)
    return new_top, total, out0, out1


@triton.jit
def delta_kernel(
    grad, grad_strides, out, out_strides, delta, size, Lq, H, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr
):
    """delta = rowsum(grad * out), [B, H, Lq]: what the softmax's gradient subtracts."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    b, h, l = (i // Lq // H).to(tl.int64), i // Lq % H, (i % Lq).to(tl.int64)
    d = tl.arange(0, DP)
    inside = (i < size)[:, None] & (d < D)[None, :]
    g = tl.load(grad + (_offset(grad_strides, b, h) + l * grad_strides[2])[:, None] + d[None, :], mask=inside, other=0)
    o = tl.load(out + (_offset(out_strides, b, h) + l * out_strides[2])[:, None] + d[None, :], mask=inside, other=0)
    T: tl.constexpr = delta.dtype.element_ty
    tl.store(delta + i, tl.sum(g.to(T) * o.to(T), 1), mask=i < size)


@triton.jit
def attention_query_gradient_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    mask,
    mask_strides,
    scale,
    Lq,
    Lk,
    H,
    group,
    grad,
    grad_strides,
    lse,
    delta,
    delta_of_p,
    dq,
    dq_strides,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """p = exp(s - lse); ds = p (grad v^T - delta); dq = scale ds k. One program per ROWS queries of one head.

    delta comes from the rounded output. What the ds of a row sum to, instead of 0, is its error: it is mended in
    delta_of_p for the other kernels, and where one tile holds all keys it is known in time for dq, too.
    """
    b, h, m0 = _place(Lq, H, ROWS)
    column = tl.program_id(1) * (D0 + D1)
    m, n = _steps(ROWS, FAR), _steps(COLUMNS, FAR)
    q_l, k_l, v_l = _multiple(q_strides[2], VECTOR), _multiple(k_strides[2], VECTOR), _multiple(v_strides[2], VECTOR)
    grad_l = _multiple(grad_strides[2], VECTOR)
    q = _matrix(q, q_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * q_l
    grad = _matrix(grad, grad_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * grad_l
    k = _matrix(k, k_strides, b, h // group, VECTOR)
    v = _matrix(v, v_strides, b, h // group, VECTOR)
    mask = _rows_of_mask(mask, mask_strides, b, h, m0)
    m_end = Lq - m0
    q0, q1 = _held(q, m, q_l, m_end, D, D0, D1, CHUNK)
    grad0, grad1 = _held(grad, m, grad_l, m_end, D, D0, D1, CHUNK)
    row = (b * H + h) * Lq + m0 + m
    lse = tl.load(lse + row, mask=m < m_end, other=float("inf"))
    delta = tl.load(delta + row, mask=m < m_end, other=0)
    T: tl.constexpr = lse.dtype
    excess = tl.zeros([ROWS], T)
    dq0 = tl.zeros([ROWS, D0], T)
    dq1 = tl.zeros([ROWS, D1 if D1 else 16], T)
    stop, _ = _keys_of(m0, Lq, Lk, ROWS, COLUMNS, CAUSAL)
    for n0 in range(0, stop, COLUMNS):
        far = tl.cast(n0, tl.int64)
        s = _product(
            q, m, q_l, m_end, q0, q1, k + far * k_l, n, k_l, Lk - n0, D, D0, D1, CHUNK, PRECISION, True
        )  # fmt: skip
        s = _masked(
            s * (scale * _LOG2_E), mask, mask_strides, m[:, None], n[None, :], m_end, Lk - n0, n0, m0 + Lk - Lq - n0,
            BY_KEY, CAUSAL, True, k.dtype.element_ty,
        )  # fmt: skip
        dp = _product(
            grad, m, grad_l, m_end, grad0, grad1, v + far * v_l, n, v_l, Lk - n0, D, D0, D1, CHUNK, PRECISION, True
        )  # fmt: skip
        p = tl.exp2(s - (_finite(lse) * _LOG2_E)[:, None])
        ds = p * (dp - delta[:, None])
        ds_sum = tl.sum(ds, 1)
        excess += ds_sum
        ds -= p * tl.where(stop <= COLUMNS, ds_sum, 0)[:, None]
        dq0, dq1 = _add_product(
            dq0, dq1, ds, k + far * k_l + column, n, k_l, Lk - n0, column, D, D0, D1, PRECISION, True
        )  # fmt: skip
    dq_l = _multiple(dq_strides[2], VECTOR)
    dq = _matrix(dq, dq_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * dq_l + column
    _store(dq, dq0 * scale, dq1 * scale, m, dq_l, m_end, column, D, D0, D1)
    if column == 0:
        tl.store(delta_of_p + row, delta + excess, mask=m < m_end)


@triton.jit
def attention_key_gradient_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    mask,
    mask_strides,
    scale,
    Lq,
    Lk,
    H,
    group,
    grad,
    grad_strides,
    lse,
    delta,
    dk,
    dk_strides,
    dv,
    dv_strides,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dv = p^T grad, dk = scale ds^T q, summed over the heads of q that share a key. One program per ROWS keys."""
    b, hk, n0 = _place(Lk, H // group, ROWS)
    column = tl.program_id(1) * (D0 + D1)
    n, m = _steps(ROWS, FAR), _steps(COLUMNS, FAR)
    q_l, k_l, v_l = _multiple(q_strides[2], VECTOR), _multiple(k_strides[2], VECTOR), _multiple(v_strides[2], VECTOR)
    grad_l = _multiple(grad_strides[2], VECTOR)
    k = _matrix(k, k_strides, b, hk, VECTOR) + tl.cast(n0, tl.int64) * k_l
    v = _matrix(v, v_strides, b, hk, VECTOR) + tl.cast(n0, tl.int64) * v_l
    n_end = Lk - n0
    k0, k1 = _held(k, n, k_l, n_end, D, D0, D1, CHUNK)
    v0, v1 = _held(v, n, v_l, n_end, D, D0, D1, CHUNK)
    T: tl.constexpr = lse.dtype.element_ty
    dk0 = tl.zeros([ROWS, D0], T)
    dk1 = tl.zeros([ROWS, D1 if D1 else 16], T)
    dv0 = tl.zeros([ROWS, D0], T)
    dv1 = tl.zeros([ROWS, D1 if D1 else 16], T)
    start = 0
    if CAUSAL:
        start = tl.maximum(n0 + Lq - Lk, 0) // COLUMNS * COLUMNS
    for h in range(hk * group, hk * group + group):
        q_h = _matrix(q, q_strides, b, h, VECTOR)
        grad_h = _matrix(grad, grad_strides, b, h, VECTOR)
        for m0 in range(start, Lq, COLUMNS):
            far = tl.cast(m0, tl.int64)
            m_end = Lq - m0
            row = (b * H + h) * Lq + m0 + m
            top = _finite(tl.load(lse + row, mask=m < m_end, other=float("inf"))) * _LOG2_E
            mean = tl.load(delta + row, mask=m < m_end, other=0)
            s = _product(
                k, n, k_l, n_end, k0, k1, q_h + far * q_l, m, q_l, m_end, D, D0, D1, CHUNK, PRECISION, True
            )  # fmt: skip
            s = _masked(
                s * (scale * _LOG2_E), _rows_of_mask(mask, mask_strides, b, h, m0), mask_strides,
                m[None, :], n[:, None], m_end, n_end, n0, m0 + Lk - Lq - n0, BY_KEY, CAUSAL, True,
            )  # fmt: skip
            p = tl.exp2(s - top[None, :])
            dv0, dv1 = _add_product(
                dv0, dv1, p, grad_h + far * grad_l + column, m, grad_l, m_end, column, D, D0, D1, PRECISION, True
            )  # fmt: skip
            dp = _product(
                v, n, v_l, n_end, v0, v1, grad_h + far * grad_l, m, grad_l, m_end, D, D0, D1, CHUNK, PRECISION, True
            )  # fmt: skip
            ds = p * (dp - mean[None, :])
            dk0, dk1 = _add_product(
                dk0, dk1, ds, q_h + far * q_l + column, m, q_l, m_end, column, D, D0, D1, PRECISION, True
            )  # fmt: skip
    dk_l, dv_l = _multiple(dk_strides[2], VECTOR), _multiple(dv_strides[2], VECTOR)
    dk = _matrix(dk, dk_strides, b, hk, VECTOR) + tl.cast(n0, tl.int64) * dk_l + column
    dv = _matrix(dv, dv_strides, b, hk, VECTOR) + tl.cast(n0, tl.int64) * dv_l + column
    _store(dk, dk0 * scale, dk1 * scale, n, dk_l, n_end, column, D, D0, D1)
    _store(dv, dv0, dv1, n, dv_l, n_end, column, D, D0, D1)


@triton.jit
def attention_mask_gradient_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    mask,
    mask_strides,
    scale,
    Lq,
    Lk,
    H,
    group,
    grad,
    grad_strides,
    lse,
    delta,
    dmask,
    dmask_strides,
    sizes,  # of the mask: b, h, q, k, each 1 or the scores'
    B,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM_QUERIES: tl.constexpr,
    SUM_KEYS: tl.constexpr,
):
    """dmask = ds summed over what the mask is broadcast along, in one fixed order. One program per tile of the mask."""
    key_tiles = tl.cdiv(sizes[3], COLUMNS)
    tiles = tl.cdiv(sizes[2], ROWS) * key_tiles
    tile = tl.program_id(0) % tiles
    mask_b, mask_h = tl.program_id(0) // tiles // sizes[1], tl.program_id(0) // tiles % sizes[1]
    m, n = _steps(ROWS, FAR), _steps(COLUMNS, FAR)
    q_l, k_l, v_l = _multiple(q_strides[2], VECTOR), _multiple(k_strides[2], VECTOR), _multiple(v_strides[2], VECTOR)
    grad_l = _multiple(grad_strides[2], VECTOR)
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
        q_at = _matrix(q, q_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * q_l
        grad_at = _matrix(grad, grad_strides, b, h, VECTOR) + tl.cast(m0, tl.int64) * grad_l
        k_at = _matrix(k, k_strides, b, h // group, VECTOR) + tl.cast(n0, tl.int64) * k_l
        v_at = _matrix(v, v_strides, b, h // group, VECTOR) + tl.cast(n0, tl.int64) * v_l
        q0, q1 = _held(q_at, m, q_l, m_end, D, D0, D1, CHUNK)
        s = _product(q_at, m, q_l, m_end, q0, q1, k_at, n, k_l, n_end, D, D0, D1, CHUNK, PRECISION, True)
        s = _masked(
            s * (scale * _LOG2_E), _rows_of_mask(mask, mask_strides, b, h, m0), mask_strides, m[:, None], n[None, :],
            m_end, n_end, n0, m0 + Lk - Lq - n0, BY_KEY, CAUSAL, True,
        )  # fmt: skip
        row = (tl.cast(b, tl.int64) * H + h) * Lq + m0 + m
        top = _finite(tl.load(lse + row, mask=m < m_end, other=float("inf"))) * _LOG2_E
        mean = tl.load(delta + row, mask=m < m_end, other=0)
        grad0, grad1 = _held(grad_at, m, grad_l, m_end, D, D0, D1, CHUNK)
        dp = _product(grad_at, m, grad_l, m_end, grad0, grad1, v_at, n, v_l, n_end, D, D0, D1, CHUNK, PRECISION, True)
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
def _place(L, H, ROWS: tl.constexpr):
    """Batch, head and first row of this program. Under a causal mask the last rows take longest: they start first."""
    tiles = tl.cdiv(L, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    return (tl.program_id(0) // tiles // H).to(tl.int64), tl.program_id(0) // tiles % H, tile * ROWS


@triton.jit
def _keys_of(m0, Lq, Lk, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Where the keys of these queries end, and up to where tiles of them are whole and nothing hides a key."""
    stop = Lk
    edge = Lk // BN * BN
    if CAUSAL:
        stop = tl.minimum(stop, m0 + BM + Lk - Lq)
        edge = tl.minimum(edge, tl.maximum(m0 + 1 + Lk - Lq, 0) // BN * BN)
    return stop, edge


@triton.jit
def _steps(N: tl.constexpr, FAR: tl.constexpr):
    n = tl.arange(0, N)
    return n.to(tl.int64) if FAR else n


@triton.jit
def _multiple(stride, VECTOR: tl.constexpr):
    """The stride, seen by the compiler to be a multiple of VECTOR, so that rows are read 16 bytes at a time."""
    return stride // VECTOR * VECTOR


@triton.jit
def _offset(strides, b, h):
    return tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def _matrix(p, strides, b, h, VECTOR: tl.constexpr):
    return (
        p + tl.cast(b, tl.int64) * _multiple(strides[0], VECTOR) + tl.cast(h, tl.int64) * _multiple(strides[1], VECTOR)
    )


@triton.jit
def _rows_of_mask(mask, strides, b, h, m0):
    if mask is None:
        return None
    else:
        return mask + _offset(strides, b, h) + tl.cast(m0, tl.int64) * strides[2]


@triton.jit
def _as_scores(x, T: tl.constexpr):
    """x plus a product of zeros: the same tile, in the layout of a product.

    From a tile that was just loaded the compiler would carry the layout of loads into the running sum, and compute the
    whole softmax twice, once in each layout: 3 times the instructions and hundreds of spills.
    """
    return tl.dot(tl.zeros([x.shape[0], 16], T), tl.zeros([16, x.shape[1]], T), x)


@triton.jit
def _finite(top):
    """A row of which every key is hidden has the maximum, and the log-sum-exp, of no number: minus infinity."""
    return tl.where(top == -float("inf"), 0, top)


@triton.jit
def _load(p, rows, stride, end, first, D: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr, RAGGED: tl.constexpr):
    """Columns first .. first + N of these rows; zero from row `end` on (EDGE) and from column D on (RAGGED)."""
    d = tl.arange(0, N)
    p = p + rows[:, None] * stride + d[None, :]
    if EDGE:
        if RAGGED:
            return tl.load(p, mask=(rows < end)[:, None] & (d < D - first)[None, :], other=0)
        else:
            return tl.load(p, mask=(rows < end)[:, None], other=0)
    elif RAGGED:
        return tl.load(p, mask=(d < D - first)[None, :], other=0)
    else:
        return tl.load(p)


@triton.jit
def _held(p, rows, stride, end, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr):
    """Both pieces of the rows; where chunks are read again, nothing is held and these are never looked at."""
    if CHUNK:
        return 0, 0
    else:
        p0 = _load(p, rows, stride, end, 0, D, D0, True, D0 > D)
        if D1:
            return p0, _load(p + D0, rows, stride, end, D0, D, D1, True, D0 + D1 > D)
        else:
            return p0, 0


@triton.jit
def _product(
    a, a_rows, a_l, a_end, a0, a1, b, b_rows, b_l, b_end,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows of a times rows of b: a b^T. The pieces of a are held, unless CHUNK columns of both are read at a time."""
    if CHUNK:
        T: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
        s = tl.zeros([a_rows.shape[0], b_rows.shape[0]], T)
        for d in range(0, D, CHUNK):
            x = _load(a + d, a_rows, a_l, a_end, d, D, CHUNK, True, D % CHUNK != 0)
            y = _load(b + d, b_rows, b_l, b_end, d, D, CHUNK, EDGE, D % CHUNK != 0)
            s = tl.dot(x, y.T, s, input_precision=PRECISION)
        return s
    else:
        s = tl.dot(a0, _load(b, b_rows, b_l, b_end, 0, D, D0, EDGE, D0 > D).T, input_precision=PRECISION)
        if D1:
            y = _load(b + D0, b_rows, b_l, b_end, D0, D, D1, EDGE, D0 + D1 > D)
            s = tl.dot(a1, y.T, s, input_precision=PRECISION)
        return s


@triton.jit
def _add_product(
    out0, out1, p, v, rows, v_l, end, column,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """out + p v, in both pieces of the columns."""
    p = p.to(v.dtype.element_ty)
    out0 = tl.dot(
        p,
        _load(v, rows, v_l, end, column, D, D0, EDGE, (D % D0 != 0) if D1 == 0 else (D0 > D)),
        out0,
        input_precision=PRECISION,
    )
    if D1:
        x = _load(v + D0, rows, v_l, end, D0, D, D1, EDGE, D0 + D1 > D)
        out1 = tl.dot(p, x, out1, input_precision=PRECISION)
    return out0, out1


@triton.jit
def _masked(
    s, mask, strides, m, n, m_end, n_end, n0, diagonal,
    BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, T: tl.constexpr = None,
):  # fmt: skip
    """Scores in units of log 2, the mask added; minus infinity where a key is hidden, past the end or in the future.

    m and n count from the tile's corner, along one axis each; mask points at the corner's row. BY_KEY: all rows of the
    mask are one. T, the type of the operands, is given where a softmax follows: see _as_scores.
    """
    if mask is not None:
        # The sum with n0 is made here, in every tile: outside of the loop the offsets would take 32 registers and more.
        key = (n0 + n) * strides[3]
        if BY_KEY:
            x = tl.load(mask + key, mask=n < n_end, other=0)
        else:
            x = tl.load(mask + m * strides[2] + key, mask=(m < m_end) & (n < n_end), other=0)
        boolean: tl.constexpr = mask.dtype.element_ty == tl.uint8
        x = x.to(s.dtype)
        if T is not None and not BY_KEY:
            x = _as_scores(x, T)
        if boolean:
            s = tl.where(x != 0, s, -float("inf"))
        else:
            # The least float, which others write for a hidden key, must not become an infinity: a row of it is a mean.
            s += tl.where(x == -float("inf"), x, tl.maximum(x, -2e38) * _LOG2_E)
    if EDGE:
        s = tl.where(n < n_end, s, -float("inf"))
        if CAUSAL:
            s = tl.where(n <= m + diagonal, s, -float("inf"))
    return s


@triton.jit
def _store(p, x0, x1, rows, stride, end, column, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    d = tl.arange(0, D0)
    at = p + rows[:, None] * stride + d[None, :]
    tl.store(at, x0.to(p.dtype.element_ty), mask=(rows < end)[:, None] & (d < D - column)[None, :])
    if D1:
        d = tl.arange(0, D1)
        at = p + D0 + rows[:, None] * stride + d[None, :]
        tl.store(at, x1.to(p.dtype.element_ty), mask=(rows < end)[:, None] & (d < D - D0)[None, :])
