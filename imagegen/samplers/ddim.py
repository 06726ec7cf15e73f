import math

from .table import Table


def ddim(path, *, eta=0.0, noise_scale=1.0, clipped_epsilon=None):
    """Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021, equations 12 and 16.

    x' = alpha' x_0 + sqrt(sigma'^2 - std^2) epsilon + std noise,   std = eta sigma'/sigma sqrt(1 - alpha^2/alpha'^2)

    With clipping, epsilon is the one that goes with the clipped x_0, so that eta = 1 is DDPM there too;
    clipped_epsilon=False keeps the model's own.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be from 0 to 1, got {eta}")
    if clipped_epsilon is None:
        clipped_epsilon = path.clipped and not path.compat
    table = Table(path)
    for here, to in path.jumps():
        std = eta * to.sigma / here.sigma * math.sqrt(max(0.0, 1 - (here.alpha / to.alpha) ** 2)) if eta else 0.0
        epsilon = table.epsilon(here, clipped_epsilon)
        # sqrt(sigma'^2 - std^2), without the difference: it is all rounding where eta is 1 and alpha nearly 0
        kept = (
            to.sigma
            / here.sigma
            * math.hypot(math.sqrt(1 - eta**2) * here.sigma, eta * here.alpha * to.sigma / to.alpha)
            if eta
            else to.sigma
        )
        mean = to.alpha * table.x0 + kept * epsilon
        table.add(here, mean + noise_scale * std * table.n, to)
    return table


def ddim_inverse(path):
    """DDIM backwards, from an image to the noise that DDIM makes it from (Song et al., 2021, section 4.3).

    Each step takes the model's output where it starts for the one where it leads.
    """
    return ddim(path)
