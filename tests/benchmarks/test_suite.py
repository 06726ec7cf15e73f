import pytest
import torch
import torch.nn.functional as F

from benchmarks import suite
from benchmarks.ops import bench_upsample_conv2d

OPS = suite.find("ops")


def test_files_are_found_by_name():
    assert {"bias_act", "group_norm", "upsample_conv2d"} <= set(OPS)
    assert suite.find("no_such_suite") == []


@pytest.mark.parametrize("op", OPS)
def test_a_file_says_all_that_is_needed(op):
    bench = suite.load("ops", op)
    assert list(bench.PROVIDERS)[:2] == ["imagegen", "eager"]
    assert set(bench.DTYPES) <= set(suite.DTYPES)
    assert set(bench.LAYOUTS) <= set(suite.LAYOUTS)
    assert set(bench.DIRECTIONS) <= set(suite.DIRECTIONS)
    assert bench.NOTE and 0 < bench.TOLERANCE <= 2e-5
    inputs = bench.make_inputs(bench.TINY_SHAPE)
    assert set(bench.GRADIENTS) <= set(inputs)
    assert all(t.dtype == torch.float32 for t in inputs.values())
    for device in ("cpu", "cuda"):
        shapes, dtypes = suite.shapes_and_dtypes(bench, device)
        assert len({bench.label(shape) for shape in shapes}) == len(shapes) and set(dtypes) <= set(suite.DTYPES)


@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors(op):
    bench = suite.load("ops", op)
    inputs = bench.make_inputs(bench.TINY_SHAPE)
    y = bench.reference(**inputs)
    least = next(iter(inputs.values())).nbytes + y.nbytes
    with_weights = getattr(bench, "OUTPUTS", 1) * y.nbytes + sum(t.nbytes for t in inputs.values())
    assert least <= bench.bytes_moved(bench.TINY_SHAPE, 4, "forward") <= with_weights
    assert bench.bytes_moved(bench.TINY_SHAPE, 4, "forward+backward") > 2 * least


def test_cases_are_filtered_by_words():
    chosen = list(suite.cases(["ops"], words=["upsample_conv2d", "bfloat16"], threads=(1, 2)))
    assert chosen and all(case.op == "upsample_conv2d" and case.dtype == "bfloat16" for case in chosen)
    assert {case.threads for case in chosen} == {1, 2}
    assert list(suite.cases(["ops"], words=["nothing_like_it"])) == []


def test_quick_cases_are_few():
    quick = list(suite.cases(["ops"], quick=True))
    assert {case.op for case in quick} == set(OPS)
    assert {case.dtype for case in quick} == {"float32"}
    assert len(quick) < len(list(suite.cases(["ops"]))) / 4


def test_the_flop_counts_of_upsample_conv2d():
    shape = (2, 3, 5, 4)
    y = torch.empty(2, 5, 8, 8)
    assert bench_upsample_conv2d.flops(shape) == 2 * 9 * 3 * y.numel()
    made = {name: bench_upsample_conv2d.flops_made(shape, name) for name in ("eager", "compile", "fold", "imagegen")}
    assert made["eager"] == made["compile"] == bench_upsample_conv2d.flops(shape)
    assert made["eager"] / made["fold"] == pytest.approx(36 / 16)
    assert made["eager"] / made["imagegen"] == pytest.approx(144 / 25)
    large = (2, 3, 5, 32)
    assert bench_upsample_conv2d.flops(large) / bench_upsample_conv2d.flops_made(large, "imagegen") == pytest.approx(
        576 / 81
    )


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 6), (1, 2, 1, 1, 1), (1, 1, 3, 1, 5)])
def test_the_fold_is_exact(shape):
    B, Ci, Co, H, W = shape
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((B, Ci, H, W), (Co, Ci, 3, 3), (Co,)))
    exact = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    folded = bench_upsample_conv2d.folded(x, bench_upsample_conv2d.fold_weight(weight), bias)
    torch.testing.assert_close(folded, exact, rtol=1e-13, atol=1e-13)
