import json

import pytest

from benchmarks import __main__ as cli
from benchmarks import compare, plot, report, result_file

LAYOUTS = ("nchw", "channels_last")
ENVIRONMENT = {
    "date": "2026-01-01",
    "cpu": "a processor",
    "isa": ["avx2", "fma"],
    "torch_isa": "AVX2",
    "cores": 2,
    "caches": ["L2 Unified 1024K"],
    "load_average": 0.1,
    "system": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.13.0",
    "torch_compiler": "GCC 13.3",
    "compiler": "g++ 12",
    "imagegen": "0.1.0",
    "omp_wait_policy": "unset",
    "backends": ["op:", "  cpu    ready"],
    "commit": "0123456789ab",
}


def row(provider, layout, ms, *, label="(1, 2, 4x4)", passed=True, failure=None, without=None, **speedup):
    timed = {} if failure else {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "rounds": 5}
    return {
        "suite": "ops",
        "op": "conv",
        "shape": [1, 2, 4],
        "label": label,
        "dtype": "float32",
        "layout": layout,
        "direction": "forward",
        "threads": 1,
        "device": "cpu",
        "provider": provider,
        "without": without,
        "passed": passed,
        "error": None if failure else 1e-7,
        "errors": {} if failure else {"y": 1e-7 if passed else 0.3},
        "failure": failure,
        "flop": 4e6,
        "flop_made": 1e6,
        "bytes": 2e6,
        "extra_bytes": 3 << 20,
        "kept_bytes": 1 << 20,
        "roofline_fraction": 0.5,
        "bound": "memory",
        "speedup": {rival: {"ratio": ratio, "layout": "nchw"} for rival, ratio in speedup.items()},
        **timed,
    }


@pytest.fixture
def result():
    rows = [
        row("imagegen", "nchw", 1.0, eager=4.0, compile=2.0),
        row("imagegen", "channels_last", 2.0, eager=2.0, compile=0.9),
        row("eager", "nchw", 4.0, imagegen=0.25),
        row("compile", "nchw", 1.9, eager=2.1),
        row("imagegen", "nchw", 1.0, label="(8, 2, 4x4)", eager=1.0, compile=2.0),
        row("imagegen", "channels_last", 1.0, label="(8, 2, 4x4)", passed=False),
        row("eager", "nchw", 1.0, label="(8, 2, 4x4)"),
        row("compile", "nchw", 1.0, label="(8, 2, 4x4)", passed=False, failure="RuntimeError: no compiler"),
    ]
    roof = {"flops_per_s": {"float32": 1e11}, "copy_bytes_per_s": 2e10}
    return {
        "format": 1,
        "environment": dict(ENVIRONMENT),
        "options": {},
        "roofline": {"1": roof},
        "notes": {"conv": "How it is counted."},
        "rows": rows,
    }


def test_json_round_trip(result, tmp_path):
    file = tmp_path / "new" / "a.json"
    result_file.save(result, file)
    assert result_file.load(file) == result
    assert len(file.read_text().splitlines()) >= len(result["rows"])
    assert json.dumps(result["rows"][0]) + "," in file.read_text().splitlines()


def test_summary_is_over_the_shapes_that_passed(result):
    key = ("conv", "float32", "forward", 1)
    found = report.summary(result["rows"])
    assert found[(*key, "nchw")] == {"eager": [4.0, 1.0], "compile": [2.0, 2.0]}
    assert found[(*key, "channels_last")] == {"eager": [2.0], "compile": [0.9]}
    head, lines = report.summary_table(result["rows"])
    assert head[-2:] == ["x eager", "x compile"]
    assert lines[0][-3:] == [2, "2.00 (1.00 to 4.00)", "2.00 (2.00 to 2.00)"]


def test_losses_and_failures_are_named(result):
    lines = report.losses(result["rows"]).splitlines()
    assert len(lines) == 3
    assert "FAILED" in lines[0] and "y 3.0e-01" in lines[0]
    assert "FAILED" in lines[1] and "no compiler" in lines[1]
    assert "slower than compile" in lines[2] and "0.900x" in lines[2] and "channels_last" in lines[2]
    assert "none of ours is slower" in report.losses(result["rows"][:1])


def test_what_an_input_costs_is_no_loss():
    rows = [row("imagegen", "nchw", 1.1, unmasked=0.9), row("unmasked", "nchw", 1.0, without="mask")]
    assert "none of ours is slower" in report.losses(rows)


def test_markdown_says_how_threads_wait(result):
    assert "OMP_WAIT_POLICY unset" in report.markdown(result)
    del result["environment"]["omp_wait_policy"]  # as in older files
    assert "OMP_WAIT_POLICY not recorded" in report.markdown(result)


def test_markdown_has_conditions_notes_and_every_row(result):
    text = report.markdown(result)
    for part in (
        "a processor",
        "commit 0123456789ab",
        "100 GFLOP/s",
        "20.0 GB/s",
        "How it is counted.",
        "cpu    ready",
    ):
        assert part in text
    table = text[text.index("### float32, forward, 1 thread") :]
    assert table.count("| (1, 2, 4x4) |") == 4 and table.count("| (8, 2, 4x4) |") == 4
    assert (
        "| (1, 2, 4x4) | imagegen | nchw | 1.000 | 0.900 to 1.100 | 4.00 | 2.00 | 4 | 2.0 | 50% memory | 3.0 |" in table
    )
    columns = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(columns) == 1


def test_a_failed_row_prints_no_speed_up(result):
    line = next(
        line for line in report.markdown(result).splitlines() if "(8, 2, 4x4) | imagegen | channels_last" in line
    )
    assert "| 1.000 | 0.900 to 1.100 |  |  |" in line and line.endswith("FAILED |")


def test_the_quick_table_takes_the_better_layout(result):
    lines = report.quick_table(result["rows"]).splitlines()
    assert lines[1].split()[-4:] == ["4.000", "1.000", "4.00x", "1.0e-07"]
    assert lines[2].split()[-2:] == ["1.00x", "1.0e-07"]
    only_wrong = [r for r in result["rows"][4:] if (r["provider"], r["layout"]) != ("imagegen", "nchw")]
    assert "none: check failed" in report.quick_table(only_wrong)


def test_report_writes_markdown_and_plots(result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result_file.save(result, tmp_path / "a.json")
    assert cli.main(["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("a.md", "a-conv.png")]
    assert "![conv](a-conv.png)" in (tmp_path / "out" / "a.md").read_text()
    assert (tmp_path / "out" / "a-conv.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib_says_so(result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "Figure", None)
    result_file.save(result, tmp_path / "a.json")
    assert cli.main(["report", str(tmp_path / "a.json")]) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "a.md").exists() and not list(tmp_path.glob("*.png"))


def test_failed_rows_have_no_bar(result):
    series = plot._series(result["rows"])
    assert series["imagegen nchw"] == {"(1, 2, 4x4)": 4.0, "(8, 2, 4x4)": 1.0}
    assert series["imagegen channels_last"] == {"(1, 2, 4x4)": 2.0}
    assert series["compile"] == {"(1, 2, 4x4)": 2.1}


def test_panels_share_shapes_and_colours(result):
    pytest.importorskip("matplotlib")
    rows = result["rows"]
    # A second panel that begins with another shape and another provider.
    peers = [{**row, "provider": "peer"} if row["provider"] == "compile" else row for row in reversed(rows)]
    figure = plot.draw("conv", rows + [{**row, "threads": 2} for row in peers], result["environment"])
    panels = [panel for panel in figure.axes if panel.containers]
    assert len(panels) == 2
    colours = {}
    for bars in (bars for panel in panels for bars in panel.containers):
        assert colours.setdefault(bars.get_label(), bars[0].get_facecolor()) == bars[0].get_facecolor()
    assert {"compile", "peer"} <= set(colours) and len(set(colours.values())) == len(colours)
    first = panels[1].containers[0]
    heights = [bar.get_height() for bar in first]
    assert heights == [
        plot._series(peers)[first.get_label()].get(label, 0) for label in plot._series(rows)["imagegen nchw"]
    ]


def test_compare_tells_changes_from_noise(result, tmp_path, capsys):
    other = json.loads(json.dumps(result))
    other["environment"]["commit"] = "ba9876543210"
    slower, faster, noise, failed = other["rows"][:4]
    for changed, factor in ((slower, 2.0), (faster, 0.5), (noise, 1.05)):
        for name in ("median_ms", "p20_ms", "p80_ms"):
            changed[name] *= factor
    failed["passed"] = False
    other["rows"].pop()
    for name, content in (("a", result), ("b", other)):
        result_file.save(content, tmp_path / f"{name}.json")
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = capsys.readouterr().out
    assert "commit: 0123456789ab -> ba9876543210" in text
    assert "imagegen: B is 1.00x as fast as A over 4 rows" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("conv")]
    assert [line[-1] for line in lines[:4]] == ["SLOWER", "faster", "0.95", "FAILS"]
    assert "only in A: 1 rows" in text and "only in B" not in text


def test_compare_with_nothing_in_common(result):
    other = {**result, "rows": []}
    assert "no row is in both" in compare.compare(result, other)


def test_run_without_a_match_says_what_there_is(capsys):
    assert cli.main(["run", "--filter", "nothing_like_it"]) == 1
    assert "upsample_conv2d" in capsys.readouterr().out
