"""What nvcc makes of the CUDA kernels, without a GPU: registers, shared memory, spills and instructions of each.

python tests/cuda_ahead_of_time.py [ARCHITECTURE ...] prints them as a table: of what this checkout's build holds, or of
what has to be compiled for it (minutes an architecture).
"""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/ops/cuda"
OBJECTS = ROOT / "build/editable/CMakeFiles/_C.dir/csrc/ops/cuda"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
STEMS = sorted(file.name.removesuffix("_kernel.cu") for file in CUDA.glob("*_kernel.cu"))
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # of sm_80 and later, of sm_90a, of sm_100
SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    registers: int
    shared: int  # bytes of static shared memory
    stack: int  # bytes, in which spilled registers lie
    instructions: Counter  # of its SASS, by name without modifiers
    sass: str


def cuobjdump():
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return bundled if bundled and bundled.exists() else shutil.which("cuobjdump")


@functools.lru_cache(maxsize=2)
def kernels(stem, architecture):
    """The kernels of csrc/ops/cuda/STEM_kernel.cu for one architecture, from this checkout's build or compiled."""
    if is_built(stem, architecture):
        return _read(_object(stem), architecture)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "kernel.cubin")
        target = [f"-arch=sm_{architecture}", "-cubin", "-o", compiled]
        command = ["nvcc", "-std=c++20", f"-I{ROOT / 'csrc'}", *target, CUDA / f"{stem}_kernel.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "serialized" not in done.stderr, done.stderr  # wgmma products that wait for each other
        return _read(compiled, architecture)


def is_built(stem, architecture):
    """Whether this checkout's build has the file for the architecture: then looking at it costs no compilation."""
    built = _object(stem)
    if not built.exists():
        return False
    sources = [CUDA / f"{stem}_kernel.cu", *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    is_current = built.stat().st_mtime > max(source.stat().st_mtime for source in sources)
    return is_current and architecture in architectures(built)


def _object(stem):
    return OBJECTS / f"{stem}_kernel.cu.o"


def architectures(file):
    """What a library or an object has machine code for."""
    return set(re.findall(r"\.sm_(\w+)\.cubin", _dump("--list-elf", file)))


def resource_usage(file):
    """The kernels of a library for all its architectures, without their instructions."""
    return _kernels(_dump("--dump-resource-usage", file))


def _read(file, architecture):
    return _kernels(_dump("-arch", f"sm_{architecture}", "--dump-resource-usage", "--dump-sass", file))


def _kernels(text):
    sass = dict(body.split("\n", 1) for body in text.split("Function : ")[1:])
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    found = []
    for name, registers, stack, shared, local in usage:
        instructions = Counter(INSTRUCTION.findall(sass.get(name, "")))
        found.append(
            Kernel(name, int(registers), int(shared), int(stack) + int(local), instructions, sass.get(name, ""))
        )
    return found


# An address, a predicate perhaps, and the name up to its first modifier.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")


def _dump(*arguments):
    return subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, check=True).stdout


def table(architectures=ARCHITECTURES, stems=STEMS):
    """A line for each kernel: file, architecture, registers, shared memory, stack, spills, matrix products, name."""
    yield f"{'file':34} {'sm':>4} {'regs':>4} {'shared':>6} {'stack':>5} {'spills':>6} {'matrix':>6}  kernel"
    for stem in stems:
        for architecture in architectures:
            found = kernels(stem, architecture)
            for kernel, name in zip(found, _demangled([kernel.name for kernel in found]), strict=True):
                spills, matrix = (sum(kernel.instructions[i] for i in names) for names in (SPILLS, MATRIX))
                yield (
                    f"{stem:34} {architecture:>4} {kernel.registers:4} {kernel.shared:6} {kernel.stack:5} "
                    f"{spills:6} {matrix:6}  {name}"
                )


def _demangled(names):
    """The names as C++ writes them, without the namespaces and parameters that all have."""
    if not shutil.which("c++filt"):
        return names
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    bare = said.replace("(anonymous namespace)::", "").replace("imagegen::", "").replace("cuda::", "")
    return [re.sub(r"^void |\(.*", "", line.replace("(Activation)", "activation ")) for line in bare.splitlines()]


if __name__ == "__main__":
    for line in table(sys.argv[1:] or ARCHITECTURES):
        print(line, flush=True)
