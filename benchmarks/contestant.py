"""One provider in one memory layout: its tensors, the call that is timed, and its error."""

import dataclasses
import os
import time
from functools import lru_cache

import torch

from imagegen.ops import _backend

from . import suite
from .environment import without_paths

# On a GPU each backend has a row of its own beside the one of what is chosen: provider -> backend.
BACKENDS = {"imagegen-cuda": "cuda", "imagegen-triton": "triton"}
TIMES_EAGER = 3  # in reduced precision a result may have this many times eager's own error


class Contestant:
    """A provider on the case's inputs in one layout; `call()` is what gets timed."""

    def __init__(self, bench, case, provider, layout):
        self.bench, self.case, self.name, self.layout = bench, case, provider, layout
        self.errors, self.failure, self.passed, self.first_call_s = {}, None, False, None
        way = implementation(bench, provider)
        self.run, self.training, self.without = way.run, case.direction != "forward", way.without
        self.inputs = lay_out(make_tensors(bench, case, way.without), layout)
        if self.training:
            for name in bench.GRADIENTS:
                self.inputs[name].requires_grad_()
        self.prepared = lay_out(way.prepare(self.inputs), layout)
        self.leaves = {k: v.detach().requires_grad_(k in self._asked()) for k, v in self.prepared.items()}
        self.dy = None

    def _asked(self):
        return self.bench.GRADIENTS if self.training else ()

    def call(self):
        """One forward, or one forward and backward: y and the gradients of the prepared inputs."""
        if not self.training:
            with torch.no_grad():
                return (self._y(),)
        y = self._y()
        return y, *torch.autograd.grad(y, [self.leaves[name] for name in self._asked()], self.dy)

    def _y(self):
        """What comes after y is made as well, and must not be left out by a compiler: y alone is looked at."""
        made = self.run(**self.leaves)
        return made[0] if isinstance(made, tuple) else made

    def before(self):
        """Touch the weights as an optimiser would: transformed weights kept from the last call are out of date."""
        if self.training:
            with torch.no_grad():
                for name in self._asked():
                    if name != "x":
                        self.leaves[name].mul_(1)

    def check(self):
        """Call once and note the error of y and of every gradient, or why there is none."""
        try:
            exact = reference(self.case, self.without)
            if self.training:
                self.dy = lay_out({"dy": exact["dy"].to(suite.DTYPES[self.case.dtype])}, self.layout)["dy"]
            start = time.perf_counter()
            y, *gradients = self.call()
            self.first_call_s = time.perf_counter() - start
            results = {"y": y, **self._pull_back(gradients)}
            self.errors = {name: relative_error(value, exact[name]) for name, value in results.items()}
        except Exception as error:  # whatever a provider raises is a row of the table, not the end of the run
            self.failure = without_paths(f"{type(error).__name__}: {error}".partition("\n")[0])[:300]

    def _pull_back(self, gradients):
        """Gradients of the prepared tensors -> gradients of the inputs they were made from."""
        if not self.training:
            return {}
        outputs = [self.prepared[name] for name in self._asked()]
        inputs = [self.inputs[name] for name in self._asked()]
        return {f"d{n}": g for n, g in zip(self._asked(), torch.autograd.grad(outputs, inputs, gradients), strict=True)}

    def judge(self, eager):
        """Passed if no error is above its tolerance; `eager` is the plain provider in the same layout."""
        self.passed = bool(self.errors) and all(
            error <= tolerance(self.bench, self.case.dtype, eager.errors.get(name))
            for name, error in self.errors.items()
        )


def tolerance(bench, dtype, eager_error):
    """Relative L2 error allowed: the file's own number in float32, a multiple of eager's below that."""
    if dtype == "float32":
        return bench.TOLERANCE
    return TIMES_EAGER * eager_error if eager_error is not None else -1.0


def line_up(bench, case, names, layouts=tuple(suite.LAYOUTS)):
    return [
        Contestant(bench, case, name, layout)
        for name in names
        for layout in bench.LAYOUTS
        if layout in layouts and layout in implementation(bench, name).layouts
        if _has_what_it_leaves_out(bench, case, implementation(bench, name).without)
    ]


def _has_what_it_leaves_out(bench, case, without):
    return without is None or without in make_tensors(bench, case)


def implementation(bench, provider):
    if provider in bench.PROVIDERS:
        return bench.PROVIDERS[provider]
    if provider in BACKENDS:
        ours = bench.PROVIDERS["imagegen"]
        return dataclasses.replace(ours, run=_with_backend(BACKENDS[provider], ours.run))
    eager = bench.PROVIDERS["eager"]
    compiled = torch.compile(eager.run, dynamic=False, fullgraph=True, mode=compile_mode())
    return suite.Provider(compiled, eager.prepare, warm_up=True)


def compile_mode():
    """On GPUs the strongest of torch.compile's modes that takes its inputs where they are: CUDA graphs copy them."""
    return "max-autotune-no-cudagraphs" if torch.cuda.is_available() else None


def _with_backend(name, run):
    def call(**tensors):
        before, _backend.forced = _backend.forced, name
        try:
            return run(**tensors)
        finally:
            _backend.forced = before

    return call


def make_tensors(bench, case, without=None):
    """The case's inputs: the same numbers for every provider, rounded to the dtype."""
    torch.manual_seed(0)
    tensors = bench.make_inputs(case.shape)
    return {name: t.to(case.device, suite.DTYPES[case.dtype]) for name, t in tensors.items() if name != without}


def lay_out(tensors, layout):
    """The same values with every 4-dimensional tensor in this memory format."""
    memory_format = suite.LAYOUTS[layout]
    return {k: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for k, t in tensors.items()}


def reference(case, without=None):
    """y, dy and the gradients of the case in float64, on its already rounded inputs, computed with every core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    try:
        return _reference(dataclasses.replace(case, threads=0), without)
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=2)  # with an input and without
def _reference(case, without):
    bench = suite.load(case.suite, case.op)
    inputs = {name: t.double() for name, t in make_tensors(bench, case, without).items()}
    if case.direction == "forward":
        with torch.no_grad():
            return {"y": bench.reference(**inputs)}
    asked = [inputs[name].requires_grad_() for name in bench.GRADIENTS]
    y = bench.reference(**inputs)
    dy = torch.randn(y.shape, device=case.device).to(suite.DTYPES[case.dtype]).double()
    if hasattr(bench, "at_kink"):
        with torch.no_grad():
            dy[bench.at_kink(**inputs)] = 0
    gradients = torch.autograd.grad(y, asked, dy)
    return {"y": y.detach(), "dy": dy, **{f"d{n}": g for n, g in zip(bench.GRADIENTS, gradients, strict=True)}}


def relative_error(value, exact):
    """L2 norm of the difference over that of the reference; a wrong shape and a NaN are errors of their own."""
    if value.shape != exact.shape:
        raise ValueError(f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}")
    if not value.isfinite().all():
        raise ValueError("the result has NaN or infinite values")
    return ((value.detach().double() - exact).norm() / exact.norm()).item()
