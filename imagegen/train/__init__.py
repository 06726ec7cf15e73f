"""Training: a recipe in, a run folder out.

    train.train(train.Recipe("diffusion", data="digits", steps=1000), "out/digits")
    model = train.load("out/digits")
    images = model.sample(64, seed=0)

The run folder holds what is needed to sample, and to resume: see `run_folder`.
"""

from .grid import save_grid
from .loop import train
from .recipe import Recipe
from .run_folder import load

__all__ = ["Recipe", "load", "save_grid", "train"]
