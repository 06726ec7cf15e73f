"""Compilers that fail, are too old, or are others than the one at hand."""

import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from installation import ROOT, SMOKE, call

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.fixture
def configure(tmp_path, build_here):
    """Run CMake as setup.py does, with more options."""
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("cmake and ninja are not on PATH")

    def run(*options, **environment):
        return call(
            "cmake",
            *("-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_ROOT={Path(torch.__file__).parent}"),
            *(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path}/imagegen", *options),
            check=False,
            **environment,
        )

    return run


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_a_compiler_that_fails_fails_the_build(sources, tmp_path, build_here):
    broken = script(tmp_path / "broken-c++", "echo this compiler is broken >&2; exit 1")
    build = (sys.executable, "-m", "pip", "wheel", *build_here, "--wheel-dir", tmp_path, sources)
    said, status = call(*build, check=False, CXX=str(broken))
    assert status != 0
    assert "this compiler is broken" in said
    assert "imagegen: the build failed, the reason is above." in said
    assert not list(tmp_path.glob("*.whl"))


def test_nvcc_that_is_too_old_is_one_sentence(configure, tmp_path):
    nvcc = script(tmp_path / "old-nvcc", "echo Cuda compilation tools, release 11.8, V11.8.89")
    said, status = configure("-DIMAGEGEN_CUDA=AUTO", f"-DCMAKE_CUDA_COMPILER={nvcc}")
    assert status != 0
    assert "old-nvcc is CUDA 11.8; the CUDA kernels need" in " ".join(said.split())


def test_cuda_asked_for_without_nvcc_is_an_error(configure):
    ignored = ";".join({str(Path(NVCC).parent), "/usr/local/cuda/bin", "/usr/local/bin"}) if NVCC else ""
    options = (f"-DCMAKE_IGNORE_PATH={ignored}",)
    said, status = configure("-DIMAGEGEN_CUDA=ON", *options, CUDA_HOME=None, CUDA_PATH=None, CUDACXX=None)
    assert status != 0
    assert "IMAGEGEN_CUDA=ON needs nvcc" in said
    said, status = configure("-DIMAGEGEN_CUDA=AUTO", *options, CUDA_HOME=None, CUDA_PATH=None, CUDACXX=None)
    assert status == 0
    assert "CUDA kernels: OFF" in said


@pytest.mark.skipif(NVCC is None, reason="nvcc is not there")
@pytest.mark.parametrize(
    "options, architectures",
    [((), "80-real;90a-real;100"), (("-DCMAKE_CUDA_ARCHITECTURES=86-real;120",), "86-real;120")],
    ids=["default", "chosen"],
)
def test_cuda_kernels_are_built_where_nvcc_is(configure, options, architectures):
    said, status = configure("-DIMAGEGEN_CUDA=AUTO", *options)
    assert status == 0, said
    assert f"CUDA kernels: ON {architectures}" in said


@pytest.mark.skipif(NVCC is None, reason="nvcc is not there")
def test_an_architecture_that_nvcc_does_not_know_is_left_out_with_a_warning(configure, tmp_path):
    pretence = f"""case "$*" in
        --version) echo Cuda compilation tools, release 12.4, V12.4.131 ;;
        --list-gpu-arch) echo compute_80; echo compute_90 ;;
        *) exec {NVCC} "$@" ;;
    esac"""
    nvcc = script(tmp_path / "nvcc", pretence)
    said, status = configure("-DIMAGEGEN_CUDA=AUTO", f"-DCMAKE_CUDA_COMPILER={nvcc}")
    assert status == 0, said
    assert "nvcc 12.4 cannot compile for 100" in " ".join(said.split())
    assert "CUDA kernels: ON 80-real;90a-real\n" in said


def test_kernels_leave_no_function_for_others_to_be_linked_with():
    """Constants may be shared; a function built for AVX-512 that others are linked with crashes older machines."""
    objects = list(ROOT.glob("build/editable/CMakeFiles/cpu_kernels_*.dir/**/*.o"))
    if not objects:
        pytest.skip("no kernel objects: the package is not installed from here with pip install -e")
    if shutil.which("nm") is None:
        pytest.skip("nm is not there")
    said = subprocess.run(["nm", "-A", "-C", *objects], capture_output=True, text=True, check=True).stdout
    assert [line for line in said.splitlines() if re.search(r":[0-9a-f]* +[Ww] ", line)] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not there")
def test_clang_compiles_a_library_that_works(configure, make_environment, tmp_path):
    said, status = configure("-DIMAGEGEN_CUDA=OFF", "-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_CXX_FLAGS=-Werror")
    assert status == 0, said
    call("cmake", "--build", tmp_path)
    shutil.copytree(ROOT / "imagegen", tmp_path / "imagegen", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    said, _ = call(make_environment(), "-c", SMOKE, PYTHONPATH=tmp_path)
    assert "CPU kernels: " in said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="aarch64-linux-gnu-g++ is not there")
def test_the_kernels_compile_for_arm64(configure, tmp_path):
    said, status = configure(
        "-DIMAGEGEN_CUDA=OFF",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
    )
    assert status == 0, said
    assert "CPU kernels for baseline; " in said
    call("cmake", "--build", tmp_path, "--target", "cpu_kernels_baseline")
