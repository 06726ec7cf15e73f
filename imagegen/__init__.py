"""Fused CPU, CUDA and Triton kernels for image generation in PyTorch."""

from . import nn, ops
from .info import info

__version__ = "0.1.0"
__all__ = ["info", "nn", "ops"]
