"""Walks a model and gives modules the classes of this package, or their own back."""

import sys

import torch

from ..ops import _backend
from . import channels_last, linear, modules
from .report import Left, Replaced, Report


def optimize(model, *, verbose=False):
    """Make a model compute with imagegen's ops, in place; imagegen.restore undoes it.

    Replaced are, wherever they are in the model and where this machine has a kernel for their device:

    - torch.nn.Conv2d of 3x3, stride 1 and padding 1, torch.nn.ConvTranspose2d that doubles the size, and
      torch.nn.GroupNorm; a torch.nn.SiLU of more than 1 MB on CPU that none of them takes over;
    - on CPUs where MKL multiplies without AVX-512, float32 torch.nn.Linear and torch.nn.Conv2d of 1x1: by oneDNN;
    - in torch.nn.Sequential, as one op each: nearest-2x Upsample, convolution and activation; GroupNorm, activation,
      convolution and activation, or the first or last two of them; transposed convolution, BatchNorm2d in eval and
      activation;
    - in diffusers' models and pipelines also ResnetBlock2D, Upsample2D, AutoencoderTinyBlock, and Attention while its
      processor is one of the stock ones.

    Nothing but the class of a module changes, to one that derives from it, so its parameters, state_dict, hooks,
    device, dtype and mode stay what they are and go on working, as do gradients, copy.deepcopy, pickle and
    torch.compile. On CUDA the weights of half precision convolutions are also laid out in channels_last, and what such
    a convolution makes comes in that memory format, the model's output with it; CUDA graphs are to be captured after.
    Several modules run as one op only while none of them is hooked. Outputs differ by rounding, in float32 by 2e-5 of
    their norm per op at most.

    Args:
        model: a torch.nn.Module, or a pipeline: an object whose `components` are a dict.
        verbose: print the report.

    Returns: a Report of what was replaced, what was left and why; it prints as a table. A second call finds nothing
        more to do.
    Raises: TypeError if model is neither.
    """
    names, report, passes = {}, Report(), _replacements()
    ours = {kind for kinds in passes for kind in kinds}
    for root, prefix in _roots("optimize", model):
        for name, module in root.named_modules(prefix=prefix):
            names.setdefault(module, name)
    for kinds in passes:
        replacements = {kind.__base__: kind for kind in kinds}
        for module in names:
            _replace(module, names, replacements, ours, report)
    report.moved = [names[module] for module in channels_last.move(names)]
    if verbose:
        print(report)
    return report


def restore(model):
    """Undo imagegen.optimize: every module gets its own class back, every weight its memory format.

    Raises: TypeError if model is neither a torch.nn.Module nor a pipeline.
    """
    ours = {kind for kinds in _replacements() for kind in kinds}
    for root, _ in _roots("restore", model):
        for module in root.modules():
            channels_last.restore(module)
            if type(module) in ours:
                module.__class__ = type(module).__base__


def _roots(function, model):
    """(module, its name) of the model itself, or of every module of a pipeline."""
    if isinstance(model, torch.nn.Module):
        return [(model, "")]
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"{function}: model must be a torch.nn.Module or a pipeline, got {type(model).__name__}")
    return [(module, name) for name, module in components.items() if isinstance(module, torch.nn.Module)]


def _replacements():
    """The classes that replace their bases: first the layers, then the containers that make something of them."""
    if "diffusers" not in sys.modules:
        return linear.LAYERS, modules.LAYERS, modules.CONTAINERS
    from . import diffusers

    return linear.LAYERS, (*modules.LAYERS, *diffusers.LAYERS), (*modules.CONTAINERS, *diffusers.CONTAINERS)


def _replace(module, names, replacements, ours, report):
    """Give the module the class that replaces its own, if there is one and nothing stands against it."""
    kind = replacements.get(type(module))
    if kind is None:
        report.kept += type(module) in replacements.values()
        for base in replacements:
            if base in _UNNAMED or type(module) in ours or not isinstance(module, base):
                continue
            left = Left(names[module], base.__name__, f"it is a subclass, {type(module).__name__}")
            if left not in report.left:  # by the pass before
                report.left.append(left)
        return
    for fusion in kind.fusions(module):
        name = names[fusion.module]
        why = fusion.why_not or _observed(module, fusion) or _missing_kernel(fusion)
        if why:
            report.left.append(Left(name, fusion.was, why))
        else:
            report.replaced.append(Replaced(name, fusion.was, fusion.by))
            module.__class__ = kind


def _observed(module, fusion):
    """What would notice the replacement, or None: hooks on the module itself see what they always saw."""
    if "forward" in vars(module):
        return "it has a forward of its own"
    for part in fusion.parts:
        found = modules.observation(part)
        if found:
            return f"{type(part).__name__} has {found}, which would be bypassed"
    return None


def _missing_kernel(fusion):
    """None where the fusion's op has a kernel or a library for the modules' device, else why each backend has not."""
    devices = {p.device.type for module in (fusion.module, *fusion.parts) for p in module.parameters(recurse=False)}
    if _backend.forced is not None or fusion.by == linear.LIBRARY:
        return None
    implementations = _backend.implementations(fusion.by)
    reasons = (_backend.why_eager(fusion.by, implementations, device) for device in devices or {"cpu"})
    return next(filter(None, reasons), None)


# Whose subclasses are so many and so different that naming them says nothing.
_UNNAMED = (torch.nn.Sequential, torch.nn.Linear)
