import torch.nn.functional as F

from .._activation import ACTIVATIONS
from .._layout import memory_format


def conv_transpose2d(x, weight, bias, stride, padding, output_padding, scale, shift, activation):
    y = _convolve(x, weight, bias, stride, padding, output_padding)
    return finish(y, scale, shift, activation).contiguous(memory_format=memory_format(x))


def finish(y, scale, shift, activation):
    z = y if scale is None else y * scale.reshape(-1, 1, 1)
    z = z if shift is None else z + shift.reshape(-1, 1, 1)
    return ACTIVATIONS[activation](z).to(y.dtype)


def _convolve(x, weight, bias, stride, padding, output_padding):
    if 0 not in (*x.shape, *weight.shape):
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    # torch refuses what is empty but the batch: sums over nothing are zero, and differentiable.
    y = (x[:0].sum() + weight[:0].sum()).expand(output_shape(x, weight, stride, padding, output_padding))
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def output_shape(x, weight, stride, padding, output_padding):
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, output_padding, strict=True)
    return x.size(0), weight.size(1), *((n - 1) * s - 2 * p + k + extra for n, k, s, p, extra in sizes)
