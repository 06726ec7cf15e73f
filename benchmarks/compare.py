"""Two result files side by side, row by row."""

from .report import aligned
from .timing import geometric_mean

KEY = ("suite", "op", "label", "dtype", "direction", "threads", "device", "provider", "layout")
CONDITIONS = ("cpu", "cores", "torch", "compiler", "omp_wait_policy", "commit")


def compare(a, b):
    """What changed from result a to result b, as text."""
    pairs = match(a["rows"], b["rows"])
    parts = [_conditions(a["environment"], b["environment"])]
    parts.append(drift(pairs))
    parts.append(aligned(["op", "shape", "case", "provider", "layout", "A ms", "B ms", "A / B", ""], map(_line, pairs)))
    parts += [f"only in {name}: {count} rows" for name, count in _unmatched(a, b, pairs) if count]
    return "\n\n".join(part for part in parts if part)


def match(rows_a, rows_b):
    """The rows both results have a time for."""
    timed = {_key(row): row for row in rows_a if "median_ms" in row}
    return [(timed[_key(row)], row) for row in rows_b if "median_ms" in row and _key(row) in timed]


def drift(pairs):
    """How every provider moved as a whole: where eager moved too, the machine did."""
    lines = []
    for provider in dict.fromkeys(row["provider"] for row, _ in pairs):
        ratios = [row_a["median_ms"] / row_b["median_ms"] for row_a, row_b in pairs if row_a["provider"] == provider]
        lines.append(f"{provider}: B is {geometric_mean(ratios):.2f}x as fast as A over {len(ratios)} rows")
    return "\n".join(lines) or "no row is in both"


def verdict(row_a, row_b):
    """A change counts where the p20 to p80 ranges lie apart."""
    if row_a["passed"] and not row_b["passed"]:
        return "CHECK NOW FAILS"
    if row_b["p20_ms"] > row_a["p80_ms"]:
        return "SLOWER"
    return "faster" if row_b["p80_ms"] < row_a["p20_ms"] else ""


def _key(row):
    return tuple(row[name] for name in KEY)


def _line(pair):
    row_a, row_b = pair
    case = f"{row_a['dtype']} {row_a['direction']} {row_a['threads']}t"
    ratio = row_a["median_ms"] / row_b["median_ms"]
    line = [row_a["op"], row_a["label"], case, row_a["provider"], row_a["layout"]]
    return [*line, f"{row_a['median_ms']:.3f}", f"{row_b['median_ms']:.3f}", f"{ratio:.2f}", verdict(row_a, row_b)]


def _conditions(a, b):
    lines = [f"{name}: {a.get(name)} -> {b.get(name)}" for name in CONDITIONS if a.get(name) != b.get(name)]
    return "\n".join(lines)


def _unmatched(a, b, pairs):
    return (("A", len(a["rows"]) - len(pairs)), ("B", len(b["rows"]) - len(pairs)))
