"""The loop of every sampler."""

import torch

from .noise import ImageNoise
from .progress import progress_bar
from .step import step


@torch.no_grad()
def sample(model, sampler, shape, *, seed=0, progress=False, noise=None, callback=None, device=None, first=0):
    """Draw images from a denoising model.

    Args:
        model: model(x, t) -> output of x's shape; x (B, …) scaled as the model expects it, t (B,) float. With guidance
            it is called on 2B images, the same B twice: the first half's outputs are conditional, the second's not.
        sampler: from `create`.
        shape: (B, …) of the images.
        seed: image i depends on (seed, first + i) alone, not on the batch it is in.
        progress: show a progress bar (needs tqdm).
        noise: unit normal of this shape to start from, in place of the seed's; its dtype is the state's.
        callback: called as callback(i, x) after row i with the new x.
        device: where the state lives; None is noise's device, or the CPU.
        first: the index of the first image.

    Returns: x_0 of this shape.
    Raises: ValueError that names the argument.
    """
    if noise is not None and tuple(noise.shape) != tuple(shape):
        raise ValueError(f"sample: noise must have the shape {tuple(shape)}, got {tuple(noise.shape)}")
    device = device if device is not None or noise is None else noise.device
    draws = ImageNoise(seed, shape, device, first)
    x = sampler.init_sigma * (draws.draw() if noise is None else noise.to(device))
    slots = [None] * sampler.slots
    model_input = sampler.input_scale * x
    column = dict(zip(sampler.columns, sampler.table.T, strict=True))

    for i, row in enumerate(progress_bar(sampler.table, progress, sampler.name)):
        output, uncond_output = _evaluate(model, model_input, column["t"][i], guided=sampler.guidance is not None)
        x, stored, model_input = step(
            x,
            output,
            row,
            uncond_output=uncond_output,
            guidance=sampler.guidance,
            slots=slots,
            noise=draws.draw().to(x.dtype) if column["c_n"][i] else None,
            clip=sampler.clip,
        )
        if stored is not None:
            slots[int(column["slot"][i])] = stored
        if callback is not None:
            callback(i, x)
    return x


def _evaluate(model, x, t, guided):
    x = torch.cat([x, x]) if guided else x
    output = model(x, torch.full((len(x),), t, device=x.device))
    return output.chunk(2) if guided else (output, None)
