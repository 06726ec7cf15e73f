"""DPM-Solver++ with several steps of history: x_0 is extrapolated in lambda = log(alpha/sigma), the rest is exact."""

import math

from .table import Table


def dpmpp(path, *, order, eta=0.0, solver="midpoint", lower_order_final=True, euler_at_final=False, noise_scale=1.0):
    """Lu et al., "DPM-Solver++", 2022, algorithm 2 and appendix B; eta = 1 is its SDE, solved as in equation 18.

    h = lambda' - lambda    k = (1 + eta) h    D_1, D_2 the first and second differences of x_0, per step of h
    x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^-k) x_0 + alpha' (1 - e^-k)/2 D_1 + std noise
    std = sigma' sqrt(1 - e^(-2 eta h))
    with solver "heun" (and at order 3)   alpha' (1 - (1 - e^-k)/k) D_1   in place of the term in D_1,
    and at order 3                        alpha' (1 - 2 (k - 1 + e^-k)/k^2) D_2   besides.

    The authors' code has half of the last term, and so has order 2; compat="diffusers" keeps that.

    lower_order_final: fewer than 15 steps end with orders 2 and 1. euler_at_final: the last step is of order 1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpmpp: order must be 1, 2 or 3, got {order}")
    if solver not in ("midpoint", "heun"):
        raise ValueError(f"dpmpp: solver must be midpoint or heun, got {solver!r}")
    table = Table(path, slots=order - 1)
    for i, (here, to) in enumerate(path.jumps()):
        history, slot = table.ring(i)
        p = path.order_at(i, order, settles_below=15 if lower_order_final else 0)
        if euler_at_final and i == path.n - 1:
            p = 1
        h = to.lam - here.lam
        if h == 0:  # diffusers' way to end a ramp at sigma_min
            p = 1
        k = (1 + eta) * h
        x_next = (
            to.sigma / here.sigma * (math.exp(-eta * h) if eta else 1) * table.x - to.alpha * math.expm1(-k) * table.x0
        )
        if p > 1:
            r0 = (here.lam - path[i - 1].lam) / h
            D1 = (table.x0 - history[0]) / r0
        if p > 2:
            r1 = (path[i - 1].lam - path[i - 2].lam) / h
            D1_before = (history[0] - history[1]) / r1
            D2 = (D1 - D1_before) / (r0 + r1)
            D1 = D1 + r0 * D2
            weight = 1 - 2 * (math.expm1(-k) + k) / k**2
            if path.compat:  # half of it, which makes the order 2, and in the SDE with the wrong sign
                weight = (-1 if eta else 1) / 2 - (math.expm1(-k) + k) / k**2
            x_next = x_next + to.alpha * weight * D2
        if p > 1:
            weight = -math.expm1(-k) / 2 if solver == "midpoint" and p == 2 else math.expm1(-k) / k + 1
            x_next = x_next + to.alpha * weight * D1
        std = to.sigma * math.sqrt(max(0.0, -math.expm1(-2 * eta * h))) if eta else 0.0
        table.add(here, x_next + noise_scale * std * table.n, to, table.x0, slot)
    return table
