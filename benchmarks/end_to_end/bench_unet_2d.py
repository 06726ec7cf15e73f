"""The UNet of DDPM for CIFAR-10, one step of a batch of images."""

import torch

from benchmarks.end_to_end.models import Model
from imagegen._optional import require

SHAPES = ((8, 32),)  # (B, H) of the images; W = H
CUDA_SHAPES = ((64, 32),)
QUICK_SHAPES = ()
TINY_SHAPE = (1, 8)
DTYPES = ("float32",)
CUDA_DTYPES = ("bfloat16",)
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward",)
GRADIENTS = ()
TOLERANCE = 1e-4
NOTE = (
    "UNet2DModel with the published configuration of DDPM on CIFAR-10: 128, 256, 256 and 256 channels, two layers per "
    "block, attention at 16x16."
)


def build():
    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"
    return require("diffusers", "benchmarking whole models").UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def label(shape):
    B, H = shape
    return f"({B}, 3, {H}x{H})"


def make_inputs(shape):
    B, H = shape
    return {"x": torch.randn(B, 3, H, H), "t": torch.linspace(1, 999, B)}


def call(unet, x, t):
    return unet(x, t).sample


MODEL = Model(build, call, make_inputs)
PROVIDERS = MODEL.providers()
reference, flops, flops_made, bytes_moved = MODEL.reference, MODEL.flops, MODEL.flops_made, MODEL.bytes_moved
