"""The conditions of a measurement: what another machine would have to match, and nothing that names this one."""

import contextlib
import datetime
import io
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import imagegen
from imagegen.ops import _backend

ISA_FLAGS = {
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("asimd", "asimdhp", "sve", "bf16", "i8mm"),
}


def describe(device="cpu"):
    cpu = _cpuinfo()
    here = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "isa": sorted(ISA_FLAGS.intersection((cpu.get("flags") or cpu.get("Features") or "").split())),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        # Whether idle threads spin (unset, for a while) or sleep (passive): waking one takes as long as a small kernel.
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_compiler": _torch_compiler(),
        "compiler": _first_line([os.environ.get("CXX", "g++"), "--version"]),
        "imagegen": imagegen.__version__,
        "backends": _backends(),
        "commit": _commit(),
    }
    if device == "cuda":
        here["gpu"] = torch.cuda.get_device_name()
        here["architecture"] = _backend.architecture(torch.device("cuda"))
        here["cuda"] = torch.version.cuda
    return here


def _cpuinfo():
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _caches():
    """The caches of the first core, as in "L2 Unified 1024K"; empty where the system does not tell."""
    entries = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return [f"L{_read(e / 'level')} {_read(e / 'type')} {_read(e / 'size')}" for e in entries]


def _read(file):
    return file.read_text().strip()


def _torch_compiler():
    lines = [line.strip("- ") for line in torch.__config__.show().splitlines()]
    return next((line for line in lines if line.startswith(("GCC", "clang", "MSVC"))), None)


def _backends():
    """What `imagegen.info()` says: which kernels are there, and why not."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        imagegen.info()
    return without_paths(text.getvalue()).splitlines()


def without_paths(text):
    """The text with the folders taken from its paths."""
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", text)


def _commit():
    """The commit measured, with a + where the tree had changes beside it."""
    folder = Path(__file__).parent.parent
    commit = _first_line(["git", "rev-parse", "--short=12", "HEAD"], folder)
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no"], folder)
    return commit + "+" * bool(changed) if commit else None


def _first_line(command, folder=None):
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]
