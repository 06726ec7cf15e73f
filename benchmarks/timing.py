"""Interleaved timing, and the statistics of it."""

import gc
import math
import time

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 200


def wall_clock(call):
    """Seconds one call takes on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaEvents:
    """Seconds one call takes on the GPU, with a cold L2 cache.

    Clearing the cache keeps the GPU busy while the call is launched, so launch overhead shows only where it is
    longer than that.
    """

    CACHE_BYTES = 256 << 20  # twice the largest L2

    def __init__(self):
        self.cache = torch.empty(self.CACHE_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def stopwatch(device):
    return CudaEvents() if device == "cuda" else wall_clock


def interleave(contestants, seconds, *, rounds=MIN_ROUNDS, measure=wall_clock, clock=time.perf_counter):
    """Times of each contestant, A B C A B C …, so that a noisy moment of the machine hurts all alike.

    A contestant has `before()`, which is not timed, and `call()`, which is. Rounds go on until `seconds` per contestant
    have passed, at least `rounds` and at most MAX_ROUNDS.
    """
    times = [[] for _ in contestants]
    if not contestants:
        return times
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = clock() + seconds * len(contestants)
        while len(times[0]) < rounds or (len(times[0]) < MAX_ROUNDS and clock() < deadline):
            for contestant, own in zip(contestants, times, strict=True):
                contestant.before()
                own.append(measure(contestant.call))
    finally:
        if collecting:
            gc.enable()
    return times


def quantile(values, q):
    """The q-quantile, linear between neighbours."""
    values = sorted(values)
    position = q * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def median(values):
    return quantile(values, 0.5)


def ratio(baseline, ours):
    """How many times faster `ours` is: the median of the ratios of the same round."""
    return median([b / o for b, o in zip(baseline, ours, strict=True)])


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))
