"""What becomes of the rows of q and k on their way into attention: a normalisation and a rotation."""

import math

import torch

from .. import _library
from . import eager
from ._check import check_dtype, check_same_device
from ._layout import empty_like_heads

# In the order of rotary_pairs: neighbours (2i, 2i + 1), halves (i, i + D/2).
PAIRS = ("neighbours", "halves")


def check(q, k, q_norm, k_norm, norm_eps, rotary, rotary_pairs):
    """(q_norm, k_norm, cos, sin, eps, halves) as the operators take them; raises on bad arguments."""
    op = "attention"
    compute = torch.promote_types(q.dtype, torch.float32)
    for argument, x, norm in (("q", q, q_norm), ("k", k, k_norm)):
        if norm is None:
            continue
        check_same_device(op, f"{argument}_norm", norm, x, argument)
        check_dtype(op, f"{argument}_norm", norm)
        if norm.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {argument}_norm must have shape ({x.size(-1)},), got {tuple(norm.shape)}")
    norm_eps = float(norm_eps)
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"{op}: norm_eps must be at least 0 and finite, got {norm_eps:g}")
    if rotary_pairs not in PAIRS:
        raise ValueError(f"{op}: rotary_pairs must be one of {', '.join(PAIRS)}, got {rotary_pairs!r}")
    cos, sin = (None, None) if rotary is None else _check_rotary(op, q, k, rotary)
    q_norm, k_norm, cos, sin = (t if t is None else t.to(compute) for t in (q_norm, k_norm, cos, sin))
    return q_norm, k_norm, cos, sin, norm_eps, rotary_pairs == "halves"


def _check_rotary(op, q, k, rotary):
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"{op}: rotary must be a pair (cos, sin)")
    D = q.size(-1)
    if D % 2:
        raise ValueError(f"{op}: rotary must be None where D is odd, got D = {D}")
    for t in rotary:
        check_same_device(op, "rotary", t, q, "q")
        check_dtype(op, "rotary", t)
        for argument, x in (("q", q), ("k", k)):
            full = (*x.shape[:3], D // 2)
            fits = 1 <= t.dim() <= 4 and t.size(-1) == D // 2
            if not fits or any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(full), strict=False)):
                raise ValueError(
                    f"{op}: rotary must have shapes that broadcast to {argument}'s (B, H, L, D/2) = {full}, "
                    f"got {tuple(t.shape)}"
                )
    cos, sin = rotary
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: rotary must be a pair of one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    return cos, sin


def over_rows(q, k, v, mask, q_norm, k_norm, cos, sin, eps, halves, causal, scale):
    """attention over the prepared rows by the compiled kernel, which prepares them as it reads them."""
    return torch.ops.imagegen.attention_over_rows(q, k, v, mask, q_norm, k_norm, cos, sin, eps, halves, causal, scale)[
        0
    ]


def before(attention):
    """`attention` after plain PyTorch has prepared the rows: for kernels that take them as they are."""

    def run(q, k, v, mask, q_norm, k_norm, cos, sin, eps, halves, causal, scale):
        q = eager.attention_rows(q, q_norm, cos, sin, eps, halves).to(q.dtype)
        k = eager.attention_rows(k, k_norm, cos, sin, eps, halves).to(k.dtype)
        return attention(q, k, v, mask, causal, scale)

    return run


def specification(q, k, v, mask, q_norm, k_norm, cos, sin, eps, halves, causal, scale):
    """In the dtype sums are kept in from beginning to end."""
    y = eager.attention(
        eager.attention_rows(q, q_norm, cos, sin, eps, halves),
        eager.attention_rows(k, k_norm, cos, sin, eps, halves),
        v,
        mask,
        causal,
        scale,
    )
    return empty_like_heads(q).copy_(y)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.halves, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx, grad, _grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    how = ctx.eps, ctx.halves
    needs = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled():  # create_graph=True: what comes out will be differentiated in its turn
        tensors = [t if t is None else t.view_as(t) for t in tensors]
        y = specification(*tensors, *how, ctx.causal, ctx.scale)
        wanted = [t for t, need in zip(tensors, needs, strict=False) if need]
        gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return *(next(gradients) if need else None for need in needs), *[None] * 6
    q, k, v, mask, q_norm, k_norm, cos, sin = tensors
    q_rows, k_rows = (q_norm, cos, sin, *how), (k_norm, cos, sin, *how)
    prepare, unprepare = _library.op("attention_rows"), _library.op("attention_rows_backward")
    dq, dk, dv, dmask = _library.op("attention_backward")(
        grad, prepare(q, *q_rows), prepare(k, *k_rows), v, mask, out, lse, ctx.causal, ctx.scale, needs[3]
    )
    dq, dq_norm = unprepare(dq, q, *q_rows)
    dk, dk_norm = unprepare(dk, k, *k_rows)
    gradients = zip((dq, dk, dv, dmask, dq_norm, dk_norm), needs, strict=True)
    return *(g if need else None for g, need in gradients), *[None] * 6


def _fake_over_rows(q, k, v, mask, q_norm, k_norm, cos, sin, eps, halves, causal, scale):
    return empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_rows_backward(grad, x, norm, cos, sin, eps, halves):
    return empty_like_heads(x), x.new_empty(0) if norm is None else torch.empty_like(norm)


_library.register("attention_rows", fake=lambda x, *_: empty_like_heads(x))
_library.register("attention_rows_backward", fake=_fake_rows_backward)
_library.register("attention_over_rows", fake=_fake_over_rows, setup_context=_setup_context, backward=_backward)
