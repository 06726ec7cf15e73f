"""A result file as Markdown tables and plots."""

import math
import sys
from pathlib import Path

from . import plot
from .result_file import load, setting, threads
from .timing import geometric_mean

OURS = "imagegen"


def markdown(result, plots=()):
    """The whole report: conditions, summary, losses, then one section per op."""
    parts = ["# Benchmarks", conditions(result)]
    parts += ["## Summary", table(*summary_table(result["rows"])), losses(result["rows"])]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        parts += [f"## {op}", result["notes"].get(op, "")]
        parts += [f"![{op}]({plot.name})" for plot in plots if plot.stem.endswith(f"-{op}")]
        parts += _sections(rows)
    parts += ["## Backends", "```\n" + "\n".join(result["environment"]["backends"]) + "\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(result):
    here = result["environment"]
    lines = [
        f"- {here['cpu']}, {here['cores']} cores, {' '.join(here['isa'])}; {here['system']}",
        f"- caches of a core: {', '.join(here['caches'])}",
        f"- torch {here['torch']} ({here['torch_compiler']}, {here['torch_isa']}), Python {here['python']}, "
        f"compiler {here['compiler']}",
        f"- imagegen {here['imagegen']}, commit {here['commit']}, {here['date']}; load average {here['load_average']}, "
        f"OMP_WAIT_POLICY {here.get('omp_wait_policy', 'not recorded')}",
    ]
    if "gpu" in here:
        lines.append(f"- {here['gpu']}, CUDA {here['cuda']}")
    for n, roof in result["roofline"].items():
        peaks = ", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in roof["flops_per_s"].items())
        copy = f"copy {roof['copy_bytes_per_s'] / 1e9:.1f} GB/s (read plus write)"
        lines.append(f"- roofline with {threads(int(n))}: matrix product {peaks}; {copy}")
    lines.append(
        "- Providers are interleaved; ms is the median with p20 to p80; a ratio is the median of the ratios of the "
        "same round, against the other provider's better memory format; extra memory is the peak of one forward beyond "
        "inputs and output, kept memory the transformed weights that stay until the weight changes; a row that failed "
        "its check against float64 has no ratio."
    )
    return "\n".join(lines)


def summary(rows):
    """(op, dtype, direction, threads, layout) -> rival -> the ratios of imagegen to that rival over all shapes."""
    found = {}
    for row in rows:
        if row["provider"] == OURS:
            key = (row["op"], row["dtype"], row["direction"], row["threads"], row["layout"])
            for rival, speedup in row["speedup"].items():
                found.setdefault(key, {}).setdefault(rival, []).append(speedup["ratio"])
    return found


def summary_table(rows):
    """Geometric mean and range over the shapes, against the better layout of each rival."""
    rivals = _rivals(rows)
    head = ["op", "dtype", "direction", "threads", "layout", "shapes", *(f"x {rival}" for rival in rivals)]
    lines = [
        [*key, max(map(len, ratios.values())), *(_spread(ratios.get(rival)) for rival in rivals)]
        for key, ratios in summary(rows).items()
    ]
    return head, lines


def losses(rows):
    """Every row that failed, and every row of ours that somebody beats at the same work, the worst first."""
    lighter = {row["provider"] for row in rows if row.get("without")}  # what an input costs is not a race
    lines = [f"- **FAILED**: {_name(row)}: {_why(row)}" for row in rows if not row["passed"]]
    slower = [
        (speedup["ratio"], f"- **slower than {rival}**: {_name(row)}: {speedup['ratio']:.3f}x")
        for row in rows
        if row["provider"] == OURS
        for rival, speedup in row["speedup"].items()
        if speedup["ratio"] < 1 and rival not in lighter
    ]
    lines += [line for _, line in sorted(slower)]
    return "\n".join(lines) or "No row failed its check, and none of ours is slower than another provider."


def row_table(rows):
    """One line per provider and layout."""
    rivals = _rivals(rows)
    head = ["shape", "provider", "layout", "ms", "p20 to p80", *(f"x {rival}" for rival in rivals)]
    head += ["GFLOP/s", "GB/s", "of the roofline", "extra MiB", "kept MiB", "error"]
    return head, [_line(row, rivals) for row in rows]


def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def quick_table(rows):
    """This package against eager PyTorch, each in its better layout, and where it loses."""
    head = ["op", "shape", "direction", "eager ms", "imagegen ms", "speed-up", "error"]
    lines, ours = [], _better_layouts(rows)
    for row in ours:
        against = row["speedup"].get("eager")
        eager = [r for r in rows if r["provider"] == "eager" and _case(r) == _case(row) and against]
        eager_ms = next((r["median_ms"] for r in eager if r["layout"] == against["layout"]), None)
        ratio = f"{against['ratio']:.2f}x" if against else "none: check failed"
        lines.append([row["op"], row["label"], row["direction"], _ms(eager_ms), _ms(row.get("median_ms"))])
        lines[-1] += [ratio, _error(row)]
    return aligned(head, lines) + "\n" + losses(ours)


def aligned(head, lines):
    """The table for a terminal."""
    cells = [[str(cell) for cell in line] for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write(file, folder):
    """Write FILE's report and plots into the folder; the names of what was written."""
    result = load(file)
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    try:
        plots = plot.save_plots(result, folder, Path(file).stem)
    except ImportError as missing:
        print(missing, file=sys.stderr)
    target = folder / f"{Path(file).stem}.md"
    target.write_text(markdown(result, plots))
    return target, *plots


def _sections(rows):
    """A table per setting."""
    for key in dict.fromkeys(setting(row) for row in rows):
        chosen = [row for row in rows if setting(row) == key]
        yield f"### {key}"
        yield table(*row_table(chosen))


def _line(row, rivals):
    ratios = [f"{row['speedup'][r]['ratio']:.2f}" if r in row["speedup"] else "" for r in rivals]
    line = [row["label"], row["provider"], row["layout"], _ms(row.get("median_ms"))]
    if "median_ms" not in row:
        return [*line, "", *ratios, "", "", "", "", "", _error(row)]
    seconds = row["median_ms"] / 1e3
    line += [f"{_ms(row['p20_ms'])} to {_ms(row['p80_ms'])}", *ratios]
    line += [f"{row['flop'] / seconds / 1e9:.0f}", f"{row['bytes'] / seconds / 1e9:.1f}"]
    line += [
        f"{row['roofline_fraction']:.0%} {row['bound']}",
        _mib(row["extra_bytes"]),
        _mib(row["kept_bytes"]),
        _error(row),
    ]
    return line


def _rivals(rows):
    return [name for name in dict.fromkeys(row["provider"] for row in rows) if name != OURS]


def _spread(ratios):
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def _better_layouts(rows):
    """Of our rows, the faster one of each case; a failed one where none passed."""
    best = {}
    for row in rows:
        if row["provider"] == OURS:
            held = best.get(_case(row))
            if held is None or _rank(row) < _rank(held):
                best[_case(row)] = row
    return list(best.values())


def _rank(row):
    return not row["passed"], row.get("median_ms", math.inf)


def _case(row):
    return row["op"], row["label"], setting(row)


def _name(row):
    return f"{row['op']} {row['label']} {setting(row)}, {row['provider']} {row['layout']}"


def _why(row):
    return row["failure"] or ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())


def _error(row):
    if row["failure"]:
        return "FAILED"
    return f"{row['error']:.1e}" + ("" if row["passed"] else " FAILED")


def _ms(value):
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _mib(value):
    return "" if value is None else f"{value / 2**20:.1f}"
