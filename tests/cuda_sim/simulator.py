"""Builds an op's CUDA sources with the simulator and loads them as torch.ops.imagegen_sim.*, on CPU tensors."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def load(op):
    """torch.ops.imagegen_sim with the operators of one op: its schemas, its CUDA host file and its kernels."""
    csrc = ROOT / "csrc"
    library = build(
        [csrc / f"ops/{op}.cpp", csrc / f"ops/cuda/{op}.cpp", csrc / f"ops/cuda/{op}_kernel.cu"],
        # The operators' namespace, and the C++ one, so that nothing is shared with the compiled library.
        ["-Dimagegen=imagegen_sim", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"],
    )
    torch.ops.load_library(library)
    return torch.ops.imagegen_sim


def build(sources, options=()):
    """The path of a library made of these sources and the simulator; made again only when something changed."""
    compiler, cuda_include = shutil.which("g++"), _cuda_include()
    if compiler is None:
        pytest.skip("the CUDA simulator needs g++")
    if cuda_include is None:
        pytest.skip("the CUDA simulator needs NVIDIA's headers: pip install triton, or set CUDA_HOME")
    torch_root = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O1", "-g", "-fPIC", "-w", *options]
    command += [f"-I{path}" for path in (HERE / "include", HERE, ROOT / "csrc")]
    command += ["-isystem", torch_root / "include", "-isystem", cuda_include]

    sources = [*sources, HERE / "cuda_sim.cpp"]
    key = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in sorted({*sources, *HERE.rglob("*.h"), *HERE.rglob("*.cuh"), *(ROOT / "csrc").rglob("*.*h")}):
        key.update(path.read_bytes())
    library = ROOT / f"build/cuda_sim/{sources[-2].stem}_{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)

    objects, compiling = [], []
    for source in sources:
        objects.append(library.with_name(f"{library.stem}_{source.parent.name}_{source.stem}.o"))
        language = ["-x", "c++", "-include", "cuda_sim.h"] if source.suffix == ".cu" else []
        compiling.append(subprocess.Popen([*command, *language, "-c", source, "-o", objects[-1]]))
    assert all(process.wait() == 0 for process in compiling), "the simulator did not compile"
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    temporary = library.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", *objects, "-o", temporary, *libraries], check=True)
    temporary.rename(library)
    for path in objects:
        path.unlink()
    return library


def _cuda_include():
    triton = importlib.util.find_spec("triton")
    candidates = [Path(triton.origin).parent / "backends/nvidia/include"] if triton else []
    candidates += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    return next((path for path in candidates if (path / "cuda_bf16.h").exists()), None)
