"""Half precision on a GPU runs in channels_last, the memory format cuDNN's tensor core kernels compute in.

Between NCHW tensors cuDNN turns the input and the output of every convolution around. A convolution of torch whose
weight has its channels innermost leaves its output so whatever it is given, those of this package are given their input
so, and every other op returns its input's format: once the first convolution has turned the images around, activations
flow as the kernels want them.
"""

import torch

DEVICE = "cuda"


def move(modules):
    """Give the weights of these convolutions channels_last memory; the modules that had another one before."""
    moved = [module for module in modules if _gains(module)]
    for module in moved:
        _lay_out(module, torch.channels_last)
        module.imagegen_moved_weight = True  # an attribute, so that copies and pickles can be restored too
    return moved


def restore(module):
    """Undo move()."""
    if was_moved(module):
        _lay_out(module, torch.contiguous_format)
        del module.imagegen_moved_weight


def was_moved(module):
    return getattr(module, "imagegen_moved_weight", False)


def follow(module, x):
    """x as the module's weight lies in memory, if that was moved."""
    return x.to(memory_format=torch.channels_last) if was_moved(module) else x


def _gains(module):
    weight = module._parameters.get("weight") if isinstance(module, torch.nn.Conv2d) else None  # a plain parameter
    if weight is None or weight.device.type != DEVICE or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


def _lay_out(module, memory_format):
    """The parameter stays the same object, for optimisers and whoever else holds it."""
    module.weight.data = module.weight.detach().to(memory_format=memory_format)
