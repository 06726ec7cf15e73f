import math

import numpy as np

from .lms import lagrange
from .table import Table


def sa_solver(
    path,
    *,
    order=2,
    corrector_order=2,
    tau=lambda t: 1.0 if 200 <= t <= 800 else 0.0,
    lower_order_final=True,
    noise_scale=1.0,
):
    """Xue et al., "SA-Solver: Stochastic Adams Solver", 2023, algorithm 1 on x_0.

    x' = e^(-tau^2 h) sigma'/sigma x + (1 + tau^2) alpha' sum_j x_0j integral of e^((1 + tau^2)(l - lambda')) L_j(l) dl
         + sigma' sqrt(1 - e^(-2 tau^2 h)) noise

    L_j is the Lagrange polynomial in lambda through the last `order` points; the corrector's also goes through the
    point x', once that is known. Both start from the same x and add the same noise, so that the corrected x is x' plus
    a sum over history. tau: how much noise, a number or a function of t; 0 is the ODE.
    lower_order_final: the last steps are of orders …, 2, 1.
    """
    if order < 1 or corrector_order < 0:
        raise ValueError(
            f"sa_solver: order must be at least 1 and corrector_order 0, got {order} and {corrector_order}"
        )
    table = Table(path, slots=max(order, corrector_order - 1))
    settles = math.inf if lower_order_final else 0
    taus = [float(tau(point.t) if callable(tau) else tau) for point in path.points[:-1]]
    p_before = 0
    for i, (here, to) in enumerate(path.jumps()):
        history, slot = table.ring(i)
        h, tau2 = to.lam - here.lam, taus[i] ** 2
        x = table.x
        if i > 0 and corrector_order:
            p = path.known_at(i, min(corrector_order, path.n - i + 2) if lower_order_final else corrector_order)
            x = x + _gradient(path, i - 1, taus[i - 1], i, [table.x0, *history][:p])
            x = x - _gradient(path, i - 1, taus[i - 1], i - 1, history[:p_before])
        p_before = path.order_at(i, order, settles_below=settles)
        x_next = (math.exp(-tau2 * h) if tau2 else 1) * to.sigma / here.sigma * x
        std = to.sigma * math.sqrt(-math.expm1(-2 * tau2 * h)) if tau2 else 0.0
        x_next = x_next + _gradient(path, i, taus[i], i, [table.x0, *history][:p_before])
        table.add(here, x_next + noise_scale * std * table.n, to, table.x0, slot)
    return table


def _gradient(path, i, tau, newest, D):
    """The sum over x_0 of the step from point i to the next; D are those of the points newest, newest - 1, …"""
    here, to = path[i], path[i + 1]
    k = 1 + tau**2
    nodes = np.array([path[newest - j].lam - to.lam for j in range(len(D))])
    h = to.lam - here.lam
    weights = [_integral(lagrange(nodes, j), k, h) for j in range(len(D))]
    if len(D) == 2:
        # The authors' code replaces the exact second moment by h^2/2 (predictor) or h/2 (corrector).
        exact = (h * k + math.expm1(-k * h)) / k**2
        fix = (h**2 / 2 - exact) / (nodes[0] - nodes[1]) if newest == i else h / 2 - exact / h
        weights = [weights[0] + fix, weights[1] - fix]
    return k * to.alpha * sum(w * d for w, d in zip(weights, D, strict=True))


def _integral(polynomial, k, h):
    """The integral of polynomial(u) e^(k u) over u from -h to 0."""
    moments = [-math.expm1(-k * h) / k]
    for p in range(1, len(polynomial)):
        moments.append((-((-h) ** p) * math.exp(-k * h) - p * moments[-1]) / k)
    return sum(c * moment for c, moment in zip(polynomial[::-1], moments, strict=True))
