"""Argument checks shared by the ops; csrc/common/check.h says the same to callers of the operators themselves."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocasts(x):
    """Whether autocast is on where x is; torch has none for tensors without values, and says so by an error."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_tensor(op, argument, t):
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(t).__name__}")


def explain(check, *arguments):
    """Raise what `check` has against the arguments that a kernel refused; return where it has nothing against them.

    The kernels check by themselves, in the same words but by RuntimeError. Asking beforehand as well takes 3 µs of a
    call, and 30 to 50 where the caches have forgotten the code, as long as a small kernel.
    """
    try:
        check(*arguments)
    except Exception as refusal:
        raise refusal from None


def check_dtype(op, argument, t):
    check_tensor(op, argument, t)
    if t.dtype not in DTYPES:
        raise TypeError(f"{op}: {argument} must be float32, bfloat16, float16 or float64, got {t.dtype}")


def check_same_dtype(op, argument, t, x, name="x"):
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {argument} must have {name}'s dtype {x.dtype}, got {t.dtype}")


def check_same_device(op, argument, t, x, name="x"):
    check_tensor(op, argument, t)
    if t.device != x.device:
        raise ValueError(f"{op}: {argument} must be on {name}'s device {x.device}, got {t.device}")


def check_shape(op, argument, t, shape, x):
    if tuple(t.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {argument} must have shape {tuple(shape)} to match x {tuple(x.shape)}, got {tuple(t.shape)}"
        )


def check_conv3x3(op, x, weight, bias):
    """What a 3x3 convolution asks of its input and parameters."""
    check_dtype(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape (B, C, H, W), got {tuple(x.shape)}")
    autocast = autocasts(x)  # which makes the dtypes one
    check_same_device(op, "weight", weight, x)
    if not autocast:
        check_same_dtype(op, "weight", weight, x)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have shape (Cout, C, 3, 3), got {tuple(weight.shape)}")
    check_shape(op, "weight", weight, (weight.size(0), x.size(1), 3, 3), x)
    if bias is not None:
        check_same_device(op, "bias", bias, x)
        if not autocast:
            check_same_dtype(op, "bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must have shape ({weight.size(0)},) to match weight {tuple(weight.shape)}, "
                f"got {tuple(bias.shape)}"
            )
