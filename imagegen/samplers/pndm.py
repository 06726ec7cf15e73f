"""Pseudo numerical methods: a linear multistep rule averages epsilons, DDIM's formula takes the step."""

from .table import Table

ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(path, *, warmup="repeat"):
    """Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", 2022: equation 12 steps x with the
    Adams-Bashforth average of four epsilons.

    warmup: "repeat" takes the first step twice, the second time with the mean epsilon of its ends (n + 1 evaluations);
    "runge_kutta" takes three steps of four evaluations each (equation 13; 5 slots, at least 4 steps).
    """
    if warmup not in ("repeat", "runge_kutta"):
        raise ValueError(f"pndm: warmup must be repeat or runge_kutta, got {warmup!r}")
    if warmup == "runge_kutta":
        return _pndm_with_runge_kutta(path)
    table = Table(path, slots=3)
    jumps = path.jumps()
    for i, (here, to) in enumerate(jumps):
        epsilons, slot = table.ring(i)
        epsilons = [_epsilon(table, here), *epsilons]
        x_next = _transfer(table, here, to, table.x, _adams_bashforth(min(i, 3) + 1, epsilons))
        table.add(here, x_next, to, epsilons[0], slot)
        if i == 0 and path.n > 1:
            x, again = _undo(table, here, to, table.h[slot]), path[1]
            # The same step; in diffusers the one that leads to the second time, from a stride above it.
            begin, end = (path.at(again.t + path.stride), again) if path.stride else (here, to)
            mean = (_epsilon(table, again) + table.h[slot]) / 2
            table.add(again, _transfer(table, begin, end, x, mean), end)
    return table


def _pndm_with_runge_kutta(path):
    if path.n < 4:
        raise ValueError(f"pndm: warmup 'runge_kutta' needs at least 4 steps, got {path.n}")
    table = Table(path, slots=5)
    for i, (here, to) in enumerate(path.jumps()):
        epsilons, slot = table.ring(i, 3)
        e1, e2, e3, epsilon = table.h[slot], table.h[3], table.h[4], _epsilon(table, here)
        if i >= 3:
            average = _adams_bashforth(4, [epsilon, *epsilons])
            table.add(here, _transfer(table, here, to, table.x, average), to, epsilon, slot)
            continue
        to = path[i + 1]
        middle = landing = path.at((here.t + to.t) // 2)
        if path.stride:
            middle, landing = path.at(to.t + path.stride // 2), path.at(here.t - path.stride // 2)
        table.add(here, _transfer(table, here, landing, table.x, epsilon), landing, epsilon, slot)
        x, epsilon = _undo(table, here, landing, e1), _epsilon(table, middle)
        table.add(middle, _transfer(table, here, middle, x, epsilon), middle, epsilon, 3)
        x = _undo(table, here, middle, e2)
        table.add(middle, _transfer(table, here, to, x, epsilon), to, epsilon, 4)
        x, average = _undo(table, here, to, e3), (e1 + 2 * e2 + 2 * e3 + _epsilon(table, to)) / 6
        table.add(to, _transfer(table, here, to, x, average), to)
    return table


def ipndm(path, *, order=4):
    """Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2023, improved PNDM: the average
    grows from one epsilon to `order` of them in place of a warm-up."""
    if order not in (1, 2, 3, 4):
        raise ValueError(f"ipndm: order must be 1, 2, 3 or 4, got {order}")
    table = Table(path, slots=order - 1)
    for i, (here, to) in enumerate(path.jumps()):
        epsilons, slot = table.ring(i)
        epsilons = [table.epsilon(here), *epsilons]
        p = min(i + 1, order)
        average = _adams_bashforth(p, epsilons)
        if path.compat:  # diffusers loses x_0 at alpha = 0, its first point
            x0 = (table.x - here.sigma * average) / max(here.alpha, 1e-8)
        else:
            x0 = table.x0 if p == 1 else (table.x - here.sigma * average) / here.alpha
        table.add(here, to.alpha * x0 + to.sigma * average, to, epsilons[0], slot)
    return table


def _adams_bashforth(order, epsilons):
    return sum(c * e for c, e in zip(ADAMS_BASHFORTH[order - 1], epsilons, strict=False))


def _epsilon(table, here):
    """What is averaged; diffusers takes the model's raw output even where that is v."""
    raw = table.path.compat and table.path.prediction == "v"
    return table.m if raw else table.epsilon(here)


def _transfer(table, here, to, x, epsilon):
    c_x, c_e = _coefficients(table.path, here, to)
    return c_x * x + c_e * epsilon


def _undo(table, here, to, epsilon):
    """The x that _transfer made the present x from."""
    c_x, c_e = _coefficients(table.path, here, to)
    return (table.x - c_e * epsilon) / c_x


def _coefficients(path, here, to):
    """(c_x, c_e) of x' = alpha' (x - sigma epsilon) / alpha + sigma' epsilon."""
    if here.alpha == 0:
        raise ValueError(
            f"pndm: can't start at t = {here.t:g}, where the schedule has zero SNR; take spacing 'leading'"
        )
    c_x, c_e = to.alpha / here.alpha, to.sigma - to.alpha * here.sigma / here.alpha
    if path.compat and path.prediction == "v":
        return c_x + c_e * here.sigma, c_e * here.alpha
    return c_x, c_e
