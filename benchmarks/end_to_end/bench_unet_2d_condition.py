"""The UNet of Stable Diffusion 1.5, one guided step of one image: a batch of two."""

import torch

from benchmarks.end_to_end.models import Model
from imagegen._optional import require

SHAPES = ((2, 64),)  # (B, H) of the latents; W = H
CUDA_SHAPES = ((2, 64), (2, 128))
QUICK_SHAPES = ()
TINY_SHAPE = (2, 8)
DTYPES = ("float32",)
CUDA_DTYPES = ("bfloat16",)
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward",)
GRADIENTS = ()
TOLERANCE = 1e-4
NOTE = (
    "UNet2DConditionModel with the configuration of Stable Diffusion 1.5: 320, 640, 1280 and 1280 channels, 8 heads, "
    "77 tokens of 768 features. Its weights take 3.4 GB, as much again in OpenVINO, and 8 GB in Winograd's form, in "
    "every memory format: `--layouts` of one keeps them once."
)


def build():
    unet = require("diffusers", "benchmarking whole models").UNet2DConditionModel
    return unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def label(shape):
    B, H = shape
    return f"({B}, 4, {H}x{H})"


def make_inputs(shape):
    B, H = shape
    return {"x": torch.randn(B, 4, H, H), "text": torch.randn(B, 77, 768), "t": torch.full((B,), 500.0)}


def call(unet, x, text, t):
    return unet(x, t, text).sample


MODEL = Model(build, call, make_inputs)
PROVIDERS = MODEL.providers()
reference, flops, flops_made, bytes_moved = MODEL.reference, MODEL.flops, MODEL.flops_made, MODEL.bytes_moved
