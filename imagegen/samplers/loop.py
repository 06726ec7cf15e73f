"""The loop of every sampler."""

import torch

from .. import ops
from .evaluate import evaluate, new_state, scaled_input
from .graph import GraphLoop
from .progress import progress_bar
from .table import x0_row

INITIAL_NOISE = 2  # the stream of `ops.randn`; a step draws from 0, the noise of what is known from 1


@torch.no_grad()
def sample(
    model,
    sampler,
    shape,
    *,
    seed=0,
    first=0,
    noise=None,
    start=None,
    start_at=None,
    mask=None,
    known=None,
    progress=False,
    callback=None,
    log=None,
    cuda_graph=False,
    device=None,
    model_input_dtype=None,
    backend=None,
):
    """Draw images from a denoising model.

    Args:
        model: model(x, t) -> output of x's shape; x (B, …) scaled as the model expects it, t (B,) float. With guidance
            it is called on 2B images, the same B twice: the first half's outputs are conditional, the second's not.
        sampler: from `create`.
        shape: (B, …) of the images.
        seed, first: image i depends on (seed, first + i) alone, not on the batch it is in (`ops.randn`).
        noise: unit normal of this shape to start from, in place of the seed's; its dtype, float32 or float64, is the
            state's.
        start: an image to start from, noised as the sampler's first row expects. start_at: the last start_at · steps
            steps alone, so that 0.6 keeps the image's large shapes; None takes the sampler as `create` made it.
        mask, known: inpainting: where mask is 0, the result is known, which is noised to each step's level; where it is
            1, it is drawn. Both broadcast to shape.
        progress: show a progress bar (needs tqdm).
        callback: called as callback(i, x) after row i with the new x; a tensor that it returns takes x's place.
        log: called as log(i, t, x_0) at row i with the x_0 that the model predicts, say a `ContactSheet`; one more
            pass over memory a row.
        cuda_graph: capture one step, model included, as a CUDA graph and replay it; the model must be capturable. Then
            callback can't replace x and log must be None.
        device: where the state lives; None is that of noise or start, or the CPU.
        model_input_dtype: what the model computes in; None is the state's.
        backend: of `ops.sampler_step` and `ops.randn`.

    Returns: x_0 of this shape.
    Raises: ValueError that names the argument.
    """
    if start_at is not None:
        if start is None:
            raise ValueError("sample: start_at needs start, the image to start from")
        sampler = sampler.starting_at(start_at)
    x = _initial(sampler, tuple(shape), seed, first, noise, start, mask, known, device, backend)
    settings = {
        "guidance": sampler.guidance.to(x.device) if isinstance(sampler.guidance, torch.Tensor) else sampler.guidance,
        "rescale": sampler.rescale,
        "clip": sampler.clip,
        "threshold": sampler.threshold,
        "seed": seed,
        "first": first,
        "mask": _moved(mask, x),
        "known": _moved(known, x),
        "model_input_dtype": model_input_dtype or x.dtype,
        "backend": backend,
    }
    rows = progress_bar(range(len(sampler.table)), progress, sampler.name)
    if cuda_graph:
        if x.device.type != "cuda":
            raise ValueError(f"sample: cuda_graph needs a CUDA device, got {x.device}")
        if log is not None:
            raise ValueError("sample: log must be None with cuda_graph, whose steps keep no x_0")
        return GraphLoop(model, sampler, x, settings).run(rows, callback)
    return _run(model, sampler, x, settings, rows, callback, log)


def _run(model, sampler, x, settings, rows, callback, log):
    # In place: a step writes to memory that the one before it has touched.
    state = new_state(x, sampler.slots)
    model_input = scaled_input(x, sampler.input_scale, sampler, settings["model_input_dtype"])
    for i in rows:
        row = sampler.table[i]
        outputs = evaluate(model, model_input, row[0], sampler)
        if log is not None:
            log(i, row[0], _x0(state[0], row, outputs, settings))
        model_input = ops.sampler_step_(state, row=row, step=i, **outputs, **settings)
        if callback is not None and (changed := callback(i, state[0].clone())) is not None:
            state[0] = changed
            model_input = scaled_input(state[0], row[1], sampler, settings["model_input_dtype"])
    return state[0].clone() if sampler.slots else state[0]  # without the slots


def _initial(sampler, shape, seed, first, noise, start, mask, known, device, backend):
    for name, tensor in (("noise", noise), ("start", start)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"sample: {name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if (mask is None) != (known is None):
        raise ValueError("sample: mask and known go together, only one was given")
    given = noise if noise is not None else start
    device = device if device is not None or given is None else given.device
    if noise is None:
        dtype = torch.float32 if given is None else torch.promote_types(given.dtype, torch.float32)
        noise = ops.randn(
            shape, seed=seed, stream=INITIAL_NOISE, first=first, device=device, dtype=dtype, backend=backend
        )
    noise = noise.to(device)
    alpha, sigma = sampler.start
    if start is None:
        if sigma == 0:
            raise ValueError(f"sample: {sampler.name!r} starts from an image, so start must be given")
        return sampler.init_sigma * noise
    start = start.to(noise)
    if mask is not None:
        mask = mask.to(noise)
        start = mask * start + (1 - mask) * known.to(noise)
    return alpha * start + sigma * noise


def _moved(tensor, x):
    return None if tensor is None else tensor.to(x.device)


def _x0(x, row, outputs, settings):
    """What the model predicts, guided and clipped: the step whose x' is x_0."""
    options = {key: settings[key] for key in ("guidance", "rescale", "clip", "threshold", "backend")}
    return ops.sampler_step(x, row=x0_row(row), copies=0, **outputs, **options)[0]
