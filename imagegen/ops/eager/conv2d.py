import torch.nn.functional as F

from .._activation import ACTIVATIONS
from .._layout import memory_format


def conv2d(x, weight, bias, residual, scale, shift, input_activation, activation):
    y = F.conv2d(map_input(x, scale, shift, input_activation), weight, bias, padding=1)
    if residual is not None:
        y = y + residual.to(y.dtype)  # which under autocast is narrower
    return ACTIVATIONS[activation](y).contiguous(memory_format=memory_format(x))


def map_input(x, scale, shift, activation):
    """What the convolution sees of x: activation(x * scale + shift), with one factor per image and channel."""
    if scale is not None:
        x = (x * scale[..., None, None] + shift[..., None, None]).to(x.dtype)
    return ACTIVATIONS[activation](x)
