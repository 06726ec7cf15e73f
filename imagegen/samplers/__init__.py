"""Diffusion samplers: a noise schedule, a table of coefficients made from it, and one loop that reads the table.

    schedule = samplers.Schedule.cosine()
    sampler = samplers.create("ddim", schedule, steps=50, prediction="v")
    images = samplers.sample(model, sampler, (64, 1, 16, 16), seed=0)

A new sampler is one function that builds rows, in a file of its own, and one line in `create.SAMPLERS`.
"""

from .create import SAMPLERS, Sampler, create
from .loop import sample
from .schedule import Schedule
from .step import step

__all__ = ["SAMPLERS", "Sampler", "Schedule", "create", "sample", "step"]
