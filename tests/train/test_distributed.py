"""Two processes under torchrun train one model."""

import subprocess
import sys

from safetensors.torch import load_file

SCRIPT = """
import os, sys
from imagegen import train
recipe = train.Recipe("diffusion", steps=3, batch_size=8, model={"width": 8, "multipliers": [1, 2]})
model = train.train(recipe, sys.argv[1], device="cpu", tensorboard=False, progress=False)
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    file.write(str([parameter.sum().item() for parameter in model.parameters()]))
"""


def test_torchrun(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
        tmp_path / "run",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run0").read_text() == (tmp_path / "run1").read_text()
    assert load_file(tmp_path / "run" / "checkpoint.safetensors")["step"] == 3
