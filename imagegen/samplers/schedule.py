"""Noise schedules: how much signal and how much noise x_t holds at each training time."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Schedule:
    """The variance-preserving path x_t = alpha_t x_0 + sigma_t epsilon at the integer times t = 0 … steps-1.

        alpha_bar_t = prod_{s<=t} (1 - beta_s)      alpha_t = sqrt(alpha_bar_t)      sigma_t = sqrt(1 - alpha_bar_t)

    alpha_bar is a float64 array of shape (steps,), its first entry the cleanest. `linear`, `scaled_linear` and
    `cosine` make the usual ones; their zero_snr=True rescales alpha so that the last time is pure noise (Lin et al.,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023, algorithm 1).
    Raises: ValueError where alpha_bar doesn't fall strictly within [0, 1).
    """

    alpha_bar: np.ndarray

    def __post_init__(self):
        alpha_bar = np.asarray(self.alpha_bar, np.float64)
        if alpha_bar.ndim != 1 or not len(alpha_bar):
            raise ValueError(f"Schedule: alpha_bar must have shape (steps,), got {alpha_bar.shape}")
        if np.any(np.diff(alpha_bar) >= 0) or alpha_bar[0] >= 1 or alpha_bar[-1] < 0:
            raise ValueError("Schedule: alpha_bar must fall strictly from below 1 to 0 or more")
        object.__setattr__(self, "alpha_bar", alpha_bar)

    @classmethod
    def linear(cls, beta_start=1e-4, beta_end=0.02, steps=1000, zero_snr=False):
        """beta grows linearly (Ho et al., "Denoising Diffusion Probabilistic Models", 2020)."""
        return cls._from_betas(np.linspace(beta_start, beta_end, steps), zero_snr)

    @classmethod
    def scaled_linear(cls, beta_start=0.00085, beta_end=0.012, steps=1000, zero_snr=False):
        """sqrt(beta) grows linearly (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion", 2022)."""
        return cls._from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2, zero_snr)

    @classmethod
    def cosine(cls, steps=1000, s=0.008, beta_max=0.999, zero_snr=False):
        """alpha_bar is a squared cosine (Nichol & Dhariwal, "Improved Denoising Diffusion …", 2021, equation 17)."""
        f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * math.pi / 2) ** 2
        return cls._from_betas(np.minimum(1 - f[1:] / f[:-1], beta_max), zero_snr)

    @classmethod
    def _from_betas(cls, beta, zero_snr):
        alpha_bar = np.cumprod(1 - beta)
        if zero_snr:
            alpha = np.sqrt(alpha_bar)
            alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return cls(alpha_bar)

    @property
    def steps(self):
        return len(self.alpha_bar)

    @property
    def alpha(self):
        return np.sqrt(self.alpha_bar)

    @property
    def sigma(self):
        return np.sqrt(1 - self.alpha_bar)

    def __repr__(self):
        return f"Schedule({self.steps} steps, alpha_bar {self.alpha_bar[0]:.6g} … {self.alpha_bar[-1]:.6g})"
