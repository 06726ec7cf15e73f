import numpy as np

from .table import Table


def lms(path, *, order=4):
    """Linear multistep (Adams-Bashforth) on the noise levels as they are (Crowson, k-diffusion): the polynomial through
    the last epsilons, the derivatives of x, integrated from sigma to sigma'.

    x' = x + sum_j epsilon_j integral of prod_{k != j} (s - sigma_k) / (sigma_j - sigma_k) ds
    """
    if order < 1:
        raise ValueError(f"lms: order must be at least 1, got {order}")
    table = Table(path, slots=order - 1)
    for i, (here, to) in enumerate(path.jumps()):
        epsilons, slot = table.ring(i)
        epsilons = [table.epsilon(here), *epsilons][: i + 1]
        # diffusers, started in the middle, takes the weights of the order that a full history would allow.
        visited = (*(path.earlier if path.compat else ()), *path.points[: i + 1])
        levels = np.array([point.sigma for point in visited[::-1][:order]])
        x_next = table.x
        for j, epsilon in zip(range(len(levels)), epsilons, strict=False):
            integral = np.polyint(lagrange(levels, j))
            x_next = x_next + (np.polyval(integral, to.sigma) - np.polyval(integral, here.sigma)) * epsilon
        table.add(here, x_next, to, epsilons[0], slot)
    return table


def lagrange(nodes, j):
    """Coefficients, highest power first, of the polynomial that is 1 at nodes[j] and 0 at the others."""
    others = np.delete(nodes, j)
    return np.poly(others) / np.prod(nodes[j] - others) if len(others) else np.ones(1)
