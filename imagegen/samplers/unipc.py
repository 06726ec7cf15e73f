import math

import numpy as np

from .table import Table


def unipc(path, *, order=2, solver="bh2", corrector=True, lower_order_final=True, uncorrected=()):
    """Zhao et al., "UniPC: A Unified Predictor-Corrector Framework", 2023, algorithms 5 and 6 on x_0.

    x' = sigma'/sigma x + alpha' (1 - e^-h) x_0 - alpha' B(h) sum_k rho_k (D_k - x_0) / r_k

    over the last `order` x_0 at r_k; the corrector adds the x_0 at x', once it is known, to the sum and so to the
    order. It starts from the same x as the predictor, so that the corrected x is x' plus a sum over history.

    solver: B(h) = -h ("bh1") or e^-h - 1 ("bh2"). uncorrected: the steps that aren't corrected.
    lower_order_final: the last steps are of orders …, 2, 1.
    """
    if order < 1:
        raise ValueError(f"unipc: order must be at least 1, got {order}")
    if solver not in ("bh1", "bh2"):
        raise ValueError(f"unipc: solver must be bh1 or bh2, got {solver!r}")
    table = Table(path, slots=order if corrector else order - 1)
    settles = math.inf if lower_order_final else 0
    orders = [path.order_at(i, order, settles_below=settles) for i in range(path.n)]
    for i, (here, to) in enumerate(path.jumps()):
        history, slot = table.ring(i)
        x = table.x
        if corrector and i > 0 and i - 1 not in uncorrected:
            p = orders[i - 1]
            x = x + _residual(path, i - 1, solver, history[:p], table.x0) - _residual(path, i - 1, solver, history[:p])
        x_next = to.sigma / here.sigma * x - to.alpha * math.expm1(here.lam - to.lam) * table.x0
        x_next = x_next + _residual(path, i, solver, [table.x0, *history][: orders[i]])
        table.add(here, x_next, to, table.x0, slot)
    return table


def _residual(path, i, solver, D, D_next=None):
    """-alpha' B(h) sum_k rho_k (D_k - D_0) / r_k of the step from point i, D its x_0 and older ones; D_next that of x'.

    rho solves sum_k rho_k r_k^j = b_j, the integrals that make the step exact for polynomials (equation 9).
    """
    here, to = path[i], path[i + 1]
    h = to.lam - here.lam
    nodes = [(path[i - k].lam - here.lam) / h for k in range(1, len(D))]
    differences = [(d - D[0]) / r for d, r in zip(D[1:], nodes, strict=True)]
    if D_next is not None:
        nodes, differences = [*nodes, 1.0], [*differences, D_next - D[0]]
    if not nodes:
        return 0.0
    B = -h if solver == "bh1" else math.expm1(-h)
    if len(nodes) == 1:
        rho = [0.5]
    else:
        phi, factorial, b = math.expm1(-h) / -h - 1, 1, []
        for k in range(1, len(nodes) + 1):
            b.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(np.vander(nodes, increasing=True).T, b)
    return -to.alpha * B * sum(w * d for w, d in zip(rho, differences, strict=True))
