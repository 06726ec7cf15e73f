import dataclasses
import math

import pytest
import torch

from benchmarks import contestant, environment, memory, runner, suite
from benchmarks.ops import bench_bias_act, bench_group_norm
from benchmarks.suite import Case, Provider
from imagegen import _library, weight_cache

OPS = suite.find("ops")


def tiny(op, dtype="float32", direction="forward"):
    return Case("ops", op, suite.load("ops", op).TINY_SHAPE, dtype, direction, 1, "cpu")


def run_tiny(case, skip=("compile",)):
    return runner.run_case(case, seconds=0.0, skip=skip)


@pytest.fixture
def providers(monkeypatch):
    """Put another function in imagegen's place in the benchmark of bias_act."""

    def replace(run):
        monkeypatch.setitem(bench_bias_act.PROVIDERS, "imagegen", Provider(run))

    return replace


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
@pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op in OPS for dtype in suite.load("ops", op).DTYPES])
def test_the_plain_providers_and_peers_pass(op, dtype, direction):
    rows = run_tiny(tiny(op, dtype, direction), skip=("compile", "imagegen"))
    assert [row["failure"] for row in rows] == [None] * len(rows)
    assert all(row["passed"] and row["median_ms"] > 0 and row["p20_ms"] <= row["p80_ms"] for row in rows)
    checked = {"y"} | ({f"d{name}" for name in suite.load("ops", op).GRADIENTS} if "back" in direction else set())
    assert all(set(row["errors"]) == checked for row in rows)


def test_no_gradient_is_asked_for_where_rounding_decides_on_which_side_of_a_kink_an_output_falls(monkeypatch):
    bench = suite.load("ops", "conv_transpose2d")
    inputs = bench.make_inputs(bench.TINY_SHAPE)
    inputs["x"][..., 0, 0] = 0
    inputs["shift"][:4] = torch.tensor([0, 1e-7, -1e-7, 1e-3])
    monkeypatch.setattr(bench, "make_inputs", lambda shape: inputs)
    monkeypatch.setattr(contestant, "_reference", contestant._reference.__wrapped__)  # past its cache
    asked = contestant.reference(tiny("conv_transpose2d", direction="forward+backward"))["dy"] != 0
    corner = asked[0, :4, 0, 0]  # the sums of one pixel, which is 0
    assert corner.tolist() == [False, False, False, True]
    assert asked.sum() > 0.99 * asked.numel() - 4


def test_every_provider_is_there_in_every_layout():
    names = runner.provider_names(suite.load("ops", "upsample_conv2d"))
    assert names == ["imagegen", "eager", "compile", "fold"]
    rows = run_tiny(tiny("upsample_conv2d"))
    assert {(row["provider"], row["layout"]) for row in rows} == {
        (name, layout) for name in ("imagegen", "eager", "fold") for layout in ("nchw", "channels_last")
    }


@pytest.mark.parametrize("direction", suite.DIRECTIONS)
def test_a_provider_without_an_input_is_held_against_the_op_without_it(direction):
    case = tiny("attention", direction=direction)
    assert "unmasked" not in [row["provider"] for row in run_tiny(case)]
    rows = {row["provider"]: row for row in run_tiny(dataclasses.replace(case, shape=(*case.shape, "mask")))}
    assert all(row["passed"] for row in rows.values())
    assert rows["imagegen"]["speedup"]["unmasked"]["ratio"] > 0
    assert {name for name, row in rows.items() if row["without"] == "mask"} == {"unmasked"}


def test_ours_is_compared_with_every_rival(providers):
    providers(bench_bias_act.plain)
    ours = run_tiny(tiny("bias_act", "bfloat16", "forward+backward"))[0]
    assert ours["provider"] == "imagegen" and ours["passed"]
    assert set(ours["speedup"]) == {"eager"} and ours["speedup"]["eager"]["ratio"] > 0
    assert ours["speedup"]["eager"]["layout"] in suite.LAYOUTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_provider_gets_no_speed_up(providers, dtype):
    providers(lambda x, b: bench_bias_act.plain(x, b) * 1.02)
    rows = run_tiny(tiny("bias_act", dtype))
    ours = [row for row in rows if row["provider"] == "imagegen"]
    assert all(not row["passed"] and row["speedup"] == {} and row["error"] > 0.01 for row in ours)
    assert all("imagegen" not in row["speedup"] for row in rows)


def test_a_wrong_gradient_is_seen(providers):
    providers(lambda x, b: bench_bias_act.plain(x, b.detach()) + 0 * b.reshape(1, -1, 1, 1))
    ours = run_tiny(tiny("bias_act", direction="forward+backward"))[0]
    assert ours["errors"]["y"] < 1e-6 and ours["errors"]["db"] == 1.0
    assert not ours["passed"] and ours["speedup"] == {}


@pytest.mark.parametrize(
    "run, reason",
    [
        (lambda x, b: x[:, :1], "shape"),
        (lambda x, b: x * math.nan, "NaN"),
        (
            lambda x, b: (_ for _ in ()).throw(RuntimeError("no kernel in /a/b/c.so\nmore")),
            "RuntimeError: no kernel in c.so",
        ),
    ],
)
def test_a_provider_without_an_answer_is_a_row_with_the_reason(providers, run, reason):
    providers(run)
    ours = run_tiny(tiny("bias_act"))[0]
    assert reason in ours["failure"] and "median_ms" not in ours and ours["speedup"] == {}


def test_reduced_precision_is_held_against_eager():
    assert contestant.tolerance(bench_group_norm, "float32", 1.0) == bench_group_norm.TOLERANCE
    assert contestant.tolerance(bench_group_norm, "bfloat16", 0.002) == pytest.approx(0.006)
    assert contestant.tolerance(bench_group_norm, "bfloat16", None) < 0


def test_inputs_come_in_the_layout_and_are_the_same_for_all():
    case = tiny("upsample_conv2d")
    bench = suite.load("ops", case.op)
    a, b = (contestant.Contestant(bench, case, "eager", layout) for layout in ("nchw", "channels_last"))
    assert a.leaves["x"].is_contiguous() and a.leaves["weight"].is_contiguous()
    for name in ("x", "weight"):
        assert b.leaves[name].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.leaves[name], b.leaves[name])


def test_weights_are_touched_before_a_training_call_only():
    bench = suite.load("ops", "upsample_conv2d")
    for direction, touched in (("forward", False), ("forward+backward", True)):
        runs = contestant.Contestant(bench, tiny("upsample_conv2d", direction=direction), "eager", "nchw")
        version = runs.leaves["weight"]._version
        runs.before()
        assert (runs.leaves["weight"]._version > version) == touched


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the peak of the resident set can be reset on Linux only")
def test_memory_counts_what_torch_does_not_know_of(monkeypatch):
    def hungry(x, b):
        extra = torch.ones(64 << 20, dtype=torch.uint8)  # far above temporaries and whole huge pages
        return bench_bias_act.plain(x, b) + extra[0] - 1

    monkeypatch.setitem(bench_bias_act.PROVIDERS, "imagegen", Provider(hungry))
    case = Case("ops", "bias_act", (1, 64, 64), "float32", "forward", 1, "cpu")
    peak, kept = memory._cpu_peak(case, "imagegen", "nchw")
    assert 63 << 20 <= peak < 80 << 20
    assert kept == 0


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_memory_tells_kept_weights_apart():
    weight_cache.clear()
    case = Case("ops", "upsample_conv2d", (1, 512, 512, 8), "float32", "forward", 1, "cpu")
    peak, kept = memory._cpu_peak(case, "imagegen", "nchw")
    assert kept == 25 * 512 * 512 * 4
    assert peak < kept / 3


def result_of(op, threads, copy):
    rows = [{**row, "median_ms": 1.0} for row in run_tiny(tiny(op)) if row["provider"] == "eager"]
    roof = {"flops_per_s": dict.fromkeys(suite.DTYPES, 1e9), "copy_bytes_per_s": copy}
    return {
        "options": {"threads": [threads]},
        "roofline": {str(threads): roof},
        "notes": {op: "a note"},
        "rows": [{**row, "threads": threads} for row in rows],
    }


def test_a_run_in_pieces_is_one_result():
    old, other = result_of("bias_act", 1, 1e9), result_of("bias_act", 2, 1e9)
    merged = runner.merge(old, other)
    assert merged["options"]["threads"] == [1, 2] and set(merged["roofline"]) == {"1", "2"}
    assert [row["threads"] for row in merged["rows"]] == [1, 1, 2, 2]
    again = {**result_of("bias_act", 1, 2e9), "notes": {"group_norm": "another"}}
    merged = runner.merge(merged, again)
    assert merged["rows"][-2:] == again["rows"] and [row["threads"] for row in merged["rows"]] == [2, 2, 1, 1]
    assert set(merged["notes"]) == {"bias_act", "group_norm"}
    assert merged["roofline"]["1"]["copy_bytes_per_s"] == 2e9  # the higher one, under which all rows are placed


def test_the_environment_names_no_folder():
    here = environment.describe()
    assert here["torch"] == torch.__version__ and here["cores"] >= 1
    text = "x.so: (/opt/a/c.so) and /usr/lib/d.so: 1/2"
    assert environment.without_paths(text) == "x.so: (c.so) and d.so: 1/2"
