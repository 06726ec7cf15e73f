"""Nearest-2x upsampling followed by a 3x3 convolution, without the upsampled tensor."""

from .. import _library
from . import _backend, eager
from ._activation import check_activation
from ._check import check_dtype, check_same_device, check_same_dtype, check_shape


def upsample_conv2d(x, weight, bias=None, *, activation="linear", backend=None):
    """Upsample x twofold by nearest neighbour and convolve it 3x3 with padding 1."""
    _check(x, weight, bias, activation)
    run = _backend.choose("upsample_conv2d", _IMPLEMENTATIONS, backend, x)
    return run(x, weight, bias, activation)


def _check(x, weight, bias, activation):
    check_dtype("upsample_conv2d", "x", x)
    if x.dim() != 4:
        raise ValueError(f"upsample_conv2d: x must have shape (B, C, H, W), got {tuple(x.shape)}")
    check_same_device("upsample_conv2d", "weight", weight, x)
    if weight.dim() != 4:
        raise ValueError(f"upsample_conv2d: weight must have shape (Cout, C, 3, 3), got {tuple(weight.shape)}")
    check_shape("upsample_conv2d", "weight", weight, (weight.size(0), x.size(1), 3, 3), x)
    if bias is not None:
        check_same_device("upsample_conv2d", "bias", bias, x)
        if tuple(bias.shape) != (weight.size(0),):
            raise ValueError(
                f"upsample_conv2d: bias must have shape ({weight.size(0)},) to match weight {tuple(weight.shape)}, "
                f"got {tuple(bias.shape)}"
            )
    check_activation("upsample_conv2d", "activation", activation)


_IMPLEMENTATIONS = {"eager": eager.upsample_conv2d}
