"""Scaled dot-product attention without a score matrix in memory."""

import math

import torch

from .. import _library
from . import _backend, attention_rows, eager
from ._check import autocasts, check_dtype, check_same_device, check_same_dtype
from ._layout import empty_like_heads


def attention(
    q,
    k,
    v,
    *,
    mask=None,
    causal=False,
    scale=None,
    q_norm=None,
    k_norm=None,
    norm_eps=1e-6,
    rotary=None,
    rotary_pairs="neighbours",
    backend=None,
):
    """Attend from every query to the keys: a softmax over the keys weighs the values.

        S[i, j] = scale * <q[i], k[j]> + mask[i, j]         -inf where a boolean mask is False, or causality forbids
        out[i]  = sum_j exp(S[i, j]) v[j] / sum_j exp(S[i, j])

    where, if asked, each row of q (and of k) is first normalised and rotated in pairs of its elements (a, b):

        u = q rsqrt(mean(q^2) + norm_eps) q_norm,    (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
        q: (B, H, Lq, D) of any strides with a unit last one, such as a view of (B, Lq, H*D) or of a fused (B, Lq, 3, H,
            D) projection; float32, bfloat16, float16 or float64; D from 1 to 512.
        k, v: (B, Hk, Lk, D) in q's dtype, of any strides as q; Hk divides H, and heads H/Hk*i to H/Hk*(i+1)-1 of q
            share head i of them.
        mask: boolean, True where a query may attend to a key, or added to S, in q's dtype or float32; of any shape that
            broadcasts to (B, H, Lq, Lk). None for no mask.
        causal: query i attends to the keys up to i + Lk - Lq: the last query to all of them (torch's is_causal, which
            aligns the first query with the first key, is the same where Lq = Lk).
        scale: positive; None is D^-1/2.
        q_norm, k_norm: (D), the weights of the norms of q and k, of any floating-point dtype; None for no norm.
        norm_eps: of those norms.
        rotary: (cos, sin) of one shape that broadcasts to (B, H, L, D/2), for q and for k: positions of
            self-attention. None for no rotation.
        rotary_pairs: "neighbours", elements 2i and 2i + 1 (FLUX; diffusers' use_real_unbind_dim=-1), or "halves", i and
            i + D/2 (its -2).
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on q's device.

    Returns: (B, H, Lq, D) in q's dtype. Where q is a view of (B, Lq, H, D), so is it: out.transpose(1, 2).flatten(2),
        the input of the next projection, costs nothing. A query that may attend to nothing gets 0, and gradients of 0.
    Gradients: in q, k, v, an additive mask, the norms' weights, cos and sin; the first order recomputes S from its
        saved log-sum-exp and takes memory O(L) as the forward does; orders beyond the first are in plain PyTorch.
    Norms and rotations happen on CPU as the kernel reads the rows (in plain PyTorch before it where cos or sin require
        a gradient), on other backends in plain PyTorch before the kernel.
    Autocast: runs in autocast's dtype.
    Raises: ValueError or TypeError that names the argument.
    Equivalent to: F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True), apart from causal and
        from queries that attend to nothing; q_norm: F.rms_norm(q, (D,), q_norm, norm_eps).
    Source: Vaswani et al., "Attention Is All You Need", 2017; Milakov and Gimelshein, "Online normalizer calculation
        for softmax", 2018; Dao et al., "FlashAttention", 2022; norms: Henry et al., "Query-Key Normalization for
        Transformers", 2020; rotation: Su et al., "RoFormer", 2021.
    """
    q, k, v = (_cast_for_autocast(t) for t in (q, k, v))
    scale = _check(q, k, v, mask, scale)
    run = _backend.choose("attention", _IMPLEMENTATIONS, backend, q, _declines, flop=lambda: 4 * q.numel() * k.size(2))
    if q_norm is None and k_norm is None and rotary is None:
        return run(q, k, v, mask, bool(causal), scale)
    rows = attention_rows.check(q, k, q_norm, k_norm, norm_eps, rotary, rotary_pairs)
    _, _, cos, sin, *_ = rows
    if run is eager.attention:
        run = attention_rows.specification
    elif run is _native and q.is_cpu and not any(t is not None and t.requires_grad for t in (cos, sin)):
        run = attention_rows.over_rows
    else:
        run = attention_rows.before(run)
    return run(q, k, v, mask, *rows, bool(causal), scale)


def _declines(backend, q):
    """Why the CUDA kernel, which multiplies on tensor cores, does not take q; None where it does."""
    if backend == "cuda" and q.dtype == torch.float64:
        return "the cuda kernel takes float32, bfloat16 or float16, q is torch.float64"
    return None


def _cast_for_autocast(t):
    if not isinstance(t, torch.Tensor) or not autocasts(t):
        return t
    return t.to(torch.get_autocast_dtype(t.device.type)) if _library.castable(t) else t


def _check(q, k, v, mask, scale):
    """The scale to use; raises on bad arguments."""
    op = "attention"
    check_dtype(op, "q", q)
    if q.dim() != 4:
        raise ValueError(f"{op}: q must have shape (B, H, Lq, D), got {tuple(q.shape)}")
    B, H, Lq, D = q.shape
    if not 1 <= D <= 512:
        raise ValueError(f"{op}: q must have a head dimension D of 1 to 512, got {D}")
    for argument, t in (("k", k), ("v", v)):
        check_same_device(op, argument, t, q, "q")
        check_same_dtype(op, argument, t, q, "q")
    if k.dim() != 4 or k.size(0) != B or k.size(3) != D:
        raise ValueError(
            f"{op}: k must have shape ({B}, Hk, Lk, {D}) to match q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if k.size(1) == 0 or H % k.size(1):
        raise ValueError(f"{op}: k must have a number of heads that divides q's {H}, got {k.size(1)}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if mask is not None:
        check_same_device(op, "mask", mask, q, "q")
        if mask.dtype not in (torch.bool, q.dtype, torch.float32):
            raise TypeError(f"{op}: mask must be torch.bool, q's dtype {q.dtype} or torch.float32, got {mask.dtype}")
        if not _broadcasts(mask.shape, (B, H, Lq, k.size(2))):
            raise ValueError(
                f"{op}: mask must have a shape that broadcasts to (B, H, Lq, Lk) = {(B, H, Lq, k.size(2))}, "
                f"got {tuple(mask.shape)}"
            )
    scale = D**-0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale:g}")
    return scale


def _broadcasts(shape, to):
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _attention_triton(q, k, v, mask, causal, scale):
    _check(q, k, v, mask, scale)
    from .triton.attention_kernel import attention  # here, not above: importing Triton takes a second

    return attention(q, k, v, mask, causal, scale)


def _attention_backward_triton(grad, q, k, v, mask, out, lse, causal, scale, mask_needs_grad):
    _check(q, k, v, mask, scale)
    _check_backward(grad, q, mask, out, lse, mask_needs_grad)
    from .triton.attention_backward_kernel import attention_backward

    return attention_backward(grad, q, k, v, mask, out, lse, causal, scale, mask_needs_grad)


def _check_backward(grad, q, mask, out, lse, mask_needs_grad):
    op = "attention"
    for argument, t in (("grad", grad), ("out", out)):
        check_same_device(op, argument, t, q, "q")
        check_same_dtype(op, argument, t, q, "q")
        if t.shape != q.shape:
            raise ValueError(f"{op}: {argument} must have q's shape {tuple(q.shape)}, got {tuple(t.shape)}")
    check_same_device(op, "lse", lse, q, "q")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if lse.shape != q.shape[:3] or lse.dtype != dtype or not lse.is_contiguous():
        raise ValueError(
            f"{op}: lse must be contiguous of shape {tuple(q.shape[:3])} and dtype {dtype}, "
            f"got {tuple(lse.shape)} of {lse.dtype}"
        )
    if mask_needs_grad and (mask is None or mask.dtype == torch.bool):
        raise ValueError(f"{op}: mask must be additive to have a gradient")


def _native(q, k, v, mask, causal, scale):
    return _attention(q, k, v, mask, causal, scale)[0]


_attention = _library.past_autograd("attention")


def _fake(q, k, v, mask, causal, scale):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return empty_like_heads(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(grad, q, k, v, mask, out, lse, causal, scale, mask_needs_grad):
    dmask = mask.new_empty(mask.shape) if mask_needs_grad else q.new_empty(0)
    return empty_like_heads(q), empty_like_heads(k), empty_like_heads(v), dmask


def _setup_context(ctx, inputs, output):
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, out, lse)


def _backward(kernel):
    """The gradient that all kernels share; `kernel` names the operator of its first order."""

    def backward(ctx, grad, _grad_lse):
        q, k, v, mask, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True: what comes out will be differentiated in its turn
            # Views, so that one tensor passed in two places gets the gradient of each.
            tensors = [t if t is None else t.view_as(t) for t in (q, k, v, mask)]
            y = eager.attention(*tensors, ctx.causal, ctx.scale)
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
            gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            gradients = [next(gradients) if need else None for need in needs]
        else:
            gradients = _library.op(kernel)(grad, q, k, v, mask, out, lse, ctx.causal, ctx.scale, needs[3])
            gradients = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return *gradients, None, None

    return backward


def _triton(q, k, v, mask, causal, scale):
    return torch.ops.imagegen.attention_triton(q, k, v, mask, causal, scale)[0]


_library.define(
    "attention_triton(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) "
    "-> (Tensor out, Tensor lse)",
    _attention_triton,
)
_library.define(
    "attention_backward_triton(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    "bool causal, float scale, bool mask_needs_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)",
    _attention_backward_triton,
)

for twin in ("", "_triton"):
    _library.register(
        f"attention{twin}",
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward(f"attention_backward{twin}"),
    )
    _library.register(f"attention_backward{twin}", fake=_fake_backward)

_IMPLEMENTATIONS = {"eager": eager.attention, "cpu": _native, "cuda": _native, "triton": _triton}
