"""The training loop."""

import json
from dataclasses import asdict

import torch

from .. import data, models
from ..samplers.noise import mixed_seed
from ..samplers.progress import progress_bar
from .batches import Batches
from .distributed import this_process
from .grid import save_grid
from .logs import Logs
from .run_folder import RunFolder
from .state import State

_LOG_EVERY = 10  # reading the loss waits for the device


def train(
    recipe,
    out,
    *,
    resume=False,
    overwrite=False,
    device=None,
    workers=0,
    save_every=1000,
    sample_every=None,
    tensorboard=True,
    progress=True,
    callback=None,
):
    """Train a model by a recipe and leave it in a run folder; under torchrun, over all its processes.

    Args:
        recipe: a `Recipe`.
        out: the run folder.
        resume: go on from the checkpoint in `out`, which may have been made with fewer or more `steps`.
        overwrite: replace the run in `out`.
        device: None takes a GPU if there is one.
        workers: processes that read the data; 0 reads in this one.
        save_every: steps between checkpoints; there is always one at the end.
        sample_every: steps between sample grids in out/samples; None makes none.
        tensorboard: write logs to out/logs.
        callback: called as callback(step, loss) after each step.

    Returns: the model with the averaged weights, as `load(out)` gives it.
    Raises: FileExistsError where `out` holds a run and neither resume nor overwrite is set; ValueError where the
        run to resume was made by another recipe.
    """
    folder = RunFolder(out)
    with this_process(device) as process, _own_randomness(process.device):
        images = data.load(recipe.data, size=recipe.size)
        state = _start(recipe, folder, images, process, resume, overwrite)
        logs = Logs(folder / "logs" if tensorboard and process.is_first else None)
        objective = process.parallel(state.model)
        batches = _batches(images, state, process, workers)
        bar = progress_bar(
            batches, progress and process.is_first, "train", initial=state.step, total=recipe.steps, unit="step"
        )
        for x0, label in bar:
            loss, norm = _step(objective, state, x0, label, process)
            if process.is_first:
                if state.step % _LOG_EVERY == 0:
                    logs.scalars(state.step, loss=loss.item(), gradient_norm=norm.item(), lr=state.lr())
                    if progress:
                        bar.set_postfix(loss=f"{loss.item():.4f}")
                if sample_every and state.step % sample_every == 0:
                    _sample(state, folder, logs)
                if state.step % save_every == 0 or state.step == recipe.steps:
                    folder.save(state)
            if callback is not None:
                callback(state.step, loss)
        logs.close()
        process.wait()
    return state.ema


def _own_randomness(device):
    """Seeding the steps leaves the caller's random numbers as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _start(recipe, folder, images, process, resume, overwrite):
    if recipe.batch_size % process.world:
        raise ValueError(f"train: batch_size {recipe.batch_size} does not divide over {process.world} processes")
    if resume:
        _check_same_run(recipe, folder)
    elif folder.exists() and not overwrite:
        raise FileExistsError(f"{folder.path} already holds a run: resume it, overwrite it or give another folder")
    process.wait()  # every process has looked before the first one writes
    torch.manual_seed(mixed_seed(recipe.seed))
    model = models.create(recipe.family, images.shape, len(images.classes), **recipe.model)
    state = State(model.to(process.device, memory_format=torch.channels_last), recipe)
    if process.is_first:
        (folder.describe if resume else folder.create)(recipe, images.shape, images.classes)
    if resume:
        folder.restore(state)
    return state


def _check_same_run(recipe, folder):
    before, now = asdict(folder.read()[0]), json.loads(json.dumps(asdict(recipe)))
    changed = [name for name in now if name != "steps" and now[name] != before[name]]
    if changed:
        facts = ", ".join(f"{name}={before[name]!r}, not {now[name]!r}" for name in changed)
        raise ValueError(f"train: can't resume {folder.path}: it was made with {facts}")


def _batches(images, state, process, workers):
    recipe = state.recipe
    indices = Batches(
        len(images),
        recipe.batch_size,
        start=state.step,
        stop=recipe.steps,
        seed=recipe.seed,
        rank=process.rank,
        world=process.world,
    )
    # The loader's own generator: without one it would draw from the steps' random numbers.
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=indices,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=process.device.type == "cuda",
    )


def _step(objective, state, x0, label, process):
    recipe = state.recipe
    x0 = x0.to(process.device, memory_format=torch.channels_last, non_blocking=True)
    label = label.to(process.device, non_blocking=True)
    torch.manual_seed(mixed_seed(recipe.seed, state.step, process.rank))
    with torch.autocast(process.device.type, torch.bfloat16, enabled=recipe.bf16):
        loss = objective(x0, label)
    loss.backward()
    return loss.detach(), state.update()


def _sample(state, folder, logs):
    images = state.ema.sample(64, seed=state.recipe.seed)
    save_grid(images, folder / "samples" / f"{state.step:07}.png", rows=state.ema.classes or None)
    logs.images(state.step, images)
