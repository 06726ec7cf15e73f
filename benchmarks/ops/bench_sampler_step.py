"""What a sampler does between two evaluations of its model: guidance, one step, the next model input, doubled."""

from functools import lru_cache
from itertools import product

import torch

from benchmarks.suite import Provider
from imagegen import _optional, ops, samplers
from imagegen.ops import eager
from imagegen.ops.sampler_step import columns

GUIDANCE, STEPS, AT = 7.5, 20, 10  # the row of evaluation 10 of 20
# name here -> (name in imagegen.samplers, scheduler in diffusers, its options)
_SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {
    "ddpm": ("ddpm", "DDPMScheduler", {"clip_sample": False}),
    "ddim": ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "euler": ("euler", "EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", _SDE),
    "unipc": ("unipc", "UniPCMultistepScheduler", {}),
    "flow_euler": ("flow_euler", "FlowMatchEulerDiscreteScheduler", {}),
}
_IMAGES = ((1, 4, 64, 64), (1, 16, 128, 128), (4, 3, 512, 512), (64, 3, 32, 32))
SHAPES = tuple((name, *image) for image, name in product(_IMAGES, SAMPLERS))
CUDA_SHAPES = tuple(
    (name, *image) for image in ((16, 16, 512, 512), (1, 4, 128, 128)) for name in ("euler_a", "dpmpp_2m", "unipc")
)
QUICK_SHAPES = (("dpmpp_2m", 1, 4, 64, 64), ("euler", 1, 16, 128, 128))
TINY_SHAPE = ("ddim", 2, 3, 4, 4)
DTYPES = ("float32",)
LAYOUTS = ("nchw",)
DIRECTIONS = ("forward",)
GRADIENTS = ("x",)
TOLERANCE = 2e-5
OUTPUTS = 4  # x', what is stored, two copies of the next model input
NOTE = (
    f"Row {AT} of {STEPS}, guidance {GUIDANCE}: guidance, step, next model input written twice; imagegen as the "
    "sampling loop calls it, in place, functional as ops.sampler_step. Noise is drawn before the clock starts, for "
    "every provider alike, so that all compute the same numbers. Bytes: x, both outputs, the noise and the "
    "stored tensors that the row reads; x', what it stores and the next model input."
)


def label(shape):
    name, *image = shape
    return f"{name} ({', '.join(map(str, image))})"


def make_inputs(shape):
    name, *image = shape
    sampler = _sampler(name)
    inputs = {key: torch.randn(image) for key in ("x", "cond", "uncond")}
    column = dict(zip(sampler.columns, sampler.table[AT], strict=True))
    if column["c_n"]:
        inputs["noise"] = torch.randn(image)
    inputs |= {f"h{k}": torch.randn(image) for k in range(sampler.slots)}
    # Which sampler, as tensors may say it: by a size.
    number = list(SAMPLERS).index(name) + 1
    _NUMBERS[number] = _row(name).tolist()
    return inputs | {"sampler": torch.zeros(number)}


_NUMBERS = {}  # of the rows made so far: what torch.compile can trace


@lru_cache
def _sampler(name):
    """The table that goes with the options of SAMPLERS and diffusers' defaults."""
    schedule = samplers.Schedule.flow() if name == "flow_euler" else samplers.Schedule.linear()
    spacing = "leading" if name in ("ddpm", "ddim") else "linspace"
    return samplers.create(SAMPLERS[name][0], schedule, steps=STEPS, spacing=spacing, compat="diffusers")


def _name(sampler):
    return list(SAMPLERS)[len(sampler) - 1]


@lru_cache
def _row(name):
    return _sampler(name).table[AT].copy()


def fused(x, cond, uncond, sampler, noise=None, **slots):
    return ops.sampler_step(
        x, cond, _row(_name(sampler)), uncond_output=uncond, guidance=GUIDANCE, noise=noise, slots=tuple(slots.values())
    )[0]


def in_place(state, cond, uncond, sampler, noise=None):
    ops.sampler_step_(state, cond, _row(_name(sampler)), uncond_output=uncond, guidance=GUIDANCE, noise=noise)
    return state[0]


def as_state(tensors):
    """x and the stored tensors as the one state that the sampling loop steps in place."""
    slots = [k for k in tensors if k.startswith("h")]
    state = torch.stack([tensors["x"], *(tensors[k] for k in slots)])
    return {k: t for k, t in tensors.items() if k not in ("x", *slots)} | {"state": state}


def plain(x, cond, uncond, sampler, noise=None, **slots):
    row = _NUMBERS[len(sampler)]
    options = (None, None, GUIDANCE, 0.0, None, None, None, 0, 0, row[-3] >= 0, 2, False, x.dtype)
    h = tuple(slots.values())
    return tuple(eager.sampler_step(x, h, cond, uncond, noise, None, None, None, row, *options))


class Diffusers:
    """The peer: guidance in the usual three operations, `step`, `cat` and `scale_model_input`."""

    def __init__(self, name):
        diffusers = _optional.require("diffusers", "the schedulers to compare with")
        kind, options = SAMPLERS[name][1:]
        self.scheduler = getattr(diffusers, kind)(**options)
        self.scheduler.set_timesteps(STEPS)
        self.t, self.t_next = self.scheduler.timesteps[AT : AT + 2]
        self.draws = kind in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")
        self.module = __import__(type(self.scheduler).__module__, fromlist=["randn_tensor"])

    def restart(self, h):
        """Back to evaluation AT, with these stored outputs, oldest first."""
        scheduler = self.scheduler
        scheduler._step_index = AT
        scheduler.is_scale_input_called = True
        if h:
            scheduler.model_outputs = [None] * (scheduler.config.solver_order - len(h)) + h
            scheduler.lower_order_nums = scheduler.this_order = scheduler.config.solver_order

    def last_sample(self, x, h):
        """UniPC's x before the step that led to x, which it starts again from: the predictor is linear in it."""
        scheduler = self.scheduler
        self.restart(h)
        scheduler._step_index = AT - 1

        def predict(last):
            return scheduler.multistep_uni_p_bh_update(model_output=x, sample=last, order=len(h))

        zero = predict(torch.zeros_like(x))
        slope = (predict(torch.ones_like(x)) - zero).mean()
        return (x - zero) / slope

    def __call__(self, x, cond, uncond, h, noise):
        self.restart(h)
        if self.draws:
            self.module.randn_tensor = lambda *_, **__: noise
        m = uncond + GUIDANCE * (cond - uncond)
        x_next = self.scheduler.step(m, self.t, x).prev_sample
        model_input = torch.cat([x_next, x_next])
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(model_input, self.t_next)
        return x_next


_diffusers = lru_cache(Diffusers)


def peer(x, cond, uncond, sampler, noise=None, last_sample=None, **slots):
    name = _name(sampler)
    scheduler = _diffusers(name)
    if last_sample is not None:
        scheduler.scheduler.last_sample = last_sample
    return scheduler(x, cond, uncond, _oldest_first(slots), noise)


def _oldest_first(slots):
    """Evaluation i stores in slot i mod K."""
    h = list(slots.values())
    return [h[i % len(h)] for i in range(AT, AT + len(h))]


def prepare_peer(tensors):
    if _name(tensors["sampler"]) != "unipc":
        return tensors
    h = _oldest_first({k: t for k, t in tensors.items() if k.startswith("h")})
    return tensors | {"last_sample": _diffusers("unipc").last_sample(tensors["x"], h)}


PROVIDERS = {
    "imagegen": Provider(in_place, as_state),
    "eager": Provider(plain),
    "functional": Provider(fused),
    "diffusers": Provider(peer, prepare_peer),
}


def reference(**tensors):
    return plain(**tensors)[0]


def flops(shape):
    """Two for every tensor in every sum."""
    return 2 * (_reads(shape[0]) + 2) * _elements(shape)


def flops_made(shape, provider):
    return flops(shape)


def bytes_moved(shape, itemsize, direction):
    stores = int(_row(shape[0])[columns(_sampler(shape[0]).slots).index("slot")] >= 0)
    forward = (_reads(shape[0]) + 3 + stores) * _elements(shape)
    return itemsize * forward * (1 if direction == "forward" else 3)


def _reads(name):
    column = dict(zip(_sampler(name).columns, _row(name), strict=True))
    return 3 + sum(int(c != 0) for key, c in column.items() if key == "c_n" or key.startswith("c_h"))


def _elements(shape):
    _, *image = shape
    return torch.Size(image).numel()
