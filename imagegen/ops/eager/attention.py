import torch

from .._layout import empty_like_heads


def attention(q, k, v, mask, causal, scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads_per_kv = q.size(1) // max(1, k.size(1))
    k, v = (t.to(dtype).repeat_interleave(heads_per_kv, 1) for t in (k, v))
    scores = scale * (q.to(dtype) @ k.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if causal:
        Lq, Lk = scores.shape[-2:]
        future = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).triu(Lk - Lq + 1)
        scores = scores.masked_fill(future, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)  # rows that attend to no key: 0, where softmax says NaN
    weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return empty_like_heads(q).copy_(weights @ v)
