"""Thin modules over the ops; each loads the state_dict of the torch module it replaces."""

from .attention import Attention
from .bias_act import BiasAct
from .conv2d import Conv2d
from .conv_transpose2d import ConvTranspose2d
from .group_norm import GroupNorm
from .upsample_conv2d import UpsampleConv2d

__all__ = ["Attention", "BiasAct", "Conv2d", "ConvTranspose2d", "GroupNorm", "UpsampleConv2d"]
