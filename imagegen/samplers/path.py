"""The times a sampler visits, the signal and noise there, and what the model's output means at each of them."""

from dataclasses import dataclass

import numpy as np

PREDICTIONS = ("epsilon", "v", "sample")
SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True, eq=False)
class Path:
    """n model evaluations at t[i], where x = alpha[i] x_0 + sigma[i] epsilon, ending at alpha[n], sigma[n] = 1, 0."""

    t: np.ndarray  # (n,), falling
    alpha: np.ndarray  # (n + 1,)
    sigma: np.ndarray  # (n + 1,)
    prediction: str
    clipped: bool

    def jumps(self):
        """(i, alpha, sigma, alpha', sigma') of every row: where it starts and where it leads."""
        alpha, sigma = self.alpha, self.sigma
        return zip(range(len(self.t)), alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True)

    def x0_coefficients(self, i):
        """(a_x, a_m) with x_0 = a_x x + a_m m."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        if self.prediction == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction == "v":
            return alpha, -sigma
        return 0.0, 1.0

    def epsilon(self, i, x, x0, m):
        """The noise in x as a combination of x, x0 and m: the model's own, or the one that goes with the clipped x0."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        if self.clipped or self.prediction == "sample":
            return (x - alpha * x0) / sigma
        return m if self.prediction == "epsilon" else sigma * x + alpha * m


def make_path(schedule, steps, prediction, spacing, offset, clipped):
    t = timesteps(spacing, steps, schedule.steps, offset)
    if prediction == "epsilon" and schedule.alpha_bar[t[0]] == 0:
        raise ValueError(
            f"create: prediction 'epsilon' says nothing about x_0 at t = {t[0]}, where the schedule has zero SNR; "
            "train with prediction 'v' or 'sample', or take spacing 'leading'"
        )
    return Path(t, np.append(schedule.alpha[t], 1.0), np.append(schedule.sigma[t], 0.0), prediction, clipped)


def timesteps(spacing, n, steps, offset=0):
    """n of the times 0 … steps-1, falling (table 2 of Lin et al., 2023).

    trailing: starts at the last time. leading: ends at `offset`, so it never sees pure noise. linspace: both ends.
    """
    if not 1 <= n <= steps:
        raise ValueError(f"create: steps must be from 1 to the schedule's {steps}, got {n}")
    if spacing not in SPACINGS:
        raise ValueError(f"create: spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if spacing == "trailing":
        t = np.round(np.arange(n, 0, -1) * (steps / n)) - 1
    elif spacing == "leading":
        t = np.arange(n)[::-1] * (steps // n) + offset
    else:
        t = np.round(np.linspace(0, steps - 1, n))[::-1]
    if t[0] >= steps:
        raise ValueError(f"create: offset {offset} leads past the schedule's last time {steps - 1}")
    return t.astype(np.int64)
