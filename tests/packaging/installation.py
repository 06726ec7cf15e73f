"""Building and installing in other processes, away from the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# One call of each op, for an installation that has no tests.
CALLS = """
import torch, imagegen
from imagegen import ops
x = torch.randn(2, 8, 12, 10)
q, k = torch.randn(2, 4, 9, 40), torch.randn(2, 2, 77, 40)
ROW = [0, 0.9, 1.1, -0.5, 0.3, 0.6, 0.1, 0.2, 0, 0, 0, -1, 0, 0]
calls = {
    "attention": lambda backend=None: ops.attention(q, k, k, causal=True, backend=backend),
    "bias_act": lambda backend=None: ops.bias_act(x, torch.randn(8), act="silu", backend=backend),
    "conv_transpose2d": lambda backend=None: ops.conv_transpose2d(x, torch.randn(8, 6, 4, 4), backend=backend),
    "conv2d": lambda backend=None: ops.conv2d(x, torch.randn(6, 8, 3, 3), backend=backend),
    "group_norm": lambda backend=None: ops.group_norm(x, 4, torch.randn(8), torch.randn(8), backend=backend),
    "group_norm_factors": lambda backend=None: ops.group_norm_factors(x, 4, torch.randn(8), backend=backend),
    "randn": lambda backend=None: ops.randn((2, 8, 12), seed=1, backend=backend),
    "sampler_step": lambda backend=None: ops.sampler_step(x, 0.5 * x, ROW, seed=1, clip=1.0, backend=backend)[0],
    "sampler_step_": lambda backend=None: ops.sampler_step_(
        x[None].clone(), 0.5 * x, ROW, seed=1, clip=1.0, copies=2, backend=backend
    ),
    "upsample_conv2d": lambda backend=None: ops.upsample_conv2d(x, torch.randn(6, 8, 3, 3), backend=backend),
}
assert set(calls) == set(ops.__all__), "give every op a call here"
"""

# Each compiled kernel against its specification.
SMOKE = f"""{CALLS}
def run(call, backend):
    torch.manual_seed(0)
    outputs = call(backend)
    return torch.cat([y.flatten() for y in outputs]) if isinstance(outputs, tuple) else outputs
for name, call in calls.items():
    y, expected = run(call, "cpu"), run(call, "eager")
    error = (y - expected).norm() / expected.norm()
    assert error < 1e-5, (name, error)
imagegen.info()
"""


def call(*command, check=True, **environment):
    """Run a command outside the checkout; its output, stdout and stderr as one, and its exit status."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS", "TRITON_INTERPRET")}
    # Variables given as None are taken away.
    environment = {k: str(v) for k, v in (inherited | environment).items() if v is not None}
    done = subprocess.run(
        [str(c) for c in command], env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done.stdout, done.returncode


def build_sdist(sources, to):
    code = "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, 'build_backend'); import backend"
    call(sys.executable, "-c", f"{code}; backend.build_sdist(sys.argv[2])", sources, to)
    (archive,) = to.glob("*.tar.gz")
    return archive


def copy_sources(to):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__")
    return shutil.copytree(ROOT, to, ignore=ignored)
