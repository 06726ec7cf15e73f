"""The decoder of Stable Diffusion's autoencoder: latents to an image of eight times their size.

Predicted, not measured, for an image of 1024 x 1024 in bf16 on an H200, in milliseconds (asked: 29, then 18):
    3x3 and 1x1 convolutions, cuDNN      11.8   7.1 TFLOP at 600 TFLOP/s
    their biases, one pass each           1.6   3.4 GB written and as much read, at 4.3 TB/s
    three upsample_conv2d                 0.9   0.10 + 0.40 + 0.40 of its three passes, plain 2.8 TFLOP
    30 group_norm + SiLU                  2.6   two readings and a writing of 3.7 GB, the smallest two from the L2
    attention of 16,384 positions, 512    0.9   0.55 TFLOP, as its tile's table has it for 4,096, times sixteen
    15 residuals                          1.1   two readings and a writing
                                         19
Four times that at 2048 x 2048, but sixteen times for attention: 87 (asked: 168).
"""

import torch

from benchmarks.end_to_end.models import Model
from imagegen._optional import require

SHAPES = ((1, 32), (1, 64))  # (B, H) of the latents; W = H
CUDA_SHAPES = ((1, 128), (1, 256))
QUICK_SHAPES = ()
TINY_SHAPE = (1, 2)
DTYPES = ("float32",)
CUDA_DTYPES = ("bfloat16",)
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward",)
GRADIENTS = ()
TOLERANCE = 1e-4
NOTE = (
    "AutoencoderKL.decode in the configuration of Stable Diffusion 1: 128, 256, 512 and 512 channels, two layers per "
    "block. FLOP: torch's count; the roofline of imagegen counts 2.25 multiplications per output and "
    "weight plane of a 3x3 convolution instead of 9, after upsampling 25 instead of 144 for 16 outputs."
)


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        diffusers = require("diffusers", "benchmarking whole models")
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        self.vae.encoder = None

    def forward(self, latents):
        return self.vae.decode(latents).sample


def label(shape):
    B, H = shape
    return f"({B}, 4, {H}x{H})"


def make_inputs(shape):
    B, H = shape
    return {"x": torch.randn(B, 4, H, H)}


def call(decoder, x):
    return decoder(x)


MODEL = Model(Decoder, call, make_inputs)
PROVIDERS = MODEL.providers(openvino=("f32", "bf16"))
reference, flops, flops_made, bytes_moved = MODEL.reference, MODEL.flops, MODEL.flops_made, MODEL.bytes_moved
