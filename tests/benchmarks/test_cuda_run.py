"""A benchmark on a GPU, all but the GPU: what asks for one gets the CPU, and events read a clock."""

import itertools
import json

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import __main__ as command
from benchmarks import environment, roofline, suite, timing
from imagegen.ops import _backend


class CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: self.place(value) for name, value in (kwargs or {}).items()}
        return function(*map(self.place, args), **kwargs)

    @staticmethod
    def place(a):
        return "cpu" if isinstance(a, (str, torch.device)) and str(a) == "cuda" else a


class FakeEvent:
    """An event on a stream that takes a millisecond for every second event."""

    recorded = itertools.count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = next(FakeEvent.recorded)

    def synchronize(self):
        assert self.at % 2

    def elapsed_time(self, end):
        assert end.at == self.at + 1
        return 1.0


@pytest.fixture
def gpu(monkeypatch):
    FakeEvent.recorded = itertools.count()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 << 20)
    monkeypatch.setattr(_backend, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(environment, "_backends", lambda: [])
    monkeypatch.setattr(roofline, "MATRICES", {"cuda": (64,)})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cuda": 1 << 20})
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    monkeypatch.setattr(timing.CudaEvents, "CACHE_BYTES", 1 << 10)
    with CudaIsCpu():
        yield


def run(tmp_path, *options):
    file = tmp_path / "gpu.json"
    quickly = ["--seconds", "1e-6", "--rounds", "2", "--no-compile"]
    options = ["run", "--device", "cuda", *quickly, "--out", str(file), *options]
    assert command.main(options) == 0
    return json.loads(file.read_text())


def test_ops_have_a_row_for_each_backend(gpu, tmp_path, monkeypatch):
    bench = suite.load("ops", "bias_act")
    monkeypatch.setattr(bench, "CUDA_SHAPES", (bench.TINY_SHAPE,))
    result = run(tmp_path, "--suite", "ops", "--filter", "bias_act bfloat16")
    assert result["environment"]["gpu"] == "a GPU" and result["environment"]["architecture"] == "sm_90"
    assert set(result["roofline"]) == {"1"} and result["roofline"]["1"]["copy_bytes_per_s"] == 2 * (1 << 20) / 1e-3
    rows = {(row["provider"], row["layout"], row["direction"]): row for row in result["rows"]}
    assert {row["device"] for row in result["rows"]} == {"cuda"}
    providers = ("imagegen", "eager", "imagegen-cuda", "imagegen-triton")
    assert set(rows) == set(itertools.product(providers, suite.LAYOUTS, suite.DIRECTIONS))
    for (provider, _, direction), row in rows.items():
        if provider == "imagegen-cuda":
            assert "it takes cuda tensors, x is on cpu" in row["failure"]
        elif provider != "imagegen-triton" or row["failure"] is None:  # which needs triton
            assert row["passed"] and row["median_ms"] == 1.0 and row["rounds"] == 2
            assert direction != "forward" or row["extra_bytes"] == (1 << 20) - row["bytes"] // 2


def test_whole_models_run_in_half_precision_and_without_peers_for_the_cpu(gpu, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="whole models are diffusers'")
    bench = suite.load("end_to_end", "autoencoder_tiny")
    monkeypatch.setattr(bench, "CUDA_SHAPES", (bench.TINY_SHAPE,))
    bench.MODEL.made.clear()
    result = run(tmp_path, "--suite", "end_to_end", "--filter", "autoencoder_tiny", "--no-memory")
    bench.MODEL.made.clear()
    assert {(row["provider"], row["dtype"]) for row in result["rows"]} == {
        ("imagegen", "bfloat16"),
        ("eager", "bfloat16"),
    }
    assert all(row["passed"] and row["error"] > 1e-4 for row in result["rows"])


def test_every_call_finds_a_cold_cache(gpu):
    measure = timing.stopwatch("cuda")
    measure.cache.fill_(1)
    seen = []
    assert measure(lambda: seen.append(measure.cache.any().item())) == 1e-3
    assert seen == [False]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["run", "--device", "cuda"]) == 1
    assert "no CUDA device is available to torch" in capsys.readouterr().out
