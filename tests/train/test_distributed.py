"""Two processes under torchrun train the model that one process trains on the same batches' gradients."""

import subprocess
import sys

import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
from imagegen import train
recipe = train.Recipe("diffusion", steps=3, batch_size=8, model={"width": 8, "multipliers": [1, 2]})
train.train(recipe, sys.argv[1], device="cpu", tensorboard=False, progress=False)
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
    tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert tensors["step"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    assert torch.any(tensors["model.unet.stem.weight"] != tensors["ema.unet.stem.weight"])
