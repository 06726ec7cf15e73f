"""In how many bits float32 convolutions multiply."""

import torch


def allow_tf32():
    """Whether torch lets convolutions round float32 to TF32: torch.backends.cudnn.conv.fp32_precision, which is what
    torch.backends.cudnn.allow_tf32 sets, too. It does unless told otherwise."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
