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


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu_says_so(capsys):
    cuda = [line for line in lines(capsys) if line.startswith("  cuda ")]
    assert cuda
    assert all("no CUDA device is available to torch" in line for line in cuda)


def test_the_command_line_prints_the_same(capsys):
    command = subprocess.run([sys.executable, "-m", "imagegen", "info"], capture_output=True, text=True, check=True)
    assert command.stdout.splitlines() == lines(capsys)
