"""What `create` returns: a table, and what holds for all its rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..ops.sampler_step import columns
from .path import Path
from .table import slots_of


@dataclass(frozen=True, eq=False)
class Sampler:
    """A table with what holds for all its rows; `print` shows it.

    table: (evaluations, 14 + slots) float64, one column per name in `columns` (see `samplers.table`).
    init_sigma: the standard deviation of the first x. input_scale: the first model input is input_scale * x.
    start: (alpha, sigma) of the first x, alpha x_0 + sigma epsilon, for a start from an image.
    """

    name: str
    table: np.ndarray
    guidance: float | torch.Tensor | None = None
    rescale: float = 0.0
    clip: float | None = None
    threshold: float | None = None
    init_sigma: float = 1.0
    input_scale: float = 1.0
    start: tuple = (0.0, 1.0)
    path: Path | None = None
    build: Callable | None = None

    @classmethod
    def built(cls, name, path, build, **settings):
        """The sampler of the rows that build(path) makes."""
        rows = build(path)
        first = rows.path[0]
        return cls(
            name,
            rows.array(),
            init_sigma=rows.path.init_sigma,
            input_scale=rows.input_scale,
            start=(first.alpha, first.sigma),
            path=path,
            build=build,
            **settings,
        )

    def starting_at(self, fraction):
        """The last `fraction` of the steps: their own table, because history starts anew.

        Raises: ValueError unless 0 < fraction <= 1 and at least one step is left, and no more than there are.
        """
        if self.path is None:
            raise ValueError(f"start_at: {self.name!r} has no path to start in the middle of, only a table")
        if not 0 < fraction <= 1:
            raise ValueError(f"start_at must be above 0 and at most 1, got {fraction}")
        left = int(self.path.steps * fraction + 1e-9)  # 0.29 of 100 steps is 29, though it is 28.999…
        if not 1 <= left <= self.path.n:
            raise ValueError(f"start_at={fraction} must leave from 1 to {self.path.n} of the {self.path.steps} steps")
        settings = {key: getattr(self, key) for key in ("guidance", "rescale", "clip", "threshold")}
        return Sampler.built(self.name, self.path.tail(self.path.n - left), self.build, **settings)

    @property
    def timesteps(self):
        return self.table[:, 0]

    @property
    def slots(self):
        return slots_of(self.table)

    @property
    def columns(self):
        return columns(self.slots)

    def __str__(self):
        title = f"{self.name}: {len(self.table)} evaluations, guidance {self.guidance}, clip {self.clip}"
        lines = [[f"{value:.6g}" for value in row] for row in self.table]
        return "\n".join([title, *(" ".join(f"{cell:>11}" for cell in line) for line in [self.columns, *lines])])
