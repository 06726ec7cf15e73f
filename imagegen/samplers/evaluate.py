"""Calling the model, once or guided."""

import torch


def scaled_input(x, scale, sampler, dtype):
    """The model's input, twice where guided."""
    model_input = (scale * x).to(dtype)
    return model_input if sampler.guidance is None else torch.cat([model_input, model_input])


def evaluate(model, model_input, t, sampler):
    """The model's outputs as `ops.sampler_step` takes them; t is a number or a tensor ()."""
    t = torch.as_tensor(t, dtype=torch.float32, device=model_input.device).expand(len(model_input))
    output = model(model_input, t)
    if sampler.guidance is None:
        return {"model_output": output}
    cond, uncond = output.chunk(2)
    return {"model_output": cond, "uncond_output": uncond}


def new_state(x, slots):
    """The state (1 + slots, B, …) of `ops.sampler_step_` that begins with x, in x's memory format."""
    state = x.new_empty_strided((1 + slots, *x.shape), (x.numel(), *torch.empty_like(x).stride()))
    state[0] = x
    return state
