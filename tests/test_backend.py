import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import imagegen
from imagegen import _library
from imagegen.ops import _backend, bias_act

X = torch.zeros(2, 3)


def python(code, **environment):
    """Standard output of code in a fresh process that finds the same imagegen."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    root = Path(imagegen.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def chosen(monkeypatch):
    """choose() with every backend implemented by its own name."""
    monkeypatch.setattr(_backend, "_warned", set())

    def choose(backend=None, implementations=_backend.NAMES):
        return _backend.choose("bias_act", {name: name for name in implementations}, backend, X)

    return choose


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_the_compiled_kernel_is_first_on_cpu(chosen):
    assert chosen() == "cpu"


@pytest.mark.parametrize(
    "backend, reason",
    [
        ("cuda", "it takes cuda tensors, x is on cpu"),
        ("triton", "it takes cuda tensors (or cpu tensors under TRITON_INTERPRET=1), x is on cpu"),
    ],
)
def test_a_backend_asked_for_by_name_never_falls_back(chosen, monkeypatch, backend, reason):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = re.escape(f"bias_act: backend '{backend}' can't run here: {reason}")
    with pytest.raises(RuntimeError, match=message):
        chosen(backend)
    with pytest.raises(RuntimeError, match=message):
        bias_act(X, backend=backend)


def test_a_backend_without_an_implementation_says_so(chosen):
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run here: bias_act has no cpu implementation"):
        chosen("cpu", implementations=["eager"])


def test_triton_that_is_not_installed_says_so(chosen, monkeypatch):
    monkeypatch.setattr(_backend, "_triton_is_installed", False)
    with pytest.raises(RuntimeError, match="triton is not installed: pip install triton"):
        chosen("triton")


def test_triton_takes_cpu_tensors_in_its_interpreter(chosen, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("triton") == "triton"


def test_an_unknown_backend_is_a_value_error(chosen):
    with pytest.raises(ValueError, match="backend must be one of eager, cpu, cuda, triton or None, got 'gpu'"):
        chosen("gpu")


def test_other_devices_run_eager():
    x = torch.zeros(2, 3, device="meta")
    implementations = {name: name for name in _backend.NAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.choose("bias_act", implementations, None, x) == "eager"


def test_a_fallback_warns_once_and_says_why(chosen):
    with pytest.warns(UserWarning, match="bias_act runs in eager PyTorch on cpu.*bias_act has no cpu implementation"):
        assert chosen(implementations=["eager"]) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(implementations=["eager"]) == "eager"


class OnGpu:
    """As much of a CUDA tensor as a choice looks at."""

    is_cpu, is_meta, device = False, False, torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16, requires_grad=False, channels_last=False):
        t = torch.empty(2, 4, 3, 3, device="meta")
        t = t.contiguous(memory_format=torch.channels_last) if channels_last else t
        self.dim, self.size, self.stride, self.is_contiguous = t.dim, t.size, t.stride, t.is_contiguous
        self.dtype, self.requires_grad = dtype, requires_grad


FORWARD = ("bfloat16", "nchw", "forward")


@pytest.fixture
def chosen_on_gpu(monkeypatch):
    """choose() for a tensor on an sm_90 that has every backend, with this table of measurements."""

    def choose(table, flop=1.0, x=None, op="bias_act", declines=None, implementations=_backend.NAMES):
        monkeypatch.setattr(_backend, "FASTEST", table)
        monkeypatch.setattr(_backend, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(_backend, "why_not", lambda op, table, name, device: None if name in table else "absent")
        monkeypatch.setattr(_backend, "_warned", set())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _backend.choose(op, {n: n for n in implementations}, None, x or OnGpu(), declines, lambda: flop)

    return choose


SIZES = ((1e6, ("triton", "cuda", "eager")), (1e9, ("eager", "cuda")), (math.inf, ("cuda", "triton", "eager")))


@pytest.mark.parametrize(
    "flop, backend", [(0, "triton"), (1e6, "triton"), (2e6, "eager"), (1e9, "eager"), (2e9, "cuda"), (1e15, "cuda")]
)
def test_on_a_gpu_the_fastest_as_measured_is_taken(chosen_on_gpu, flop, backend):
    """Eager among them, without a warning: there it is no fallback."""
    assert chosen_on_gpu({"sm_90": {"bias_act": {FORWARD: SIZES}}}, flop) == backend


def test_where_the_fastest_declines_the_next_is_taken(chosen_on_gpu):
    table = {"sm_90": {"bias_act": {FORWARD: SIZES}}}
    assert chosen_on_gpu(table, 1e3, declines=lambda name, x: "no" if name == "triton" else None) == "cuda"
    assert chosen_on_gpu(table, 1e3, implementations=("eager",)) == "eager"


def test_what_was_not_measured_goes_by_the_order_of_preference(chosen_on_gpu):
    triton = ((math.inf, ("triton", "eager")),)
    for table in ({}, {"sm_80": {"bias_act": {FORWARD: triton}}}, {"sm_90": {"attention": {FORWARD: triton}}}):
        assert chosen_on_gpu(table) == "cuda"
    table = {"sm_90": {"bias_act": {FORWARD: triton}}}
    assert chosen_on_gpu(table) == chosen_on_gpu(table, x=OnGpu(torch.float16)) == "triton"
    assert chosen_on_gpu(table, op="bias_act_") == "triton"  # the in-place twin
    for other in (OnGpu(torch.float32), OnGpu(requires_grad=True), OnGpu(channels_last=True)):
        assert chosen_on_gpu(table, x=other) == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else torch.no_grad():
        assert chosen_on_gpu(table, x=OnGpu(requires_grad=True)) == ("cuda" if torch.is_grad_enabled() else "triton")


def test_a_fallback_on_a_gpu_warns_where_nothing_was_measured(chosen_on_gpu):
    with pytest.raises(UserWarning, match="bias_act runs in eager PyTorch on cuda"):
        chosen_on_gpu({}, implementations=("eager",))
    assert chosen_on_gpu({}, op="conv2d", implementations=("eager",)) == "eager"  # where cuDNN convolves


def test_why_an_op_would_run_in_eager():
    def why(op, device, names=()):
        return _backend.why_eager(op, dict.fromkeys(names), device)

    assert why("conv2d", "cuda") is None
    assert why("bias_act", "cuda").startswith("cuda: bias_act has no cuda implementation; triton: ")
    assert why("bias_act", "mps") == "imagegen has no kernels for mps"


def test_a_measured_choice_compiles(monkeypatch):
    """Sizes that change are compared with the limits; a table that is asked leaves no break in the graph."""
    monkeypatch.setattr(_backend, "FASTEST", {"sm_90": {"bias_act": {("float32", "nchw", "forward"): SIZES}}})
    monkeypatch.setattr(_backend, "architecture", lambda device: "sm_90")

    def double(x):
        fastest = _backend._fastest("bias_act", x, 5e5 * x.numel())
        return 2 * x if fastest[0] == "triton" else 3 * x

    compiled = torch.compile(double, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(torch.ones(2)), 2 * torch.ones(2))
    assert torch.equal(compiled(torch.ones(7)), 3 * torch.ones(7))


def test_imagegen_backend_forces_one(chosen, monkeypatch):
    monkeypatch.setattr(_backend, "forced", "eager")
    assert chosen() == "eager"
    code = "import torch, imagegen; from imagegen.ops import _backend; print(_backend.forced); imagegen.info()"
    out = python(code, IMAGEGEN_BACKEND="eager")
    assert out.startswith("eager\n")
    assert "IMAGEGEN_BACKEND=eager is in force" in out


def test_without_the_compiled_library_everything_works_in_eager():
    code = """
import sys, warnings, torch
sys.modules["imagegen._C"] = None  # as if it were not there
import imagegen
x, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = imagegen.ops.bias_act(x, b, act="lrelu")
    imagegen.ops.bias_act(x, b)
y.sum().backward()
assert torch.equal(y, imagegen.ops.bias_act(x, b, act="lrelu", backend="eager"))
try:
    imagegen.ops.bias_act(x, b, backend="cpu")
except RuntimeError as error:
    print(error)
print([str(w.message) for w in caught])
imagegen.info()
"""
    error, warned, *info = python(code).splitlines()
    missing = "the compiled kernels are not there"
    assert error.startswith(f"bias_act: backend 'cpu' can't run here: {missing}")
    assert warned.count("runs in eager PyTorch on cpu, slower than it could") == 1
    assert missing in warned
    assert any(line.startswith(f"{missing}: ") for line in info)
    assert any(re.match(r"  cpu +the compiled kernels are not there", line) for line in info)
    assert "  eager  ready" in info


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_forward_mode_runs_in_eager(monkeypatch):
    monkeypatch.setattr(_backend, "_warned", set())
    x, tangent = torch.randn(2, 3), torch.randn(2, 3)

    def derivative(backend):
        return torch.func.jvp(lambda x: bias_act(x, act="silu", backend=backend), (x,), (tangent,))[1]

    with pytest.warns(UserWarning, match="cpu: it has no derivative in forward mode"):
        assert torch.equal(derivative(None), derivative("eager"))
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run here: it has no derivative in forward mode"):
        derivative("cpu")


def test_import_is_cheap_and_leaves_torch_alone():
    code = """
import sys, torch
def settings():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
before = settings()
import imagegen
assert settings() == before
print([m for m in ("triton", "torch._dynamo", "torch._inductor", "matplotlib", "PIL") if m in sys.modules])
"""
    assert python(code) == "[]\n"
