import torch.nn.functional as F

from .._activation import ACTIVATIONS
from .._layout import memory_format


def group_norm(x, num_groups, weight, bias, eps, scale, shift, activation):
    y = F.group_norm(x, num_groups, weight, bias, eps)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.reshape(per_channel))
    if shift is not None:
        y = y + shift.reshape(per_channel)
    return ACTIVATIONS[activation](y).to(x.dtype).contiguous(memory_format=memory_format(x))
