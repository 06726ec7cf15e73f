"""Builds an op's CUDA sources with the simulator and loads them as torch.ops.imagegen_sim.*, on CPU tensors."""

import fcntl
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
        [csrc / f"ops/{op}.cpp", csrc / f"ops/cuda/{op}.cpp", *sorted((csrc / "ops/cuda").glob(f"{op}*_kernel.cu"))],
        # The operators' namespace, and the C++ one, so that nothing is shared with the compiled library.
        ["-Dimagegen=imagegen_sim", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"],
    )
    torch.ops.load_library(library)
    return torch.ops.imagegen_sim


def build(sources, options=()):
    """The path of a library made of these sources and the simulator; made again only when something changed."""
    torch_root = Path(torch.__file__).parent
    options = [*options, "-fPIC", "-isystem", torch_root / "include"]
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    return _build(sources, options, ["-shared"], libraries, ".so")


def build_program(sources, sanitizer):
    """The path of a program watched by a sanitizer: "address" sees accesses out of bounds, "thread" races."""
    watched = [f"-fsanitize={sanitizer}"]
    return _build(sources, watched, watched, [], f".{sanitizer}")


def run_program(program, *arguments, order="forward"):
    """What the program printed and what the sanitizer said, with its warps in this order."""
    environment = os.environ | {"SIM_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    # Older ThreadSanitizers do not start where addresses are spread as widely as newer kernels do; -R ends that.
    command = ["setarch", "-R", program] if shutil.which("setarch") else [program]
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    return done.stdout, done.stderr


def found_nothing(said):
    """Whether a sanitizer that said this had nothing to report; it warns of fibers as such."""
    return "ERROR" not in said and "WARNING: ThreadSanitizer" not in said and "FATAL" not in said


def _build(sources, options, linking, libraries, suffix):
    compiler, cuda_include = shutil.which("g++"), _cuda_include()
    if compiler is None:
        pytest.skip("the CUDA simulator needs g++")
    if cuda_include is None:
        pytest.skip("the CUDA simulator needs NVIDIA's headers: pip install triton, or set CUDA_HOME")
    command = [compiler, "-std=c++20", "-O1", "-g", "-w"]
    command += [f"-I{path}" for path in (HERE / "include", HERE, ROOT / "csrc")]
    command += ["-isystem", cuda_include]

    sources = [*sources, HERE / "cuda_sim.cpp"]
    key = hashlib.sha256(repr((command, options, torch.__version__)).encode())
    for path in sorted({*sources, *HERE.rglob("*.h"), *HERE.rglob("*.cuh"), *(ROOT / "csrc").rglob("*.*h")}):
        key.update(path.read_bytes())
    built = ROOT / f"build/cuda_sim/{sources[-2].stem}_{key.hexdigest()[:16]}{suffix}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes: one builds, the others wait
        if not built.exists():
            _compile(command, sources, options, [*linking, *libraries], built)
    return built


def _compile(command, sources, options, linking, built):
    objects, compiling = [], []
    for source in sources:
        objects.append(built.with_name(f"{built.name}_{source.parent.name}_{source.stem}.o"))
        language = ["-x", "c++", "-include", "cuda_sim.h"] if source.suffix == ".cu" else []
        own = options if source.name != "cuda_sim.cpp" else _unwatched(options)
        compiling.append(subprocess.Popen([*command, *own, *language, "-c", source, "-o", objects[-1]]))
    assert all(process.wait() == 0 for process in compiling), "the simulator did not compile"
    temporary = built.with_suffix(f".{os.getpid()}")
    subprocess.run([command[0], *objects, "-o", temporary, *linking], check=True)
    temporary.rename(built)
    for path in objects:
        path.unlink()


def _unwatched(options):
    """The options for the scheduler itself, which sanitizers must not watch, but which tells one of them its fibers."""
    sanitizers = [option for option in options if str(option).startswith("-fsanitize")]
    told = ["-DSIM_WATCHED"] * bool(sanitizers) + ["-DSIM_TSAN"] * ("-fsanitize=thread" in sanitizers)
    return [option for option in options if option not in sanitizers] + told


def _cuda_include():
    triton = importlib.util.find_spec("triton")
    candidates = [Path(triton.origin).parent / "backends/nvidia/include"] if triton else []
    candidates += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    return next((path for path in candidates if (path / "cuda_bf16.h").exists()), None)
