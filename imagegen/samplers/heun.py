import math

from .euler import churned, lowered
from .table import Table


def heun(path, *, churn=0.0, churn_min=0.0, churn_max=math.inf, noise_scale=1.0):
    """Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, algorithm 2: an Euler
    step to sigma', then the step again with the mean derivative of its ends; 2n - 1 evaluations, order 2.

    x_1 = x + (sigma' - sigma) epsilon    x' = x + (sigma' - sigma) (epsilon + epsilon_1) / 2

    churn: as in `euler`.
    """
    path, kicks = churned(path, churn, churn_min, churn_max, noise_scale)
    table = Table(path, slots=1)
    for i, (here, to) in enumerate(path.jumps()):
        level = lowered(to, kicks[i + 1], noise_scale)
        step, kick = level - here.sigma, kicks[i + 1] * table.n
        d = table.epsilon(here)
        if i == path.n - 1:
            table.add(here, table.x + step * d, to)
            break
        end = path.between(level) if kicks[i + 1] else to
        table.add(here, table.x + step * d, end, store=table.x + step / 2 * d)
        table.add(end, table.h[0] + step / 2 * table.epsilon(end) + kick, to)
    return table
