"""Noise schedules: how much signal and noise x_t = alpha_t x_0 + sigma_t epsilon holds at each training time."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Schedule:
    """The variance-preserving path x_t = alpha_t x_0 + sigma_t epsilon at the integer times t = 0 … steps-1.

        alpha_bar_t = prod_{s<=t} (1 - beta_s)      alpha_t = sqrt(alpha_bar_t)      sigma_t = sqrt(1 - alpha_bar_t)

    alpha_bar is a float64 array of shape (steps,), its first entry the cleanest. `linear`, `scaled_linear`, `cosine`,
    `sigmoid`, `from_betas` and `from_sigmas` make it; their zero_snr=True rescales alpha so that the last time is pure
    noise (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023, algorithm 1). `flow`, `edm`
    and `angular` make the schedules of models that are trained on continuous times.
    Raises: ValueError where alpha_bar doesn't fall strictly within [0, 1).
    """

    alpha_bar: np.ndarray
    kind: str = "custom"

    def __post_init__(self):
        alpha_bar = np.asarray(self.alpha_bar, np.float64)
        if alpha_bar.ndim != 1 or not len(alpha_bar):
            raise ValueError(f"Schedule: alpha_bar must have shape (steps,), got {alpha_bar.shape}")
        if not (np.all(np.diff(alpha_bar) < 0) and alpha_bar[0] < 1 and alpha_bar[-1] >= 0):
            raise ValueError("Schedule: alpha_bar must fall strictly from below 1 to 0 or more")
        object.__setattr__(self, "alpha_bar", alpha_bar)

    @classmethod
    def linear(cls, beta_start=1e-4, beta_end=0.02, steps=1000, zero_snr=False):
        """beta grows linearly (Ho et al., "Denoising Diffusion Probabilistic Models", 2020)."""
        return cls.from_betas(np.linspace(beta_start, beta_end, steps), zero_snr, "linear")

    @classmethod
    def scaled_linear(cls, beta_start=0.00085, beta_end=0.012, steps=1000, zero_snr=False):
        """sqrt(beta) grows linearly (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion", 2022)."""
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
        return cls.from_betas(betas, zero_snr, "scaled_linear")

    @classmethod
    def cosine(cls, steps=1000, s=0.008, beta_max=0.999, zero_snr=False):
        """alpha_bar is a squared cosine (Nichol & Dhariwal, "Improved Denoising Diffusion …", 2021, equation 17)."""
        f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * math.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - f[1:] / f[:-1], beta_max), zero_snr, "cosine")

    @classmethod
    def sigmoid(cls, beta_start=1e-4, beta_end=0.02, steps=1000, zero_snr=False):
        """beta follows a sigmoid from -6 to 6 (Xu et al., "GeoDiff", 2022)."""
        betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, steps)))
        return cls.from_betas(betas, zero_snr, "sigmoid")

    @classmethod
    def from_betas(cls, betas, zero_snr=False, kind="custom"):
        """Any betas within (0, 1), the cleanest first."""
        alpha_bar = np.cumprod(1 - np.asarray(betas, np.float64))
        if zero_snr:
            alpha = np.sqrt(alpha_bar)
            alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return cls(alpha_bar, kind)

    @classmethod
    def from_sigmas(cls, sigmas):
        """Any rising ratios sigma_t / alpha_t, the standard deviations of the noise in x_t / alpha_t."""
        return cls(1 / (1 + np.asarray(sigmas, np.float64) ** 2))

    @staticmethod
    def flow(shift=1.0, steps=1000):
        """A `FlowSchedule`."""
        return FlowSchedule(shift, steps)

    @staticmethod
    def edm(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0):
        """An `EDMSchedule`."""
        return EDMSchedule(sigma_min, sigma_max, sigma_data, rho)

    @staticmethod
    def angular():
        """An `AngularSchedule`."""
        return AngularSchedule()

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
        return (
            f"Schedule({self.kind}, {self.steps} steps, alpha_bar {self.alpha_bar[0]:.6g} … {self.alpha_bar[-1]:.6g})"
        )


@dataclass(frozen=True)
class FlowSchedule:
    """The straight path x = (1 - sigma) x_0 + sigma epsilon; the model is told t = steps sigma.

    The uniform sigmas s that a sampler would visit are shifted towards noise, sigma = shift s / (1 + (shift - 1) s)
    (Esser et al., "Scaling Rectified Flow Transformers …", 2024, equation 23; there shift = sqrt(m / n) for m pixels
    where n were trained on; `resolution_shift` is another law).
    """

    shift: float = 1.0
    steps: int = 1000

    def __post_init__(self):
        if not self.shift > 0:
            raise ValueError(f"Schedule.flow: shift must be positive, got {self.shift}")
        if self.steps < 1:
            raise ValueError(f"Schedule.flow: steps must be at least 1, got {self.steps}")

    def shifted(self, s):
        return self.shift * s / (1 + (self.shift - 1) * s)


def resolution_shift(tokens, low=(256, 0.5), high=(4096, 1.15)):
    """The shift of a flow for an image of so many tokens, exp(mu) with mu linear in tokens.

    low, high: (tokens, mu) pairs that mu passes through; the defaults are those of the FLUX.1 models.
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


@dataclass(frozen=True)
class EDMSchedule:
    """x = x_0 + sigma epsilon for any sigma of [sigma_min, sigma_max]; the model is told ln(sigma) / 4.

    sigma_data is the data's standard deviation, which scales the model's input and output; rho bends the sigmas that
    are visited (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, table 1).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                "Schedule.edm: sigma_min must be positive and below sigma_max, "
                f"got {self.sigma_min} and {self.sigma_max}"
            )
        if not self.sigma_data > 0:
            raise ValueError(f"Schedule.edm: sigma_data must be positive, got {self.sigma_data}")


@dataclass(frozen=True)
class AngularSchedule:
    """The quarter circle x = cos(t pi/2) x_0 + sin(t pi/2) epsilon, 0 <= t <= 1, visited at sigma = sin(u pi/2)^2 for
    uniform u (Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022)."""

    def visited(self, u):
        """(t, alpha, sigma) at u."""
        sigma = np.sin(u * math.pi / 2) ** 2
        alpha = np.sqrt(1 - sigma**2)
        return np.arctan2(sigma, alpha) * 2 / math.pi, alpha, sigma
