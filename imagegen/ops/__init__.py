"""The ops: functions with keyword-only options, one module each."""

from .bias_act import bias_act
from .group_norm import group_norm
from .upsample_conv2d import upsample_conv2d

__all__ = ["bias_act", "group_norm", "upsample_conv2d"]
