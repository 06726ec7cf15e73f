import torch
import triton
import triton.language as tl

from .._layout import empty_model_input
from ..eager.sampler_step import first_pass
from .randn_kernel import noise as make_noise

BLOCK = 256  # counters a program, of four elements each


def sampler_step(x, slots, *arguments):
    """The operator `sampler_step`."""
    *operands, store, copies, shared, dtype = arguments
    stored = torch.empty_like(x) if store else None
    model_input = empty_model_input(x, copies, dtype) if copies else None
    slots = [None if h.shape != x.shape else h for h in slots]
    if shared:  # x' is the first copy
        _run(x, slots, *operands, model_input[: len(x)], stored, model_input[len(x) :] if copies > 1 else None, False)
        return [t for t in (stored, model_input) if t is not None]
    x_next = torch.empty_like(x)
    _run(x, slots, *operands, x_next, stored, model_input, False)
    return [t for t in (x_next, stored, model_input) if t is not None]


def sampler_step_(state, *arguments):
    """The operator `sampler_step_`."""
    *operands, copies, dtype = arguments
    x, *slots = state.unbind()
    model_input = empty_model_input(x, copies, dtype)
    _run(x, slots, *operands, x, None, model_input if copies else None, True)
    return model_input


def _run(
    x, slots, model_output, uncond_output, noise, mask, known, known_noise, row, index, guidance, scale, rescale, clip,
    threshold, seed, step, first, x_next, stored, model_input, in_place,
):  # fmt: skip
    if x.numel() == 0:
        return
    row = row.to(x.device)
    factor, bound = first_pass(x, model_output, uncond_output, row, index, guidance, scale, rescale, clip, threshold)
    tensors = [x, model_output, uncond_output, noise, mask, known, known_noise, x_next, stored, model_input, *slots]
    generates = seed is not None and (noise is None or (mask is not None and known_noise is None))
    dense = _are_dense(x, [t for t in tensors if t is not None]) and (x.is_contiguous() or not generates)
    axes = range(x.dim() - 1, 0, -1)
    strides = [0 if t is None else t.stride(d) for t in tensors for d in axes]
    size = x[0].numel()
    with torch.cuda.device_of(x):
        sampler_step_kernel[(len(x) * triton.cdiv(size, 4 * BLOCK),)](
            *tensors[:10],
            tuple(slots),
            row,
            0 if row.dim() == 1 or (index is not None and index.dim() == 0) else 1,
            row.stride(0) if row.dim() == 2 else 0,
            row.stride(-1),
            len(row) if row.dim() == 2 else 1,
            index,
            guidance,
            factor,
            bound,
            len(x),
            size,
            tuple(0 if t is None else t.stride(0) for t in tensors),
            None if dense else tuple(x.size(d) for d in axes),
            None if dense else tuple(strides),
            scale,
            float("inf") if clip is None else clip,
            0 if seed is None else seed,
            step,
            first,
            SEEDED=seed is not None,
            COPIES=0 if model_input is None else len(model_input) // len(x),
            IN_PLACE=in_place,
            DOUBLE=x.dtype == torch.float64,
            SLOTS=len(slots),
            BLOCK=BLOCK,
        )


def _are_dense(x, tensors):
    """Whether every tensor's samples have the strides of x's, and those leave no gaps."""
    of_sample = [d for d in range(1, x.dim()) if x.size(d) > 1]
    expected = 1
    for d in sorted(of_sample, key=x.stride):
        if x.stride(d) != expected:
            return False
        expected *= x.size(d)
    return all(t.stride(d) == x.stride(d) for t in tensors for d in of_sample)


@triton.jit
def sampler_step_kernel(
    x,
    model_output,
    uncond_output,  # None where not guided, as every tensor that there is none of
    noise,
    mask,
    known,
    known_noise,
    x_next,
    stored,  # None where what is stored goes to a slot
    model_input,
    slots,
    row,
    by_sample,  # 1: every sample has a row, or an index, of its own
    row_stride,
    column_stride,
    rows,
    index,
    guidance,
    factor,  # on the guided output
    bound,  # of dynamic thresholding
    samples,
    size: tl.int64,  # elements of a sample
    sample_strides,
    sizes,  # innermost first; None where the samples of all tensors are dense alike
    strides,  # of every tensor in turn
    scale: tl.float64,
    clip: tl.float64,
    seed: tl.int64,
    step: tl.int64,
    first: tl.int64,
    SEEDED: tl.constexpr,
    COPIES: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DOUBLE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x' = c_x x + c_0 x_0 + c_m m + c_n noise + sum_k c_hk h[k] with x_0 = clip(a_x x + a_m m), and all around it.

    One program per 4 BLOCK elements of one sample. The row is read here: the host never waits for it.
    """
    COMPUTE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    programs = tl.cdiv(size, 4 * BLOCK)
    b = tl.program_id(0).to(tl.int64) // programs
    block = tl.program_id(0) % programs
    i = block.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside = i < size

    at = b * by_sample
    if index is not None:
        step = tl.load(index + at)
        at = step
    row += at * row_stride
    there = (at >= 0) & (at < rows)  # else the counter has left the table, and nan says so
    nan: tl.constexpr = float("nan")
    s = tl.load(row + column_stride, mask=there, other=nan).to(COMPUTE)
    a_x = tl.load(row + 2 * column_stride, mask=there, other=nan).to(COMPUTE)
    a_m = tl.load(row + 3 * column_stride, mask=there, other=nan).to(COMPUTE)
    c_x = tl.load(row + 4 * column_stride, mask=there, other=nan).to(COMPUTE)
    c_0 = tl.load(row + 5 * column_stride, mask=there, other=nan).to(COMPUTE)
    c_m = tl.load(row + 6 * column_stride, mask=there, other=nan).to(COMPUTE)
    c_n = tl.load(row + 7 * column_stride, mask=there, other=nan).to(COMPUTE)
    after = row + (8 + SLOTS) * column_stride
    q_x = tl.load(after, mask=there, other=nan).to(COMPUTE)
    q_0 = tl.load(after + column_stride, mask=there, other=nan).to(COMPUTE)
    q_m = tl.load(after + 2 * column_stride, mask=there, other=nan).to(COMPUTE)
    slot = tl.load(after + 3 * column_stride, mask=there, other=-1).to(tl.int32)

    wants_x0 = (c_0 != 0) | (q_0 != 0)
    wants_m = (wants_x0 & (a_m != 0)) | (c_m != 0) | (q_m != 0)
    wants_x = (wants_x0 & (a_x != 0)) | (c_x != 0) | (q_x != 0)
    v_x = _load(x, 0, b, i, wants_x, size, sample_strides, sizes, strides, COMPUTE)
    m = _load(model_output, 1, b, i, wants_m, size, sample_strides, sizes, strides, COMPUTE)
    if uncond_output is not None:
        g = tl.full((1,), scale, COMPUTE)
        if guidance is not None:
            g = tl.load(guidance + b + tl.arange(0, 1)).to(COMPUTE)
        m = tl.where(g == 0, 0, g * m)
        u = _load(uncond_output, 2, b, i, wants_m & (tl.sum(g) != 1), size, sample_strides, sizes, strides, COMPUTE)
        m += (1 - g) * u
    if factor is not None:
        m *= tl.load(factor + b).to(COMPUTE)
    x0 = a_x * v_x + a_m * m
    if bound is not None:
        limit = tl.load(bound + b).to(COMPUTE)
        x0 = tl.where(limit != limit, limit, _clip(x0, limit) / limit)
    else:
        x0 = _clip(x0, tl.full((1,), clip, COMPUTE))
    x0 = tl.where(wants_x0, x0, 0)

    y = c_x * v_x + c_0 * x0 + c_m * m
    if noise is not None:
        y += c_n * _load(noise, 3, b, i, c_n != 0, size, sample_strides, sizes, strides, COMPUTE)
    elif SEEDED:
        if c_n != 0:
            y += c_n * make_noise(seed, first + b, step, tl.full((), 0, tl.int64), block, BLOCK).to(COMPUTE)
    else:
        y += tl.where(c_n == 0, 0, float("nan"))  # nothing was given: the host could not see the row to say so
    for k in tl.static_range(SLOTS):
        c_h = tl.load(row + (8 + k) * column_stride, mask=there, other=nan).to(COMPUTE)
        if slots[k] is not None:
            y += c_h * _load(slots[k], 10 + k, b, i, c_h != 0, size, sample_strides, sizes, strides, COMPUTE)
        else:
            y += tl.where(c_h == 0, 0, float("nan"))

    if mask is not None:
        b_0 = tl.load(after + 4 * column_stride, mask=there, other=nan).to(COMPUTE)
        b_1 = tl.load(after + 5 * column_stride, mask=there, other=nan).to(COMPUTE)
        keep = _load(mask, 4, b, i, size > 0, size, sample_strides, sizes, strides, COMPUTE)
        other = b_0 * _load(known, 5, b, i, b_0 != 0, size, sample_strides, sizes, strides, COMPUTE)
        if known_noise is not None:
            other += b_1 * _load(known_noise, 6, b, i, b_1 != 0, size, sample_strides, sizes, strides, COMPUTE)
        elif SEEDED:
            if b_1 != 0:
                other += b_1 * make_noise(seed, first + b, step, tl.full((), 1, tl.int64), block, BLOCK).to(COMPUTE)
        else:
            other += tl.where(b_1 == 0, 0, float("nan"))
        y = keep * y + (1 - keep) * other

    h = q_x * v_x + q_0 * x0 + q_m * m
    if stored is not None:
        _store(stored, 8, b, i, h, inside, sample_strides, sizes, strides)
    if IN_PLACE:
        for k in tl.static_range(SLOTS):
            _store(slots[k], 10 + k, b, i, h, i < tl.where(slot == k, size, 0), sample_strides, sizes, strides)
    _store(x_next, 7, b, i, y, inside, sample_strides, sizes, strides)
    for c in tl.static_range(COPIES):
        _store(model_input, 9, b + c * samples, i, s * y, inside, sample_strides, sizes, strides)


@triton.jit
def _clip(v, bound):
    return tl.where(v > bound, bound, tl.where(v < -bound, -bound, v))  # lets nan through


@triton.jit
def _offset(tensor: tl.constexpr, b, i, sample_strides, sizes, strides):
    at = i
    if sizes is not None:
        at = tl.zeros_like(i)
        rest = i
        for d in tl.static_range(len(sizes)):
            at += rest % sizes[d] * strides[tensor * len(sizes) + d]
            rest //= sizes[d]
    return b * sample_strides[tensor] + at


@triton.jit
def _load(p, tensor: tl.constexpr, b, i, wanted, size, sample_strides, sizes, strides, COMPUTE: tl.constexpr):
    """A coefficient of 0 masks the load: the tensor is not read."""
    at = _offset(tensor, b, i, sample_strides, sizes, strides)
    return tl.load(p + at, mask=i < tl.where(wanted, size, 0), other=0).to(COMPUTE)


@triton.jit
def _store(p, tensor: tl.constexpr, b, i, v, inside, sample_strides, sizes, strides):
    at = _offset(tensor, b, i, sample_strides, sizes, strides)
    tl.store(p + at, v.to(p.dtype.element_ty), mask=inside)
