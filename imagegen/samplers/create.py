"""Samplers by name."""

from dataclasses import dataclass

import numpy as np
import torch

from .ddim import ddim
from .ddpm import ddpm
from .path import PREDICTIONS, make_path
from .table import columns, slots_of

SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def create(
    name, schedule, *, steps, prediction="epsilon", spacing="trailing", offset=0, guidance=None, clip=None, **options
):
    """The sampler `name` as a table of coefficients along a schedule.

    Args:
        name: "ddim" or "ddpm".
        schedule: a `Schedule`, the one the model was trained on.
        steps: how many times the model is evaluated.
        prediction: what the model returns: "epsilon", "v" = alpha epsilon - sigma x_0, or "sample" = x_0.
        spacing: which times are visited: "trailing", "leading" (from `offset` up) or "linspace".
        guidance: weight g of the conditional output in m = g m_c + (1-g) m_u, a number or one per image (B,);
            None evaluates the model once per image (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022).
        clip: x_0 is held within [-clip, clip]; None leaves it.
        options: the sampler's own: eta for "ddim" (0 is deterministic, 1 is "ddpm").

    Returns: a `Sampler`.
    Raises: ValueError that names the argument; TypeError for an option the sampler doesn't have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"create: name must be one of {', '.join(SAMPLERS)}, got {name!r}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"create: prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"create: clip must be positive or None, got {clip}")
    path = make_path(schedule, steps, prediction, spacing, offset, clipped=clip is not None)
    return Sampler(name, SAMPLERS[name](path, **options).array(), guidance, clip)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A table with what holds for all its rows; `print` shows it.

    table: (evaluations, 14 + slots) float64, one column per name in `columns` (see `samplers.table`).
    init_sigma: the standard deviation of the first x. input_scale: the first model input is input_scale * x.
    """

    name: str
    table: np.ndarray
    guidance: float | torch.Tensor | None = None
    clip: float | None = None
    init_sigma: float = 1.0
    input_scale: float = 1.0

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
