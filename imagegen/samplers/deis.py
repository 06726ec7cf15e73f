import math

import numpy as np

from .lms import lagrange
from .table import Table


def deis(path, *, order=2, lower_order_final=True):
    """Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2023, log-rho variant: epsilon is
    a polynomial in u = log(rho), rho = sigma/alpha, through the last `order` points.

    x'/alpha' = x/alpha + sum_j epsilon_j integral of prod_{k != j} (u - u_k) / (u_j - u_k) e^u du

    written as the first order, which is DDIM, and differences of epsilons, for x/alpha and rho are large where
    x'/alpha' is not. lower_order_final: fewer than 15 steps end with orders 2 and 1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"deis: order must be 1, 2 or 3, got {order}")
    table = Table(path, slots=order - 1)
    for i, (here, to) in enumerate(path.jumps()):
        history, slot = table.ring(i)
        epsilons = [table.epsilon(here), *history]
        p = path.order_at(i, order, settles_below=15 if lower_order_final else 0)
        x_next = to.alpha * table.x0 + to.sigma * epsilons[0]
        u = np.array([-path[i - j].lam for j in range(p)])
        for j in range(1, p):
            # The weights of all epsilons sum to rho' - rho, which DDIM gives the first: differences are left.
            weight = _integral(lagrange(u, j), -to.lam) - _integral(lagrange(u, j), -here.lam)
            x_next = x_next + to.alpha * weight * (epsilons[j] - epsilons[0])
        table.add(here, x_next, to, epsilons[0], slot)
    return table


def _integral(polynomial, u):
    """The integral of polynomial(u) e^u, which is (p - p' + p'' - …)(u) e^u."""
    derivatives = [np.polyder(polynomial, k) for k in range(len(polynomial))]
    return math.exp(u) * sum((-1) ** k * np.polyval(p, u) for k, p in enumerate(derivatives))
