"""Which times, and which noise levels between two of them, a sampler visits."""

import math

import numpy as np

from .._optional import require

SPACINGS = ("trailing", "leading", "linspace")
SIGMAS = ("karras", "exponential", "beta")


def timesteps(spacing, n, steps, offset=0, extra=0, rounded=True):
    """n of the times 0 … steps-1, falling (table 2 of Lin et al., 2023).

    trailing: starts at the last time. leading: ends at `offset`, so it never sees pure noise. linspace: both ends.
    extra: leading and linspace are made of n + extra times, the last of which are dropped. rounded: to integers.
    """
    if not 1 <= n <= steps:
        raise ValueError(f"create: steps must be from 1 to the schedule's {steps}, got {n}")
    if offset < 0:
        raise ValueError(f"create: offset must not be negative, got {offset}")
    if spacing == "trailing":
        t = np.round(steps - np.arange(n) * (steps / n)) - 1
    elif spacing == "leading":
        t = np.arange(n + extra)[::-1][:n] * (steps // (n + extra)) + offset
        if t[0] >= steps:
            raise ValueError(f"create: offset {offset} leads past the schedule's last time {steps - 1}")
    else:
        t = np.linspace(0, steps - 1, n + extra)[::-1][:n]
        t = np.round(t) if rounded else t
    return t.astype(np.float64)


def ramp(kind, high, low, n, rho=7.0):
    """n noise levels falling from high to low.

    karras: sigma^(1/rho) is uniform (Karras et al., 2022, equation 5). exponential: ln(sigma) is. beta: quantiles of
    Beta(0.6, 0.6), dense at both ends (Lee et al., "Beta Sampling is All You Need", 2024).
    """
    if kind == "karras":
        return np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), n))
    beta = require("scipy.stats", "sigmas='beta'").beta
    return low + (high - low) * beta.ppf(np.linspace(1, 0, n), 0.6, 0.6)


def time_of(sigma, training_sigmas):
    """The (fractional) training time of a noise level sigma / alpha: linear in its logarithm.

    training_sigmas need not rise throughout, so: from the last one that is not above sigma.
    """
    u, v = np.log(sigma), np.log(training_sigmas)
    below = np.greater_equal.outer(u, v)
    k = np.where(below.any(-1), len(v) - 1 - np.argmax(below[..., ::-1], -1), 0)
    k = np.minimum(k, len(v) - 2)
    return np.round(k + np.clip((u - v[k]) / (v[k + 1] - v[k]), 0, 1), 10)
