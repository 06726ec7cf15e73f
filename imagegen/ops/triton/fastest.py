"""Which of several tiles is the fastest: timed on the GPU at a class's first call, remembered until the process ends.

Not triton.autotune: that cannot be told to time nothing while a graph is captured or where results have to repeat.
"""

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

_chosen = {}


def launch_fastest(calls, candidates, launch):
    """launch(tile) with the fastest candidate for `calls`, a name of calls like this one.

    launch writes the same whatever the tile and however often, but for the last bits. So under
    torch.use_deterministic_algorithms the first candidate runs, the same in every process; and so it does while a CUDA
    graph is captured that no call came before, since nothing can be timed then.
    """
    several = len(candidates) > 1 and not torch.are_deterministic_algorithms_enabled()
    if several and calls not in _chosen and not torch.cuda.is_current_stream_capturing():
        _chosen[calls] = _fastest(candidates, launch)
    launch(_chosen.get(calls, candidates[0]) if several else candidates[0])


def _fastest(candidates, launch):
    milliseconds = {}
    for tile in candidates:
        try:
            milliseconds[tile] = triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20, return_mode="median")  # noqa: B023
        except (OutOfResources, PTXASError):  # this GPU has less than the candidate wants
            continue
    return min(milliseconds, key=milliseconds.get, default=candidates[0])
