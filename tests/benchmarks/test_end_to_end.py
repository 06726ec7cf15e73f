import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import runner, suite
from benchmarks.end_to_end import models

pytest.importorskip("diffusers", reason="whole models are diffusers'")
MODELS = suite.find("end_to_end")
SMALL = ["autoencoder_tiny", "unet_2d", "unet_2d_training"]


def tiny(op):
    shape = suite.load("end_to_end", op).TINY_SHAPE
    return suite.Case("end_to_end", op, shape, "float32", "forward", 1, "cpu")


def test_files_are_found_by_name():
    assert {*SMALL, "autoencoder_kl", "unet_2d_condition"} == set(MODELS)


@pytest.mark.parametrize("op", MODELS)
def test_a_file_says_all_that_is_needed(op):
    bench = suite.load("end_to_end", op)
    assert list(bench.PROVIDERS)[:3] == ["imagegen", "eager", "compile"]
    assert bench.DTYPES == ("float32",) and set(bench.LAYOUTS) <= set(suite.LAYOUTS) and bench.NOTE
    assert suite.shapes_and_dtypes(bench, "cuda") == (bench.CUDA_SHAPES, ("bfloat16",))
    for shapes in (bench.SHAPES, bench.CUDA_SHAPES):
        assert len({bench.label(shape) for shape in shapes}) == len(shapes)
    assert bench.TOLERANCE <= 1e-4


@pytest.mark.parametrize(
    ("op", "shape", "tera"),
    [("autoencoder_kl", (1, 64), 2.48), ("unet_2d_condition", (2, 64), 1.61), ("unet_2d", (1, 32), 0.0121)],
)
def test_flop_are_those_known_of_the_published_models(op, shape, tera):
    bench = suite.load("end_to_end", op)
    plain, made = bench.flops(shape), bench.flops_made(shape, "imagegen")
    assert plain == pytest.approx(tera * 1e12, rel=0.05)
    assert bench.flops_made(shape, "eager") == plain and 0.2 * plain < made < 0.7 * plain
    assert made < bench.flops_made(shape, "imagegen-cuda") <= plain


@pytest.mark.parametrize("op", SMALL)
def test_providers_pass_and_what_is_checked_is_not_nothing(op):
    bench = suite.load("end_to_end", op)
    skip = [name for name in bench.PROVIDERS if name not in ("imagegen", "eager")]
    rows = runner.run_case(tiny(op), seconds=0, skip=skip)
    assert [(row["provider"], row["layout"]) for row in rows] == [
        (provider, layout) for provider in ("imagegen", "eager") for layout in ("nchw", "channels_last")
    ]
    assert all(row["failure"] is None and row["passed"] and row["error"] < 2e-5 for row in rows)
    y = bench.reference(**{name: t.double() for name, t in bench.make_inputs(bench.TINY_SHAPE).items()})
    assert y.std() > 1e-3 * y.abs().mean() and math.isfinite(y.norm())


def test_a_trained_model_is_not_the_next_check_s(monkeypatch):
    bench = suite.load("end_to_end", "unet_2d_training")
    monkeypatch.setattr(bench, "RATE", 1e-2)
    bench.MODEL.made.clear()
    skip = [name for name in bench.PROVIDERS if name != "eager"]
    for threads in 1, 2:
        rows = runner.run_case(dataclasses.replace(tiny("unet_2d_training"), threads=threads), seconds=0, skip=skip)
        assert all(row["passed"] for row in rows)


def test_the_reference_attends_piece_by_piece():
    q, k, v = torch.randn(3, 1, 2, 2500, 8, dtype=torch.float64)
    whole = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    with models._QueriesInPieces():
        pieces = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        causal = torch.ones(2500, 2500, dtype=torch.bool).tril()
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(masked, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_a_wrong_model_gets_no_speed_up(monkeypatch):
    bench = suite.load("end_to_end", "autoencoder_tiny")

    def spoil(module):
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] += 0.1

    monkeypatch.setattr(models.imagegen, "optimize", spoil)
    bench.MODEL.made.clear()
    rows = runner.run_case(tiny("autoencoder_tiny"), seconds=0, skip=["compile", "openvino-f32"])
    bench.MODEL.made.clear()
    assert not any(row["passed"] for row in rows if row["provider"] == "imagegen")


def test_only_the_last_model_is_kept():
    for op in SMALL[:2]:
        bench = suite.load("end_to_end", op)
        bench.PROVIDERS["eager"].run(**bench.make_inputs(bench.TINY_SHAPE))
    assert suite.load("end_to_end", SMALL[0]).MODEL.made == {} and models.Model.kept is bench.MODEL
