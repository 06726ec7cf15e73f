"""What nvcc makes of the CUDA kernels, without a GPU: registers, shared memory, spills and instructions of each.

python tests/cuda_ahead_of_time.py [FILE ...] prints them as a Markdown table: of what this checkout's build holds, or
of what has to be compiled for it, once (a quarter of an hour for all of it on one core).
"""

import functools
import importlib.util
import os
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
COMPILED = ROOT / "build/ahead_of_time"
# Architecture that is compiled for -> those whose machine code is made of that: the compiler's slow half runs once.
FAMILIES = {"80": ("80", "86", "89"), "90a": ("90a",), "100": ("100", "120")}
ARCHITECTURES = tuple(architecture for family in FAMILIES.values() for architecture in family)
LONGEST = 560  # seconds for one file and family
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

    def count(self, names):
        return sum(self.instructions[name] for name in names)


def cuobjdump():
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return bundled if bundled and bundled.exists() else shutil.which("cuobjdump")


@functools.lru_cache(maxsize=2)
def kernels(stem, architecture):
    """The kernels of csrc/ops/cuda/STEM_kernel.cu for one architecture, from this checkout's build or compiled."""
    file = _object(stem) if is_built(stem, architecture) else _compiled(stem, architecture)
    return _kernels(_dump("-arch", f"sm_{architecture}", "--dump-resource-usage", "--dump-sass", file))


def _compiled(stem, architecture):
    """The machine code of a file for a family of architectures, kept until a source of it changes."""
    virtual = next(virtual for virtual, family in FAMILIES.items() if architecture in family)
    kept = COMPILED / f"{stem}.{virtual}.fatbin"
    if _is_current(kept):
        return kept
    COMPILED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=COMPILED) as folder:
        made = Path(folder, kept.name)
        code = ",".join(f"sm_{real}" for real in FAMILIES[virtual])
        target = ["-gencode", f"arch=compute_{virtual},code=[{code}]", "-fatbin", "-o", made]
        listing = ["-MD", "-MF", _sources_of(made)]
        command = ["nvcc", "-std=c++20", f"-I{ROOT / 'csrc'}", *target, *listing, CUDA / f"{stem}_kernel.cu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        assert done.returncode == 0, done.stderr
        assert "serialized" not in done.stderr, done.stderr  # wgmma products that wait for each other
        _sources_of(made).replace(_sources_of(kept))
        return made.replace(kept)


def _sources_of(compiled):
    return compiled.with_suffix(".d")


def _is_current(compiled):
    if not compiled.exists() or not _sources_of(compiled).exists():
        return False
    sources = _sources_of(compiled).read_text().split(" : ", 1)[1].replace("\\\n", " ").split()
    return all(os.path.exists(s) and os.path.getmtime(s) < compiled.stat().st_mtime for s in sources)


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


def table(stems=STEMS, architectures=ARCHITECTURES):
    """In Markdown, a line for each kernel: its registers by architecture, then the most of all else on any of them."""
    head = ["file", "kernel", *(f"sm_{a}" for a in architectures), "shared", "spilled", "spills", "matrix products"]
    yield _line(head)
    yield _line(["---", "---", *(["--:"] * (len(head) - 3)), "---"])
    for stem in stems:
        of = {a: {kernel.name: kernel for kernel in kernels(stem, a)} for a in architectures}
        names = list(dict.fromkeys(name for found in of.values() for name in found))
        for name, readable in zip(names, _demangled(names), strict=True):
            found = [of[a].get(name) for a in architectures]
            there = [kernel for kernel in found if kernel]
            registers = [kernel.registers if kernel else "" for kernel in found]
            most = [max(value) for value in zip(*((k.shared, k.stack, k.count(SPILLS)) for k in there), strict=True)]
            matrix = [i for i in MATRIX if any(kernel.instructions[i] for kernel in there)]
            yield _line([stem, f"`{readable}`", *registers, *most, " ".join(matrix)])


def _line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def _demangled(names):
    """The names as C++ writes them, without the namespaces and parameters that all have."""
    if not shutil.which("c++filt"):
        return names
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    bare = said.replace("(anonymous namespace)::", "").replace("imagegen::", "").replace("cuda::", "")
    return [re.sub(r"^void |\(.*", "", line.replace("(Activation)", "activation ")) for line in bare.splitlines()]


if __name__ == "__main__":
    for line in table(sys.argv[1:] or STEMS):
        print(line, flush=True)
