"""The specification of every op in plain PyTorch: reference in tests, baseline in benchmarks, fallback everywhere."""

from .attention import attention
from .attention_rows import attention_rows
from .bias_act import bias_act
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .group_norm import group_norm
from .group_norm_factors import group_norm_factors
from .randn import randn
from .sampler_step import sampler_step, sampler_step_
from .upsample_conv2d import upsample_conv2d

__all__ = [
    "attention",
    "attention_rows",
    "bias_act",
    "conv2d",
    "conv_transpose2d",
    "group_norm",
    "group_norm_factors",
    "randn",
    "sampler_step",
    "sampler_step_",
    "upsample_conv2d",
]
