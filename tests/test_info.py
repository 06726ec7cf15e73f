import subprocess
import sys

import pytest
import torch

import imagegen
from imagegen import _library
from imagegen.ops import _backend


def lines(capsys, **options):
    imagegen.info(**options)
    return capsys.readouterr().out.splitlines()


def test_every_op_and_backend_has_a_line(capsys):
    printed = lines(capsys)
    for op in imagegen.ops.__all__:
        first = printed.index(f"{op}:")
        named = [line.split()[0] for line in printed[first + 1 : first + 1 + len(_backend.NAMES)]]
        assert named == list(_backend.NAMES)
        assert printed[first + 1].split() == ["eager", "ready"]


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_it_says_what_was_built(capsys):
    text = "\n".join(lines(capsys, verbose=True))
    assert f"imagegen on torch {torch.__version__}" in text
    assert f"CPU kernels: {_library._C.cpu_capability()}" in text
    assert "compiler: " in text
    assert f"CUDA kernels: {_library._C.cuda_architectures() or 'none'}" in text


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_verbose_names_the_algorithm_of_each_convolution(capsys):
    here = _library._C.cpu_capability()
    try:
        _library._C.set_cpu_capability("baseline")
        printed = [line.strip() for line in lines(capsys, verbose=True)]
        assert "3x3, 512 -> 512 channels, output 8x8: F(2,3)" in printed
        assert "3x3, 128 -> 3 channels, output 512x512: direct" in printed
        assert "3x3, 4 -> 512 channels, output 64x64: F(2,3) along the rows" in printed
        assert "3x3, 512 -> 512 channels, output 128x128: 25 products for 2x2 pixels" in printed
        if "avx2" in _library._C.cpu_capabilities():
            _library._C.set_cpu_capability("avx2")
            printed = [line.strip() for line in lines(capsys, verbose=True)]
            assert "3x3, 512 -> 512 channels, output 64x64: F(4,3)" in printed
            assert "4x4, 128 -> 64 channels, output 64x64: F(4,2)" in printed
            assert "3x3, 512 -> 512 channels, output 128x128: 81 products for 4x4 pixels" in printed
            assert "3x3, 512 -> 512 channels, output 32x32: 25 products for 2x2 pixels" in printed
        if "avx512_bf16" in _library._C.cpu_capabilities():
            _library._C.set_cpu_capability("avx512_bf16")
            printed = [line.strip() for line in lines(capsys, verbose=True)]
            assert "3x3, 512 -> 512 channels, output 64x64: F(4,3) in float32, F(2,3) in bfloat16" in printed
    finally:
        _library._C.set_cpu_capability(here)
    assert not any("F(4,3)" in line for line in lines(capsys))


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
@pytest.mark.parametrize("size", [64, 8])
def test_the_algorithm_named_is_the_one_that_runs(size, capability):
    algorithm = _library._C.conv_algorithm("conv2d", 3, "float32", 32, 32, size, size)
    kept = {"conv2d F(4,3)": 36, "conv2d F(2,3)": 16}[algorithm] * 32 * 32 * 4
    imagegen.weight_cache.clear()
    imagegen.ops.conv2d(torch.randn(1, 32, size, size), torch.randn(32, 32, 3, 3))
    assert imagegen.weight_cache.size() == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu_says_so(capsys):
    cuda = [line for line in lines(capsys) if line.startswith("  cuda ")]
    assert cuda
    assert all("no CUDA device is available to torch" in line for line in cuda)


def test_it_says_what_was_measured_on_this_machines_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_backend, "architecture", lambda device: ("sm_80", "sm_90")[device.index])
    monkeypatch.setattr(_backend, "FASTEST", {"sm_90": {"attention": {}, "sampler_step": {}}})
    first, second, third = (line for line in lines(capsys) if "measured" in line)
    assert first.startswith(f"not measured on sm_80: {', '.join(imagegen.ops.__all__)}; ")
    assert first.endswith("there it is cuda, then triton, then eager, the first that is ready")
    assert second == "on sm_90 the fastest backend as measured is taken for attention, sampler_step"
    assert "attention" not in third and "sampler_step" not in third and "bias_act, conv2d" in third


def test_the_command_line_prints_the_same(capsys):
    command = subprocess.run([sys.executable, "-m", "imagegen", "info"], capture_output=True, text=True, check=True)
    assert command.stdout.splitlines() == lines(capsys)
