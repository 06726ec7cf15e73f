import math

from .euler import ancestral
from .table import Table


def dpm_2(path):
    """Karras et al., 2022, with the midpoint rule of DPM-Solver-2 (Lu et al., 2022): the derivative at the geometric
    mean of sigma and sigma' takes the whole step; 2n - 1 evaluations, order 2.

    x_1 = x + (sigma_mid - sigma) epsilon    x' = x + (sigma' - sigma) epsilon_1
    """
    return dpm_2_ancestral(path, eta=0.0)


def dpm_2_ancestral(path, *, eta=1.0, noise_scale=1.0):
    """`dpm_2` to sigma_down, then noise back up to sigma' (Crowson, k-diffusion)."""
    table = Table(path, slots=1)
    for here, to in path.jumps():
        down, up = ancestral(here.sigma, to.sigma, eta)
        if down == 0:
            table.add(here, table.x0 + noise_scale * up * table.n, to)
            continue
        middle = path.between(math.sqrt(here.sigma * down))
        x_mid = table.x + (middle.sigma - here.sigma) * table.epsilon(here)
        table.add(here, x_mid, middle, store=table.x)
        x_next = table.h[0] + (down - here.sigma) * table.epsilon(middle)
        table.add_second_stage(middle, x_next + noise_scale * up * table.n, to)
    return table
