"""Fixtures of every test."""

import contextlib
import ctypes
import importlib.util
import os

import pytest
import torch

# Triton's kernels run on CPU tensors where there is no GPU. Triton reads this when a kernel is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.repair()

from imagegen import _library, output_cache

# Of glibc's mallopt: fill what malloc gives out with the complement of this byte; take so many bytes from the system.
M_PERTURB, M_MMAP_THRESHOLD = -6, -3


def pytest_configure(config):
    if _library.load_error:  # then every op falls back, also where modules and models call it
        config.addinivalue_line("filterwarnings", "ignore:.* runs in eager PyTorch")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill uninitialised tensors with NaN, those of C++ empty_like included, so that an unwritten element shows.

    Memory past torch's own fill, as outputs are, is 3.4e38, up to 32 MB, beyond which malloc takes it from the system;
    that of outputs that are gone, which may hold the right result, is not used.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_PERTURB, 0x80)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    limit = output_cache.limit()
    output_cache.set_limit(0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    output_cache.set_limit(limit)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def float32_products():
    """float32 is multiplied as float32 on a GPU too: cuDNN's default, TF32, keeps ten bits of it."""
    with _tf32(False):
        yield


@pytest.fixture
def tf32(float32_products):
    """torch's own switches allow TF32, for tests of what follows them."""
    with _tf32(True):
        yield


@contextlib.contextmanager
def _tf32(allowed):
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture(params=_library._C.cpu_capabilities() if _library._C else ["none"])
def capability(request):
    """Run the test under every instruction set of this machine that the CPU kernels were built for."""
    if request.param is None:  # on a GPU
        yield None
        return
    if _library._C is None:
        pytest.skip(_library.load_error)
    before = _library._C.cpu_capability()
    _library._C.set_cpu_capability(request.param)
    yield request.param
    _library._C.set_cpu_capability(before)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    """Run the test on one and on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
