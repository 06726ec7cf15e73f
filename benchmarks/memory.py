"""Peak memory one forward takes beyond its inputs and its output.

On the CPU this is the resident set of a fresh process, since kernels may allocate outside torch: nothing is left
over from other calls, so workspaces kept for the next call count too. Transformed weights that stay in memory until the
weight changes are told apart: they belong to the model as its weights do. Linux only.
The kernel counts pages in batches; differences below a quarter of a MiB mean nothing.
"""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from imagegen import weight_cache

from . import suite
from .contestant import Contestant, implementation

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel takes in clear_refs to set the peak to the present
# Freed blocks go back to the system at once, and large ones never come from a heap that is resident already.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def peak_extra(case, provider, layout):
    """(bytes that come and go, bytes of transformed weights that stay); None where this system cannot tell."""
    if case.device == "cuda":
        return _cuda_peak(case, provider, layout), 0
    if not CLEAR_REFS.exists():
        return None, None
    question = json.dumps([dataclasses.asdict(case), provider, layout])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", question],
        env={**os.environ, **MALLOC},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else (None, None)


def _cpu_peak(case, provider, layout):
    torch.set_num_threads(case.threads)
    bench = suite.load(case.suite, case.op)
    Contestant(bench, dataclasses.replace(case, shape=bench.TINY_SHAPE), provider, layout).call()  # code pages, threads
    contestant = Contestant(bench, case, provider, layout)
    if implementation(bench, provider).warm_up:
        contestant.call()
    _give_back_free_memory()
    resident, code, kept = _status("VmRSS"), _status("RssFile"), weight_cache.size()
    CLEAR_REFS.write_text(RESET_PEAK)
    (y,) = contestant.call()
    code = _status("RssFile") - code  # pages of libraries first used now: not the kernel's memory
    kept = weight_cache.size() - kept
    return max(0, _status("VmHWM") - resident - code - y.untyped_storage().nbytes() - kept), kept


def _give_back_free_memory():
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status(field):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _cuda_peak(case, provider, layout):
    contestant = Contestant(suite.load(case.suite, case.op), case, provider, layout)
    contestant.call()  # library handles and compiled code
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (y,) = contestant.call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - y.untyped_storage().nbytes()


def _answer(question):
    fields, provider, layout = json.loads(question)
    case = suite.Case(**{**fields, "shape": tuple(fields["shape"])})
    print(json.dumps(_cpu_peak(case, provider, layout)))


if __name__ == "__main__":
    _answer(sys.argv[1])
