"""What this machine can do at best, measured: multiply-adds per second and bytes copied per second."""

import time

import torch

from . import timing

# On a busy machine only the small products run undisturbed; on many cores only the large ones use them all.
MATRICES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # well past the last-level cache
SECONDS = 0.3


def measure(device, threads):
    """FLOP/s of the best matrix product in each dtype and bytes/s (read plus write) of a large copy."""
    torch.set_num_threads(threads)
    peaks = {name: matmul_peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    # Where bfloat16 products are slow, nothing keeps a kernel from computing in float32.
    peaks["bfloat16"] = max(peaks.values())
    peaks["float16"] = peaks["bfloat16"] if device == "cuda" else peaks["float32"]
    return {"flops_per_s": peaks, "copy_bytes_per_s": copy_bandwidth(device)}


def matmul_peak(dtype, device):
    return max(_matmul_rate(n, dtype, device) for n in MATRICES[device])


def _matmul_rate(n, dtype, device):
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def copy_bandwidth(device):
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES[device] / _best(lambda: target.copy_(source), device)


def _best(call, device):
    """The least time of many, because a roof is what was reached at best."""
    measure_once = timing.stopwatch(device)
    call()
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        times.append(measure_once(call))
    return min(times)


def higher(a, b):
    """The better figure of two measurements of one machine: what was slower had company."""
    peaks = {name: max(flops, b["flops_per_s"][name]) for name, flops in a["flops_per_s"].items()}
    return {"flops_per_s": peaks, "copy_bytes_per_s": max(a["copy_bytes_per_s"], b["copy_bytes_per_s"])}


def fraction(roof, dtype, flop, bytes_moved, seconds):
    """Share of the roofline reached, and which roof it is: "compute" or "memory"."""
    compute = flop / roof["flops_per_s"][dtype]
    memory = bytes_moved / roof["copy_bytes_per_s"]
    return max(compute, memory) / seconds, "compute" if compute > memory else "memory"
