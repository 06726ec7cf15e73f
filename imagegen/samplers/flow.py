"""Samplers of rectified flows, x = (1 - sigma) x_0 + sigma epsilon, whose velocity is v = epsilon - x_0."""

from .table import Table


def flow_euler(path, *, stochastic=False, noise_scale=1.0):
    """Lipman et al., "Flow Matching for Generative Modeling", 2023; Liu et al., "Flow Straight and Fast", 2023.

    x' = x + (sigma' - sigma) v    or, stochastic,    x' = (1 - sigma') x_0 + sigma' noise
    """
    table = Table(path)
    for here, to in path.jumps():
        if stochastic:
            x_next = to.alpha * table.x0 + noise_scale * to.sigma * table.n
        else:
            x_next = table.x + (to.sigma - here.sigma) * _velocity(table, here)
        table.add(here, x_next, to)
    return table


def flow_heun(path):
    """`flow_euler`, then the step again with the mean velocity of its ends; 2n - 1 evaluations, order 2.

    x_1 = x + (sigma' - sigma) v    x' = x + (sigma' - sigma) (v + v_1) / 2
    """
    table = Table(path, slots=1)
    for i, (here, to) in enumerate(path.jumps()):
        step, v = to.sigma - here.sigma, _velocity(table, here)
        if i == path.n - 1:
            table.add(here, table.x + step * v, to)
            break
        table.add(here, table.x + step * v, to, store=table.x + step / 2 * v)
        table.add_second_stage(to, table.h[0] + step / 2 * _velocity(table, to), to)
    return table


def _velocity(table, here):
    if table.path.prediction == "flow" and not table.path.clipped:
        return table.m
    return (table.x - table.x0) / here.sigma
