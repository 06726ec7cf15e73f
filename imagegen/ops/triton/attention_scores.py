"""What attention's kernels share: rows of heads, products over the two pieces of D, masked scores."""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def place(L, H, ROWS: tl.constexpr):
    """Batch, head and first row of this program. Under a causal mask the last rows take longest: they start first."""
    tiles = tl.cdiv(L, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    return (tl.program_id(0) // tiles // H).to(tl.int64), tl.program_id(0) // tiles % H, tile * ROWS


@triton.jit
def keys_of(m0, Lq, Lk, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Where the keys of these queries end, and up to where tiles of them are whole and nothing hides a key."""
    stop = Lk
    edge = Lk // BN * BN
    if CAUSAL:
        stop = tl.minimum(stop, m0 + BM + Lk - Lq)
        edge = tl.minimum(edge, tl.maximum(m0 + 1 + Lk - Lq, 0) // BN * BN)
    return stop, edge


@triton.jit
def steps(N: tl.constexpr, FAR: tl.constexpr):
    n = tl.arange(0, N)
    return n.to(tl.int64) if FAR else n


@triton.jit
def rows_of(p, strides, b, h, first, VECTOR: tl.constexpr):
    """Where row `first` of a head begins, and the stride from row to row."""
    l = _multiple(strides[2], VECTOR)
    p += tl.cast(b, tl.int64) * _multiple(strides[0], VECTOR) + tl.cast(h, tl.int64) * _multiple(strides[1], VECTOR)
    return p + tl.cast(first, tl.int64) * l, l


@triton.jit
def _multiple(stride, VECTOR: tl.constexpr):
    """The stride, seen by the compiler to be a multiple of VECTOR, so that rows are read 16 bytes at a time."""
    return stride // VECTOR * VECTOR


@triton.jit
def offset(strides, b, h):
    return tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def rows_of_mask(mask, strides, b, h, m0):
    if mask is None:
        return None
    else:
        return mask + offset(strides, b, h) + tl.cast(m0, tl.int64) * strides[2]


@triton.jit
def held(p, rows, stride, end, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr):
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
def scores(
    q, m, q_l, m_end, q0, q1, k, n, k_l, n_end, n0, mask, mask_strides, diagonal, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr,
    BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr, T: tl.constexpr = None,
):  # fmt: skip
    """scale q k^T + mask of a tile whose rows are queries, as `masked` gives them."""
    s = product(q, m, q_l, m_end, q0, q1, k, n, k_l, n_end, D, D0, D1, CHUNK, PRECISION, EDGE)
    return masked(
        s * (scale * LOG2_E), mask, mask_strides, m[:, None], n[None, :], m_end, n_end, n0, diagonal,
        BY_KEY, CAUSAL, EDGE, T,
    )  # fmt: skip


@triton.jit
def product(
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
def add_product(
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
def masked(
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
            s += tl.where(x == -float("inf"), x, tl.maximum(x, -2e38) * LOG2_E)
    if EDGE:
        s = tl.where(n < n_end, s, -float("inf"))
        if CAUSAL:
            s = tl.where(n <= m + diagonal, s, -float("inf"))
    return s


@triton.jit
def _as_scores(x, T: tl.constexpr):
    """x plus a product of zeros: the same tile, in the layout of a product.

    From a tile that was just loaded the compiler would carry the layout of loads into the running sum, and compute the
    whole softmax twice, once in each layout: 3 times the instructions and hundreds of spills.
    """
    return tl.dot(tl.zeros([x.shape[0], 16], T), tl.zeros([16, x.shape[1]], T), x)


@triton.jit
def finite(top):
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
def store_rows(p, x0, x1, rows, stride, end, column, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    d = tl.arange(0, D0)
    at = p + rows[:, None] * stride + d[None, :]
    tl.store(at, x0.to(p.dtype.element_ty), mask=(rows < end)[:, None] & (d < D - column)[None, :])
    if D1:
        d = tl.arange(0, D1)
        at = p + D0 + rows[:, None] * stride + d[None, :]
        tl.store(at, x1.to(p.dtype.element_ty), mask=(rows < end)[:, None] & (d < D - D0)[None, :])
