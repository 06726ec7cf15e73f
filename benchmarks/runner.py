"""Runs cases: verify every provider, time those that ran, compare those that passed."""

import torch

from imagegen.ops import _backend

from . import contestant, environment, memory, roofline, suite, timing
from .hush import hushed

FORMAT = 1


def run(
    cases,
    on_case,
    *,
    device="cpu",
    threads=(1,),
    seconds=0.5,
    rounds=timing.MIN_ROUNDS,
    skip=(),
    layouts=tuple(suite.LAYOUTS),
    memory_of=(),
    hush=None,
):
    """Everything measured, ready for JSON; on_case sees the rows of each case as they come.

    The memory of the providers `memory_of` is measured at the first number of threads. The roofline is measured before
    and after, and the better one counts. `hush` is a command that runs while something is timed: see `hush.hushed`.
    """
    with hushed(hush):
        roofs = {n: roofline.measure(device, n) for n in threads}
    result = {
        "format": FORMAT,
        "environment": environment.describe(device),
        "options": {
            "device": device,
            "threads": list(threads),
            "seconds": seconds,
            "rounds": rounds,
            "skip": list(skip),
        },
        "roofline": {str(n): roof for n, roof in roofs.items()},
        "notes": {},
        "rows": [],
    }
    for case in cases:
        result["notes"][case.op] = suite.load(case.suite, case.op).NOTE
        whose = memory_of if case.threads == threads[0] else ()
        rows = run_case(case, seconds=seconds, rounds=rounds, skip=skip, layouts=layouts, memory_of=whose, hush=hush)
        place_under_roof(rows, result["roofline"])
        result["rows"] += rows
        on_case(result, rows)
    with hushed(hush):
        result["roofline"] = {str(n): roofline.higher(roof, roofline.measure(device, n)) for n, roof in roofs.items()}
    place_under_roof(result["rows"], result["roofline"])
    return result


def place_under_roof(rows, roofs):
    """Fill in the share of the roofline of the rows that have a time."""
    for row in rows:
        if "median_ms" in row:
            roof, seconds = roofs[str(row["threads"])], row["median_ms"] / 1e3
            share, bound = roofline.fraction(roof, row["dtype"], row["flop_made"], row["bytes"], seconds)
            row["roofline_fraction"], row["bound"] = _short(share), bound


def merge(old, new):
    """The new result with what the old one has besides: cases not run again, roofs that were higher."""
    again = {_case(row) for row in new["rows"]}
    roofs = {n: roofline.higher(roof, new["roofline"].get(n, roof)) for n, roof in old["roofline"].items()}
    options = {**new["options"], "threads": sorted({*old["options"]["threads"], *new["options"]["threads"]})}
    merged = {
        **new,
        "options": options,
        "roofline": {**new["roofline"], **roofs},
        "notes": {**old["notes"], **new["notes"]},
        "rows": [row for row in old["rows"] if _case(row) not in again] + new["rows"],
    }
    place_under_roof(merged["rows"], merged["roofline"])
    return merged


def run_case(
    case, *, seconds, rounds=timing.MIN_ROUNDS, skip=(), layouts=tuple(suite.LAYOUTS), memory_of=(), hush=None
):
    """One row for every provider in every layout."""
    torch.set_num_threads(case.threads)
    bench = suite.load(case.suite, case.op)
    names = [name for name in [*provider_names(bench, case.device), *own_backends(case)] if name not in skip]
    if "compile" in names:
        _forget_compiled()
    contestants = contestant.line_up(bench, case, names, layouts)
    verify(contestants)
    measured = [c for c in contestants if c.failure is None]
    with hushed(hush):
        times = timing.interleave(measured, seconds, rounds=rounds, measure=timing.stopwatch(case.device))
    times = dict(zip(measured, times, strict=True))
    rows = [{**_row(c, times.get(c)), "speedup": speedups(c, times)} for c in contestants]
    for row in rows:
        if row["provider"] in memory_of and row["failure"] is None and case.direction == "forward":
            row["extra_bytes"], row["kept_bytes"] = memory.peak_extra(case, row["provider"], row["layout"])
    return rows


def provider_names(bench, device="cpu"):
    """imagegen, eager, compile, then the peers."""
    own = [name for name, provider in bench.PROVIDERS.items() if device in provider.devices]
    return own if "compile" in own else [*own[:2], "compile", *own[2:]]


def own_backends(case):
    """The providers that are one backend of ours each: on a GPU, where several take the same tensors."""
    if (case.suite, case.device) != ("ops", "cuda"):
        return []
    implemented = _backend.implementations(case.op)
    return [provider for provider, name in contestant.BACKENDS.items() if name in implemented]


def _forget_compiled():
    """Inductor bakes the thread count in, and dynamo goes over to dynamic shapes at the second one it meets."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of compilers beside the timings
    torch._dynamo.reset()


def verify(contestants):
    eager = {}
    for c in contestants:
        c.check()
        if c.name == "eager":
            eager[c.layout] = c
    for c in contestants:
        c.judge(eager[c.layout])


def speedups(ours, times):
    """How many times faster than each other provider in its better layout; nothing unless both passed their check."""
    if not ours.passed:
        return {}
    found = {}
    for name in dict.fromkeys(c.name for c in times if c.name != ours.name):
        rivals = [c for c in times if c.name == name and c.passed]
        if rivals:
            best = min(rivals, key=lambda c: timing.median(times[c]))
            found[name] = {"ratio": _short(timing.ratio(times[best], times[ours])), "layout": best.layout}
    return found


def _case(row):
    return tuple(str(row[field]) for field in ("suite", "op", "shape", "dtype", "direction", "threads", "device"))


def _row(c, times):
    case, bench = c.case, c.bench
    passes = suite.DIRECTIONS[case.direction]
    row = {
        "suite": case.suite,
        "op": case.op,
        "shape": list(case.shape),
        "label": bench.label(case.shape),
        "dtype": case.dtype,
        "layout": c.layout,
        "direction": case.direction,
        "threads": case.threads,
        "device": case.device,
        "provider": c.name,
        "without": c.without,
        "passed": c.passed,
        "error": _short(max(c.errors.values(), default=None)),
        "errors": {name: _short(error) for name, error in c.errors.items()},
        "failure": c.failure,
        "flop": passes * bench.flops(case.shape),
        "flop_made": passes * bench.flops_made(case.shape, _maker(c)),
        "bytes": bench.bytes_moved(case.shape, suite.DTYPES[case.dtype].itemsize, case.direction),
        "extra_bytes": None,
        "kept_bytes": None,
    }
    if times:
        seconds = timing.median(times)
        row["median_ms"] = _short(1e3 * seconds)
        row["p20_ms"], row["p80_ms"] = (_short(1e3 * timing.quantile(times, q)) for q in (0.2, 0.8))
        row["rounds"] = len(times)
        row["first_call_s"] = _short(c.first_call_s)
    return row


def _maker(c):
    """The provider whose multiplications these are: on a GPU ours are the cuda backend's."""
    return "imagegen-cuda" if (c.case.device, c.name) == ("cuda", "imagegen") else c.name


def _short(value):
    """Four digits are more than the machine repeats."""
    return None if value is None else float(f"{value:.4g}")
