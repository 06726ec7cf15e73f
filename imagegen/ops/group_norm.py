"""Group normalisation with scale, shift and activation in the same pass."""

from .. import _library
from . import _backend, eager
from ._activation import check_activation
from ._check import check_dtype, check_same_device, check_shape


def group_norm(
    x, num_groups, weight=None, bias=None, *, eps=1e-5, scale=None, shift=None, activation="linear", backend=None
):
    """Normalise each group of channels of each image, then scale, shift and activate."""
    _check(x, num_groups, weight, bias, eps, scale, shift, activation)
    run = _backend.choose("group_norm", _IMPLEMENTATIONS, backend, x)
    return run(x, num_groups, weight, bias, float(eps), scale, shift, activation)


def _check(x, num_groups, weight, bias, eps, scale, shift, activation):
    check_dtype("group_norm", "x", x)
    if x.dim() < 2:
        raise ValueError(f"group_norm: x must have shape (B, C, ...), got {tuple(x.shape)}")
    if num_groups < 1 or x.size(1) % num_groups:
        raise ValueError(f"group_norm: num_groups must divide x's {x.size(1)} channels, got {num_groups}")
    for argument, t, shape in (
        ("weight", weight, x.shape[1:2]),
        ("bias", bias, x.shape[1:2]),
        ("scale", scale, x.shape[:2]),
        ("shift", shift, x.shape[:2]),
    ):
        if t is not None:
            check_dtype("group_norm", argument, t)
            check_same_device("group_norm", argument, t, x)
            check_shape("group_norm", argument, t, shape, x)
    if not eps >= 0:
        raise ValueError(f"group_norm: eps must be at least 0, got {eps}")
    check_activation("group_norm", "activation", activation)


_IMPLEMENTATIONS = {"eager": eager.group_norm}
