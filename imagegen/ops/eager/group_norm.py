from functools import reduce

import torch

from .._activation import ACTIVATIONS
from .._layout import memory_format


def group_norm(x, num_groups, weight, bias, eps, scale, shift, activation):
    # torch refuses weights in another dtype on some devices, and has no gradient of a bias without a weight.
    dtype = reduce(torch.promote_types, [t.dtype for t in (x, weight, bias) if t is not None])
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    # F.group_norm would refuse groups of one element.
    y = torch.group_norm(x.to(dtype), num_groups, weight, bias, eps)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.reshape(per_channel))
    if shift is not None:
        y = y + shift.reshape(per_channel)
    return ACTIVATIONS[activation](y).to(x.dtype).contiguous(memory_format=memory_format(x))
