"""What can be said of the CUDA kernels without a GPU: they are there for every architecture, and none spills."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from imagegen import _library


def cuobjdump():
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return bundled if bundled and bundled.exists() else shutil.which("cuobjdump")


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
