"""Memory formats: every op returns the format of its input."""

import torch


def memory_format(x):
    """channels_last where channels are the innermost axis of x, else contiguous; slices count as their parent does."""
    channels_last = x.dim() == 4 and x.size(1) > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_like_heads(x):
    """An uninitialised tensor like x (B, H, L, D): a view of (B, L, H, D) where x is one, else contiguous.

    A projection leaves (B, L, H*D); attention reads its heads as a view, and the next projection finds them joined.
    """
    B, H, L, D = x.shape
    if H > 1 and L > 1 and x.stride(1) < x.stride(2):
        return x.new_empty(B, L, H, D).transpose(1, 2)
    return x.new_empty(B, H, L, D)


def empty_model_input(x, copies, dtype):
    """An uninitialised tensor for `copies` of x, one after the other along the batch."""
    shape = (copies * x.size(0), *x.shape[1:])
    return x.new_empty(shape, dtype=dtype).to(memory_format=memory_format(x))
