"""diffusers' own schedulers as the reference, run in double so that only a wrong formula can differ.

A scheduler's source is loaded a second time with its `torch.float32` and `np.float32` bound to float64, and with its
noise taken from a list that the table under test reads too.
"""

import functools
import importlib.util
import pathlib
import sys
import types

import diffusers
import numpy as np
import torch

diffusers.utils.logging.set_verbosity_error()

SHAPE = (2, 3, 4, 4)
_generator = torch.Generator().manual_seed(0)
X, B, *NOISE = torch.randn(130, *SHAPE, generator=_generator).double()  # exact in float32, too
_now = {"noise": None}


class _Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return self._module.float64 if name == "float32" else getattr(self._module, name)


class _GivenNoise:
    """Stands in for the Brownian tree."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_):
        return _now["noise"]


def set_noise(noise):
    """The noise that every scheduler draws from now on."""
    _now["noise"] = noise


@functools.cache
def load(stem, double=True):
    """The module diffusers.schedulers.scheduling_<stem> with our noise, in double if asked."""
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    path = pathlib.Path(diffusers.__file__).parent / "schedulers" / f"scheduling_{stem}.py"
    name = f"diffusers.schedulers._oracle_{stem}_{double:d}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.randn_tensor = lambda shape, dtype=None, **_: _now["noise"].to(dtype)
    module.BrownianTreeNoiseSampler = _GivenNoise
    if double:
        module.torch, module.np = _Double(torch), _Double(np)
    return module


def model(x, t):
    """Smooth, nonlinear, mixes neighbours; about what a noise predictor does at high noise."""
    return 0.75 * x + 0.3 * torch.sin(1.7 * x.roll(1, -1) + B.to(x.dtype) + float(t) / 300)


def trajectory(stem, cls, config, steps, *, set_timesteps=None, begin=0, **step_options):
    """(x after every step (N, …), the times, init_noise_sigma) of a scheduler from X init_noise_sigma."""
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = getattr(load(stem), cls)(**config)
        scheduler.set_timesteps(**({"num_inference_steps": steps} if steps else {}), **(set_timesteps or {}))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)  # otherwise equal times start it at index 1
        init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        x, states = X * init, []
        timesteps = scheduler.timesteps[begin:]
        for i, t in enumerate(timesteps):
            set_noise(NOISE[i])
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(x_in, t), t, x, **step_options).prev_sample
            states.append(x)
        return torch.stack(states), [float(t) for t in timesteps], init
    finally:
        torch.set_default_dtype(torch.float32)
