import torch


def attention_rows(x, norm, cos, sin, eps, halves):
    """x (..., L, D), normalised by its root mean square and rotated in pairs: in the dtype sums are kept in."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    if cos is not None:
        pairs = (2, -1) if halves else (-1, 2)
        a, b = x.unflatten(-1, pairs).unbind(-2 if halves else -1)
        x = torch.stack([a * cos - b * sin, a * sin + b * cos], -2 if halves else -1).flatten(-2)
    return x
