import math

import numpy as np

from .lms import lagrange
from .table import Table


def deis(path, *, order=2, lower_order_final=True):
    """Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2023, log-rho variant: epsilon is
    a polynomial in u = log(rho), rho = sigma/alpha, through the last `order` points.

    x'/alpha' = x/alpha + sum_j epsilon_j integral of prod_{k != j} (u - u_k) / (u_j - u_k) e^u du

    The first order is DDIM. lower_order_final: fewer than 15 steps end with orders 2 and 1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"deis: order must be 1, 2 or 3, got {order}")
    table = Table(path, slots=order - 1)
    for i, (here, to) in enumerate(path.jumps()):
        history, slot = table.ring(i)
        epsilons = [table.epsilon(here), *history]
        p = path.order_at(i, order, settles_below=15 if lower_order_final else 0)
        if p == 1:
            x_next = to.alpha * table.x0 + to.sigma * epsilons[0]
        else:
            u = np.array([-path[i - j].lam for j in range(p)])
            weights = [_integral(lagrange(u, j), -to.lam) - _integral(lagrange(u, j), -here.lam) for j in range(p)]
            x_next = to.alpha * (table.x / here.alpha + sum(w * e for w, e in zip(weights, epsilons, strict=False)))
        table.add(here, x_next, to, epsilons[0], slot)
    return table


def _integral(polynomial, u):
    """The integral of polynomial(u) e^u, which is (p - p' + p'' - …)(u) e^u."""
    derivatives = [np.polyder(polynomial, k) for k in range(len(polynomial))]
    return math.exp(u) * sum((-1) ** k * np.polyval(p, u) for k, p in enumerate(derivatives))
