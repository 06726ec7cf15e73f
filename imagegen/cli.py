"""python -m imagegen: info, train, sample, demo."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

from . import train as training
from .info import info as print_info

# Chosen for digits that read well after some two minutes on two CPU cores.
DEMO = {"data": "digits", "size": 16, "steps": 800, "lr": 3e-3, "ema": 0.995, "model": {"multipliers": [1, 2, 2]}}
DEMO_IMAGES = 64
DEMO_GUIDANCE = 2.0


def main(argv=None):
    """Run one command; errors a user can mend are one line, without a traceback."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"imagegen {args.command}: {error}", file=sys.stderr)
        return 1


def info(args):
    print_info(verbose=args.verbose)


def train(args):
    values = {field.name: getattr(args, field.name) for field in fields(training.Recipe)}
    recipe = training.Recipe(**values | {"model": dict(args.model)})
    training.train(
        recipe,
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        device=args.device,
        workers=args.workers,
        save_every=args.save_every,
        sample_every=args.sample_every,
        tensorboard=not args.no_tensorboard,
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"trained model in {args.out}; draw from it: python -m imagegen sample {args.out}")


def sample(args):
    model = training.load(args.run_folder, args.device)
    images = model.sample(args.n, seed=args.seed, progress=True, **dict(args.options))
    training.save_grid(images, args.out, rows=model.classes or None)
    print(f"{args.n} images in {args.out}")


def demo(args):
    start = time.perf_counter()
    folder, picture = args.out / "demo", args.out / "demo.png"
    recipe = training.Recipe("diffusion", **DEMO | {"steps": args.steps})
    print("Training a small diffusion model on scikit-learn's 1,797 handwritten digits.")
    model = training.train(recipe, folder, overwrite=True, tensorboard=False)
    images = model.sample(DEMO_IMAGES, seed=0, guidance=DEMO_GUIDANCE, progress=True)
    training.save_grid(images, picture, rows=model.classes)
    print(f"{DEMO_IMAGES} new digits, one row per class, in {picture} after {time.perf_counter() - start:.0f} s.")
    return _benchmark()


def _benchmark():
    """This package against eager PyTorch on this machine, where the benchmark suite is at hand."""
    if not Path("benchmarks", "__main__.py").exists():
        print("To hold the kernels against eager PyTorch, run this in a checkout: python -m benchmarks run --suite ops")
        return 0
    command = [sys.executable, "-m", "benchmarks", "run", "--suite", "ops", "--quick", "--no-compile"]
    return subprocess.run(command).returncode


def _parser():
    parser = argparse.ArgumentParser("imagegen", description="Train and sample image models on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, help):
        parser = commands.add_parser(run.__name__, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        parser.set_defaults(run=run)
        return parser.add_argument

    add = command(info, "which kernels are ready on this machine, and why others are not")
    add("--verbose", action="store_true", help="name the compiler and the choice of algorithms too")

    recipe = training.Recipe
    add = command(train, "train a model and leave it in a folder")
    add("family", help="the model family: diffusion")
    add("--data", default=recipe.data, help="digits, fashion-mnist, mnist, cifar10, NAME:FOLDER, or a folder of images")
    add("--size", type=int, default=recipe.size, help="image side; None is the data's own")
    add("--steps", type=int, default=recipe.steps, help="optimizer steps")
    add("--out", type=Path, required=True, help="the run folder")
    add("--batch-size", type=int, default=recipe.batch_size, help="images per step, over all processes")
    add("--lr", type=float, default=recipe.lr, help="highest learning rate")
    add("--warmup", type=int, default=recipe.warmup, help="steps until the learning rate is reached")
    add("--ema", type=float, default=recipe.ema, help="decay of the averaged weights")
    add("--clip-norm", type=float, default=recipe.clip_norm, help="bound on the gradient's norm")
    add("--bf16", action="store_true", help="compute the loss under bfloat16 autocast")
    add("--seed", type=int, default=recipe.seed, help="of weights, data order and noise")
    add("--set", dest="model", **_NAMED_VALUES, help="an option of the model, e.g. width=64")
    add("--resume", action="store_true", help="go on from the folder's checkpoint")
    add("--overwrite", action="store_true", help="replace the run in the folder")
    add("--device", help="cpu, cuda, …; a GPU if there is one")
    add("--workers", type=int, default=0, help="processes that read the data")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--sample-every", type=int, help="steps between sample grids")
    add("--no-tensorboard", action="store_true", help="write no logs")

    add = command(sample, "draw a grid of images from a trained model")
    add("run_folder", type=Path, help="what train left")
    add("--n", type=int, default=64, help="how many")
    add("--seed", type=int, default=0, help="image i depends on the seed and i alone")
    add("--out", type=Path, default=Path("grid.png"), help="the picture")
    add("--set", dest="options", **_NAMED_VALUES, help="an option of sampling, e.g. guidance=2")
    add("--device", default="cpu", help="cpu, cuda, …")

    add = command(demo, "train on handwritten digits, sample a grid, time the kernels: a few minutes on two CPU cores")
    add("--steps", type=int, default=DEMO["steps"], help="optimizer steps")
    add("--out", type=Path, default=Path("out"), help="folder for demo.png and the run")
    return parser


def _named_value(text):
    """NAME=VALUE, the value in JSON or else a plain string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


_NAMED_VALUES = {"type": _named_value, "action": "append", "default": [], "metavar": "NAME=VALUE"}
