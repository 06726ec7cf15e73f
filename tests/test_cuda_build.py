"""What can be said of the CUDA kernels without a GPU: they are there for every architecture, and none spills."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagegen import _library


def cuobjdump():
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return bundled if bundled and bundled.exists() else shutil.which("cuobjdump")


@dataclass
class Kernel:
    name: str
    registers: int
    spilled: int  # bytes of its stack
    sass: str


def compile_kernels(stem, architecture, folder):
    """What nvcc makes of csrc/ops/cuda/STEM_kernel.cu for one architecture."""
    csrc = Path(__file__).parents[1] / "csrc"
    built = folder / "kernel.cubin"
    target = [f"-arch=sm_{architecture}", "-cubin", "-o", built]
    subprocess.run(["nvcc", "-std=c++20", f"-I{csrc}", *target, csrc / f"ops/cuda/{stem}_kernel.cu"], check=True)
    dump = [cuobjdump(), "--dump-resource-usage", "--dump-sass", built]
    said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", said)
    sass = dict(text.split("\n", 1) for text in said.split("Function : ")[1:])
    return [Kernel(name, int(reg), int(stack) + int(local), sass[name]) for name, reg, stack, local in usage]


@pytest.mark.skipif(not (_library._C and _library._C.cuda_architectures()), reason="this build has no CUDA kernels")
@pytest.mark.skipif(not cuobjdump(), reason="cuobjdump is not there: pip install triton")
def test_no_cuda_kernel_spills():
    command = [cuobjdump(), "--dump-resource-usage", _library._C.__file__]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", usage)
    assert len(kernels) > 100
    assert [name for name, _, stack, local in kernels if int(stack) or int(local)] == []
    for architecture in _library._C.cuda_architectures().split():
        assert f"sm_{architecture.removesuffix('-real')}" in usage
