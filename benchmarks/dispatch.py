"""From measurements on GPUs to the table by which imagegen.ops chooses between its backends."""

import itertools
import math
from pathlib import Path

import imagegen.ops

from . import suite
from .contestant import BACKENDS
from .timing import geometric_mean

TABLE = Path(imagegen.ops.__file__).with_name("_measured.py")
HEAD = '''\
"""Which backend is fastest on which GPU; `python -m benchmarks dispatch` writes it from benchmarks/results/."""

{imports}\
# architecture -> op -> (dtype, layout, direction) -> (a forward's FLOP at most, backends from the fastest on), ...
FASTEST = {table}
'''
CHOICES = {"eager": "eager", **BACKENDS}  # provider -> backend


def fastest(results):
    """The table of these result files; where two measured the same class of calls the later one counts."""
    table = {}
    for result in results:
        architecture = result["environment"]["architecture"]
        for (op, *kind), rows in _classes(result["rows"]).items():
            table.setdefault(architecture, {}).setdefault(op, {})[tuple(kind)] = _limits(_orders(rows))
    return table


def _classes(rows):
    """(op, dtype, layout, direction) -> its rows on a GPU with a time and a backend that the rule can choose."""
    classes = {}
    for row in rows:
        chooses = (row["suite"], row["device"]) == ("ops", "cuda") and row["provider"] in CHOICES
        if chooses and row["passed"] and "median_ms" in row:
            kind = (row["op"], row["dtype"], row["layout"], row["direction"])
            classes.setdefault(kind, []).append(row)
    return {kind: rows for kind, rows in classes.items() if any(row["provider"] == "eager" for row in rows)}


def _orders(rows):
    """[(FLOP of a forward, the backends from the fastest on)] of rows of one class; shapes of the same FLOP are one."""
    sizes = {}
    for row in rows:
        flop = row["flop"] / suite.DIRECTIONS[row["direction"]]
        sizes.setdefault(flop, {}).setdefault(CHOICES[row["provider"]], []).append(row["median_ms"])
    orders = []
    for flop, times in sorted(sizes.items()):
        shapes = max(map(len, times.values()))
        everywhere = [name for name, of in times.items() if len(of) == shapes]  # a backend that failed one is out
        orders.append((flop, tuple(sorted(everywhere, key=lambda name: geometric_mean(times[name])))))
    return orders


def _limits(orders):
    """Each order up to the middle, in ratios, between the last size it won and the next one's first."""
    limits = []
    for (flop, order), (following, other) in itertools.pairwise([*orders, (math.inf, None)]):
        if order != other:
            limits.append((float(f"{math.sqrt(flop * following):.3g}"), order))
    return tuple(limits)


def source(table):
    """The table as the Python file that imagegen.ops reads."""
    imports = "from math import inf\n\n" if table else ""
    return HEAD.format(imports=imports, table=_literal(table, ""))


def _literal(value, indent):
    """As ruff formats it: a dict, and what would not fit a line, one entry per line."""
    if not isinstance(value, dict):
        return _tuple(value, indent)
    entries = [f"{indent}    {_quoted(key)}: {_literal(of, indent + '    ')},\n" for key, of in value.items()]
    return "{\n" + "".join(entries) + indent + "}" if entries else "{}"


def _tuple(limits, indent):
    entries = [f"{indent}    ({_number(flop)}, {_quoted(order)}),\n" for flop, order in limits]
    return "(\n" + "".join(entries) + indent + ")"


def _number(flop):
    return f"{flop:.3g}".replace("e+", "e")


def _quoted(value):
    if isinstance(value, str):
        return f'"{value}"'
    return f"({', '.join(map(_quoted, value))}{',' * (len(value) == 1)})"
