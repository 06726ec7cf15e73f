import math

from .table import Table


def ddpm(path):
    """Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020, equations 6 and 7: the posterior of x'.

    x' = (alpha' beta x_0 + alpha_step sigma'^2 x) / sigma^2 + sigma'/sigma sqrt(beta) noise,
    alpha_step = alpha/alpha',  beta = 1 - alpha_step^2
    """
    table = Table(path)
    for i, alpha, sigma, alpha_next, sigma_next in path.jumps():
        alpha_step = alpha / alpha_next
        beta = 1 - alpha_step**2
        mean = (alpha_next * beta * table.x0 + alpha_step * sigma_next**2 * table.x) / sigma**2
        table.add(i, mean + sigma_next / sigma * math.sqrt(beta) * table.n)
    return table
