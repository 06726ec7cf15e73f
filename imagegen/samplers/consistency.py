"""Samplers of models that were distilled to jump from any time straight to the data."""

import math

from .table import Table


def lcm(path, *, sigma_data=0.5, timestep_scaling=10.0, noise_scale=1.0):
    """Luo et al., "Latent Consistency Models", 2023, algorithm 3: jump to the data, then add noise again.

    f = c_skip x + c_out x_0    x' = alpha' f + sigma' noise    and the last f is the result
    c_skip = sigma_data^2 / (u^2 + sigma_data^2)    c_out = u / sqrt(u^2 + sigma_data^2)    u = timestep_scaling t
    """
    table = Table(path)
    for i, (here, to) in enumerate(path.jumps()):
        c_skip, c_out = boundary(timestep_scaling * here.t, sigma_data)
        f = c_skip * table.x + c_out * table.x0
        last = i == path.n - 1
        table.add(here, f if last else to.alpha * f + noise_scale * to.sigma * table.n, path[path.n] if last else to)
    return table


def boundary(u, sigma_data=0.5):
    """(c_skip, c_out)"""
    return sigma_data**2 / (u**2 + sigma_data**2), u / math.hypot(u, sigma_data)


def tcd(path, *, eta=0.3, noise_scale=1.0):
    """Zheng et al., "Trajectory Consistency Distillation", 2024, algorithm 4: jump to s = (1 - eta) t', renoise to t'.

    x_s = alpha_s x_0 + sigma_s epsilon    x' = r x_s + sqrt(1 - r^2) noise    r = alpha'/alpha_s
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"tcd: eta must be from 0 to 1, got {eta}")
    table = Table(path)
    for here, to in path.jumps():
        s = path.at(math.floor((1 - eta) * to.t)) if to.t >= 0 else to
        r = to.alpha / s.alpha
        x_s = s.alpha * table.x0 + s.sigma * table.epsilon(here)
        table.add(here, r * x_s + noise_scale * math.sqrt(max(0.0, 1 - r**2)) * table.n, to)
    return table
