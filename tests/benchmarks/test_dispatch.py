import ast
import math
import shutil
import subprocess

import pytest

from benchmarks import __main__ as command
from benchmarks import contestant, dispatch, result_file, runner, suite
from imagegen.ops import _backend, _measured


def row(flop, backend, ms, *, dtype="bfloat16", layout="nchw", direction="forward", passed=True):
    provider = "eager" if backend == "eager" else f"imagegen-{backend}"
    kind = {"suite": "ops", "op": "group_norm", "device": "cuda", "dtype": dtype, "layout": layout}
    return kind | {"direction": direction, "provider": provider, "flop": flop, "median_ms": ms, "passed": passed}


def result(*rows, architecture="sm_90"):
    return {"environment": {"architecture": architecture}, "rows": list(rows)}


def sizes(*entries):
    """(FLOP, {backend: ms}) each."""
    return [row(flop, backend, ms) for flop, times in entries for backend, ms in times.items()]


FORWARD = ("bfloat16", "nchw", "forward")


def test_the_fastest_is_first_and_limits_lie_between_the_sizes():
    rows = sizes(
        (1e9, {"eager": 3, "cuda": 2, "triton": 1}),
        (1e6, {"eager": 1, "cuda": 2, "triton": 3}),
        (1e8, {"eager": 9, "cuda": 5, "triton": 4}),
    )
    assert dispatch.fastest([result(*rows)]) == {
        "sm_90": {
            "group_norm": {
                FORWARD: ((1e7, ("eager", "cuda", "triton")), (math.inf, ("triton", "cuda", "eager"))),
            }
        }
    }


def test_shapes_of_the_same_flop_are_one_size():
    rows = sizes((1e6, {"eager": 4, "cuda": 1}), (1e6, {"eager": 4, "cuda": 9}))
    assert dispatch.fastest([result(*rows)])["sm_90"]["group_norm"][FORWARD] == ((math.inf, ("cuda", "eager")),)


def test_what_failed_its_check_is_not_chosen():
    rows = [*sizes((1e6, {"eager": 4})), row(1e6, "cuda", 1, passed=False), row(1e6, "triton", 2)]
    del rows[-1]["median_ms"]
    assert dispatch.fastest([result(*rows)])["sm_90"]["group_norm"][FORWARD] == ((math.inf, ("eager",)),)
    once = [*sizes((1e6, {"eager": 4, "cuda": 1}), (1e6, {"eager": 4})), row(1e6, "cuda", 1, passed=False)]
    assert dispatch.fastest([result(*once)])["sm_90"]["group_norm"][FORWARD] == ((math.inf, ("eager",)),)
    assert dispatch.fastest([result(row(1e6, "cuda", 1))]) == {}  # nothing to compare it with


def test_a_backward_counts_as_its_forward_does():
    rows = [row(3e6, b, 1, direction="forward+backward") for b in ("eager", "cuda")]
    rows += [row(3e10, b, ms, direction="forward+backward") for b, ms in (("eager", 2), ("cuda", 1))]
    table = dispatch.fastest([result(*rows)])["sm_90"]["group_norm"]
    assert table == {
        ("bfloat16", "nchw", "forward+backward"): ((1e8, ("eager", "cuda")), (math.inf, ("cuda", "eager")))
    }


def test_the_later_file_counts_and_each_architecture_is_apart():
    old, new = sizes((1e6, {"eager": 1, "cuda": 2})), sizes((1e6, {"eager": 2, "cuda": 1}))
    table = dispatch.fastest([result(*old), result(*old, architecture="sm_120"), result(*new)])
    assert table["sm_90"]["group_norm"][FORWARD] == ((math.inf, ("cuda", "eager")),)
    assert table["sm_120"]["group_norm"][FORWARD] == ((math.inf, ("eager", "cuda")),)


def test_rows_of_other_providers_suites_and_devices_are_left_out():
    rows = sizes((1e6, {"eager": 2, "cuda": 1}))
    changes = ({"provider": "imagegen"}, {"provider": "compile"}, {"device": "cpu"}, {"suite": "end_to_end"})
    others = [{**r, "median_ms": 0.1, **change} for r in rows for change in changes]
    assert dispatch.fastest([result(*rows, *others)]) == dispatch.fastest([result(*rows)])


def test_the_command_writes_what_the_package_reads(tmp_path, monkeypatch, capsys):
    file, written = tmp_path / "gpu.json", tmp_path / "_measured.py"
    result_file.save(result(*sizes((1e6, {"eager": 1}), (1.234e11, {"eager": 2, "cuda": 1, "triton": 3}))), file)
    monkeypatch.setattr(dispatch, "TABLE", written)
    assert command.main(["dispatch", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(written)
    module = {}
    exec(written.read_text(), module)
    assert module["FASTEST"] == dispatch.fastest([result_file.load(file)])
    if shutil.which("ruff"):
        subprocess.run(["ruff", "format", "--check", "--line-length=120", "--isolated", written], check=True)
        subprocess.run(["ruff", "check", "--select=I,F,E", "--line-length=120", "--isolated", written], check=True)


def test_the_table_in_the_package_is_one_that_the_command_writes():
    text = dispatch.TABLE.read_text()
    assert text == dispatch.source(_measured.FASTEST)
    assert ast.parse(text)


@pytest.mark.parametrize("op", suite.find("ops"))
def test_a_call_is_looked_up_by_the_flop_of_its_benchmark(op, monkeypatch):
    bench = suite.load("ops", op)
    asked, choose = [], _backend.choose

    def spy(op, implementations, backend, x, declines=None, flop=lambda: 0):
        asked.append((op.rstrip("_"), flop()))
        return choose(op, implementations, backend, x, declines, flop)

    monkeypatch.setattr(_backend, "choose", spy)
    monkeypatch.setattr(_backend, "forced", "eager")
    case = suite.Case("ops", op, bench.TINY_SHAPE, "float32", "forward", 1, "cpu")
    contestant.Contestant(bench, case, "imagegen", "nchw").call()
    # What a step of a sampler reads depends on its row, which a call does not look into.
    close = 2 if op == "sampler_step" else 1
    assert asked[-1][0] == op
    assert bench.flops(bench.TINY_SHAPE) / close <= asked[-1][1] <= bench.flops(bench.TINY_SHAPE) * close


def test_each_backend_has_a_row_on_a_gpu(monkeypatch):
    case = suite.Case("ops", "bias_act", (1, 2, 2), "float32", "forward", 1, "cuda")
    assert runner.own_backends(case) == ["imagegen-cuda", "imagegen-triton"]
    assert runner.own_backends(suite.Case("ops", "conv2d", (1,), "float32", "forward", 1, "cuda")) == []
    assert runner.own_backends(suite.Case("ops", "bias_act", (1,), "float32", "forward", 1, "cpu")) == []
    bench = suite.load("ops", "bias_act")
    forced = []
    ours = suite.Provider(lambda x, b: forced.append(_backend.forced))
    monkeypatch.setitem(bench.PROVIDERS, "imagegen", ours)
    contestant.implementation(bench, "imagegen-triton").run(x=None, b=None)
    assert forced == ["triton"] and _backend.forced is None
