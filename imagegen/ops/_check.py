"""Argument checks shared by the ops; csrc/common/check.h says the same to callers of the operators themselves."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op, argument, t):
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(t).__name__}")


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
