"""Four samplers in fifty digits, straight from their papers: who is right where two runs in double differ.

Beginning, noise, noise levels and times are the doubles that both runs begin with, taken as exact.
"""

import inspect
import math

import diffusers_oracle as oracle
import numpy as np
import torch
from mpmath import mp, mpf

mp.dps = 50
_exact = np.vectorize(mpf, otypes=[object])
_sin = np.vectorize(mp.sin, otypes=[object])


def trajectory(sampler, options):
    """x after every evaluation (N, …), rounded to double in the end alone; None where the options are not covered."""
    steps = _STEPS.get(sampler.name)
    taken = {key: options[key] for key in _OPTIONS if key in options}
    if steps is None or not taken.keys() <= set(inspect.signature(steps).parameters):
        return None
    x = _exact(oracle.X.numpy()) * mpf(sampler.init_sigma)
    return torch.from_numpy(np.stack([np.float64(x) for x in steps(sampler, x, **taken)]))


def _model(x, point):
    shifted = mpf(1.7) * np.roll(x, 1, -1) + _exact(oracle.B.numpy()) + mpf(point.t / 300)
    return mpf(0.75) * x + mpf(0.3) * _sin(shifted)


def _x0(sampler, point, x):
    alpha, sigma = mpf(point.alpha), mpf(point.sigma)
    m = _model(mpf(point.scale) * x, point)
    if sampler.path.prediction == "sample":
        x0 = m
    elif sampler.path.prediction == "v":  # of x / length, whose alpha and sigma lie on the circle
        length = mp.hypot(alpha, sigma)
        x0 = (alpha * x / length - sigma * m) / length
    else:
        x0 = (x - sigma * m) / alpha
    if sampler.threshold is not None:
        return np.stack([_thresholded(image, sampler) for image in x0])
    return x0 if sampler.clip is None else np.clip(x0, -mpf(sampler.clip), mpf(sampler.clip))


def _thresholded(x0, sampler):
    ordered, rank = np.sort(abs(x0), axis=None), mpf(sampler.threshold) * (x0.size - 1)
    low, part = ordered[int(rank)], rank - int(rank)
    s = low + part * (ordered[min(int(rank) + 1, x0.size - 1)] - low)
    s = min(max(s, mpf(1)), mpf(sampler.clip))
    return np.clip(x0, -s, s) / s


def _ddim(sampler, x, eta, clipped_epsilon):
    """Song et al., 2021, equations 12 and 16."""
    for i, (here, to) in enumerate(sampler.path.jumps()):
        alpha, sigma = mpf(here.alpha), mp.sqrt(1 - mpf(here.alpha) ** 2)
        alpha_to, sigma_to = mpf(to.alpha), mp.sqrt(1 - mpf(to.alpha) ** 2)
        x0 = _x0(sampler, here, x)
        std = mpf(eta) * sigma_to / sigma * mp.sqrt(1 - (alpha / alpha_to) ** 2)
        kept = mp.sqrt(max(0, sigma_to**2 - std**2))
        assert clipped_epsilon
        x = alpha_to * x0 + kept * (x - alpha * x0) / sigma + std * _exact(oracle.NOISE[i].numpy())
        yield x


def _heun(sampler, x):
    """Karras et al., 2022, algorithm 2."""
    for here, to in sampler.path.jumps():
        step = mpf(to.sigma) - mpf(here.sigma)
        slope = (x - _x0(sampler, here, x)) / mpf(here.sigma)
        yield x + step * slope
        if to.sigma:
            x_1 = x + step * slope
            x = x + step * (slope + (x_1 - _x0(sampler, to, x_1)) / mpf(to.sigma)) / 2
            yield x


def _deis(sampler, x, order, lower_order_final):
    """Zhang & Chen, 2023, log-rho variant."""
    epsilons, path = [], sampler.path
    for i, (here, to) in enumerate(path.jumps()):
        epsilons = [(x - mpf(here.alpha) * _x0(sampler, here, x)) / mpf(here.sigma), *epsilons]
        nodes = [
            _log_rho(path[i - j]) for j in range(path.order_at(i, order, settles_below=15 if lower_order_final else 0))
        ]
        change = sum(_weight(nodes, j, _log_rho(here), _log_rho(to)) * epsilons[j] for j in range(len(nodes)))
        x = mpf(to.alpha) * (x / mpf(here.alpha) + change)
        yield x


def _sa_solver(sampler, x, order, corrector_order):
    """Xue et al., 2023, algorithm 1 on x_0: each step predicts from the corrected x and corrects with its own noise."""
    path, x0s, before = sampler.path, [], None
    for i, (here, to) in enumerate(path.jumps()):
        x0s = [_x0(sampler, here, x), *x0s]
        if before is not None:
            x = before + _sa_gradient(path, i - 1, i, x0s[: path.known_at(i, min(corrector_order, path.n - i + 2))])
        tau = _tau(here)
        kept = mp.exp(-(tau**2) * (_lam(to) - _lam(here)))  # of what x holds beside x_0, where x_0 is known
        noise = _exact(oracle.NOISE[i].numpy())
        before = kept * mpf(to.sigma) / mpf(here.sigma) * x + mpf(to.sigma) * mp.sqrt(1 - kept**2) * noise
        x = before + _sa_gradient(path, i, i, x0s[: path.order_at(i, order, settles_below=math.inf)])
        yield x


def _sa_gradient(path, i, newest, x0s):
    """(1 + tau^2) alpha' sum_j x_0j integral of e^((1 + tau^2)(l - lambda')) L_j(l) dl over step i, where x0s are those
    of the points newest, newest - 1, …; in that of u = (1 + tau^2)(l - lambda') the factor before the sum is alpha'."""
    here, to = path[i], path[i + 1]
    k, h = 1 + _tau(here) ** 2, _lam(to) - _lam(here)
    nodes = [k * (_lam(path[newest - j]) - _lam(to)) for j in range(len(x0s))]
    weights = [_weight(nodes, j, -k * h, mpf(0)) for j in range(len(x0s))]
    if len(x0s) == 2:  # "does not influence the order": h^2/2 for the second moment, as their code has it
        fix = k**2 * h**2 / 2 - (k * h - 1 + mp.exp(-k * h))
        weights = [weights[0] + fix / (nodes[0] - nodes[1]), weights[1] - fix / (nodes[0] - nodes[1])]
    return mpf(to.alpha) * sum(w * x0 for w, x0 in zip(weights, x0s, strict=True))


def _tau(point):
    return mpf(1 if 200 <= point.t <= 800 else 0)


def _lam(point):
    return -_log_rho(point)


def _log_rho(point):
    return mp.log(mpf(point.sigma) / mpf(point.alpha))


def _weight(nodes, j, start, end):
    """The integral of prod_{k != j} (u - u_k) / (u_j - u_k) e^u from start to end: that of u^k e^u by parts."""
    polynomial = [mpf(1)]  # lowest power first
    for k, node in enumerate(nodes):
        if k != j:
            raised, lowered = [mpf(0), *polynomial], [-node * c for c in polynomial] + [mpf(0)]
            polynomial = [(a + b) / (nodes[j] - node) for a, b in zip(raised, lowered, strict=True)]

    def antiderivative(u):
        return mp.exp(u) * sum(
            c * sum((-1) ** (k - i) * math.perm(k, k - i) * u**i for i in range(k + 1))
            for k, c in enumerate(polynomial)
        )

    return antiderivative(end) - antiderivative(start)


_OPTIONS = ("eta", "clipped_epsilon", "order", "corrector_order", "lower_order_final", "churn")
_STEPS = {"ddim": _ddim, "heun": _heun, "deis": _deis, "sa_solver": _sa_solver}
