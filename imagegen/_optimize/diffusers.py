"""What optimize makes of diffusers' blocks; imported only where diffusers is."""

import functools

import torch
from diffusers.models import attention_processor, resnet, upsampling
from diffusers.models.unets import unet_2d_blocks

from .. import ops
from ..integrations.diffusers import AttnProcessor
from .linear import is_pointwise
from .modules import (
    Conv2d,
    Fusion,
    GroupNorm,
    Sequential,
    activation_name,
    conv2d,
    group_norm,
    norm_conv2d,
    records,
    run,
    takes,
    unobserved,
)


class Attention(attention_processor.Attention):
    """An attention that runs imagegen's processor in place of diffusers' stock ones; any other processor is kept."""

    @staticmethod
    def fusions(attention):
        size = attention.inner_dim // attention.heads
        reason = f"its heads have {size} channels, above {_LARGEST_HEAD}" if size > _LARGEST_HEAD else None
        if type(attention.processor) not in _STOCK_PROCESSORS:
            reason = f"its processor is {type(attention.processor).__name__}"
        return [Fusion(attention, [], "Attention", "attention", reason)]

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        if type(self.processor) not in _STOCK_PROCESSORS:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return _PROCESSOR(self, hidden_states, encoder_hidden_states, attention_mask, temb=kwargs.get("temb"))


class Upsample2D(upsampling.Upsample2D):
    """Upsampling and convolution in one op, unless a size other than the double is asked for."""

    @staticmethod
    def fusions(block):
        if type(_conv_of(block)) is Conv2d and block.interpolate and block.norm is None:
            yield Fusion(block, [_conv_of(block)], "Upsample2D", "upsample_conv2d")

    def forward(self, hidden_states, output_size=None, *args, **kwargs):
        conv = _conv_of(self)
        doubles = output_size is None or tuple(output_size) == tuple(2 * n for n in hidden_states.shape[2:])
        if type(conv) is Conv2d and doubles and takes(hidden_states) and unobserved([conv]):
            return ops.upsample_conv2d(hidden_states, conv.weight, conv.bias)
        return super().forward(hidden_states, output_size, *args, **kwargs)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Norm, activation and convolution, twice: activations and time embedding in the norms, the residual in the end."""

    @staticmethod
    def fusions(block):
        if _is_fusible(block):
            yield Fusion(block, _fused(block), "ResnetBlock2D", "conv2d")

    def forward(self, input_tensor, temb=None, *args, **kwargs):
        if not self._runs_fused(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        activation = activation_name(self.nonlinearity)
        scale, shift, offset = self._embed(temb)

        if self.upsample is None and self.downsample is None:
            hidden = norm_conv2d(self.norm1, activation, self.conv1, input_tensor)
        else:
            input_tensor, hidden = self._resample(input_tensor, group_norm(self.norm1, activation, input_tensor))
        if offset is not None:
            # In place where nothing is recorded: a fresh output costs its page faults.
            hidden = hidden + offset if torch.is_grad_enabled() else hidden.add_(offset)

        shortcut = self.conv_shortcut
        norm_conv2 = functools.partial(
            norm_conv2d, self.norm2, activation, self.conv2, hidden, scale=scale, shift=shift
        )
        if (self.dropout.training and self.dropout.p) or not unobserved([self.dropout]):
            hidden = self.dropout(group_norm(self.norm2, activation, hidden, scale, shift))
            hidden = conv2d(self.conv2, hidden, residual=input_tensor if shortcut is None else shortcut(input_tensor))
        elif shortcut is None:
            hidden = norm_conv2(residual=input_tensor)
        elif _is_pointwise(shortcut) and not records(hidden, input_tensor, shortcut.weight, self.conv2.weight):
            hidden = _add_pointwise_(norm_conv2(bias=_sum(self.conv2.bias, shortcut.bias)), shortcut, input_tensor)
        else:
            hidden = norm_conv2(residual=shortcut(input_tensor))
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor

    def _resample(self, x, hidden):
        """(x at the other size, the first convolution of hidden at the other size)."""
        if _doubles(self.upsample):
            return self.upsample(x), ops.upsample_conv2d(hidden, self.conv1.weight, self.conv1.bias)
        resample = self.downsample if self.upsample is None else self.upsample
        return resample(x), conv2d(self.conv1, resample(hidden))

    def _runs_fused(self, x, temb):
        scales = self.time_embedding_norm == "scale_shift"
        if (temb is None) != (self.time_emb_proj is None) or (scales and temb is None) or not _is_fusible(self):
            return False
        return takes(x) and not torch.is_autocast_enabled(x.device.type) and unobserved(_fused(self))

    def _embed(self, temb):
        """(scale, shift) of the second norm, or the offset to its input: what the time embedding says."""
        if temb is None:
            return None, None, None
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            return *temb.chunk(2, dim=1), None
        return None, None, temb[:, :, None, None]


class AutoencoderTinyBlock(unet_2d_blocks.AutoencoderTinyBlock):
    """Three convolutions, the sum and the last activation in the third."""

    @staticmethod
    def fusions(block):
        if _is_fusible_tiny(block):
            yield Fusion(block, _fused_tiny(block), "AutoencoderTinyBlock", "conv2d")

    def forward(self, x):
        fused = _is_fusible_tiny(self) and takes(x) and not torch.is_autocast_enabled(x.device.type)
        if not (fused and unobserved(_fused_tiny(self))):
            return super().forward(x)
        *first, last = self.conv
        return conv2d(last, run(first, x), activation_name(self.fuse), residual=self.skip(x))


def _conv_of(block):
    """The convolution of an Upsample2D that interpolates before it, or None."""
    conv = getattr(block, "conv" if block.name == "conv" else "Conv2d_0", None)
    return conv if block.use_conv and not block.use_conv_transpose else None


def _is_fusible(block):
    known = (type(block.norm1), type(block.norm2)) == (GroupNorm, GroupNorm)
    known = known and (type(block.conv1), type(block.conv2)) == (Conv2d, Conv2d)
    return known and activation_name(block.nonlinearity) is not None


def _fused(block):
    """The parts of a ResnetBlock2D that are not called when it runs fused."""
    return [block.norm1, block.nonlinearity, block.conv1, block.norm2, block.conv2]


def _doubles(upsample):
    """Whether this is a nearest-2x upsampling and nothing else, which the convolution behind it can take over."""
    if type(upsample) is not upsampling.Upsample2D or not unobserved([upsample]):
        return False
    return upsample.interpolate and upsample.norm is None and not upsample.use_conv_transpose and not upsample.use_conv


def _is_pointwise(conv):
    """Whether the convolution is torch's matrix product per pixel and nobody watches it."""
    return type(conv) is torch.nn.Conv2d and is_pointwise(conv) and unobserved([conv])


def _add_pointwise_(y, conv, x):
    """y += conv(x), but for the bias: as a product that adds to y it saves writing and reading the sum's other half.

    With the bias's own pass that is 1.5 times as fast as the convolution and the addition on (1, 256, 256, 256).
    """
    weight = conv.weight.flatten(1)
    if y.is_contiguous():
        y.flatten(2).baddbmm_(weight.expand(len(y), -1, -1), x.flatten(2))
    else:
        y.permute(0, 2, 3, 1).flatten(0, 2).addmm_(x.permute(0, 2, 3, 1).flatten(0, 2), weight.t())
    return y


def _sum(a, b):
    return b if a is None else a if b is None else a + b


def _is_fusible_tiny(block):
    known = type(block.conv) in (Sequential, torch.nn.Sequential) and type(block.conv[-1]) is Conv2d
    return known and activation_name(block.fuse) is not None


def _fused_tiny(block):
    return [block.conv, *block.conv, block.fuse]


_LARGEST_HEAD = 512  # of ops.attention
_PROCESSOR = AttnProcessor()
_STOCK_PROCESSORS = (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0)

LAYERS = (Attention,)
CONTAINERS = (Upsample2D, ResnetBlock2D, AutoencoderTinyBlock)
