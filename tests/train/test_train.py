import json

import pytest
import torch
from safetensors.torch import load_file

from imagegen import train as training
from imagegen.train import Recipe, load, train

RECIPE = Recipe("diffusion", steps=6, batch_size=8, warmup=1, model={"width": 8, "multipliers": [1, 2]})


def quiet(recipe, out, **options):
    return train(recipe, out, tensorboard=False, progress=False, **options)


def recipe(**changes):
    return Recipe(**vars(RECIPE) | changes)


class Stop(Exception):
    pass


def stop_after(last):
    def callback(step, loss):
        if step == last:
            raise Stop

    return callback


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    quiet(RECIPE, tmp_path / "whole")
    with pytest.raises(Stop):
        quiet(RECIPE, tmp_path / "parts", save_every=2, callback=stop_after(5))  # one step past its checkpoint
    torch.manual_seed(123)  # a new process has other random numbers
    quiet(RECIPE, tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_run_stopped_before_its_first_checkpoint_can_be_resumed(tmp_path):
    with pytest.raises(Stop):
        quiet(RECIPE, tmp_path, callback=stop_after(1))
    with pytest.raises(FileNotFoundError, match="stopped before its first checkpoint"):
        load(tmp_path)
    quiet(RECIPE, tmp_path, resume=True)
    load(tmp_path)


def test_the_checkpoint_holds_weights_average_and_optimizer(tmp_path):
    model = quiet(RECIPE, tmp_path)
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    assert tensors["step"] == 6
    assert {name.split(".")[0] for name in tensors} == {"step", "model", "ema", "optimizer"}
    name = "unet.stem.weight"
    assert torch.equal(tensors[f"ema.{name}"], model.state_dict()[name])
    assert not torch.equal(tensors[f"ema.{name}"], tensors[f"model.{name}"])


def test_the_same_recipe_gives_the_same_model(tmp_path):
    one, two, other = (
        quiet(r, tmp_path / str(i)).unet.stem.weight for i, r in enumerate([RECIPE, RECIPE, recipe(seed=1)])
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    quiet(recipe(steps=2), tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_the_loss_falls(tmp_path):
    losses = []
    quiet(recipe(steps=50, batch_size=16, lr=5e-3), tmp_path, callback=lambda step, loss: losses.append(loss.item()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_load_gives_the_trained_model(tmp_path):
    trained = quiet(RECIPE, tmp_path)
    loaded = load(tmp_path)
    assert not loaded.training
    assert loaded.classes == 10
    assert torch.equal(trained.sample(2, steps=2), loaded.sample(2, steps=2))


def test_grids_and_logs_are_written(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(recipe(steps=10), tmp_path, sample_every=10)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["0000010.png"]
    logs = event_accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(logs.Tags()["scalars"]) == {"loss", "gradient_norm", "lr"}


def test_bf16_computes_in_bf16(tmp_path):
    rounded, exact = (quiet(recipe(steps=2, bf16=bf16), tmp_path / str(bf16)) for bf16 in (True, False))
    assert rounded.unet.stem.weight.dtype == torch.float32
    assert not torch.equal(rounded.unet.stem.weight, exact.unet.stem.weight)


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    quiet(recipe(steps=1), tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run"):
        quiet(recipe(steps=1), tmp_path)
    quiet(recipe(steps=1), tmp_path, overwrite=True)


def test_another_recipe_is_not_resumed(tmp_path):
    quiet(recipe(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"it was made with batch_size=8, not 4, lr=0.001, not 0.1$"):
        quiet(recipe(batch_size=4, lr=0.1), tmp_path, resume=True)
    quiet(recipe(steps=2), tmp_path, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["steps"] == 2


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        quiet(RECIPE, tmp_path / "nothing", resume=True)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"ema": 1.0}, "ema must be from 0 to below 1, got 1.0"),
    ],
)
def test_bad_recipes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        recipe(**values)


def test_missing_libraries_name_the_install_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        quiet(RECIPE, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        training.train(RECIPE, tmp_path, overwrite=True, progress=False)
