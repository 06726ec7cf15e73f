"""The folder a training run leaves: run.json, model.safetensors (the averaged weights), checkpoint.safetensors."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from .. import models
from .._optional import require
from .recipe import Recipe

_DESCRIPTION, _MODEL, _CHECKPOINT = "run.json", "model.safetensors", "checkpoint.safetensors"


def load(folder, device="cpu"):
    """The trained model in a run folder, with the averaged weights, ready to sample.

    Raises: FileNotFoundError where the folder holds no finished checkpoint.
    """
    return RunFolder(folder).load_model(device)


class RunFolder:
    def __init__(self, path):
        self.path = Path(path)

    def __truediv__(self, name):
        return self.path / name

    def exists(self):
        return (self / _DESCRIPTION).exists()

    def create(self, recipe, image_shape, classes):
        """Start a new run here; what an older one left is removed."""
        for name in (_MODEL, _CHECKPOINT):
            (self / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.describe(recipe, image_shape, classes)

    def describe(self, recipe, image_shape, classes):
        description = {"recipe": asdict(recipe), "image_shape": image_shape, "classes": classes}
        (self / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    def read(self):
        """(recipe, image_shape, classes)."""
        if not self.exists():
            raise FileNotFoundError(f"{self.path} is not a run folder: it holds no {_DESCRIPTION}")
        description = json.loads((self / _DESCRIPTION).read_text())
        return Recipe(**description["recipe"]), tuple(description["image_shape"]), tuple(description["classes"])

    def save(self, state):
        _save(state.tensors(), self / _CHECKPOINT)
        _save(state.ema.state_dict(), self / _MODEL)

    def restore(self, state):
        """Continue where the checkpoint left off, or from the start where there is none yet."""
        if (self / _CHECKPOINT).exists():
            state.load_tensors(_load(self / _CHECKPOINT))

    def load_model(self, device):
        recipe, image_shape, classes = self.read()
        if not (self / _MODEL).exists():
            raise FileNotFoundError(f"{self.path} holds no {_MODEL}: the run was stopped before its first checkpoint")
        with torch.random.fork_rng([]):  # the initial weights are drawn, then replaced
            model = models.create(recipe.family, image_shape, len(classes), **recipe.model)
        model.load_state_dict(_load(self / _MODEL))
        return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _save(tensors, path):
    """Write beside, then rename: a run stopped while it saves still has its last checkpoint."""
    save_file = require("safetensors.torch", "a checkpoint").save_file
    beside = path.with_suffix(".tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, beside)
    os.replace(beside, path)


def _load(path):
    return require("safetensors.torch", "a checkpoint").load_file(path)
