import math

from .table import Table


def ddpm(path, *, variance="small", noise_scale=1.0):
    """Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020, equations 6 and 7: the posterior of x'.

    x' = (alpha' beta x_0 + alpha_step sigma'^2 x) / sigma^2 + std noise,    alpha_step = alpha/alpha',
    beta = 1 - alpha_step^2,    std^2 = sigma'^2/sigma^2 beta ("small") or beta ("large", none at the end)
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be small or large, got {variance!r}")
    table = Table(path)
    for here, to in path.jumps():
        alpha_step = here.alpha / to.alpha
        beta = 1 - alpha_step**2
        mean = (to.alpha * beta * table.x0 + alpha_step * to.sigma**2 * table.x) / here.sigma**2
        std = math.sqrt(beta) * (to.sigma / here.sigma if variance == "small" else 1)
        ends = to.sigma == 0 if not path.compat else here.t == 0  # diffusers adds noise to its result, but not at t = 0
        if path.compat:
            std = max(std, 1e-10)
        table.add(here, mean + (0 if ends else noise_scale * std * table.n), to)
    return table
