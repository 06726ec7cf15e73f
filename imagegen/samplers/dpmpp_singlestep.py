"""DPM-Solver++ of two evaluations a step, with noise, on x = x_0 + sigma epsilon, where lambda = -log(sigma)."""

import math

from .euler import ancestral
from .table import Table


def dpmpp_2s_ancestral(path, *, eta=1.0, noise_scale=1.0):
    """Lu et al., "DPM-Solver++", 2022, algorithm 1 to sigma_down, then noise back up to sigma' (Crowson, k-diffusion).

    x_1 = s/sigma x + (1 - s/sigma) x_0    x' = d/sigma x + (1 - d/sigma) x_0(x_1) + sigma_up noise
    with d = sigma_down and s = sqrt(sigma d), halfway in lambda; 2n - 1 evaluations.
    """
    table = Table(path, slots=1)
    for here, to in path.jumps():
        down, up = ancestral(here.sigma, to.sigma, eta)
        if down == 0:
            table.add(here, table.x0 + noise_scale * up * table.n, to)
            continue
        middle, ratio = path.between(math.sqrt(here.sigma * down)), down / here.sigma
        half = middle.sigma / here.sigma
        table.add(here, half * table.x + (1 - half) * table.x0, middle, store=ratio * table.x)
        table.add_second_stage(middle, table.h[0] + (1 - ratio) * table.x0 + noise_scale * up * table.n, to)
    return table


def dpmpp_sde(path, *, eta=1.0, r=0.5, noise_scale=1.0):
    """Lu et al., "DPM-Solver++", 2022, the SDE of section 5 by algorithm 1 (Crowson, k-diffusion): both stages end with
    noise, and the second combines the x_0 of both.

    x_1 = mu_1 + u_1 noise_1    mu_1 = d_1/sigma x + (1 - d_1/sigma) x_0       d_1, u_1: down and up to sigma_r
    x'  = d_2/sigma x + (1 - d_2/sigma) ((1 - f) x_0 + f x_0(x_1))             d_2, u_2: down and up to sigma'
          + c u_1 noise_1 + sqrt(u_2^2 - c^2 u_1^2) noise_2                    c sigma_r: down from sigma_r to sigma'
    with sigma_r = sigma^(1-r) sigma'^r and f = 1/(2r); 2n - 1 evaluations.

    The noise of the first stage is part of the second's, as one Brownian motion makes both; u_1 noise_1 = x_1 - mu_1
    comes from what is stored. Independent noise would make the order 1, in distribution, where it is 2.
    """
    if not 0 < r <= 1:
        raise ValueError(f"dpmpp_sde: r must be above 0 and at most 1, got {r}")
    table = Table(path, slots=1)
    f = 1 / (2 * r)
    for here, to in path.jumps():
        if to.sigma == 0:
            table.add(here, table.x0, to)
            continue
        middle = path.between(here.sigma ** (1 - r) * to.sigma**r)
        (down_1, up_1), (down_2, up_2) = (ancestral(here.sigma, end.sigma, eta) for end in (middle, to))
        # diffusers leaves it to its Brownian tree to give noises that go together
        c = 0.0 if path.compat else ancestral(middle.sigma, to.sigma, eta)[0] / middle.sigma
        mu_1 = down_1 / here.sigma * table.x + (1 - down_1 / here.sigma) * table.x0
        kept = down_2 / here.sigma * table.x + (1 - down_2 / here.sigma) * (1 - f) * table.x0
        table.add(here, mu_1 + noise_scale * up_1 * table.n, middle, store=kept - c * mu_1)
        fresh = math.sqrt(max(0.0, up_2**2 - (c * up_1) ** 2))
        x_next = table.h[0] + c * table.x + (1 - down_2 / here.sigma) * f * table.x0 + noise_scale * fresh * table.n
        table.add_second_stage(middle, x_next, to)
    return table
