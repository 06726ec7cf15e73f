"""The specification of every op in plain PyTorch: reference in tests, baseline in benchmarks, fallback everywhere."""

from .bias_act import bias_act
from .group_norm import group_norm
from .upsample_conv2d import upsample_conv2d

__all__ = ["bias_act", "group_norm", "upsample_conv2d"]
