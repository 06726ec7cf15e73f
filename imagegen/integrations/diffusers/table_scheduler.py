"""A diffusers scheduler whose step is one row of a table and one kernel."""

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ... import ops
from ..._optional import require
from ...samplers.sampler import Sampler
from ...samplers.table import x0_row
from .tables import TABLES


def scheduler(diffusers_scheduler):
    """The scheduler with its step replaced: `pipe.scheduler = scheduler(pipe.scheduler)`.

    It is a scheduler of the same class, with its `config`, `timesteps`, `sigmas`, `init_noise_sigma`, `order`,
    `add_noise`, `set_timesteps`, `from_config` and `save_config`; a pipeline that is saved with it loads anywhere.
    `step` applies one row of the table made from those times and noise levels, so that it gives what the scheduler
    gives, up to rounding: the state is kept in float32 between steps whatever the model's dtype.

    Args:
        diffusers_scheduler: a scheduler of one of the classes that `TABLES` names.

    Returns: a new scheduler; the one given is not changed.
    Raises: TypeError for another class, ValueError for a config that has no table.
    """
    require("diffusers", "imagegen.integrations.diffusers.scheduler")
    cls = type(diffusers_scheduler)
    if issubclass(cls, TableStep):
        return cls.from_config(diffusers_scheduler.config)
    if cls.__name__ not in TABLES:
        raise TypeError(f"scheduler: must be one of {', '.join(TABLES)}, got {cls.__name__}")
    return _table_class(cls).from_config(diffusers_scheduler.config)


@functools.cache
def _table_class(cls):
    """A subclass under the same name, so that what is saved names a class that diffusers has."""

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        TABLES[cls.__name__].check(self.config)
        self._restart()

    def set_timesteps(self, *args, **kwargs):
        cls.set_timesteps(self, *args, **kwargs)
        self._restart()

    parameters = inspect.signature(cls.step)

    def step(self, *args, **kwargs):
        given = parameters.bind(self, *args, **kwargs)
        given.apply_defaults()
        return self._table_step(**{k: v for k, v in given.arguments.items() if k != "self"})

    body = {
        "__init__": functools.wraps(cls.__init__)(__init__),
        "set_timesteps": functools.wraps(cls.set_timesteps)(set_timesteps),
        "step": functools.wraps(cls.step)(step),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (TableStep, cls), body)


@dataclass
class Output:
    """What `step` returns; the model's x_0, original(), is made when it is asked for."""

    prev_sample: torch.Tensor
    original: Callable

    @property
    def pred_original_sample(self):
        return self.original()

    denoised = pred_original_sample  # its name in LCM

    def __getitem__(self, key):
        name = ("prev_sample", "pred_original_sample")[key] if isinstance(key, int) else key
        return getattr(self, name)


class TableStep:
    """The methods that take the place of a diffusers scheduler's own."""

    def _restart(self):
        self._row = self._handed_out = self._state = None

    def scale_model_input(self, sample, timestep=None):
        if not self._kind.scaled:
            return sample
        if self._row is None:
            self._begin(timestep, {})
        scale = self._sampler.input_scale if self._row == 0 else self._sampler.table[self._row - 1, 1]
        return sample * scale

    @property
    def _kind(self):
        return TABLES[type(self).__name__]

    def _begin(self, timestep, options):
        """Make the table from timestep on, which need not be the first one."""
        if self.num_inference_steps is None:
            raise ValueError("step: set_timesteps must be called first")
        first = getattr(self, "_begin_index", None)
        if first is None:
            here = torch.as_tensor(timestep, device=self.timesteps.device, dtype=self.timesteps.dtype)
            matches = (self.timesteps == here).nonzero()
            if not len(matches):
                raise ValueError(f"step: timestep must be one of the scheduler's, got {float(timestep):g}")
            first = int(matches[0])
        path, rows = self._kind.build(self, options, first)
        self._sampler = Sampler.built(type(self).__name__, path, rows)
        self._times = self.timesteps[-len(self._sampler.table) :].tolist()
        self._row, self._options, self._slots = 0, options, [None] * self._sampler.slots

    def _table_step(self, model_output, timestep, sample, generator=None, return_dict=True, **options):
        given = options.pop("variance_noise", None)
        if options.pop("per_token_timesteps", None) is not None:
            raise ValueError("step: per_token_timesteps must be None, a table has one time for all tokens")
        if self._row is None or (self._row == 0 and options != self._options):
            self._begin(timestep, options)
        self._check(timestep, options)
        kind, column = self._kind, self._sampler.columns.index
        row = self._sampler.table[self._row].copy()
        row[column("s'")] = 1.0  # scale_model_input does it
        noise = given
        if noise is None and (kind.always_draws or row[column("c_n")]):
            noise = self._noise(model_output, generator)
        x, bounds = self._exact(sample), kind.bounds(self.config)
        x_next, stored, returned = ops.sampler_step(
            x, model_output, row, slots=self._slots, noise=noise, model_input_dtype=model_output.dtype, **bounds
        )
        if stored is not None:
            self._slots[int(row[column("slot")])] = stored
        self._row += 1
        if hasattr(self, "_begin_index"):
            self._step_index = len(self.timesteps) - len(self._times) + self._row
        self._handed_out, self._state = (weakref.ref(returned), returned._version), x_next

        def original():
            wanted = x0_row(row, *kind.original(self.config, row[0]))
            return ops.sampler_step(x, model_output, wanted, copies=0, **bounds)[0].to(model_output.dtype)

        if return_dict:
            return Output(returned, original)
        return (returned, original()) if kind.returns_original else (returned,)

    def _check(self, timestep, options):
        if self._row == len(self._times):
            raise ValueError("step: the last timestep is done; call set_timesteps to start again")
        if abs(float(timestep) - self._times[self._row]) > 1e-3:
            raise ValueError(f"step: timestep must be {self._times[self._row]:g}, got {float(timestep):g}")
        if options != self._options:
            raise ValueError(f"step: options must stay those of the first step, {self._options}, got {options}")

    def _exact(self, sample):
        """The float32 state behind the sample that the last step returned, unless somebody has changed it since."""
        if self._handed_out is not None:
            reference, version = self._handed_out
            if reference() is sample and sample._version == version:
                return self._state
        return sample.to(torch.promote_types(sample.dtype, torch.float32))

    def _noise(self, like, generator):
        randn = require("diffusers.utils.torch_utils", "noise").randn_tensor
        dtype = torch.promote_types(like.dtype, torch.float32)
        return randn(like.shape, generator=generator, device=like.device, dtype=dtype)
