"""The decoder of the tiny autoencoder for Stable Diffusion: latents to an image of eight times their size."""

import torch

from benchmarks.end_to_end.models import Model
from imagegen._optional import require

SHAPES = ((1, 32), (1, 64))  # (B, H) of the latents; W = H
CUDA_SHAPES = ((1, 128),)
QUICK_SHAPES = ()
TINY_SHAPE = (1, 2)
DTYPES = ("float32",)
CUDA_DTYPES = ("bfloat16",)
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward",)
GRADIENTS = ()
TOLERANCE = 1e-4
NOTE = "The decoder of AutoencoderTiny with its published configuration: 64 channels, 3, 3, 3 and 1 blocks."


def build():
    return require("diffusers", "benchmarking whole models").AutoencoderTiny().decoder


def label(shape):
    B, H = shape
    return f"({B}, 4, {H}x{H})"


def make_inputs(shape):
    B, H = shape
    return {"x": torch.randn(B, 4, H, H)}


def call(decoder, x):
    return decoder(x) + 1  # the last layer subtracts 1, which would hide the error of all others


MODEL = Model(build, call, make_inputs)
PROVIDERS = MODEL.providers()
reference, flops, flops_made, bytes_moved = MODEL.reference, MODEL.flops, MODEL.flops_made, MODEL.bytes_moved
