"""Diffusion samplers: a noise schedule, a table of coefficients made from it, and one loop that reads the table.

    schedule = samplers.Schedule.cosine()
    sampler = samplers.create("ddim", schedule, steps=50, prediction="v")
    images = samplers.sample(model, sampler, (64, 1, 16, 16), seed=0)

A new sampler is one function that builds rows, and one line in `create.SAMPLERS`.
"""

from .contact_sheet import ContactSheet
from .create import SAMPLERS, create
from .loop import sample
from .sampler import Sampler
from .schedule import Schedule, resolution_shift

__all__ = ["SAMPLERS", "ContactSheet", "Sampler", "Schedule", "create", "resolution_shift", "sample"]
