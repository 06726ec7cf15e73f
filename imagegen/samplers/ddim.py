import math

from .table import Table


def ddim(path, *, eta=0.0):
    """Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021, equations 12 and 16.

    x' = alpha' x_0 + sqrt(sigma'^2 - std^2) epsilon + std noise,   std = eta sigma'/sigma sqrt(1 - alpha^2/alpha'^2)

    With clipping, epsilon is the one that goes with the clipped x_0, so that eta = 1 is DDPM there too.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be from 0 to 1, got {eta}")
    table = Table(path)
    for i, alpha, sigma, alpha_next, sigma_next in path.jumps():
        std = eta * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
        table.add(i, alpha_next * table.x0 + math.sqrt(sigma_next**2 - std**2) * table.epsilon(i) + std * table.n)
    return table
