"""A training step of DDPM's UNet for CIFAR-10: noise prediction, loss, gradients, update."""

import torch
import torch.nn.functional as F

from benchmarks.end_to_end.bench_unet_2d import build, label
from benchmarks.end_to_end.models import Model

SHAPES = ((4, 32),)  # (B, H) of the images; W = H
CUDA_SHAPES = ((64, 32),)
QUICK_SHAPES = ()
TINY_SHAPE = (1, 8)
DTYPES = ("float32",)
CUDA_DTYPES = ("bfloat16",)
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward",)  # the step is the forward of this benchmark
GRADIENTS = ()
TOLERANCE = 1e-4
NOTE = (
    "The model of unet_2d. A step is forward, backward and an update by gradient descent; checked is the gradient of "
    "every parameter at the first step. FLOP: three times those of the forward."
)
RATE = 1e-6

__all__ = ["build", "label"]


def make_inputs(shape):
    B, H = shape
    return {"x": torch.randn(B, 3, H, H), "noise": torch.randn(B, 3, H, H), "t": torch.linspace(1, 999, B)}


def forward(unet, x, noise, t):
    return F.mse_loss(unet(x, t).sample, noise)


def step(unet, **tensors):
    """The gradients of all parameters, one after the other."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(forward(unet, **tensors), list(unet.parameters()))
    for parameter, gradient in zip(unet.parameters(), gradients, strict=True):
        parameter.data.sub_(gradient, alpha=RATE)
    return torch.cat([gradient.flatten() for gradient in gradients])


MODEL = Model(build, step, make_inputs, trains=True)
PROVIDERS = MODEL.providers(openvino=())
reference, bytes_moved = MODEL.reference, MODEL.bytes_moved
FORWARD = Model(build, forward, make_inputs)


def flops(shape):
    return 3 * FORWARD.flops(shape)


def flops_made(shape, provider):
    return 3 * FORWARD.flops_made(shape, provider)
