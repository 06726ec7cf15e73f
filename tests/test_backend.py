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
