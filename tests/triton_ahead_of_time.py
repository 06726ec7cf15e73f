"""Compiles a Triton kernel for NVIDIA architectures without a GPU, and says what it takes of each.

compile_kernel() runs this file in processes of its own, without TRITON_INTERPRET.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Architecture -> its instruction that multiplies matrices: of a warp, of a warpgroup (wgmma), and of a thread for the
# block (tcgen05.mma), which the later ones take where a tile has 64 rows and its warps are whole warpgroups.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
ARCHITECTURES = tuple(MATRIX)


def compile_kernel(module, kernel, variants):
    """The resources of every variant on every architecture: registers, stack and local bytes, spilling instructions,
    those that multiply matrices by name, shared and tensor memory, PTX loads. Of a stack no byte need be touched: ptxas
    leaves 8 bytes behind where it could do without. What is spilled is stored and loaded by a spilling instruction.

    A variant is {"signature": {argument: type}, "constants": {argument: value}, "divisible": [argument, ...]}: the last
    are multiples of 16, as torch's allocations are. "argument.3" is a constant within a tuple. "options" (num_warps,
    num_stages) and "architectures" may be there, too.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}

    def compiled(share):
        job = json.dumps([module, kernel, share])
        done = subprocess.run([sys.executable, __file__], input=job, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    processes = min(os.cpu_count(), -(-len(variants) // 4))  # to start one takes as long as to compile two
    with ThreadPoolExecutor(processes) as pool:
        shares = list(pool.map(compiled, [variants[i::processes] for i in range(processes)]))
    return [shares[i % processes][i // processes] for i in range(len(variants))]


def _compile(kernel, architecture, signature, constants, divisible, options=None):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {k: tuple(v) if isinstance(v, list) else v for k, v in signature.items()}
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {_path(kernel, name): [["tt.divisibility", 16]] for name in divisible}
    constants = {_path(kernel, name): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.check_output([dump, "--dump-resource-usage", "--dump-sass", file.name], text=True)
    instructions = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return {
        "architecture": architecture,
        "registers": int(registers),
        "stack": int(stack),
        "local": int(local),
        "spills": sum(instructions.count(name) for name in ("LDL", "STL")),
        "matrix": {name: instructions.count(name) for name in MATRIX.values() if name in instructions},
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
        "loads": re.findall(r"ld\.global\.(\S+)", compiled.asm["ptx"]),
    }


def _path(kernel, name):
    argument, _, element = name.partition(".")
    return (kernel.arg_names.index(argument), *([int(element)] if element else []))


if __name__ == "__main__":
    module, name, variants = json.load(sys.stdin)
    kernel = getattr(importlib.import_module(module), name)
    print(
        json.dumps(
            [[_compile(kernel, a, **v) for a in v.pop("architectures", ARCHITECTURES)] for v in variants],
        )
    )
