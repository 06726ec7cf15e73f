import pytest

from imagegen import ops
from imagegen._optimize import linear, walk
from imagegen.ops import _backend

OPS = ("attention", "bias_act", "conv2d", "conv_transpose2d", "group_norm", "group_norm_factors", "upsample_conv2d")


@pytest.fixture(autouse=True)
def one_library(monkeypatch):
    """Whatever the processor, linear layers stay with MKL but where a test says otherwise."""
    monkeypatch.setattr(linear, "FASTER", False)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Where an op has no kernel optimize rightly leaves its layers: here eager PyTorch stands in, without a warning."""
    lacking = {op for op in OPS if _backend.why_not(op, _backend.implementations(op), "cpu", "cpu")}
    monkeypatch.setattr(_backend, "_warned", {(op, "cpu") for op in lacking})
    missing_kernel = walk._missing_kernel
    monkeypatch.setattr(walk, "_missing_kernel", lambda f: None if f.by in lacking else missing_kernel(f))
    return missing_kernel


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops, in the order they are called."""
    names = []

    def spy(name):
        function = getattr(ops, name)

        def call(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        call.__name__ = name
        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, spy(name))
    return names
