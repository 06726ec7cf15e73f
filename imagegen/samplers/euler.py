"""Euler's method on x = x_0 + sigma epsilon, whose derivative by sigma is epsilon = (x - x_0) / sigma."""

import math
from dataclasses import replace

from .table import Table


def euler(path, *, churn=0.0, churn_min=0.0, churn_max=math.inf, noise_scale=1.0):
    """Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, algorithm 2 without its
    second stage.

    x' = x + (sigma' - sigma) epsilon

    churn: before each step at churn_min <= sigma <= churn_max noise lifts sigma by min(churn/n, sqrt(2) - 1) of itself.
    """
    if path.compat and churn:
        return _euler_churned_late(path, churn, churn_min, churn_max, noise_scale)
    path, levels, kicks = churned(path, churn, churn_min, churn_max, noise_scale)
    table = Table(path)
    for (here, to), level, kick in zip(path.jumps(), levels, kicks, strict=True):
        table.add(here, table.x + (level - here.sigma) * table.epsilon(here) + kick * table.n, to)
    return table


def euler_ancestral(path, *, eta=1.0, noise_scale=1.0):
    """Euler's method to sigma_down, then noise back up to sigma' (Karras et al., 2022; Crowson, k-diffusion).

    x' = x + (sigma_down - sigma) epsilon + sigma_up noise
    """
    table = Table(path)
    for here, to in path.jumps():
        down, up = ancestral(here.sigma, to.sigma, eta)
        table.add(here, table.x + (down - here.sigma) * table.epsilon(here) + noise_scale * up * table.n, to)
    return table


def ancestral(sigma, sigma_next, eta):
    """(sigma_down, sigma_up), sigma_down^2 + sigma_up^2 = sigma_next^2: eta times the noise of DDPM's posterior."""
    up = min(sigma_next, eta * math.sqrt(max(0.0, sigma_next**2 * (sigma**2 - sigma_next**2)) / sigma**2))
    if eta > 1 or sigma_next > sigma:
        return math.sqrt(sigma_next**2 - up**2), up
    # The same without the difference, which is all rounding where sigma_next is far below sigma and eta is 1.
    return sigma_next * math.hypot(math.sqrt(1 - eta**2), eta * sigma_next / sigma), up


def churned(path, churn, churn_min, churn_max, noise_scale):
    """(the path at the lifted noise levels, levels, kicks): step i leads to levels[i], then kicks[i] lifts it.

    So the noise that precedes an evaluation is part of the row before it; the first joins the initial noise.
    """
    if churn < 0:
        raise ValueError(f"create: churn must not be negative, got {churn}")
    points, kicks = [], []  # kicks[i] leads to point i
    for point in path.points[:-1]:
        lift = min(churn / path.steps, math.sqrt(2) - 1) if churn_min <= point.sigma <= churn_max else 0.0
        points.append(path.between(point.sigma * (1 + lift)) if lift else point)
        kicks.append(noise_scale * math.sqrt(max(0.0, points[-1].sigma ** 2 - point.sigma**2)))
    levels = [point.sigma for point in path.points[1:]]
    lifted = replace(path, points=(*points, path[path.n]), init_sigma=math.hypot(path.init_sigma, kicks[0]))
    return lifted, levels, [*kicks[1:], 0.0]


def _euler_churned_late(path, churn, churn_min, churn_max, noise_scale):
    """diffusers adds the noise after it has called the model at the lower level."""
    table = Table(path)
    for here, to in path.jumps():
        lift = min(churn / path.steps, math.sqrt(2) - 1) if churn_min <= here.sigma <= churn_max else 0.0
        hat = here.sigma * (1 + lift)
        read = here if path.prediction in ("v", "sample") else replace(here, sigma=hat)
        kick = noise_scale * math.sqrt(hat**2 - here.sigma**2) * table.n
        x, x0 = table.x + kick, table.x0 + path.x0_coefficients(read)[0] * kick
        table.add(read, x + (to.sigma - hat) * (x - x0) / hat, to)
    return table
