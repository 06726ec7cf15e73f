"""A Gaussian target, N(MEAN, STD^2): the best model is affine in x, so every table maps moments to moments exactly."""

import numpy as np

from imagegen import samplers
from imagegen.samplers.schedule import AngularSchedule, EDMSchedule, FlowSchedule

MEAN, STD = 0.3, 0.5


def level(schedule, t):
    """(alpha, sigma) at the time t that the model is told."""
    if isinstance(schedule, EDMSchedule):
        return 1.0, np.exp(4 * t)
    if isinstance(schedule, FlowSchedule):
        return 1 - t / schedule.steps, t / schedule.steps
    if isinstance(schedule, AngularSchedule):
        return np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)
    return schedule.alpha[int(t)], schedule.sigma[int(t)]


def best_model(schedule, prediction, t):
    """(gain, offset): E[prediction | x_t] = gain x_t + offset. (EDM's network sees c_in x_t; that is left out here.)"""
    alpha, sigma = level(schedule, t)
    variance = alpha**2 * STD**2 + sigma**2
    x0 = np.array([alpha * STD**2 / variance, MEAN * sigma**2 / variance])
    epsilon = np.array([sigma / variance, -alpha * sigma * MEAN / variance])
    if prediction == "edm":
        c_skip = schedule.sigma_data**2 / (sigma**2 + schedule.sigma_data**2)
        c_out = sigma * schedule.sigma_data / np.hypot(sigma, schedule.sigma_data)
        return (x0 - [c_skip, 0]) / c_out
    return {"epsilon": epsilon, "sample": x0, "flow": epsilon - x0, "v": alpha * epsilon - sigma * x0}[prediction]


def model(schedule, prediction):
    """model(x, t), the best one."""

    def best(x, t):
        gain, offset = best_model(schedule, prediction, float(t[0]))
        return gain * x + offset

    return best


def moments(sampler, schedule, prediction, mean, std):
    """(mean, standard deviation) of x after the last row, from those before the first: x and the slots are Gaussian."""
    slots = sampler.slots
    mu, covariance = np.zeros(1 + slots), np.zeros((1 + slots, 1 + slots))
    mu[0], covariance[0, 0] = mean, std**2
    scales = np.append(sampler.input_scale, sampler.table[:-1, 1])
    if isinstance(schedule, EDMSchedule):
        scales[:] = 1
    for scale, row in zip(scales, sampler.table, strict=True):
        c = dict(zip(sampler.columns, row, strict=True))
        gain, offset = best_model(schedule, prediction, c["t"]) * [scale, 1]
        x0_gain, x0_offset = c["a_x"] + c["a_m"] * gain, c["a_m"] * offset
        A, b = np.eye(1 + slots), np.zeros(1 + slots)
        A[0] = [c["c_x"] + c["c_0"] * x0_gain + c["c_m"] * gain, *(c[f"c_h{k}"] for k in range(slots))]
        b[0] = c["c_0"] * x0_offset + c["c_m"] * offset
        if c["slot"] >= 0:
            k = 1 + int(c["slot"])
            A[k], A[k, 0] = 0, c["q_x"] + c["q_0"] * x0_gain + c["q_m"] * gain
            b[k] = c["q_0"] * x0_offset + c["q_m"] * offset
        mu, covariance = A @ mu + b, A @ covariance @ A.T
        covariance[0, 0] += c["c_n"] ** 2
    return mu[0], covariance[0, 0] ** 0.5


def error(name, schedule, prediction, steps, **options):
    """How far a sampler misses the marginal where it ends, started from the marginal where it starts."""
    sampler = samplers.create(name, schedule, steps=steps, prediction=prediction, **options)
    (alpha, sigma), (alpha_end, sigma_end) = sampler.start, sampler.table[-1][-2:]
    mean, std = moments(sampler, schedule, prediction, alpha * MEAN, np.hypot(alpha * STD, sigma))
    return abs(mean - alpha_end * MEAN) + abs(std - np.hypot(alpha_end * STD, sigma_end))
