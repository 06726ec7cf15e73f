"""The activations every op accepts by name, in plain PyTorch, and the check of that name."""

import torch.nn.functional as F

LRELU_SLOPE = 0.2  # the slope GAN and super-resolution papers use; torch's own default is 0.01

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, LRELU_SLOPE),
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
}

# The torch.nn modules that compute them.
MODULES = {
    "Identity": "linear",
    "ReLU": "relu",
    "LeakyReLU": "lrelu",
    "SiLU": "silu",
    "GELU": "gelu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
}


def check_activation(op, argument, name):
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: {argument} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
