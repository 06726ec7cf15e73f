"""Fused CPU, CUDA and Triton kernels for image generation in PyTorch."""

import importlib

from . import nn, ops
from ._optimize import optimize, restore
from .info import info

__version__ = "0.1.0"
__all__ = [
    "data",
    "info",
    "models",
    "nn",
    "ops",
    "optimize",
    "output_cache",
    "restore",
    "samplers",
    "train",
    "weight_cache",
]


def __getattr__(name):
    """What stands on the kernels is imported when it is first used: importing the kernels stays cheap."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
