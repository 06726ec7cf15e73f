"""What a benchmark file says, and how the files are found.

`benchmarks/<suite>/bench_<op>.py` is found by its name and holds

    SHAPES, QUICK_SHAPES, TINY_SHAPE   tuples of sizes; the quick ones are for demonstrations, the tiny one warms up
    DTYPES, LAYOUTS, DIRECTIONS        what to run, from the names below
    GRADIENTS                          the inputs whose gradients `forward+backward` asks for
    TOLERANCE                          relative L2 error allowed in float32; see `runner.tolerance` for the others
    NOTE                               one sentence for the report: how FLOP and bytes are counted
    label(shape)                       the shape as people read it
    make_inputs(shape)                 name -> float32 tensor
    PROVIDERS                          name -> Provider; `imagegen` and `eager` always, `compile` where torch.compile of
                                       `eager` is not what it should be, any other name is a peer
    reference(**inputs)                the op on float64 inputs
    flops(shape), flops_made(shape, provider)   of one forward: the plain count, and what the provider really does
    bytes_moved(shape, itemsize, direction)     what has to move at least
    at_kink(**inputs)                  where it has one: outputs so near to it that rounding decides on their
                                       gradient, which is therefore not asked for
    CUDA_SHAPES, CUDA_DTYPES           where a GPU runs others
    OUTPUTS                            where it writes more than y: how many times y's bytes at most
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SUITES = ("ops", "end_to_end")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = {"forward": 1, "forward+backward": 3}  # and how many forwards their FLOP count as


def as_they_are(tensors):
    return tensors


@dataclass(frozen=True)
class Provider:
    """One way to compute an op: `run(**tensors)` is timed, `prepare(tensors)` comes once before the clock starts.

    `layouts` are those it runs in, where it does not run in all, and `devices` likewise; one that needs to `warm_up`
    compiles in its first call, which takes memory that is not the model's. One that goes `without` an input is there
    where the input is, held against the op without it: what the input costs.
    """

    run: Callable
    prepare: Callable = as_they_are
    layouts: tuple = tuple(LAYOUTS)
    devices: tuple = ("cpu", "cuda")
    warm_up: bool = False
    without: str | None = None


@dataclass(frozen=True)
class Case:
    """What the providers of an op are compared on: all of them run interleaved."""

    suite: str
    op: str
    shape: tuple
    dtype: str
    direction: str
    threads: int
    device: str

    def __str__(self):
        return f"{self.op} {load(self.suite, self.op).label(self.shape)} {self.dtype} {self.direction}"


def find(suite):
    """The names of the ops that have a benchmark in `suite`."""
    files = (Path(__file__).parent / suite).glob("bench_*.py")
    return sorted(file.stem.removeprefix("bench_") for file in files)


def load(suite, op):
    return importlib.import_module(f"benchmarks.{suite}.bench_{op}")


def cases(suites, *, words=(), device="cpu", threads=(1,), quick=False):
    """Every case whose description contains all the words; thread counts innermost, so that a reference is kept."""
    for suite in suites:
        for op in find(suite):
            bench = load(suite, op)
            for case in _cases_of(bench, suite, op, device, threads, quick):
                if all(word in str(case) for word in words):
                    yield case


def shapes_and_dtypes(bench, device):
    if device == "cuda":
        return getattr(bench, "CUDA_SHAPES", bench.SHAPES), getattr(bench, "CUDA_DTYPES", bench.DTYPES)
    return bench.SHAPES, bench.DTYPES


def _cases_of(bench, suite, op, device, threads, quick):
    shapes, dtypes = shapes_and_dtypes(bench, device)
    for shape in bench.QUICK_SHAPES if quick else shapes:
        for dtype in dtypes[:1] if quick else dtypes:
            for direction in bench.DIRECTIONS:
                for n in threads:
                    yield Case(suite, op, tuple(shape), dtype, direction, n, device)
